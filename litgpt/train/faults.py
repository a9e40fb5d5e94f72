"""Errors for runs that cannot continue: a loss or gradient that is not finite, not enough memory, a full disk."""

import errno
import json
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import torch

from litgpt.data.batches import Batch, PackedRows
from litgpt.errors import UserError, reason, remark
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model.gpt import GPT
from litgpt.model.sharded import full_tensor
from litgpt.storage.outputs import free_name, is_ours, write_single
from litgpt.train.args import TrainArgs
from litgpt.train.resume.state import checkpoints
from litgpt.train.signals import Stopped

if TYPE_CHECKING:
    from litgpt.train.run import Run

TEXT, NAMED = 300, 5  # in messages: characters of a row, and number of rows


@torch.no_grad()
def crash(run: "Run", step: int, units: list[int], loss: float, norm: float) -> BaseException:
    """The error for a step whose loss or gradient is not finite. Writes the step's rows to `crash/`.

    All ranks must call this, because all of them run the model; only the first gets a `UserError`. `units` are the
    indices of the step's rows or packs, `loss` is the mean, and `norm` that of the gradient.
    """
    run.loss_model.eval()
    found = losses_of_rows(run, units)
    bad = [row for row in found if not math.isfinite(row["loss"])]
    broken = [name for name, weight in all_weights(run.model) if not bool(weight.isfinite().all())]
    run.fabric.barrier()
    if not run.fabric.is_global_zero:
        return Stopped(0)
    file = run.out_dir / "crash" / f"step-{step:06d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file = file if is_ours(file) else free_name(file)
    report = {"step": step, "loss": loss, "gradient_norm": norm, "weights_not_finite": broken, "rows": bad or found}
    write_single(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if broken:
        why = f"Weights that are not finite: {', '.join(broken[:NAMED])}."
    elif bad:
        shown = "; ".join(f"row {row['row']}: {row['text'][:TEXT]!r}" for row in bad[:NAMED])
        why = f"The cause is in {len(bad)} of its {len(found)} rows ({shown})."
    else:
        why = (
            f"Each of its {len(found)} rows has a finite loss on its own, for example row {found[0]['row']} "
            f"({found[0]['text'][:TEXT]!r}). Try a lower --train.learning_rate, or --train.max_norm 1."
        )
    what, value = ("Gradient norm", norm) if math.isfinite(loss) else ("Loss", loss)
    kind = "NaN" if math.isnan(value) else "infinite"
    return UserError(f"{what} is {kind} at step {step}. Stopping before the weights are updated. {why} See {file}.")


def losses_of_rows(run: "Run", units: list[int]) -> list[dict[str, Any]]:
    rows, numbers, found = run.train_rows, units, []
    if isinstance(rows, PackedRows):
        numbers = [row for unit in units for row in rows.packs[unit]]
        rows = rows.rows
    for number in numbers:
        batch = rows.batch([number]).to(run.fabric.device)
        loss = float(run.loss_model(batch).sum()) / max(1, batch.n_target_tokens)
        text = run.tokenizer.decode(rows.row(number)[0].tolist())  # type: ignore[attr-defined]
        found.append({"row": number, "tokens": int(rows.lengths[number]), "loss": loss, "text": text})
    return found


def all_weights(gpt: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """The full weights of a model by name, quantized ones dequantized."""
    yield from ((name, full_tensor(p)) for name, p in gpt.named_parameters())
    for name, layer in gpt.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield f"{name}.weight", layer.dequantized()


@contextmanager
def in_words(run: "Run") -> Iterator[None]:
    """Raise a `UserError` if memory or disk space runs out within this context."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            run.explain_memory()
            raise out_of_memory(run.last_batch, run.train, run.can_quantize, not run.is_frozen) from e
        if is_disk_full(e):
            advice = "There is no checkpoint yet. Free some space, or use another --out_dir."
            if saved := checkpoints(run.out_dir):
                advice = f"The last complete checkpoint is {saved[0]}. Free some space, then pass --resume true."
            raise UserError(f"The disk of {run.out_dir} is full. {advice}") from e
        raise


def is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    )


def out_of_memory(batch: Optional[Batch], train: TrainArgs, can_quantize: bool, all_trained: bool) -> UserError:
    """The error for a micro-batch that does not fit in memory, with the three settings that help most."""
    shape = "a micro-batch"
    longest = 2
    if batch is not None:
        longest = max(batch.seqlens)
        shape += f" of {batch.ids.numel():,} tokens in {len(batch.seqlens)} rows, the longest {longest:,}"
    remedies = [
        (train.micro_rows > 1, f"--train.micro_batch_size {max(1, train.micro_rows // 2)}"),
        (not train.activation_checkpointing, "--train.activation_checkpointing true"),
        (train.activation_checkpointing in (True, "block"), "--train.activation_checkpointing offload"),
        (can_quantize, "--quantize bnb.nf4"),
        (longest > 256, f"--train.max_seq_length {longest // 2}"),
        (all_trained, "finetune lora, which trains fewer weights"),
        (True, "--optimizer SGD, which stores no moments"),
    ]
    tries = "; ".join([text for good, text in remedies if good][:3])
    return UserError(f"Out of memory in {shape}. Try: {tries}. To see what fits: litgpt plan, with the same options.")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full. Libraries wrap the cause in their own errors."""
    cause: Optional[BaseException] = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def spared(what: str, ranks: int = 1) -> Iterator[None]:
    """Report errors within this context in one line, which begins with `what`, instead of ending the run; for steps
    that only display or record. With several `ranks`, running out of memory still raises: the others would wait for
    this one."""
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
