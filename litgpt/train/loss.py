"""Cross-entropy over the head, without all logits in memory at once.

Shapes: T tokens, n target tokens of a chunk, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.data.batches import Batch
from litgpt.model.chunked_attention import ROUND
from litgpt.model.gpt import GPT
from litgpt.model.kernels import cross_entropy_, logits_at_once, padded_length
from litgpt.model.packing import Packing

if TYPE_CHECKING:
    from litgpt.train.objectives import Preference

T = TypeVar("T")


class LossModel(nn.Module):
    """A `GPT` whose forward pass returns the loss of a batch: one module with one output for DDP and FSDP.

    Args:
        objective: Makes a loss of those of the target tokens. None for their sum.
    """

    def __init__(self, gpt: GPT, objective: Optional["Preference"] = None) -> None:
        super().__init__()
        self.gpt, self.objective = gpt, objective

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the cross-entropies of the target tokens, a float32 scalar; with an objective, the sums that it
        makes of them, (parts,)."""
        hidden, head = self.hidden(batch), self.gpt.lm_head
        if self.objective is None:
            return head_loss(hidden, head, batch.targets[0], batch.trained)
        return self.objective.loss(token_losses(hidden, head, batch.targets[0], batch.trained), batch)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """(T, C), or longer"""
        ids, packing = batch.ids, batch.packing
        if padding := padded_length(ids, ids.size(1)) - ids.size(1):
            ids, packing = F.pad(ids, (0, padding)), Packing.of([*batch.seqlens, padding])  # a last row without targets
        return self.gpt.hidden(ids, packing=packing)[0]

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
    return _HeadLoss.apply(*selected(hidden, targets, positions), head, *trained_of(head))


def token_losses(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each target token, (n,), float32. Arguments and memory as for `head_loss`. If parameters of
    the head are trained, the backward pass computes the logits again."""
    return _TokenLosses.apply(*selected(hidden, targets, positions), head, *trained_of(head))


def selected(hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that have a target, (n, C) or longer, and the targets, (n,)."""
    target_tokens = targets[positions]
    if padding := padded_length(hidden, len(positions)) - len(positions):
        positions = F.pad(positions, (0, padding))
    return hidden.index_select(0, positions), target_tokens


def trained_of(head: nn.Module) -> list[nn.Parameter]:
    return [p for p in head.parameters() if p.requires_grad]


def run_head(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: nn.Module,
    trained: Sequence[torch.Tensor],
    with_grad: bool,
    weights: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of each target, (n,), and the gradients of `hidden` and of `trained`, which are those of the sum of the
    losses times `weights`, (n,). Without `with_grad` there are none."""
    losses = hidden.new_empty(len(targets), dtype=torch.float32)
    grads = [torch.empty_like(hidden)] if with_grad else []
    sums = [torch.zeros_like(p) for p in trained] if with_grad and not len(hidden) else []
    size = max(1, logits_at_once(hidden) // rows_of(head) // ROUND) * ROUND
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        with torch.set_grad_enabled(with_grad):
            x = hidden[chunk].detach().requires_grad_(with_grad)
            factors = None if weights is None else weights[chunk]
            total = _CrossEntropy.apply(head(x), targets[chunk], losses[chunk], factors)
        if with_grad:
            first, *others = torch.autograd.grad(total, [x, *trained])
            grads[0][chunk] = first
            if start == 0:  # a sum of many in bfloat16 would lose small ones
                sums = others if size >= len(hidden) else [grad.float() for grad in others]
            else:
                for grad, more in zip(sums, others):
                    grad += more
    return losses, [*grads, *(grad.to(p.dtype) for grad, p in zip(sums, trained))]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, *trained: nn.Parameter
    ) -> torch.Tensor:
        losses, grads = run_head(hidden, targets, head, trained, any(ctx.needs_input_grad))
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        first, *others = (grad.mul_(outputs[0]) for grad in ctx.saved_tensors)  # in place: the head has a large one
        return first, None, None, *others


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, *trained: nn.Parameter
    ) -> torch.Tensor:
        at_once = any(ctx.needs_input_grad) and not trained  # a gradient for each token, scaled in the backward pass
        losses, grads = run_head(hidden, targets, head, trained, at_once)
        ctx.head, ctx.trained = head, trained
        ctx.save_for_backward(*grads, *([hidden, targets] if trained else []))
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        weights, saved = outputs[0], ctx.saved_tensors
        if ctx.trained:
            hidden, targets = saved
            _, (first, *others) = run_head(hidden, targets, ctx.head, ctx.trained, True, weights)
            return first, None, None, *others
        first = saved[0]
        first[: len(weights)].mul_(weights[:, None])
        return first, None, None


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy_` of the first logits, which have targets; the rest is padding. Fills `losses` and returns their
    sum. To pass this gradient to `torch.autograd.grad` instead would import a part of torch's compiler, in 0.25 s."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        weights: Optional[torch.Tensor],
    ) -> torch.Tensor:
        gradient = logits.detach()
        losses.copy_(cross_entropy_(gradient[: len(targets)], targets))
        if weights is not None:
            gradient[: len(targets)].mul_(weights[:, None])
        gradient[len(targets) :] = 0
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        return *ctx.saved_tensors, None, None, None  # the gradient of a sum of 1


def rows_of(head: nn.Module) -> int:
    """V, also of a wrapped head."""
    while hasattr(head, "linear"):
        head = head.linear  # type: ignore[assignment]
    return int(head.out_features)  # type: ignore[arg-type]
