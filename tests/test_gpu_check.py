"""The script for a borrowed GPU: its plan, and that it survives what it runs. With `--smoke`, all of it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.test_benchmarks import records, script  # noqa: F401

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"
pytestmark = [
    pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="needs a shell"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib"),
]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(*words: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=environment, timeout=600
    )


def test_the_list():
    shown = started("--list", "--wheels", "some/folder")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.index("correctness") < shown.stdout.index("memory") < shown.stdout.index("speed")
    assert "--python-version 3.12" in shown.stdout and "-d some/folder" in shown.stdout
    fetched = shown.stdout.rpartition("-d some/folder")[2]
    assert "bitsandbytes" in fetched and "typeshed-client" in fetched and "torchmetrics" in fetched
    assert "'torch>=" not in fetched and "nvidia" not in fetched


@pytest.mark.parametrize("smoke", [False, True])
def test_the_plan_can_be_run(check, script, monkeypatch, smoke):  # noqa: F811
    """The scripts take the options that they are given, and the tests are there."""
    items = check.plan(smoke)
    parts = [item.part for item in items]
    assert list(dict.fromkeys(parts)) == ["correctness", "memory", "speed"] and parts == sorted(parts)
    assert len({item.name for item in items if item.part != "memory"}) == len([p for p in parts if p != "memory"])
    for item in items:
        if item.command[0] == "-m":
            assert all((ROOT / word).is_file() for word in item.command if word.startswith("tests/"))
            continue
        module = script(Path(item.command[0]).stem)
        monkeypatch.setattr(module, "pick_device", lambda accelerator: torch.device("cpu"))
        monkeypatch.setattr(module, "build", stop)
        with pytest.raises(SystemExit, match="stopped" if smoke else "not measured"):
            module.main(list(item.command[1:]))


def stop(*args: Any) -> None:
    sys.exit("stopped")


def test_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = started(OUT=str(tmp_path))
    assert run.returncode == 2 and "no GPU" in run.stderr
    (facts,) = records(tmp_path / "results.jsonl")
    assert facts["name"] == "facts" and facts["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        ("", []),
        ("raise ValueError('no such kernel')", ["no such kernel"]),
        ("import os; os.abort()", ["exit code -6"]),
        ("import time; time.sleep(60)", ["ended after 5 s"]),
    ],
)
def test_what_fails_leaves_what_it_measured(check, tmp_path, capsys, code, errors):
    file = tmp_path / "item.py"
    measure = "import sys; open(sys.argv[2], 'w').write('{\"tokens_per_s\": 12.5, \"peak_memory\": 2e9}\\n')\n"
    file.write_text(measure + code)
    results = check.Results(tmp_path / "out.jsonl")
    check.run(check.Item("memory", "an item", (str(file),), 5), results, dict(os.environ), 100, tmp_path)
    found = records(tmp_path / "out.jsonl")
    assert found == [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results.records
    assert found[0] == {"part": "memory", "name": "an item", "tokens_per_s": 12.5, "peak_memory": 2e9}
    assert len(found) == 1 + len(errors) and all(e in r["error"] for e, r in zip(errors, found[1:]))
    assert results.failed == bool(errors) == (tmp_path / "errors.log").is_file()
    assert "12.5" in results.table() and "2.00 GB" in results.table() and all(e in results.table() for e in errors)


@pytest.mark.long
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["", "workers"])
def test_each_test_is_a_line(check, tmp_path, workers):
    """At once: what passed before a test that ends the process is known."""
    file = tmp_path / "test_some.py"
    last = "import os; os._exit(1)" if workers else "import time; time.sleep(60)"
    file.write_text(
        f"import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): {last}\n"
        "@pytest.mark.skip\ndef test_d(): pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}"}
    words = ("-m", "pytest", "-p", "gpu_check", "-q", "-p", "no:cacheprovider", *workers, str(file))
    results = check.Results(None)
    check.run(check.Item("correctness", "tests", words, 60 if workers else 30), results, environment, 100, tmp_path)
    outcomes = {r["name"]: r.get("outcome") for r in results.records}
    assert outcomes["test test_a"] == "passed" and outcomes["test test_b"] == "failed"
    assert len(results.records) == len(outcomes) and results.failed
    assert "1 == 2" in next(r["error"] for r in results.records if r["name"] == "test test_b")
    if workers:
        assert outcomes["test test_d"] == "skipped"  # another process went on
    else:
        assert "ended after 30 s" in results.records[-1]["error"]


def test_an_error_of_the_script_is_a_result(check):
    results = check.Results(None)
    with check.survived(results, "memory", "something"):
        raise KeyError("wrong")
    assert results.records == [{"part": "memory", "name": "something", "error": "KeyError: 'wrong'"}]


@pytest.mark.long
def test_smoke(tmp_path):
    pytest.importorskip("bitsandbytes")
    run = started("--smoke", OUT=str(tmp_path / "new" / "out"))
    assert run.returncode == 0, run.stdout + run.stderr
    found = records(tmp_path / "new" / "out" / "results.jsonl")
    assert len([r for r in found if r["name"].startswith("test ")]) > 10
    assert not [r for r in found if r.get("outcome") not in (None, "passed")]
    assert {"lora", "qlora", "full", "nf4"} <= {r.get("method") for r in found}
    assert len([r for r in found if "predicted_memory" in r]) == 3
    assert "failed" in run.stdout and "tokens/s" in run.stdout
