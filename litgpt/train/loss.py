"""Cross-entropy over the head, without all logits in memory at once.

Shapes: T tokens, n target tokens of a chunk, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.data.batches import Batch
from litgpt.model.chunked_attention import ROUND
from litgpt.model.gpt import GPT
from litgpt.model.kernels import cross_entropy_, logits_at_once, padded_length
from litgpt.model.packing import Packing

T = TypeVar("T")


class LossModel(nn.Module):
    """A `GPT` whose forward pass returns the summed loss of a batch: one module with one output for DDP and FSDP."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropies of the target tokens, a float32 scalar."""
        ids, packing = batch.ids, batch.packing
        if padding := padded_length(ids, ids.size(1)) - ids.size(1):
            ids, packing = F.pad(ids, (0, padding)), Packing.of([*batch.seqlens, padding])  # a last row without targets
        hidden = self.gpt.hidden(ids, packing=packing)
        return head_loss(hidden[0], self.gpt.lm_head, batch.targets[0], batch.trained)

    def read(self, function: Callable[[GPT], T]) -> T:
        """Return `function(self.gpt)`. A sharded model can only be run by this or by `forward`. All ranks must call it,
        with functions that run the blocks equally often."""
        return function(self.gpt)


def head_loss(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of `head(hidden)` against `targets`, a float32 scalar.

    Logits are computed only where there is a target, some at a time. Their gradient overwrites them, and yields the
    gradients of the input and of the trained parameters of the head.

    Args:
        hidden: (T, C), or longer.
        head: A module that maps (n, C) to logits (n, V).
        targets: The next token or `UNTRAINED`, (T,).
        positions: Where the targets are not `UNTRAINED`, (n,).
    """
    target_tokens = targets[positions]
    trained = [p for p in head.parameters() if p.requires_grad]
    if padding := padded_length(hidden, len(positions)) - len(positions):
        positions = F.pad(positions, (0, padding))
    return _HeadLoss.apply(hidden.index_select(0, positions), target_tokens, head, *trained)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, *trained: nn.Parameter
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        with_grad = any(ctx.needs_input_grad)
        grads = [torch.empty_like(hidden)] if with_grad else []
        sums = [torch.zeros_like(p) for p in trained] if with_grad and not len(hidden) else []
        size = max(1, logits_at_once(hidden) // rows_of(head) // ROUND) * ROUND
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(with_grad):
                x = hidden[chunk].detach().requires_grad_(with_grad)
                loss = _CrossEntropy.apply(head(x), targets[chunk])
            total += loss.detach()
            if with_grad:
                first, *others = torch.autograd.grad(loss, [x, *trained])
                grads[0][chunk] = first
                if start == 0:  # a sum of many in bfloat16 would lose small ones
                    sums = others if size >= len(hidden) else [grad.float() for grad in others]
                else:
                    for grad, more in zip(sums, others):
                        grad += more
        ctx.save_for_backward(*grads, *(grad.to(p.dtype) for grad, p in zip(sums, trained)))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        first, *others = (grad.mul_(outputs[0]) for grad in ctx.saved_tensors)  # in place: the head has a large one
        return first, None, None, *others


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy_` of the first logits, which have targets; the rest is padding. To pass this gradient to
    `torch.autograd.grad` instead would import a part of torch's compiler, in 0.25 s."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = logits.detach()
        total = cross_entropy_(gradient[: len(targets)], targets)
        gradient[len(targets) :] = 0
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        return *ctx.saved_tensors, None  # the gradient of a sum of 1


def rows_of(head: nn.Module) -> int:
    """V, also of a wrapped head."""
    while hasattr(head, "linear"):
        head = head.linear  # type: ignore[assignment]
    return int(head.out_features)  # type: ignore[arg-type]
