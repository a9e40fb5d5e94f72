"""Whatever is wrong with a small file ends in a line that says so, or does no harm."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import Scene, damaged, put, run, scenes

SECONDS = 10  # for one command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, Scene]:
    return scenes(tmp_path_factory.mktemp("scenes"), tokenizer_file)


class TookLong(BaseException):
    """No code may catch it."""


@pytest.fixture
def limits() -> Any:
    """A limit of time for one command, and of memory for all."""
    resource = pytest.importorskip("resource")

    def stop(*_: Any) -> None:
        raise TookLong

    handler = signal.signal(signal.SIGALRM, stop)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self").exists()
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def mutate(seed: int, scene: Scene, folder: Path, capsys: Any) -> None:
    draw = random.Random(seed)
    name = draw.choice(scene.files)
    data = damaged((scene.folder / name).read_bytes(), name, draw)
    out = folder / "out"
    with put(scene, name, data, folder) as copy:
        command = draw.choice([c for c in scene.commands(copy, out) if name.endswith((".jinja", ".json")) or True])
        kept = folder / f"seed-{seed}"
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            code, err = run(command, capsys)
        except BaseException:
            kept.write_bytes(data or b"")
            print(f"seed {seed}: {name} of {scene.folder.name}, {' '.join(command)}\n{kept}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        what = f"seed {seed}, {name} of {scene.folder.name}: {' '.join(command)}\n{code} {err[-2000:]}"
        assert code in ((0, 1, 2) if command[0] == "data_check" else (0, 2)), what
        assert "Traceback" not in err, what
        last = err.splitlines()[-1] if err else ""
        assert code == 0 or code == 1 or (last.startswith("litgpt: error: ") and len(last) < 5000), what
        assert time.monotonic() - began < SECONDS, what


NAMES = ("base", "old", "lora", "prefix", "lit", "lit_lora", "paused", "config", "data")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name, made, tmp_path, capsys, limits):
    for seed in range(15):
        mutate(seed, made[name], tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(0, 5000, 100))
def test_many_damaged_files(seed, made, tmp_path, capsys, limits):
    for i in range(seed, seed + 100):
        mutate(i + 1000, made[NAMES[i % len(NAMES)]], tmp_path, capsys)
