"""Where the numbers of a run go besides `metrics.csv`: TensorBoard, Weights & Biases, MLflow.

Each library is imported only when it is asked for. What they, and others, send home by themselves is switched off in
`litgpt/__init__.py`.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, Protocol

import yaml

from litgpt.errors import UserError, require, without_secrets
from litgpt.storage.outputs import free_name
from litgpt.train.args import LogArgs

Settings = dict[str, Any]
PROJECT = "litgpt"  # where none is named


class Logger(Protocol):
    """Takes the same numbers as `metrics.csv`. `where` says in a few words where to look at them."""

    where: str

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, status: str) -> None:
        """`status` is finished, failed or interrupted."""


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), flush_secs=10)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        self.writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))  # shown as code
        self.where = f"tensorboard --logdir {folder}"

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, status: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in files under `folder` where nobody is logged in: no prompt stops a script."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings) -> None:
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
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, else in files in `folder`."""

    def __init__(self, folder: Path, log: LogArgs, name: str, settings: Settings) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a newer MLflow refuses folders without it
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.absolute().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        project = log.project or PROJECT
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(project)
        tags = {"group": log.group} if log.group else {}
        self.run = self.client.create_run(number, tags=tags, run_name=log.run or name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(settings)]
        for start in range(0, len(params), 100):  # so many at once
            self.client.log_batch(self.run, params=params[start : start + 100])
        self.where = f"{without_secrets(uri)}, experiment {project}, run {log.run or name}"

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self, status: str) -> None:
        names = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self.client.set_terminated(self.run, status=names[status])


# name: (the class, the module that must be there, the extra that brings it, what it uses of --log)
LOGGERS: dict[str, tuple[Callable[..., Logger], str, str, tuple[str, ...]]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard", ()),
    "wandb": (WandB, "wandb", "wandb", ("project", "run", "group")),
    "mlflow": (MLflow, "mlflow.tracking", "mlflow", ("project", "run", "group")),
}


def check_logger(name: str, log: LogArgs) -> list[str]:
    """Sentences about options that have no effect with this logger.

    Raises:
        UserError: its package is not installed.
    """
    used: tuple[str, ...] = ()
    if name in LOGGERS:
        _, module, extra, used = LOGGERS[name]
        require(module, extra)
    idle = [f"--log.{key}" for key, value in vars(log).items() if key not in used and value != getattr(LogArgs, key)]
    return [f"Without effect with --logger_name {name}: {', '.join(idle)}."] if idle else []


def make_logger(name: str, log: LogArgs, out_dir: Path, settings: Settings, resumed: bool = False) -> Optional[Logger]:
    """Begin a run of the logger `name`; None for csv, which is always written.

    Its files go to a folder in `logs`: that of the last run if this one goes on with it, else a new one.

    Raises:
        UserError: it cannot, for example because no server answers.
    """
    if name not in LOGGERS:
        return None
    folder = out_dir / "logs" / name
    used = sorted(folder.parent.glob(f"{name}*"), key=lambda path: path.stat().st_mtime)
    if used:
        folder = used[-1] if resumed else free_name(folder)
    try:
        return LOGGERS[name][0](folder, log, str(out_dir), settings)
    except Exception as e:  # of a library or of the network: any kind
        raise UserError(f"--logger_name {name}: {' '.join(str(e).split()) or type(e).__name__}") from e


def flat(settings: Settings, above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
