"""Log-probabilities of answers under the reference model of preference training.

They are computed once, before the first step, and cached beside the tokens, so that training holds no second model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from litgpt.data.batches import Batch, Rows, steps_of_rows
from litgpt.data.cache import cache_folder, cache_limit, shrink_cache
from litgpt.data.preferences import PreferenceRows
from litgpt.errors import UserError
from litgpt.methods.model_source import ModelSource
from litgpt.model.devices import DTYPES
from litgpt.model.sharded import reshard
from litgpt.storage.files import part_of

if TYPE_CHECKING:
    from litgpt.train.objectives import Preference
    from litgpt.train.run import Run

Mismatches = list[tuple[int, int]]  # pairs of rows: the prompt of the first, the answer of the second
TOKENS_AT_ONCE = 4096  # of a batch without gradients


def compute_reference(run: "Run", objective: "Preference") -> None:
    """Set the reference log-probabilities of all rows, computed with the weights that are loaded or with those of
    another folder. Raises `UserError` if that folder has another tokenizer."""
    sets = {"train": run.train_rows, "val": run.val_rows}
    pairs = {name: mismatches_of(run, name) for name in sets} if objective.unit == "label" else {}
    file = cache_folder() / f"reference-{reference_key(run, objective, pairs)}.safetensors"
    found = run.fabric.broadcast(read_reference(file))
    if found is None:
        with reference_model(run, objective) as model, run.screen.counting("reference rows") as show_count:
            found = {}
            for name, rows in sets.items():
                assert isinstance(rows, PreferenceRows)
                logps = row_logps(run, model, objective, rows, show_count)
                found |= {name: logps.cpu()}
                if name in pairs:
                    found[f"{name}_kl"] = mismatched_logps(run, model, objective, rows, pairs[name]).cpu()
        if run.is_first:
            write_reference(file, found)
    for name, rows in sets.items():
        assert isinstance(rows, PreferenceRows)
        rows.reference = found[name]
    if objective.unit == "label":
        known = {name: dict(zip(pairs[name], found[f"{name}_kl"].tolist())) for name in sets}
        objective.kl_reference = known  # type: ignore[attr-defined]


def mismatches_of(run: "Run", name: str) -> Mismatches:
    """The mismatched answers of all steps, or of a validation."""
    if name == "val":
        return mismatches(list(range(len(run.val_rows))))
    train = run.train
    steps = steps_of_rows(len(run.train_rows), train.global_batch_size, train.epochs, run.seed)
    if run.plan.steps is None:
        raise UserError("The KL divergence of kto needs a known number of steps. Set --train.epochs or max_steps.")
    pairs = (pair for rows in islice(steps, run.plan.steps) for pair in mismatches(rows))
    return list(dict.fromkeys(pairs))


def mismatches(rows: Sequence[int]) -> Mismatches:
    """Each row with the answer of the next one; none of a single row."""
    return list(zip(rows, [*rows[1:], *rows[:1]])) if len(rows) > 1 else []


def row_logps(
    run: "Run", model: nn.Module, objective: "Preference", rows: PreferenceRows, show_count: Any
) -> torch.Tensor:
    """(rows, 2): the log-probabilities of the chosen or only answer, and of the rejected one (else 0)."""
    width = 2 if objective.unit == "pair" else 1
    found = torch.zeros(len(rows), 2, device=run.fabric.device)
    done = 0
    for numbers in shares(run, rows.lengths.tolist()):
        logps = answer_logps(run, model, objective, rows.batch(numbers))
        if numbers:
            found[torch.tensor(numbers), :width] = logps.view(-1, width)
        done += len(numbers) * run.fabric.world_size
        show_count(min(done, len(rows)), len(rows))
    return summed(run, found)


def mismatched_logps(
    run: "Run", model: nn.Module, objective: "Preference", rows: Rows, pairs: Mismatches
) -> torch.Tensor:
    """The log-probability of each answer after the prompt of another row, (pairs,)."""
    assert isinstance(rows, PreferenceRows)
    found = torch.zeros(len(pairs), device=run.fabric.device)
    lengths = [int(rows.lengths[i] + rows.lengths[j]) for i, j in pairs]
    for numbers in shares(run, lengths):
        batch = rows.mismatched([pairs[n] for n in numbers], run.model.config.block_size)
        logps = answer_logps(run, model, objective, batch)
        if numbers:
            found[torch.tensor(numbers)] = logps
    return summed(run, found)


@torch.no_grad()
def answer_logps(run: "Run", model: nn.Module, objective: "Preference", batch: Batch) -> torch.Tensor:
    """(S,)"""
    objective.reads_logps = True
    try:
        with run.fabric.strategy.precision.forward_context():
            return model(batch.to(run.fabric.device)).float()
    finally:
        objective.reads_logps = False


def shares(run: "Run", lengths: Sequence[int]) -> list[list[int]]:
    """This rank's batches of rows, each of about `TOKENS_AT_ONCE` tokens. All ranks get the same number; some may be
    empty."""
    groups: list[list[int]] = []
    n_tokens = TOKENS_AT_ONCE
    for i, length in enumerate(lengths):
        if n_tokens + length > TOKENS_AT_ONCE:
            groups.append([])
            n_tokens = 0
        groups[-1].append(i)
        n_tokens += length
    rank, n_ranks = run.fabric.global_rank, run.fabric.world_size
    groups += [[]] * (-len(groups) % n_ranks)
    return groups[rank::n_ranks]


def summed(run: "Run", values: torch.Tensor) -> torch.Tensor:
    """Values that each rank has a share of, with zeros elsewhere, on all ranks."""
    total = run.fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


@contextmanager
def reference_model(run: "Run", objective: "Preference") -> Iterator[nn.Module]:
    """The model whose log-probabilities are the reference, in evaluation mode."""
    folder = reference_folder(run, objective)
    if folder is None:
        trained_on = run.checkpoint is not None and not run.is_frozen  # the weights are not those before the first step
        if trained_on:
            run.fill(resumes=False)
        training = run.loss_model.training
        run.loss_model.eval()
        yield run.loss_model
        reshard(run.loss_model)
        run.loss_model.train(training)
        if trained_on:
            run.fill()
        return
    source = ModelSource.open(folder)
    if not run.tokenizer.is_like(source.tokenizer()):
        raise UserError(f"--preference.reference {folder} has another tokenizer than the model.")
    model = source.model(DTYPES[run.precision_name], run.fabric.device, run.quantize)
    yield objective.loss_model(model)


def reference_folder(run: "Run", objective: "Preference") -> Optional[Path]:
    """The folder of the reference model; None for the model that is loaded."""
    name, base = objective.args.reference, run.base_model
    if name == "start" or (name == "base" and base.initial_adapter is None):
        return None
    if name == "base":
        assert base.checkpoint is not None
        return base.checkpoint.folder
    return Path(name)


def reference_key(run: "Run", objective: "Preference", pairs: dict[str, Mismatches]) -> str:
    """A hash of what the log-probabilities depend on: rows, weights, and how they are computed."""
    digest = hashlib.sha256()
    for rows in (run.dataset.train, run.dataset.val):
        for values in (rows.row_hashes(), rows.loss_mask):
            digest.update(values.contiguous().numpy().tobytes())
    base, folder = run.base_model, reference_folder(run, objective)
    source = ModelSource.open(folder) if folder is not None else None
    checkpoint = base.checkpoint if source is None else source.checkpoint
    adapter = base.initial_adapter if source is None else source.adapter
    files = {file for file in checkpoint.files.values()} if checkpoint is not None else set()
    files |= {file for file in adapter.folder.glob("*adapter*") if file.is_file()} if adapter is not None else set()
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    how = [run.precision_name, run.quantize, run.fabric.device.type, run.model.config.block_size, torch.__version__]
    digest.update(json.dumps([stats, how, pairs]).encode())
    return digest.hexdigest()[:32]


def read_reference(file: Path) -> Optional[dict[str, torch.Tensor]]:
    with suppress(OSError, SafetensorError):
        os.utime(file)  # the cache removes what was not used for the longest time
        return load_file(file)
    return None


def write_reference(file: Path, values: dict[str, torch.Tensor]) -> None:
    part = part_of(file)
    save_file({name: value.contiguous() for name, value in values.items()}, part)
    part.replace(file)
    shrink_cache(file, cache_limit())
