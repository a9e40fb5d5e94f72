"""Cross-entropy over the head without ever holding all logits.

Shapes: N trained positions, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.data.batches import UNTRAINED, Batch
from litgpt.model import GPT
from litgpt.model.linear import ROUND, rounded

T = TypeVar("T")
LOGITS = 2**24  # that are held at once
CACHED = 2**19  # logits that are turned into gradients at once on a CPU


class LossModel(nn.Module):
    """A `GPT` whose forward is the summed loss of a batch, so that strategies see one module with one output."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropies of the trained targets, float32, a scalar."""
        ids, seqlens = batch.ids, batch.seqlens
        if ids.device.type == "cpu" and (more := rounded(ids.size(1)) - ids.size(1)):
            ids, seqlens = F.pad(ids, (0, more)), [*seqlens, more]  # a last row that nobody looks at
        hidden = self.gpt.hidden(ids, seqlens)
        return head_loss(hidden[0], self.gpt.lm_head, batch.targets[0])

    def read(self, function: Callable[[GPT], T]) -> T:
        """What `function` makes of the model; where weights are sharded, this and `forward` are the ways to run it.
        All ranks have to call it, with functions that run the blocks equally often."""
        return function(self.gpt)


def head_loss(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of `head(hidden)` against `targets`.

    Logits are made for trained positions only, `LOGITS` of them at a time. Their gradient takes their place, and gives
    those of the input and of the parameters of the head that are trained.

    Args:
        hidden: (T, C), or longer.
        head: Anything that maps (n, C) to logits (n, V).
        targets: (T,), the token that follows or `UNTRAINED`.

    Returns:
        A float32 scalar.
    """
    positions = (targets != UNTRAINED).nonzero().squeeze(1)
    wanted = targets[positions]
    trained = [p for p in head.parameters() if p.requires_grad]
    if hidden.device.type == "cpu":
        positions = F.pad(positions, (0, rounded(len(positions)) - len(positions)))
    return _HeadLoss.apply(hidden.index_select(0, positions), wanted, head, *trained)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, *trained: nn.Parameter
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        wanted = any(ctx.needs_input_grad)
        grads = [torch.empty_like(hidden)] if wanted else []
        size = max(1, LOGITS // rows_of(head) // ROUND) * ROUND
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                x = hidden[chunk].detach().requires_grad_(wanted)
                loss = _CrossEntropy.apply(head(x), targets[chunk])
            total += loss.detach()
            if wanted:
                first, *others = torch.autograd.grad(loss, [x, *trained])
                grads[0][chunk] = first
                if start == 0:
                    grads += others
                else:
                    for grad, more in zip(grads[1:], others):
                        grad += more
        if wanted and len(grads) == 1:  # nothing is trained
            grads += [torch.zeros_like(p) for p in trained]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        first, *others = (grad.mul_(outputs[0]) for grad in ctx.saved_tensors)  # in place: the head's is large
        return first, None, None, *others


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy_` of the logits (n, V) that have a target; the others do not count.

    The logits could as well be given to `torch.autograd.grad` with their gradient. It would check its shape, and import
    a part of torch's compiler for that, which takes a quarter of a second.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = logits.detach()
        total = cross_entropy_(gradient[: len(targets)], targets)
        gradient[len(targets) :] = 0
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        return *ctx.saved_tensors, None  # that of the sum itself


def rows_of(head: nn.Module) -> int:
    """V, also where the head is wrapped."""
    while hasattr(head, "linear"):
        head = head.linear  # type: ignore[assignment]
    return int(head.out_features)  # type: ignore[arg-type]


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy, computed in float32; `logits` (n, V) become its gradient.

    Few rows at a time, so that on a CPU all of it happens in the cache.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    rows = max(1, CACHED // logits.size(1)) if logits.device.type == "cpu" else len(logits)
    for part, wanted in zip(logits.split(rows), targets.split(rows)):
        logits_32 = part.float()
        own, most = logits_32.gather(1, wanted[:, None]), logits_32.amax(1, keepdim=True)
        p = logits_32.softmax(1)
        total += (most - p.amax(1, keepdim=True).log() - own).sum()  # the largest is exp(0) / sum
        p.scatter_add_(1, wanted[:, None], p.new_full((len(p), 1), -1.0))
        part.copy_(p)
    return total
