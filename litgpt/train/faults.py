"""What ends a run that cannot go on, in words that help: numbers that are not finite, a full memory, a full disk."""

import errno
import itertools
import json
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from litgpt.data.batches import Batch, PackedRows, Rows
from litgpt.errors import UserError, reason, remark
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model.sharded import full_tensor
from litgpt.storage.outputs import free_name, is_ours, write_single
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import TrainArgs
from litgpt.train.loss import LossModel
from litgpt.train.resume.state import checkpoints
from litgpt.train.signals import Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric

TEXT, NAMED = 300, 5  # characters of a row that are shown, and how many rows


def crash(fabric: "Fabric", *step: Any) -> BaseException:
    """`not_finite` for the first rank; the others, which run the model too, end in silence."""
    error = not_finite(fabric, *step)
    fabric.barrier()
    return error if fabric.is_global_zero else Stopped(0)


@torch.no_grad()
def not_finite(
    fabric: "Fabric",
    model: LossModel,
    rows: Rows,
    tokenizer: Tokenizer,
    out_dir: Path,
    step: int,
    units: list[int],
    loss: float,
    norm: float,
) -> UserError:
    """The error for a step whose loss or gradient is not finite; its rows are written to `crash/`.

    Args:
        units: The numbers of the rows, or packs, of the step.
        loss: Its mean loss.
        norm: The norm of its gradient.
    """
    numbers = [row for unit in units for row in rows.packs[unit]] if isinstance(rows, PackedRows) else list(units)
    single = rows.rows if isinstance(rows, PackedRows) else rows
    model.eval()
    found: list[dict[str, Any]] = []
    for number in numbers:
        batch = single.batch([number]).to(fabric.device)
        own = float(model(batch)) / max(1, batch.n_target_tokens)
        text = tokenizer.decode(single.row(number)[0].tolist())  # type: ignore[attr-defined]
        found.append({"row": number, "tokens": int(single.lengths[number]), "loss": own, "text": text})
    bad = [row for row in found if not math.isfinite(row["loss"])]
    packed = ((f"{n}.weight", m.dequantized()) for n, m in model.gpt.named_modules() if isinstance(m, QuantizedLinear))
    weights = itertools.chain(((name, full_tensor(p)) for name, p in model.gpt.named_parameters()), packed)
    broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
    file = out_dir / "crash" / f"step-{step:06d}.json"
    report = {"step": step, "loss": loss, "gradient_norm": norm, "weights_not_finite": broken, "rows": bad or found}
    if fabric.is_global_zero:
        file.parent.mkdir(parents=True, exist_ok=True)
        file = file if is_ours(file) else free_name(file)
        write_single(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if broken:
        why = f"Weights are not finite: {', '.join(broken[:NAMED])}."
    elif bad:
        shown = "; ".join(f"row {row['row']}: {row['text'][:TEXT]!r}" for row in bad[:NAMED])
        why = f"It comes from {len(bad)} of the step's {len(found)} rows ({shown})."
    else:
        why = (
            f"Each of the step's {len(found)} rows has a finite loss by itself, row {found[0]['row']} for example "
            f"({found[0]['text'][:TEXT]!r}): a lower --train.learning_rate or --train.max_norm 1 may help."
        )
    what = f"loss of step {step} is {loss}" if not math.isfinite(loss) else f"gradient of step {step} has norm {norm}"
    return UserError(f"The {what}, so the run stops before it is learned. {why} See {file}.")


@contextmanager
def in_words(
    out_dir: Path, last: list[Batch], train: TrainArgs, quantize: Optional[str], all_trained: bool
) -> Iterator[None]:
    """Turn what a full memory or a full disk raises into a `UserError`.

    Args:
        last: The micro-batch that was run, once there is one.
        all_trained: Whether all weights are trained.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError):
            raise
        if is_out_of_memory(e):
            raise out_of_memory(next(iter(last), None), train, quantize, all_trained) from e
        if is_disk_full(e):
            raise disk_full(out_dir, next(iter(checkpoints(out_dir)), None)) from e
        raise


def is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    )


def out_of_memory(batch: Optional[Batch], train: TrainArgs, quantize: Optional[str], all_trained: bool) -> UserError:
    """The error for a micro-batch that does not fit, with the three settings that would help most."""
    shape = "a micro-batch"
    longest = 2
    if batch is not None:
        longest = max(batch.seqlens)
        shape += f" of {batch.ids.numel():,} tokens in {len(batch.seqlens)} rows, the longest {longest:,}"
    ideas = [
        (train.micro_batch_size > 1, f"--train.micro_batch_size {max(1, train.micro_batch_size // 2)}"),
        (not train.activation_checkpointing, "--train.activation_checkpointing true"),
        (not all_trained and quantize is None, "--quantize bnb.nf4"),
        (longest > 256, f"--train.max_seq_length {longest // 2}"),
        (all_trained, "finetune lora, which trains less"),
        (True, "--optimizer SGD, which keeps less"),
    ]
    return UserError(f"Out of memory in {shape}. What helps most: {'; '.join([w for good, w in ideas if good][:3])}.")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because there was no room. Libraries wrap the reason in errors of their own."""
    chain: Optional[BaseException] = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left" in str(chain).lower():
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def disk_full(out_dir: Path, whole: Optional[Path]) -> UserError:
    """The error for a full disk, which names the last good checkpoint."""
    last = (
        f"The last whole checkpoint is {whole}; make room, then go on with --resume true"
        if whole
        else ("There is no checkpoint yet; make room, or name another --out_dir")
    )
    return UserError(f"No room is left on the disk of {out_dir}. {last}.")


@contextmanager
def spared(what: str, ranks: int = 1) -> Iterator[None]:
    """A run, and its result, are spared the errors of what only shows or records something: each is said in one line.

    Args:
        what: The beginning of that line.
        ranks: How many processes do it together. Of several, one may run out of memory alone, and the others would wait
            for it: that still ends them all.
    """
    try:
        yield
    except Exception as e:
        if ranks > 1 and is_out_of_memory(e):
            raise
        if os.environ.get("LITGPT_TRACEBACK"):
            traceback.print_exc()
        remark(f"{what}: {reason(e)}")


def all_finite(*numbers: Any) -> bool:
    return all(math.isfinite(float(n)) for n in numbers)
