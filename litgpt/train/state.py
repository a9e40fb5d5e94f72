"""What a run needs to go on where it stopped, in every checkpoint folder beside what the method saves."""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.files import read_json

STATE, SUMS = "training_state.pt", "checksums.json"
# settings that may differ between the parts of a run without changing its numbers
FREE = re.compile(
    r"(threads|out_dir|overwrite|resume|resume_with_changes|logger_name|accelerator|log\..*|eval\.(?!early_stopping).*"
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
        torch.save(vars(self), folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """Raises:
        UserError: the file is not of our making.
        """
        try:
            fields = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
            return cls(**fields)
        except Exception as e:  # torch raises what it likes
            raise UserError(f"{folder / STATE} cannot be read: {str(e).splitlines()[0]}") from e


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is set otherwise than it was, of the settings that change the numbers of a run."""
    return [
        f"{name if ' ' in name else '--' + name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*then, *now})
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
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def write_sums(folder: Path) -> None:
    """The size and the CRC-32 of each file, so that a damaged folder is known as one."""
    sums = {str(p.relative_to(folder)): [p.stat().st_size, checksum(p)] for p in files_below(folder)}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint folder, in words; None if it is as it was written."""
    try:
        sums = read_json(folder / SUMS)
        for name, (size, crc) in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum(path) != crc:
                return f"{name} has changed"
    except (UserError, OSError, AttributeError, TypeError, ValueError) as e:
        return f"{SUMS} cannot be used ({e})"
    return None if STATE in sums else f"{STATE} is missing"


def files_below(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first."""
    found = (p for p in out_dir.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir())
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)
