"""The state that a run needs to resume. Every checkpoint folder contains it beside the files of the method."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open

from litgpt.checkpoint.folder import widest_first, write_file
from litgpt.errors import UserError
from litgpt.families.weights import Outline
from litgpt.model.sharded import full_tensor, is_sharded
from litgpt.storage.fields import ID, Each, misfit
from litgpt.storage.files import read_json
from litgpt.storage.outputs import CARD, SUMS, checksum
from litgpt.storage.torch_file import NAMES

STATE = "training_state.pt"
SHARDED_STATE = "optimizer.safetensors"  # the optimizer's state of sharded weights, which may not fit in memory
SHARDED = "sharded"  # the names in it, as a part of the optimizer's state
OPTIMIZER = "the optimizer"  # setting: its class
MICRO_BATCH = "the micro-batch size"  # setting: the size that a run picked
TIME = "the time in the prompts"  # setting: the time that templates print, also after the run resumes
# settings that may change when a run resumes, because they do not change its results
INITIAL = "initial_checkpoint_dir"
FREE = re.compile(
    rf"({TIME}|{MICRO_BATCH}|threads|torch|out_dir|overwrite|resume|resume_with_changes|logger_name|accelerator|devices|num_nodes"
    r"|report|strategy|fsdp_cpu_offload|log\..*|eval\.(?!early_stopping).*"
    r"|train\.(save_interval|log_interval|keep_last|save_best|pause_after))$"
)


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on, except the base model and the data."""

    trained: dict[str, torch.Tensor]  # the trained weights by name
    optimizer: dict[str, Any]  # its `state_dict`
    random: list[dict[str, torch.Tensor]]  # for each rank, the states of its generators: {"cpu": ..., "cuda": ...}
    progress: dict[str, Any]  # steps, tokens, seconds, validation losses and so on
    settings: dict[str, Any]  # of the run, flat

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint. Sharded tensors are gathered and written one at a time."""
        state = self.optimizer["state"]
        sharded = {f"{n}.{k}": v for n, values in state.items() for k, v in values.items() if is_sharded(v)}
        if sharded:
            state = {n: {k: v for k, v in values.items() if not is_sharded(v)} for n, values in state.items()}
            self.optimizer = self.optimizer | {"state": state, SHARDED: list(sharded)}
            outlines = widest_first(Outline(name, NAMES[v.dtype], tuple(v.shape)) for name, v in sharded.items())
            tensors = ((outline.name, full_tensor(sharded[outline.name])) for outline in outlines)
            write_file(folder / SHARDED_STATE, outlines, tensors)
        with open(folder / STATE, "wb") as f:  # with a path, torch hides the cause of an error
            torch.save(vars(self), f)

    @classmethod
    def read(cls, folder: Path, mmap: bool = False) -> "TrainingState":
        """Read the files of `write`, perhaps mapped into memory. Raises `UserError` if they are not such files."""
        try:
            found = torch.load(folder / STATE, map_location="cpu", mmap=mmap, weights_only=True)
        except MemoryError:
            raise
        except Exception as e:  # torch raises errors of many kinds, before any code in the file runs
            foreign = re.search(r"GLOBAL (\S+)", str(e))
            why = (str(e).splitlines() or [type(e).__name__])[0]
            why = f"It requires code: {foreign[1]}." if foreign else why
            raise UserError(f"{folder / STATE} cannot be read: {why}") from e
        if wrong := wrong_parts(found):
            raise UserError(f"{folder / STATE} cannot be read: invalid content in {', '.join(wrong)}")
        if names := found["optimizer"].pop(SHARDED, []):
            for name, tensor in sharded_state(folder / SHARDED_STATE, names):
                number, _, key = name.partition(".")
                found["optimizer"]["state"].setdefault(int(number), {})[key] = tensor
        return cls(**found)


def sharded_state(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of these names, mapped into memory. Raises `UserError` if the file is damaged."""
    try:
        with safe_open(str(file), framework="pt") as f:
            for name in names:
                yield name, f.get_tensor(name)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} cannot be read: {str(e).splitlines()[0]}") from e


def wrong_parts(state: Any) -> list[str]:
    """The names of the invalid parts of a state."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "trained": lambda v: is_dict(v, str, torch.is_tensor),
        "optimizer": is_optimizer,
        "random": lambda v: isinstance(v, list) and all(map(is_random, v)),
        "progress": lambda v: is_dict(v, str),
        "settings": lambda v: is_dict(v, str),
    }
    if not is_dict(state, str):
        return ["the file"]
    return [k for k, good in kinds.items() if k not in state or not good(state[k])] + sorted(state.keys() - kinds)


def is_dict(value: Any, keys: type, values: Callable[[Any], bool] = lambda v: True) -> bool:
    return isinstance(value, dict) and all(isinstance(k, keys) and values(v) for k, v in value.items())


def is_optimizer(value: Any) -> bool:
    """Whether this is the `state_dict` of an optimizer."""
    return (
        is_dict(value, str)
        and misfit(value, {"param_groups": [{"params": [ID]}]}) is None
        and all(is_dict(group, str) for group in value["param_groups"])
        and is_dict(value.get("state"), int, lambda v: is_dict(v, str))
        and all(n >= 0 for n in value["state"])
        and isinstance(names := value.get(SHARDED, []), list)
        and all(isinstance(name, str) and re.fullmatch(r"\d{1,9}\.\w+", name, re.ASCII) for name in names)
    )


def is_random(value: Any) -> bool:
    """Whether these are the states of one rank's generators: bytes by device."""
    return (
        is_dict(value, str, lambda v: torch.is_tensor(v) and v.dtype == torch.uint8 and v.ndim == 1)
        and all(re.fullmatch(r"(rounding-)?(cpu|cuda|mps)(:\d+)?", name) for name in value)
        and len(value.get("cpu", ())) == len(torch.get_rng_state())
    )


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The changed settings, of those that change the results of a run. A resumed run does not read the weights that it
    began with, so it need not name them."""
    unneeded = () if now.get(INITIAL) else (INITIAL,)
    return [
        f"{name if ' ' in name else '--' + name} was {then.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted({*then, *now}, key=lambda name: (" " in name, name))
        if not FREE.match(name) and name not in unneeded and then.get(name) != now.get(name)
    ]


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as JSON values."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + str(key)] = json.loads(json.dumps(value, default=str))
    return found


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].clone())  # torch crashes on a view
    if device.type in ("cuda", "mps") and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def damage(folder: Path) -> Optional[str]:
    """How a checkpoint folder is damaged; None if it is intact."""
    try:
        sums = read_sums(folder)["files"]
        for name, (size, crc, *_) in sums.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{SUMS} lists {name!r}, which is outside the folder"
            if name == CARD:  # people may change it
                continue
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
    """Read the checksums of a checkpoint. Raises `UserError` if they are invalid."""
    found = read_json(folder / SUMS)
    wrong = misfit(found, {"step": ID, "files": Each([int])})
    if wrong or not all(len(entry) in (2, 3) for entry in found["files"].values()):
        raise UserError(wrong or "it does not list sizes and checksums")
    return found


def checkpoints(out_dir: Path) -> list[Path]:
    """The step-* folders of a run, newest first."""
    found = (p for p in out_dir.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and is_checkpoint(p))
    return sorted(found, key=step_of, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, possibly a damaged one."""
    return not folder.is_symlink() and any((folder / name).is_file() for name in (SUMS, STATE))


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name or, for best/, from its checksums; -1 if unknown."""
    if named := re.fullmatch(r"step-(\d+)", folder.name):
        return int(named[1])
    try:
        return read_sums(folder)["step"]
    except UserError:
        return -1
