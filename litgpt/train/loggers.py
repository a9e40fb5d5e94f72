"""Loggers that receive a run's metrics in addition to `metrics.csv`: TensorBoard, Weights & Biases, MLflow, Trackio.

Each library is imported only if it is selected. `where` says where to view the metrics; `close` ends the logger's run
as finished, failed or interrupted. `litgpt/__init__.py` turns their telemetry off.
"""

import contextlib
import importlib
import io
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from litgpt.errors import UserError, require, without_secrets
from litgpt.storage.outputs import free_name
from litgpt.train.args import LogArgs
from litgpt.train.resume.state import flat

Settings = dict[str, Any]
PROJECT = "litgpt"  # by default


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), flush_secs=10)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        self.writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))  # Markdown code
        self.where = f"tensorboard --logdir {folder}"

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, status: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; offline in `folder`, without a prompt, if nobody is logged in."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings, resumed: bool) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = None if "WANDB_MODE" in os.environ or wandb.login(prompt=False) else "offline"
        self.run = wandb.init(
            project=log.project or PROJECT,
            name=log.run or name,
            group=log.group,
            dir=str(folder),
            mode=mode,
            config=settings,
            settings=wandb.Settings(silent=True, console="off"),
        )
        here = Path(self.run.dir).parent
        self.where = f"{here} (offline; wandb sync {here} uploads it)" if self.run.offline else str(self.run.url)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=int(status != "finished"))


class MLflow:
    """A run of MLflow, on the server in MLFLOW_TRACKING_URI or in `folder`."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings, resumed: bool) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions require it for folders
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.absolute().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        project = log.project or PROJECT
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(project)
        tags = {"group": log.group} if log.group else {}
        self.run = self.client.create_run(number, tags=tags, run_name=log.run or name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(settings).items()]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self.client.log_batch(self.run, params=params[start : start + 100])
        self.where = f"{without_secrets(uri)}, experiment {project}, run {log.run or name}"

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self, status: str) -> None:
        names = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self.client.set_terminated(self.run, status=names[status])


class Trackio:
    """A run of Trackio in TRACKIO_DIR or in `folder`; a resumed run continues there."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings, resumed: bool) -> None:
        root, variables = os.environ.get("TRACKIO_DIR") or str(folder), dict(os.environ)
        # Trackio reads the variable when it is imported, and a sweep has a folder for each run.
        for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
            del sys.modules[module]
        os.environ["TRACKIO_DIR"] = root
        self.trackio = importlib.import_module("trackio")
        del os.environ["TRACKIO_DIR"]
        os.environ.update(variables)
        self.trackio.Run._get_username = lambda run: None  # otherwise it asks the Hugging Face hub
        project = log.project or PROJECT
        with contextlib.redirect_stdout(io.StringIO()):
            run = self.trackio.init(
                project=project,
                name=log.run or name,
                group=log.group,
                config=settings,
                resume="allow" if resumed else "never",
                embed=False,  # in a notebook, it would start a server
            )
        view = shlex.join(["trackio", "show", "--project", project])
        self.where = run.url or f"TRACKIO_DIR={shlex.quote(root)} {view}"

    def write(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def close(self, status: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


Logger = Union[TensorBoard, WandB, MLflow, Trackio]
# name: (class, required module, extra that installs it, options of --log that it uses)
LOGGERS: dict[str, tuple[Callable[..., Logger], str, str, tuple[str, ...]]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard", ()),
    "wandb": (WandB, "wandb", "wandb", ("project", "run", "group")),
    "mlflow": (MLflow, "mlflow.tracking", "mlflow", ("project", "run", "group")),
    "trackio": (Trackio, "trackio", "trackio", ("project", "run", "group")),
}


def check_logger(name: str, log: LogArgs) -> list[str]:
    """Warnings about options that this logger ignores. Raises `UserError` if its package is not installed."""
    used: tuple[str, ...] = ()
    if name in LOGGERS:
        _, module, extra, used = LOGGERS[name]
        require(module, extra)
    idle = [f"--log.{key}" for key, value in vars(log).items() if key not in used and value != getattr(LogArgs, key)]
    return [f"--logger_name {name} ignores {', '.join(idle)}."] if idle else []


def make_logger(name: str, log: LogArgs, out_dir: Path, settings: Settings, resumed: bool = False) -> Optional[Logger]:
    """Start the logger `name`; None for csv, which is always written.

    Its files go to a folder in `logs`: a new one, or that of the previous run if this run resumes it. Raises
    `UserError` if the logger cannot start, for example because its server does not respond.
    """
    if name not in LOGGERS:
        return None
    folder = out_dir / "logs" / name
    used = sorted(folder.parent.glob(f"{name}*"), key=lambda path: path.stat().st_mtime)
    if used:
        folder = used[-1] if resumed else free_name(folder)
    try:
        return LOGGERS[name][0](folder, log, str(out_dir), settings, resumed)
    except Exception as e:  # libraries and the network can cause any kind
        raise UserError(f"--logger_name {name}: {' '.join(str(e).split()) or type(e).__name__}") from e
