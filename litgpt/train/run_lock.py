"""`run.lock`: what a result depends on, so that `litgpt rerun` can repeat the run and say what is different now."""

import hashlib
import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from litgpt.checkpoint.hub import repository_id
from litgpt.data.batches import steps_of_rows
from litgpt.data.data_module import DataModule, TokenizedDataset
from litgpt.storage.files import cache_place, file_hash, is_there, read_json, write_text
from litgpt.train.args import run_command
from litgpt.train.metrics import ALL, METRICS, lines_until
from litgpt.train.report import describe_counts

if TYPE_CHECKING:
    from litgpt.train.run import Run

LOCK, N_LOSSES = "run.lock", 20
PACKAGES = ("litgpt", "torch", "lightning", "tokenizers", "sentencepiece", "safetensors", "bitsandbytes", "peft")
HASHES, LARGE = "hashes.json", 2**24  # the file with known hashes; bytes from which on a file is in it
MOST_HASHES = 1000


def write_lock(run: "Run", folder: Path) -> None:
    base, adapter = run.base_model.checkpoint, run.base_model.initial_adapter
    order = [i for step in steps_of_rows(len(run.train_rows), 1, 1, run.seed) for i in step]
    lock = {
        "command": run_command.get(),
        "versions": versions(),
        "model": files_of(base.folder) if base is not None else {},
        "repository": repository_id(base.folder) if base is not None else None,
        "adapter": files_of(adapter.folder) if adapter is not None else {},
        "data": data_hashes(run.source),
        "order": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        "rows": hashlib.sha256(run.dataset.train.row_hashes().numpy().tobytes()).hexdigest(),
        "machine": machine(run.fabric.device) | {"devices": run.fabric.world_size, "precision": run.precision_name},
        "losses": losses(run.out_dir)[:N_LOSSES],
        "events": run.result.events,
        "check": data_check(run.dataset),
    }
    write_text(folder / LOCK, json.dumps(lock, indent=1) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "code": code_hash()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def code_hash() -> str:
    """A hash of litgpt's own source files."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "system": platform.system()}


def files_of(folder: Path) -> dict[str, str]:
    """The hashes of the files of a model that a run reads."""
    kinds = (".safetensors", ".bin", ".pth", ".json", ".model", ".jinja", ".txt", ".yaml")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()]
    return file_hashes(file for file in files if file.name not in ("checksums.json", "parity.json"))


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by the names of the files. Those of large files are kept by size and time."""
    place = cache_place()
    store = None if place is None else place / HASHES
    known: dict[str, str] = {}
    with suppress(Exception):
        known = read_json(store) if store is not None and store.is_file() else {}
    found, n_known = {}, len(known)
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known or stat.st_size < LARGE:
            found[file.name] = file_hash(file)
            if stat.st_size >= LARGE:
                known[key] = found[file.name]
        else:
            found[file.name] = known[key]
    if store is not None and len(known) > n_known:
        with suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            write_text(store, json.dumps(dict(list(known.items())[-MOST_HASHES:])))
    return found


def data_hashes(data: DataModule) -> list[list[str]]:
    """The path and a hash of the rows of each source, validation rows included."""
    train, val = data.sources()
    return [[str(source.path), source.fingerprint()[0]] for source in [*train, *(val or [])]]


def data_check(data: TokenizedDataset) -> list[str]:
    """What a user should know of the rows."""
    share = f"{data.train.trained_share():.1%} of the training tokens are in the loss"
    return [describe_counts(data.counts), share, *data.notes()]


def losses(out_dir: Path) -> list[str]:
    """The training losses as metrics.csv has them."""
    return [row["loss"] for row in lines_until(out_dir / METRICS, ALL, ALL) if row["loss"]]


def read_lock(folder: Path) -> Optional[dict[str, Any]]:
    file = folder / LOCK
    return read_json(file) if is_there(file) else None
