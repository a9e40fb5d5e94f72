"""Every logger gets the numbers of metrics.csv and the settings, and is closed whatever becomes of the run."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litgpt.__main__ import main
from litgpt.train.args import LogArgs
from litgpt.train.loggers import TensorBoard, make_logger
from tests.test_training import read_metrics

CLOSED = {None: "FINISHED", ValueError: "FAILED", KeyboardInterrupt: "KILLED"}
Points = dict[tuple[str, int], float]  # (name, step): value


@pytest.fixture
def finetune(llama, rows_file, tmp_path, monkeypatch):
    """Run the command in a home where nobody is logged in anywhere; the points of metrics.csv."""
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def run(*flags: object) -> Points:
        options = {
            "--data": "JSON",
            "--data.json_path": rows_file,
            "--out_dir": tmp_path / "out",
            "--train.max_steps": 4,
            "--eval.interval": 2,
            "--eval.max_new_tokens": "null",
            "--precision": "32-true",
            "--accelerator": "cpu",
            "--log.run": "run 1",
        }
        words = [str(w) for pair in options.items() for w in pair]
        main(["finetune", "lora", str(llama), *words, *map(str, flags)])
        return points(tmp_path / "out")

    return run


def points(out: Path) -> Points:
    rows = read_metrics(out)
    return {(k, int(row["step"])): float(v) for row in rows for k, v in row.items() if v and k != "step"}


def mlflow_run(out: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(out / "logs" / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("llamas").experiment_id])
    return client, run


def test_tensorboard(finetune, tmp_path, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = finetune("--logger_name", "tensorboard", "--lora_r", 5)
    events = event_accumulator.EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"))
    events.Reload()
    found = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert expected == pytest.approx({k: found.get(k) for k in expected}, rel=1e-5) and len(found) == len(expected)
    assert {("val_loss", 0), ("val_loss", 2), ("loss", 4), ("peak_memory", 1)} <= set(found)
    (settings,) = events.Tensors("settings/text_summary")
    assert b"    lora_r: 5\n" in settings.tensor_proto.string_val[0]
    assert "--logger_name tensorboard ignores --log.run." in capsys.readouterr().out


def test_mlflow(finetune, tmp_path):
    pytest.importorskip("mlflow.tracking")
    expected = finetune("--logger_name", "mlflow", "--log.project", "llamas", "--log.group", "g")
    client, run = mlflow_run(tmp_path / "out")
    found = {
        (name, m.step): m.value for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)
    }
    assert found == pytest.approx(expected)
    assert run.data.params["train.max_steps"] == "4" and run.data.params["precision"] == "32-true"
    assert (run.info.run_name, run.data.tags["group"], run.info.status) == ("run 1", "g", "FINISHED")


def wandb_records(file: Path) -> bytes:
    content, block = file.read_bytes(), 2**15
    blocks = [content[i : i + block] for i in range(0, len(content), block)]
    return b"".join([*blocks[:1], *(part[7:] for part in blocks[1:])])  # a record goes on after a block's header


def test_wandb_without_a_login_is_offline(finetune, tmp_path, capsys):
    pytest.importorskip("wandb")
    expected = finetune("--logger_name", "wandb", "--log.project", "llamas", "--log.teamspace", "t")
    (folder,) = (tmp_path / "out" / "logs" / "wandb" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    values = [repr(value).encode() for value in (expected["loss", 1], expected["val_loss", 4])]
    until = time.monotonic() + 30  # a process of wandb's writes the file
    while not all(value in (content := wandb_records(file)) for value in values):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert b"llamas" in content and b"run 1" in content and b"max_steps" in content
    printed = capsys.readouterr().out
    assert f"wandb sync {folder}" in printed
    assert "--logger_name wandb ignores --log.teamspace." in printed


def trackio_runs(folder: Path, project: str = "litgpt") -> list[tuple[str, dict, Points]]:
    """The runs in a folder of Trackio: name, settings, points."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        runs = database.execute("SELECT run_id, run_name, config FROM configs ORDER BY id").fetchall()
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [
        (name, json.loads(config), {(k, s): v for i, s, m in rows if i == run for k, v in json.loads(m).items()})
        for run, name, config in runs
    ]


def test_trackio_is_local(finetune, tmp_path, monkeypatch, capfd):
    pytest.importorskip("trackio")
    calls: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: calls.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: calls.append(args))
    monkeypatch.setattr(socket.socket, "bind", lambda *args: calls.append(args))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # with a token it could ask who you are
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    expected = finetune("--logger_name", "trackio", "--log.project", "my llamas", "--log.group", "g")
    folder = tmp_path / "out" / "logs" / "trackio"
    ((name, settings, found),) = trackio_runs(folder, "myllamas")
    assert found == pytest.approx(expected) and not calls
    assert (name, settings["train"]["max_steps"], settings["_Group"]) == ("run 1", 4, "g")
    printed = capfd.readouterr().out
    assert f"trackio: TRACKIO_DIR={folder} trackio show --project 'my llamas'\n" in printed and "* " not in printed


def test_trackio_continues_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)

    def log(out: str, step: int, resumed: bool = False) -> None:
        logger = make_logger("trackio", LogArgs(run="r"), tmp_path / out, {}, resumed)
        assert logger is not None
        logger.write(step, {"loss": 1 / step})
        logger.close("finished")

    log("a", 1)
    log("b", 1)  # another folder in the same process, as in a sweep
    log("a", 2, resumed=True)
    log("b", 3)
    folders = ("a/logs/trackio", "b/logs/trackio", "b/logs/trackio-2")
    found = [points for folder in folders for _, _, points in trackio_runs(tmp_path / folder)]
    assert found == [{("loss", 1): 1, ("loss", 2): 0.5}, {("loss", 1): 1}, {("loss", 3): 1 / 3}]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "all"))
    log("c", 1)
    log("d", 1)
    log("d", 2, resumed=True)
    assert [len(points) for _, _, points in trackio_runs(tmp_path / "all")] == [1, 2]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_closed_when_the_run_ends_early(finetune, tmp_path, monkeypatch, error):
    pytest.importorskip("mlflow.tracking")

    def broken(self: object) -> None:
        raise error

    monkeypatch.setattr("litgpt.train.loop.Trainer.fit", broken)
    with pytest.raises((ValueError, SystemExit)):
        finetune("--logger_name", "mlflow", "--log.project", "llamas")
    assert mlflow_run(tmp_path / "out")[1].info.status == CLOSED[error]


def test_its_failure_does_not_end_the_run(finetune, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def broken(self: TensorBoard, step: int, values: dict[str, float]) -> None:
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr(TensorBoard, "write", broken)
    assert ("loss", 4) in finetune("--logger_name", "tensorboard")
    error = capsys.readouterr().err
    assert "TensorBoard" in error and error.endswith("no space left\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorboard", "pip install '.[tensorboard]'"),
        ("trackio", "pip install '.[trackio]'"),
        ("litlogger", "--logger_name: litlogger is not available. Use csv, tensorboard, wandb, mlflow, or trackio."),
    ],
)
def test_refused_before_anything_is_written(finetune, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SystemExit) as stop:
        finetune("--logger_name", name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_cannot_be_reached(finetune, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(SystemExit):
        finetune("--logger_name", "mlflow")
    error = capsys.readouterr().err
    assert "--logger_name mlflow: " in error and error.count("\n") == 1


def test_nothing_reports_home():
    """In a process of its own, where no test suite switches anything off."""
    unset = ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith(("MLFLOW", "WANDB"))}
    code = """
import litgpt, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
try:
    import wandb.env
except ModuleNotFoundError: pass
else: assert not wandb.env.error_reporting_enabled()
try:
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
except ModuleNotFoundError: pass
else: assert MLFLOW_DISABLE_TELEMETRY.get()
"""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
