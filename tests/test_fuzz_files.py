"""Whatever is wrong with a small file ends in a line that says so, or does no harm."""

import importlib.util
import json
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from litgpt.errors import UserError
from litgpt.families import read_config, write_config
from litgpt.model.gpt import GPT
from tests.families import FAMILIES
from tests.mutations import Scene, damaged, put, run, structural

resource = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows
SECONDS, MEMORY = 10, 4 * 2**30  # that a command may take
NAMES = ("base", "old", "lora", "prefix", "lit", "lit_lora", "paused", "config", "data")


class TookLong(BaseException):
    """No code may catch it."""


@pytest.fixture
def limits() -> Iterator[None]:
    """A limit of time for each command, and of memory."""
    if resource is None or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TookLong

    handler, before = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = Path("/proc/self/statm")
    if used.is_file():
        size = int(used.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutate(seed: int, scene: Scene, folder: Path, capsys: Any) -> None:
    """Damage a file of a scene and run a command over it."""
    draw = random.Random(seed)
    name = draw.choice(scene.files)
    data = damaged((scene.folder / name).read_bytes(), name, draw)
    with put(scene, name, data, folder) as copy:
        command = draw.choice(scene.commands(copy, folder / f"out-{seed}"))
        what = f"seed {seed}: {name} of {scene.folder.name}, {' '.join(command)}"
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.monotonic()
        try:
            code, err = run(command, capsys)
        except BaseException as e:
            raise AssertionError(what) from e
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
        last = err.splitlines()[-1] if err else ""
        assert code in ((0, 1, 2) if command[0] == "data_check" else (0, 2)), (what, code, last)
        assert code != 2 or (last.startswith("litgpt: error: ") and len(last) < 5000), (what, last)
        assert "Traceback" not in err and time.monotonic() - began < SECONDS, (what, err[-2000:])


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name, scenes, tmp_path, capsys, limits):
    for seed in range(6 if name == "paused" else 18):  # whose command is a run
        mutate(seed, scenes[name], tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 6000, 250))
def test_many_damaged_files(first, scenes, tmp_path, capsys, limits):
    for seed in range(first, first + 250):
        mutate(seed, scenes[NAMES[seed % len(NAMES)]], tmp_path, capsys)


@pytest.fixture(scope="module")
def configs() -> list[str]:
    """The `config.json` of every family and variant, with all the fields that `transformers` writes."""
    made = [AutoConfig.for_model(name, **fields) for name, variants in FAMILIES.items() for fields in variants.values()]
    return [config.to_json_string(use_diff=False) for config in made]


def change_config(seed: int, configs: list[str]) -> None:
    """Damage a field of a `config.json`, and make the model if it is still one."""
    draw = random.Random(seed)
    text = structural(draw.choice(configs).encode(), "config.json", draw)
    fields = json.loads(text) if text and b"9" * 5000 not in text else {}
    with suppress(UserError):
        config = read_config(fields if isinstance(fields, dict) else {})
        widths = (config.padded_vocab_size, sum(config.qkv_sizes), config.intermediate_size or 0, config.block_size)
        if max(*widths, config.n_embd, config.moe_intermediate_size or 0) < 10**5 and config.n_layer < 10:
            GPT(config)(torch.zeros(1, 3, dtype=torch.long))
        write_config(config)


def test_damaged_configs(configs, limits):
    for seed in range(200):
        change_config(seed, configs)


@pytest.mark.long
def test_many_damaged_configs(configs, limits):
    for seed in range(1000, 9000):
        change_config(seed, configs)
