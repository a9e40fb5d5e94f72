"""Optimizers: AdamW that rounds stochastically on bfloat16 weights, Muon, and what is short for which class."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, Optional

import torch
from torch import nn
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.model.sharded import full_tensor, is_sharded, local_shard, my_rows, shard_like

TORCH = "Adadelta Adafactor Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD".split()
BITSANDBYTES = (
    "Adam8bit AdamW8bit PagedAdam PagedAdam8bit PagedAdamW PagedAdamW8bit Lion Lion8bit PagedLion PagedLion8bit "
    "AdEMAMix AdEMAMix8bit PagedAdEMAMix PagedAdEMAMix8bit LAMB LAMB8bit LARS LARS8bit Adagrad8bit RMSprop8bit SGD8bit"
).split()
SHORT_NAMES = {
    **{name: f"torch.optim.{name}" for name in TORCH},
    **{name: f"bitsandbytes.optim.{name}" for name in BITSANDBYTES},
    "Muon": "litgpt.train.optimizers.Muon",
}
WHOLE = ("Adafactor", "Rprop")  # of torch: they fail on sharded weights
# Elements that are updated at once: the float32 copies of a large weight shall not take its size again. A processor is
# faster where they fit into its cache, a GPU where it has much to do at once.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**24


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters of a model, as an optimizer takes them.

    A parameter's attribute `lr_ratio`, 1 where there is none, says by how much its learning rate differs from the
    run's; there is one group for each ratio. The matrices of the blocks get an attribute `row_blocks` for `Muon`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}  # sharded weights and others are not updated together
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((getattr(parameter, "lr_ratio", 1.0), is_sharded(parameter)), []).append(parameter)
            if name.startswith("transformer.h.") and parameter.ndim == 2:
                module, _, leaf = name.rpartition(".")
                parameter.row_blocks = row_blocks(model.get_submodule(module), leaf, parameter)  # type: ignore
    return [{"params": parameters, "lr_ratio": ratio} for (ratio, _), parameters in groups.items()]


def row_blocks(module: nn.Module, name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """The rows of each of the matrices that stand below each other in a weight, as q, k and v do."""
    if name in ("lora_A", "lora_B"):
        found = tuple((a if name == "lora_A" else b).size(0) for _, a, b in module.blocks())  # type: ignore[operator]
    else:
        found = getattr(module, "parts", ())
    return found if sum(found) == weight.size(0) else (weight.size(0),)


def ours(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """What makes an optimizer, with `AdamW` of this module where torch's would be made, which takes the same options.

    Args:
        make: A class, or options and a class in a `partial`, as jsonargparse has them.
    """
    if isinstance(make, partial):
        return partial(ours(make.func), *map(ours, make.args), **make.keywords)
    return AdamW if make is torch.optim.AdamW else make


def finished(optimizer: Optimizer, seed: int, fuse: bool = True) -> Optimizer:
    """The optimizer to train with.

    torch's AdamW becomes `AdamW`. On float32 weights that is fused, unless its options say something else, which makes
    its step several times faster. Ours get their seed, the same on every device, so that all of them round alike.

    Args:
        fuse: Whether AdamW may be fused: not where its gradients are scaled, since they could not be clipped.
    """
    if type(optimizer) is torch.optim.AdamW:  # as `ours` cannot see that a function would make it
        optimizer = AdamW(optimizer.param_groups)
    groups = optimizer.param_groups
    if type(optimizer) is AdamW and fuse and all(g["foreach"] is g["fused"] is None for g in groups):
        fused = {p.dtype for group in groups for p in group["params"]} == {torch.float32}
        for group in groups:
            group["fused"] = fused or None
    if isinstance(optimizer, Rounding):
        optimizer.seed = seed
    return optimizer


def remarks(optimizer: Optimizer, device: torch.device) -> list[str]:
    """What a user should know about an optimizer on these weights, a line each."""
    name, lines = type(optimizer).__name__, []
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    rounds = {torch.bfloat16} if isinstance(optimizer, Rounding) else set()
    if half := dtypes & {torch.bfloat16, torch.float16} - rounds:
        kinds = " and ".join(sorted(str(d).removeprefix("torch.") for d in half))
        lines.append(
            f"{name} rounds {kinds} weights to the nearest value, so that small updates may be lost: --precision "
            "32-true does not, nor does AdamW with bf16-true."
        )
    if getattr(optimizer, "is_paged", False) and device.type != "cuda":
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported")  # this line says it
        lines.append(f"{name} has nothing to page out to on {device.type}: it does the same without paging.")
    return lines


class StochasticRounding:
    """Throws numbers from 0 to 65,535, at a tenth of what torch's own generator takes for them on a CPU.

    Each lane is a linear congruential generator modulo 2^32 with the multiplier of PCG (https://www.pcg-random.org),
    the upper half of whose state is thrown. torch's generator draws where the lanes start. So all numbers are equally
    likely in every throw, which makes means exact, and lanes do not depend on each other. A step of an optimizer takes
    new dice: what is thrown for a weight in one step says nothing about the next.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.lanes = torch.empty(0, dtype=torch.int32, device=generator.device)

    def throw(self, n: int) -> torch.Tensor:
        """(n,), int32"""
        if (missing := n - len(self.lanes)) > 0:
            device, ends = self.generator.device, (-(2**31), 2**31)
            more = torch.randint(*ends, (missing,), generator=self.generator, device=device, dtype=torch.int32)
            self.lanes = torch.cat([self.lanes, more])
        return (self.lanes[:n].mul_(747796405).add_(1) >> 16).bitwise_and_(2**16 - 1)


def check_sharded(optimizer: Optimizer) -> None:
    """Raise `UserError` where the optimizer is to train sharded weights and cannot."""
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    name = type(optimizer).__name__
    if sharded and (name in WHOLE or type(optimizer).__module__.startswith("bitsandbytes")):
        raise UserError(f"--optimizer {name} does not know sharded weights: take AdamW, or --strategy ddp.")


class Rounding(Optimizer):
    """What optimizers that round stochastically share: the generator of the random bits, and its state in `state_dict`.

    torch decorates its methods so that its compiler leaves them alone. That imports the compiler, which takes a quarter
    of the time to the first step, so here they are without it.

    Attributes:
        seed: Where the generator starts.
    """

    seed: int = 0
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    def generator(self, device: torch.device) -> torch.Generator:
        """The one for tensors on this device; a process has one device of a kind."""
        generators = self.__dict__.setdefault("generators", {})
        if device.type not in generators:
            generators[device.type] = torch.Generator(device).manual_seed(self.seed)
        return generators[device.type]

    def dice(self) -> dict[str, StochasticRounding]:
        """Those of one step, for each kind of device."""
        devices = {p.device.type: p.device for group in self.param_groups for p in group["params"]}
        return {kind: StochasticRounding(self.generator(device)) for kind, device in devices.items()}

    def state_dict(self) -> dict[str, Any]:
        states = {kind: g.get_state() for kind, g in self.__dict__.get("generators", {}).items()}
        return {**inspect.unwrap(Optimizer.state_dict)(self), "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generators"})
        for p, state in self.state.items():
            if p.dtype == torch.bfloat16 and torch.is_tensor(state.get("step")):
                state["step"] = state["step"].cpu()  # a fused group had it moved, and reading it there would wait
        self.__dict__["generators"] = {}
        for kind, bits in state_dict.get("generators", {}).items():
            self.generator(torch.device(kind)).set_state(bits.cpu())


class AdamW(Rounding, torch.optim.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) that also trains bfloat16 weights: the update is computed in float32,
    and weights and both moments are stored in bfloat16, rounded up or down at random so that they are right on
    average (https://arxiv.org/abs/2010.06192). Weights of other types take torch's own step."""

    torchs_step = inspect.unwrap(torch.optim.AdamW.step)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads: dict[torch.Tensor, torch.Tensor] = {}
        dice = self.dice()
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype == torch.bfloat16 and p.grad is not None:
                    adamw_step(p, self.state[p], group, group["eps"], dice[p.device.type])
                    grads[p], p.grad = p.grad, None  # torch's step passes it over
        self.torchs_step()
        for p, grad in grads.items():
            p.grad = grad
        return loss


class Muon(Rounding):
    """Muon for the 2-d weights of the blocks, AdamW for all others: embedding, head, norms and biases.

    Muon (https://kellerjordan.github.io/posts/muon/) takes the nearest orthogonal matrix to the momentum as the
    update. A weight that holds several matrices, such as q, k and v, is updated by each of them. bfloat16 weights are
    rounded stochastically.

    Args:
        params: Parameters or groups of them; those with an attribute `row_blocks` are updated by Muon.
        lr: The learning rate.
        weight_decay: Each step takes lr * weight_decay of every weight away.
        momentum: The share of the momentum that stays from one step to the next.
        nesterov: Whether the update looks ahead by one step of the momentum.
        ns_coefficients: Of the polynomial in the Newton-Schulz iteration.
        ns_steps: How often it is iterated.
        eps: The least norm by which a matrix is divided before it.
        adjust_lr_fn: How the update of an m x n matrix is scaled: match_rms_adamw, by 0.2 sqrt(max(m, n)), has the size
            of AdamW's (https://arxiv.org/abs/2502.16982) and takes its learning rates; original, by sqrt(max(1, m/n)).
        betas: AdamW's, for all other weights.
        adamw_eps: AdamW's, for all other weights.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        shares = {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1]}
        wrong = [f"{k} {v} is not at least 0 and below 1" for k, v in shares.items() if not 0 <= v < 1]
        sizes = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "adamw_eps": adamw_eps, "ns_steps": ns_steps}
        wrong += [f"{k} {v} is below 0" for k, v in sizes.items() if v < 0]
        if wrong:
            raise ValueError(", ".join(wrong))
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            ns_steps=ns_steps, eps=eps, adjust_lr_fn=adjust_lr_fn, betas=betas, adamw_eps=adamw_eps,
        )  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dice = self.dice()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and hasattr(p, "row_blocks"):
                    muon_step(p, self.state[p], group, dice[p.device.type])
                elif p.grad is not None:
                    adamw_step(p, self.state[p], group, group["adamw_eps"], dice[p.device.type])
        return loss


def adamw_step(
    p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], eps: float, dice: StochasticRounding
) -> None:
    """One step of AdamW, computed in float32; `p` and its moments keep the dtype of `p`."""
    if not state:
        state["step"] = torch.zeros(())  # on the CPU, as torch has it
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])):
            state[name] = torch.zeros_like(p)
    state["step"] += 1
    step, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
    grad = -p.grad if group.get("maximize") else p.grad  # type: ignore[operator]
    for w, g, m, v, *largest in in_chunks(p, grad, *(t for name, t in state.items() if name != "step")):
        g = g.float()
        new_m = m.float().lerp_(g, 1 - beta1)
        new_v = v.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
        second = new_v if not largest else torch.maximum(new_v, largest[0].float())
        divisor = (second / (1 - beta2**step)).sqrt_().add_(eps)
        new_w = w.float().mul_(1 - lr * group["weight_decay"]).addcdiv_(new_m, divisor, value=-lr / (1 - beta1**step))
        for old, new in ((w, new_w), (m, new_m), (v, new_v), *((old, second) for old in largest)):
            store(old, new, dice)


def in_chunks(*tensors: Optional[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape as views of their rows, about `CHUNK` elements at a time."""
    some = [torch.atleast_1d(local_shard(t)) for t in tensors if t is not None]
    rows = max(1, CHUNK.get(some[0].device.type, CHUNK_ELSEWHERE) // max(1, some[0][:1].numel()))
    return zip(*(t.split(rows) for t in some))


def muon_step(p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], dice: StochasticRounding) -> None:
    """One step of Muon; `p` and its momentum keep the dtype of `p`."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(p)
    grad = local_shard(p.grad).float()  # type: ignore[arg-type]
    momentum = local_shard(state["momentum_buffer"]).float().lerp_(grad, 1 - group["momentum"])
    update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    update = (
        full_tensor(shard_like(p, update)) if is_sharded(p) else update
    )  # a part of a matrix says nothing about its own
    weight = local_shard(p).float().mul_(1 - group["lr"] * group["weight_decay"])
    steps = []
    for u in update.split(p.row_blocks):  # type: ignore[attr-defined]
        m, n = u.shape
        scale = 0.2 * max(m, n) ** 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else max(1, m / n) ** 0.5
        steps.append(orthogonal(u, group["ns_coefficients"], group["ns_steps"], group["eps"]).mul_(scale))
    weight.sub_(torch.cat(steps)[my_rows(p)], alpha=group["lr"])
    for old, new in ((local_shard(p), weight), (local_shard(state["momentum_buffer"]), momentum)):
        for old_part, new_part in in_chunks(old, new):
            store(old_part, new_part, dice)


def orthogonal(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """About the nearest matrix to `x` (m, n) whose singular values are all 1: they are between 0.7 and 1.2.

    The Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/, in bfloat16 on a GPU. float32, (m, n)
    """
    a, b, c = coefficients
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    wide = y if y.size(0) <= y.size(1) else y.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide if y.size(0) <= y.size(1) else wide.T).float()


def store(old: torch.Tensor, new: torch.Tensor, dice: StochasticRounding) -> None:
    """Put the float32 values of `new` into `old`; those of `new` are lost."""
    old.copy_(round_stochastically_(new, dice) if old.dtype == torch.bfloat16 else new)


def round_stochastically_(x: torch.Tensor, dice: StochasticRounding) -> torch.Tensor:
    """float32 to values of bfloat16 in place, up or down at random, with the odds that make the mean exact.

    bfloat16 is the upper half of float32: random lower bits are added, and what does not carry over is cut.
    """
    x.nan_to_num_(math.nan, math.inf, -math.inf)  # a GPU's NaN is all ones, which would carry into the sign
    x.view(torch.int32).add_(dice.throw(x.numel()).view_as(x)).bitwise_and_(-(2**16))
    return x
