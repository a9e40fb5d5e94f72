"""What a run needs to go on where it stopped, in every checkpoint folder beside what the method saves."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.storage.files import read_json
from litgpt.storage.outputs import SUMS, checksum

STATE = "training_state.pt"
OPTIMIZER = "the optimizer"  # among the settings: its class
TIME = "the time in the prompts"  # among the settings: what templates print, also when the run goes on
# settings that may differ between the parts of a run without changing its numbers
FREE = re.compile(
    rf"({TIME}|threads|torch|out_dir|overwrite|resume|resume_with_changes|logger_name|accelerator|devices|num_nodes|strategy|fsdp_cpu_offload|log\..*|eval\.(?!early_stopping).*"
    r"|train\.(save_interval|log_interval|keep_last|save_best|pause_after))$"
)


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on, apart from the base model and the data.

    Args:
        trained: The trained weights by name, as they are in memory.
        optimizer: Its `state_dict`.
        random: For each rank the states of its generators: {"cpu": ..., "cuda": ...}.
        progress: Steps, tokens, seconds, validation losses and the like, of plain types.
        settings: The run's settings, flat.
    """

    trained: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: list[dict[str, torch.Tensor]]
    progress: dict[str, Any]
    settings: dict[str, Any]

    def write(self, folder: Path) -> None:
        with open(folder / STATE, "wb") as f:  # given the path, torch would hide why it could not be written
            torch.save(vars(self), f)

    @classmethod
    def read(cls, folder: Path, mmap: bool = False) -> "TrainingState":
        """Read what `write` has written.

        Args:
            mmap: Leave the tensors on the disk until they are looked at.

        Raises:
            UserError: the file is not of our making.
        """
        try:
            found = torch.load(folder / STATE, map_location="cpu", mmap=mmap, weights_only=True)
        except MemoryError:
            raise
        except Exception as e:  # torch raises what it likes; nothing that the file holds was run
            foreign = re.search(r"GLOBAL (\S+)", str(e))
            why = (str(e).splitlines() or [type(e).__name__])[0]
            why = f"it asks for {foreign[1]}, which is no plain data" if foreign else why
            raise UserError(f"{folder / STATE} cannot be read: {why}") from e
        if wrong := wrong_parts(found):
            raise UserError(f"{folder / STATE} cannot be read: {', '.join(wrong)} is not what it should be")
        return cls(**found)


def wrong_parts(state: Any) -> list[str]:
    """The names of those parts of what a file holds that are not as `write` writes them."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "trained": lambda v: is_dict(v, str, torch.is_tensor),
        "optimizer": is_optimizer,
        "random": lambda v: isinstance(v, list) and all(map(is_random, v)),
        "progress": lambda v: is_dict(v, str),
        "settings": lambda v: is_dict(v, str),
    }
    if not is_dict(state, str):
        return ["all of it"]
    return [k for k, good in kinds.items() if k not in state or not good(state[k])] + sorted(state.keys() - kinds)


def is_dict(value: Any, keys: type, values: Callable[[Any], bool] = lambda v: True) -> bool:
    return isinstance(value, dict) and all(isinstance(k, keys) and values(v) for k, v in value.items())


def is_optimizer(value: Any) -> bool:
    """Whether this is the `state_dict` of an optimizer: what it knows of each weight by its number, and the groups."""
    if not (is_dict(value, str) and is_dict(value.get("state"), int, lambda v: is_dict(v, str))):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(
        is_dict(g, str) and isinstance(g.get("params"), list) and all(isinstance(n, int) for n in g["params"])
        for g in groups
    )


def is_random(value: Any) -> bool:
    """Whether these are the states of the generators of one rank: bytes, by the names of devices."""
    if not is_dict(value, str, lambda v: torch.is_tensor(v) and v.dtype == torch.uint8 and v.ndim == 1):
        return False
    named = all(re.fullmatch(r"(rounding-)?(cpu|cuda|mps)(:\d+)?", name) for name in value)
    return named and "cpu" in value and len(value["cpu"]) == len(torch.get_rng_state())


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is set otherwise than it was, of the settings that change the numbers of a run."""
    return [
        f"{name if ' ' in name else '--' + name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*then, *now}, key=lambda name: (" " in name, name))
        if not FREE.match(name) and then.get(name) != now.get(name)
    ]


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their dotted names, as values of JSON."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + str(key)] = json.loads(json.dumps(value, default=str))
    return found


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].clone())  # it crashes on a tensor that is a part of another
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint folder, in words; None if it is as it was written."""
    try:
        sums = read_sums(folder)["files"]
        for name, (size, crc, *_) in sums.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{SUMS} names {name!r}, which is not in the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum(path) != crc:
                return f"{name} has changed"
    except (UserError, OSError) as e:
        return f"{SUMS} cannot be used ({e})"
    return None if STATE in sums else f"{STATE} is missing"


def read_sums(folder: Path) -> dict[str, Any]:
    """What the list of a checkpoint holds. Raises `UserError` where it is something else."""
    found = read_json(folder / SUMS)
    if not is_dict(found, str) or type(found.get("step")) is not int or not is_dict(found.get("files"), str, is_sum):
        raise UserError("it is no list of sizes and sums")
    return found


def is_sum(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 3) and all(type(n) is int for n in value)


def checkpoints(out_dir: Path) -> list[Path]:
    """The folders step-* of a run, the newest first."""
    found = (p for p in out_dir.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and is_checkpoint(p))
    return sorted(found, key=step_of, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, be it a damaged one."""
    return not folder.is_symlink() and any((folder / name).is_file() for name in (SUMS, STATE))


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written: as its name says or, for best/, the list of its files; -1 where
    neither does."""
    if named := re.fullmatch(r"step-(\d+)", folder.name):
        return int(named[1])
    try:
        return read_sums(folder)["step"]
    except UserError:
        return -1
