"""The MLP of a block.

Shapes: B rows, T tokens, C = n_embd, N = B T tokens.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.config import Config
from litgpt.model.kernels import remat, rms_norm, stacked
from litgpt.model.linear import Linear, linear
from litgpt.model.norm import make_norm


class LLaMAMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202). `fc` fuses the gate and up projections, in this order."""

    def __init__(self, config: Config, intermediate_size: Optional[int] = None) -> None:
        super().__init__()
        size, bias = intermediate_size or config.intermediate_size, bool(config.mlp_bias)
        self.fc = Linear(config.n_embd, 2 * size, bias=bias)
        self.fc.parts = (size, size)  # type: ignore[assignment]
        self.proj = Linear(size, config.n_embd, bias=bias)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(remat(self.fc(x), self.glu))

    def glu(self, x: torch.Tensor) -> torch.Tensor:
        """The gated half of `x`, (..., 2 size) to (..., size)."""
        gate, up = x.chunk(2, dim=-1)
        if self.alpha is not None:
            return remat(gate, self.clamped, up)
        return remat(gate, self.activation) * up

    def clamped(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The variant of gpt-oss (https://arxiv.org/abs/2508.10925)."""
        assert self.alpha is not None
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)

    def activation(self, gate: torch.Tensor) -> torch.Tensor:
        return F.silu(gate)


class GemmaMLP(LLaMAMLP):
    """GeGLU: the same with GELU instead of SiLU."""

    def __init__(self, config: Config, intermediate_size: Optional[int] = None) -> None:
        super().__init__(config, intermediate_size)
        self.approximate = config.gelu_approximate

    def activation(self, gate: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate=self.approximate)


class XIELU(nn.Module):
    """A quadratic above 0, and an exponential below it, whose slopes are learned (https://arxiv.org/abs/2411.13010)."""

    beta: torch.Tensor
    eps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (nn.Parameter(torch.empty(1)) for _ in range(2))
        for leaf in ("beta", "eps"):
            self.register_buffer(leaf, torch.empty(1, dtype=torch.float32))
        if not self.alpha_p.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for p, value in ((self.alpha_p, math.log(math.expm1(0.8))), (self.alpha_n, math.log(math.expm1(0.3)))):
            p.fill_(value)
        self.beta.fill_(0.5)
        self.eps.fill_(-1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beta, eps = self.beta.to(x.dtype), self.eps.to(x.dtype)
        above, below = F.softplus(self.alpha_p).to(x.dtype), beta + F.softplus(self.alpha_n).to(x.dtype)
        return torch.where(x > 0, above * x * x, (torch.expm1(torch.minimum(x, eps)) - x) * below) + beta * x


class GptNeoxMLP(nn.Module):
    """Up, GELU or another activation, down, without a gate."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size, bias=bool(config.mlp_bias))
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=bool(config.mlp_bias))
        self.approximate, self.kind = config.gelu_approximate, config.activation
        if config.activation == "xielu":
            self.act = XIELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(remat(self.fc(x), self.activation))

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """https://arxiv.org/abs/2109.08668 has `relu2`."""
        if self.kind == "xielu":
            return self.act(x)
        return F.relu(x).square() if self.kind == "relu2" else F.gelu(x, approximate=self.approximate)


class Router(nn.Module):
    """The scores of the experts for each token, (N, n_expert). Not an `nn.Linear`, so that no method adapts or
    quantizes it; `transformers` and `peft` do the same."""

    def __init__(self, n_embd: int, n_expert: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = n_embd, n_expert
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        self.bias = nn.Parameter(torch.zeros(n_expert)) if bias else None
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=n_embd**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight, self.bias)


class BiasedRouter(Router):
    """A router with a bias that counts for the choice of experts alone, not for their shares. It balanced the load in
    pretraining (https://arxiv.org/abs/2408.15664) and stays as it is, in float32, in which scores are computed too."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, n_embd: int, n_expert: int, bias: bool = False) -> None:
        super().__init__(n_embd, n_expert, bias)
        self.register_buffer("e_score_correction_bias", torch.zeros(n_expert, dtype=torch.float32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(remat(tokens, torch.Tensor.float), self.weight.float(), bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BiasedRouter":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != bias.dtype:
            self.e_score_correction_bias = moved.to(bias.dtype) if bias.is_meta else bias.to(moved.device)
        return self


class ScaledRouter(Router):
    """The router of Gemma 4, for normalized tokens. The dimensions of these, and the shares of each expert, have a
    factor that is learned."""

    def __init__(self, n_embd: int, n_expert: int, eps: float) -> None:
        super().__init__(n_embd, n_expert)
        self.eps = eps
        self.scale, self.per_expert_scale = (nn.Parameter(torch.ones(size)) for size in (n_embd, n_expert))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.ones_(self.per_expert_scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(remat(tokens, rms_norm, self.scale * self.in_features**-0.5, self.eps))


class LLaMAMoE(nn.Module):
    """A mixture of experts: each token goes through the experts with the highest scores.

    https://arxiv.org/abs/2401.04088. Tokens are sorted by expert. On a GPU one matmul then serves all experts, whose
    weights are parts of one tensor, see `stack`; else each expert runs once, on all of its tokens.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.moe_intermediate_size or config.intermediate_size
        self.config = config
        kind = GemmaMLP if config.expert_activation == "gelu" else LLaMAMLP
        router = BiasedRouter if config.router_bias else Router
        self.gate = (
            ScaledRouter(config.n_embd, config.n_expert, config.norm_eps)
            if config.expert_norms
            else router(config.n_embd, config.n_expert, config.gate_bias)
        )
        self.experts = nn.ModuleList(kind(config, size) for _ in range(config.n_expert))
        self.shared_experts = kind(config, config.shared_size) if config.shared_size else None
        self.norm_in, self.norm_out, self.shared_norm_in, self.shared_norm_out = (
            make_norm(config, config.n_embd) if config.expert_norms else nn.Identity() for _ in range(4)
        )
        self.shared_expert_gate = Linear(config.n_embd, 1, bias=False) if config.shared_expert_gate else None
        self.stacks: Optional[tuple[torch.Tensor, torch.Tensor]] = None  # (n_expert, out, in) of `fc` and of `proj`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # (N, C)
        shares, chosen = self.choose(self.gate(tokens))  # (N, n_chosen)
        by_expert, order = chosen.flatten().sort(stable=True)  # (N * n_chosen,)
        owners = order // chosen.size(1)  # the token of each choice
        y = self.run_experts(remat(self.norm_in(tokens), torch.index_select, 0, owners), by_expert)
        y = y * shares.flatten()[order, None]
        y = self.norm_out(torch.zeros_like(tokens).index_add(0, owners, y.to(x.dtype)).view_as(x))
        return y if self.shared_experts is None else y + self.shared(x)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, and the shares that they have in its output, from the logits (N, n_expert). With
        groups of experts, only those in the groups with the highest sums of their best scores are chosen
        (https://arxiv.org/abs/2412.19437)."""
        c, sigmoid = self.config, self.config.router_scores == "sigmoid"
        scores = logits.float().sigmoid() if sigmoid else logits.softmax(-1, dtype=torch.float32)
        ranks = scores.detach()
        if isinstance(self.gate, BiasedRouter):
            ranks = ranks + self.gate.e_score_correction_bias
        if c.n_topk_groups < c.n_expert_groups:
            groups = ranks.unflatten(-1, (c.n_expert_groups, -1))
            best = groups.topk(c.n_topk_scores_per_group).values.sum(-1).topk(c.n_topk_groups).indices
            outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            ranks = groups.masked_fill(outside[..., None], -math.inf).flatten(-2)
        chosen = ranks.topk(c.n_expert_per_token).indices
        shares = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        if isinstance(self.gate, ScaledRouter):
            shares = shares * self.gate.per_expert_scale[chosen]
        return shares * c.routed_scaling_factor, chosen

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the experts that every token goes through (https://arxiv.org/abs/2401.06066)."""
        y = self.shared_norm_out(self.shared_experts(self.shared_norm_in(x)))  # type: ignore[misc]
        return y if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * y

    def run_experts(self, tokens: torch.Tensor, by_expert: torch.Tensor) -> torch.Tensor:
        """The outputs of the experts for tokens (n, C) that are sorted by the number of their expert, `by_expert`."""
        numbers = torch.arange(len(self.experts), device=tokens.device)
        ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
        if self.stacks is not None:
            fc, proj = ([getattr(expert, leaf).weight for expert in self.experts] for leaf in ("fc", "proj"))
            hidden = self.with_bias("fc", GroupedLinear.apply(tokens, ends, self.stacks[0], *fc), by_expert)
            y = GroupedLinear.apply(remat(hidden, self.experts[0].glu), ends, self.stacks[1], *proj)  # type: ignore
            return self.with_bias("proj", y, by_expert)
        groups = tokens.tensor_split(ends[:-1].tolist())
        return torch.cat([expert(x) for expert, x in zip(self.experts, groups) if len(x) or self.trains(expert)])

    def with_bias(self, leaf: str, y: torch.Tensor, by_expert: torch.Tensor) -> torch.Tensor:
        """The outputs of the layer `leaf` of the experts, (n, out), with their biases, if they have some."""
        biases = [getattr(expert, leaf).bias for expert in self.experts]
        return y if biases[0] is None else y + torch.stack(biases)[by_expert]

    def trains(self, expert: nn.Module) -> bool:
        """Whether an expert without tokens runs too, for a gradient of zero: optimizers tell it from none, and all
        devices need gradients of the same weights."""
        return self.training and any(p.requires_grad for p in expert.parameters())

    @torch.no_grad()
    def stack(self) -> None:
        """Make the weights of the experts parts of one tensor, if the device has a matmul for groups of rows."""
        layers = [[getattr(expert, leaf) for expert in self.experts] for leaf in ("fc", "proj")]
        before, self.stacks = self.stacks, None
        if all(type(layer) is Linear for layer in itertools.chain(*layers)):
            if before is not None and shares_storage(before[0], layers[0][0].weight):
                self.stacks = before
                return
            fc, proj = (stacked(*(layer.weight for layer in each)) for each in layers)
            if fc is not None and proj is not None:
                for layer, part in zip(itertools.chain(*layers), itertools.chain(fc, proj)):
                    layer.weight.data = part
                self.stacks = fc, proj

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LLaMAMoE":
        super()._apply(fn, recurse)
        if self.stacks is not None:
            self.stack()
        return self


def shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class GroupedLinear(torch.autograd.Function):
    """Linear layers of groups of rows, as one matmul."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ends: torch.Tensor, stack: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """`x` is (n, in); group i ends before row `ends[i]`, int32, and is multiplied by `stack[i]`, (out, in), whose
        gradient goes to `weights[i]`."""
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, ends, stack)
        return F.grouped_mm(x, stack.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, ends, stack = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = F.grouped_mm(grad, stack, offs=ends) if ctx.needs_input_grad[0] else None
        grad_weights = [None] * len(stack) if x is None else F.grouped_mm(grad.t(), x, offs=ends).unbind()
        return grad_x, None, None, *grad_weights


MLPS = {mlp.__name__: mlp for mlp in (LLaMAMLP, GemmaMLP, GptNeoxMLP, LLaMAMoE)}
