"""Optimizers: AdamW with stochastic rounding for bfloat16 weights, Muon, and the short names of other classes."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.model.sharded import full_tensor, is_sharded, local_shard, my_rows, shard_like

OPTIMIZERS = {  # module: the classes with a short name
    "torch.optim": "Adadelta Adafactor Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD",
    "bitsandbytes.optim": "Adam8bit AdamW8bit PagedAdam PagedAdam8bit PagedAdamW PagedAdamW8bit Lion Lion8bit "
    "PagedLion PagedLion8bit AdEMAMix AdEMAMix8bit PagedAdEMAMix PagedAdEMAMix8bit LAMB LAMB8bit LARS LARS8bit "
    "Adagrad8bit RMSprop8bit SGD8bit",
    "litgpt.train.optimizers": "Muon",
}
SHORT_NAMES = {name: f"{module}.{name}" for module, names in OPTIMIZERS.items() for name in names.split()}
UNSHARDED = ("Adafactor", "Rprop")  # torch's; they fail on sharded weights
# Elements per update: limits the memory of float32 copies. On a CPU they should fit in the cache.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**24


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of a model's trained weights, one per learning rate: a parameter's attribute `lr_ratio`
    (default 1) multiplies it. The matrices of the blocks get an attribute `row_blocks` for `Muon`."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}  # sharded and other weights cannot share a group
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((getattr(parameter, "lr_ratio", 1.0), is_sharded(parameter)), []).append(parameter)
            if name.startswith("transformer.h.") and parameter.ndim == 2:
                module, _, leaf = name.rpartition(".")
                parameter.row_blocks = row_blocks(model.get_submodule(module), leaf, parameter)  # type: ignore
    return [{"params": parameters, "lr_ratio": ratio} for (ratio, _), parameters in groups.items()]


def row_blocks(module: nn.Module, name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """The numbers of rows of the matrices that are stacked in a weight, such as q, k and v."""
    if name in ("lora_A", "lora_B"):
        found = tuple((a if name == "lora_A" else b).size(0) for _, a, b in module.blocks())  # type: ignore[operator]
    else:
        found = getattr(module, "parts", ())
    return found if sum(found) == weight.size(0) else (weight.size(0),)


def ours(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Replace torch's AdamW, as a class or within a `partial` from jsonargparse, by `AdamW`. Creating torch's would
    import its compiler."""
    if isinstance(make, partial):
        return partial(ours(make.func), *map(ours, make.args), **make.keywords)
    return AdamW if make is torch.optim.AdamW else make


def finished(optimizer: Optimizer, seed: int, fuse: bool = True) -> Optimizer:
    """The optimizer to train with.

    torch's AdamW becomes `AdamW`, on float32 weights fused unless `fuse` is False (scaled gradients could not be
    clipped then), which is several times faster. Our optimizers get the seed, so that all devices round alike.
    """
    if type(optimizer) is torch.optim.AdamW:  # created by a function, where `ours` does not find it
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
    name, lines = type(optimizer).__name__, []
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    rounded = {torch.bfloat16} if isinstance(optimizer, Rounding) else set()
    if half := dtypes & {torch.bfloat16, torch.float16} - rounded:
        kinds = " and ".join(sorted(str(d).removeprefix("torch.") for d in half))
        lines.append(
            f"{name} rounds {kinds} weights to the nearest value, which may lose small updates. Use --precision "
            "32-true, or AdamW with bf16-true."
        )
    if getattr(optimizer, "is_paged", False) and device.type != "cuda":
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported")  # replaced by this note
        lines.append(f"{name} does not page on {device.type}; the results are the same.")
    return lines


class StochasticRounding:
    """Random 16-bit numbers, on a CPU ten times as fast as torch's generator.

    There, each lane is a linear congruential generator modulo 2^32 with the multiplier of PCG
    (https://www.pcg-random.org); it yields the upper half of its state. torch's generator seeds the lanes, so that
    numbers are uniform and lanes are independent. Each optimizer step uses a new instance, so that steps are
    independent too.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.lanes = torch.empty(0, dtype=torch.int32, device=generator.device)

    def draw(self, n: int) -> torch.Tensor:
        """n numbers from 0 to 65,535: (n,), int32"""
        if self.generator.device.type != "cpu":  # one kernel
            drawn = torch.empty(n, dtype=torch.int32, device=self.generator.device)
            return drawn.random_(0, 2**16, generator=self.generator)
        if (missing := n - len(self.lanes)) > 0:
            device, ends = self.generator.device, (-(2**31), 2**31)
            more = torch.randint(*ends, (missing,), generator=self.generator, device=device, dtype=torch.int32)
            self.lanes = torch.cat([self.lanes, more])
        return (self.lanes[:n].mul_(747796405).add_(1) >> 16).bitwise_and_(2**16 - 1)


def check_sharded(optimizer: Optimizer) -> None:
    """Raise `UserError` if the weights are sharded and the optimizer does not support that."""
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    name = type(optimizer).__name__
    if sharded and (name in UNSHARDED or type(optimizer).__module__.startswith("bitsandbytes")):
        raise UserError(f"--optimizer {name} does not support sharded weights. Use AdamW, or --strategy ddp.")


class Rounding(Optimizer):
    """The base of optimizers with stochastic rounding: keeps a random generator per device type, also in `state_dict`.

    torch's decorators exclude its methods from compilation, for which they import the compiler. Unwrapping them saves a
    quarter of the time to the first step.
    """

    seed: int = 0
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generators: dict[str, torch.Generator] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what copies an optimizer; torch passes on only the fields that it knows."""
        super().__setstate__(state)
        self.__dict__.setdefault("generators", {})

    def generator(self, device: torch.device) -> torch.Generator:
        if device.type not in self.generators:
            self.generators[device.type] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device.type]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        devices = {p.device.type: p.device for group in self.param_groups for p in group["params"]}
        self.update({kind: StochasticRounding(self.generator(device)) for kind, device in devices.items()})
        return loss

    def update(self, rounding: dict[str, StochasticRounding]) -> None:
        """Update all parameters that have a gradient, with the rounding of their device type."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        states = {kind: g.get_state() for kind, g in self.generators.items()}
        return {**inspect.unwrap(Optimizer.state_dict)(self), "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generators"})
        for p, state in self.state.items():
            if p.dtype == torch.bfloat16 and torch.is_tensor(state.get("step")):
                # loading moves it in fused groups; reading it there would synchronize
                state["step"] = state["step"].cpu()
        self.generators = {}
        for kind, bits in state_dict.get("generators", {}).items():
            self.generator(torch.device(kind)).set_state(bits.cpu())


class AdamW(Rounding, torch.optim.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) that also trains bfloat16 weights: it computes the update in float32 and
    stores weights and moments in bfloat16 with stochastic rounding (https://arxiv.org/abs/2010.06192). For other dtypes
    it is torch's."""

    step_of_torch = inspect.unwrap(torch.optim.AdamW.step)

    def update(self, rounding: dict[str, StochasticRounding]) -> None:
        grads: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            rounded = [p for p in group["params"] if p.dtype == torch.bfloat16 and p.grad is not None]
            adamw_step(rounded, self.state, group, group["eps"], rounding)
            for p in rounded:
                grads[p], p.grad = p.grad, None  # torch's step skips it
        self.step_of_torch()
        for p, grad in grads.items():
            p.grad = grad


class Muon(Rounding):
    """Muon for the matrices of the blocks, AdamW for all other weights: embedding, head, norms and biases.

    Muon (https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum; in a weight that stacks several
    matrices, such as q, k and v, each on its own. bfloat16 weights are rounded stochastically.

    Args:
        params: Parameters or parameter groups; Muon updates those with an attribute `row_blocks`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay; each step multiplies all weights by 1 - lr * weight_decay.
        momentum: Decay rate of the momentum.
        nesterov: Use Nesterov momentum.
        ns_coefficients: Coefficients of the polynomial in the Newton-Schulz iteration.
        ns_steps: Number of Newton-Schulz iterations.
        eps: Minimum norm that a matrix is divided by before the iteration.
        adjust_lr_fn: Scale of the update of an m x n matrix. match_rms_adamw, 0.2 sqrt(max(m, n)), matches AdamW and
            works with its learning rates (https://arxiv.org/abs/2502.16982); original is sqrt(max(1, m/n)).
        betas: AdamW's betas for all other weights.
        adamw_eps: AdamW's eps for all other weights.

    Raises:
        ValueError: a value is out of range.
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
        rates = {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1]}
        wrong = [f"{k} must be at least 0 and below 1, got {v}" for k, v in rates.items() if not 0 <= v < 1]
        sizes = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "adamw_eps": adamw_eps, "ns_steps": ns_steps}
        wrong += [f"{k} must be at least 0, got {v}" for k, v in sizes.items() if v < 0]
        if wrong:
            raise ValueError(", ".join(wrong))
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            ns_steps=ns_steps, eps=eps, adjust_lr_fn=adjust_lr_fn, betas=betas, adamw_eps=adamw_eps,
        )  # fmt: skip
        super().__init__(params, defaults)

    def update(self, rounding: dict[str, StochasticRounding]) -> None:
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for p in (p for p in updated if hasattr(p, "row_blocks")):
                muon_step(p, self.state[p], group, rounding[p.device.type])
            others = [p for p in updated if not hasattr(p, "row_blocks")]
            adamw_step(others, self.state, group, group["adamw_eps"], rounding)


def adamw_step(
    params: Iterable[torch.Tensor],
    states: dict[torch.Tensor, Any],
    group: dict[str, Any],
    eps: float,
    rounding: dict[str, StochasticRounding],
) -> None:
    """One step of AdamW in float32 for parameters that have a gradient. They and their moments keep their dtype.

    Many of them are updated together, in about ten kernels: copied to float32, updated by torch's kernel, rounded, and
    copied back.
    """
    alike: dict[Any, list[tuple[torch.Tensor, ...]]] = {}
    for p in params:
        state = states[p]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, like torch's
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])):
                state[name] = torch.zeros_like(p)
        state["step"] += 1
        assert p.grad is not None
        tensors = (p.grad, p, *(t for name, t in state.items() if name != "step"))
        alike.setdefault((p.device, p.dtype, int(state["step"])), []).append(tensors)
    options: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay")} | {"eps": eps}
    options |= {name: bool(group.get(name)) for name in ("amsgrad", "maximize")}
    options["beta1"], options["beta2"] = group["betas"]
    for (device, dtype, number), rows in alike.items():
        step = torch.full((), float(number), device=device)
        for bucket in buckets(rows):
            lengths = [part.numel() for part, *_ in bucket]
            flat = torch.empty(len(bucket[0]), sum(lengths), dtype=torch.float32, device=device)
            olds = [part for parts in zip(*bucket) for part in parts]  # gradients, then weights, then each moment
            news = [new for row in flat for new in row.split(lengths)]
            news = [new.view_as(old) for new, old in zip(news, olds)]
            torch._foreach_copy_(news, olds)
            grad, weight, mean, square, *largest = flat
            torch._fused_adamw_([weight], [grad], [mean], [square], largest, [step], **options)
            if dtype == torch.bfloat16:
                round_stochastically_(flat[1:], rounding[device.type])
            torch._foreach_copy_(olds[len(bucket) :], news[len(bucket) :])


def buckets(rows: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Groups of about `CHUNK` elements: views of rows of tensors, in each tuple of the same shape."""
    bucket: list[tuple[torch.Tensor, ...]] = []
    room = 0
    for parts in (parts for tensors in rows for parts in in_chunks(*tensors)):
        if bucket and parts[0].numel() > room:
            yield bucket
            bucket = []
        room = (room if bucket else chunk(parts[0])) - parts[0].numel()
        bucket.append(parts)
    if bucket:
        yield bucket


def in_chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the rows of tensors of the same shape, about `CHUNK` elements at a time."""
    shards = [torch.atleast_1d(local_shard(t)) for t in tensors]
    rows = max(1, chunk(shards[0]) // max(1, shards[0][:1].numel()))
    return zip(*(t.split(rows) for t in shards))


def chunk(tensor: torch.Tensor) -> int:
    return CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)


def muon_step(p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], rounding: StochasticRounding) -> None:
    """One step of Muon in float32. `p` and its momentum keep the dtype of `p`."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(p)
    grad = local_shard(p.grad).float()  # type: ignore[arg-type]
    momentum = local_shard(state["momentum_buffer"]).float().lerp_(grad, 1 - group["momentum"])
    update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    if is_sharded(p):  # orthogonalization needs the full matrix
        update = full_tensor(shard_like(p, update))
    weight = local_shard(p).float().mul_(1 - group["lr"] * group["weight_decay"])
    steps = []
    for u in update.split(p.row_blocks):  # type: ignore[attr-defined]
        m, n = u.shape
        scale = 0.2 * max(m, n) ** 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else max(1, m / n) ** 0.5
        steps.append(orthogonal(u, group["ns_coefficients"], group["ns_steps"], group["eps"]).mul_(scale))
    weight.sub_(torch.cat(steps)[my_rows(p)], alpha=group["lr"])
    for old, new in ((local_shard(p), weight), (local_shard(state["momentum_buffer"]), momentum)):
        for old_part, new_part in in_chunks(old, new):
            store(old_part, new_part, rounding)


def orthogonal(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Approximately the nearest matrix to `x` (m, n) whose singular values are 1; they end up between 0.7 and 1.2.

    The Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/, in bfloat16 on a GPU. Returns float32.
    """
    a, b, c = coefficients
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    wide = y if y.size(0) <= y.size(1) else y.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide if y.size(0) <= y.size(1) else wide.T).float()


def store(old: torch.Tensor, new: torch.Tensor, rounding: StochasticRounding) -> None:
    """Copy the float32 values of `new` to `old`. May overwrite `new`."""
    old.copy_(round_stochastically_(new, rounding) if old.dtype == torch.bfloat16 else new)


def round_stochastically_(x: torch.Tensor, rounding: StochasticRounding) -> torch.Tensor:
    """Round float32 in place to values of bfloat16, up or down at random so that the mean is exact.

    bfloat16 is the upper half of float32: add random lower bits, then truncate.
    """
    x.nan_to_num_(math.nan, math.inf, -math.inf)  # a GPU's NaN is all ones, which would carry into the sign
    x.view(torch.int32).add_(rounding.draw(x.numel()).view_as(x)).bitwise_and_(-(2**16))
    return x
