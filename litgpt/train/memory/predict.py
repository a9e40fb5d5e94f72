"""The memory that a run will need: the run itself, on fake tensors, for two steps of its longest rows.

The first step has no optimizer state in its backward pass; the second has the peak.
"""

import copy
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from litgpt.data.batches import Batch
from litgpt.families.weights import EmptyWeights
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.config import REPEATED, Config
from litgpt.model.gpt import GPT
from litgpt.model.sharded import local_shard
from litgpt.train.base_model import BaseModel
from litgpt.train.devices.one_device import OneDevice
from litgpt.train.flops import flops_per_token, linears, used_share
from litgpt.train.loop import Trainer
from litgpt.train.memory.meter import CPU_BLOCK, CUDA_BLOCK, Meter
from litgpt.train.memory.stand_ins import gpu_kernels
from litgpt.train.metrics import Metrics
from litgpt.train.progress import Screen
from litgpt.train.schedule import Result

if TYPE_CHECKING:
    from litgpt.train.run import Run

KINDS = ("weights", "trained", "gradients", "optimizer", "kept", "temporary")
STEPS = 2
STEPS_NAME = "litgpt: the steps"


@dataclass
class Prediction:
    """The memory of a run, and how much is computed.

    Attributes:
        places: Bytes at the peak of each part of a step, by kind.
        place: The part with the highest peak.
        kinds: The bytes there.
        peak: Their sum.
        micro_tokens: Tokens of the largest micro-batch.
        flops: Of a token, forward and backward, what is computed again included.
        state: Bytes of the trained weights and the optimizer's state on all devices, which a checkpoint holds.
    """

    places: dict[str, dict[str, int]]
    micro_tokens: int
    flops: float
    state: int
    place: str = field(init=False)
    kinds: dict[str, int] = field(init=False)
    peak: int = field(init=False)

    def __post_init__(self) -> None:
        self.place, self.kinds = max(self.places.items(), key=lambda item: sum(item[1].values()))
        self.peak = sum(self.kinds.values())


class Rehearsal(Trainer):
    """The training loop for `STEPS` steps of given micro-batches, without its screen and files."""

    def __init__(self, run: "Run", batches: list[Batch], meter: Meter) -> None:
        super().__init__(run)
        self.batches, self.meter, self.left = batches, meter, STEPS
        self.name_weights()
        run.fabric_model.register_forward_hook(self.name_kept)
        run.saver.optimizer.register_step_pre_hook(self.name_gradients)

    def name_weights(self) -> None:
        gpt, name = self.run.model, self.meter.name
        name("trained", (p for p in gpt.parameters() if p.requires_grad))
        name("weights", gpt.parameters())
        name("weights", (t for m in gpt.modules() if isinstance(m, QuantizedLinear) for t in stored_tensors(m.stored)))
        name("weights", (rope.inverse for rope in gpt.ropes))

    def prepare(self) -> None:
        blocks = self.run.model.transformer.h
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(self.at(f"the forward pass (block {i})"))
            block.register_forward_hook(self.in_backward(f"the backward pass (block {i})"))
        self.run.model.transformer.ln_f.register_forward_pre_hook(self.at("the head"))

    def name_gradients(self, *args: Any) -> None:
        self.meter.name("gradients", (p.grad for p in self.run.model.parameters() if p.grad is not None))
        self.meter.place = "the optimizer"

    def name_kept(self, *args: Any) -> None:
        self.name_gradients()
        self.meter.name_all("kept")
        self.meter.place = "the backward pass of the head"

    def at(self, place: str) -> Any:
        def hook(*args: Any) -> None:
            self.meter.place = place

        return hook

    def in_backward(self, place: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(self.at(place))

        return hook

    def next_step(self) -> Optional[tuple[list[int], list[Batch]]]:
        if not self.left:
            return None
        self.left -= 1
        self.meter.place = "the loss"
        return [0], self.batches

    def should_stop(self) -> bool:
        return False

    def stop(self) -> None:  # type: ignore[override]
        """Go on: a signal that is read is none."""

    def save_checkpoint(self, name: str) -> None:
        """Save nothing."""

    def validate(self, n_rows: Optional[int] = None) -> float:
        return 0.0

    def count_step(self, rows: list[int], began: float) -> None:
        self.result.steps += 1

    def log_step(self, lr: float, n_targets: int, measured: dict[str, float]) -> None:
        self.meter.name("optimizer", stored_tensors(self.optimizer.state))


def stored_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors within dictionaries, lists, tuples, and plain objects."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from stored_tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from stored_tensors(inner)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from stored_tensors(vars(value))


def predict(run: "Run", gpu: bool, devices: int = 1) -> Prediction:
    """The memory of a run whose options are checked and whose rows are loaded, on a GPU or on the CPU. With several
    `devices`, the memory of one of them, if they shard the model.

    Models of many layers are built with fewer: the memory in each part of a step grows by the same amount with each
    period of layers. The highest peak may be in another part than that of the models with fewer layers.
    """
    config = run.base_model.config
    few, many = layers_to_run(config)
    if many == config.n_layer:
        return rehearse(run, config.n_layer, gpu, devices)
    a, b = (rehearse(run, n, gpu, devices) for n in (few, many))
    periods = (config.n_layer - many) / (many - few)

    def extended(x: float, y: float) -> float:
        return y + periods * (y - x)

    small, large = (in_larger_model(p.places, n, few, many - few, config.n_layer) for p, n in ((a, few), (b, many)))
    places = {
        place: {kind: round(extended(small[place][kind], n)) for kind, n in kinds.items()}
        for place, kinds in large.items()
        if place in small
    }
    return Prediction(places, b.micro_tokens, extended(a.flops, b.flops), round(extended(a.state, b.state)))


def in_larger_model(places: dict[str, Any], n_layer: int, first: int, last: int, n_final: int) -> dict[str, Any]:
    """The same with the numbers that the `first` and the `last` blocks have in a model of `n_final` blocks."""
    found: dict[str, Any] = {}
    for place, value in places.items():
        block = re.search(r"(?<=block )\d+", place)
        i = int(block[0]) if block else 0
        numbers = [i] * (i < first) + [i + n_final - n_layer] * (i >= n_layer - last)
        found |= {re.sub(r"(?<=block )\d+", str(n), place): value for n in numbers} if block else {place: value}
    return found


def layers_to_run(config: Config) -> tuple[int, int]:
    """Two numbers of layers from which to extrapolate; the second is all of them if that would save nothing."""
    c, numbers = config, range(config.n_layer)
    kinds = [(c.window(i), c.mlp_class(i), c.rope_kind(i), c.is_recurrent(i)) for i in numbers]
    sums = ((start, total - start) for total in range(1, config.n_layer + 1) for start in range(total))
    start, period = next((s, p) for s, p in sums if all(a == b for a, b in zip(kinds[s:], kinds[s + p :])))
    some = period * math.ceil(3 / period)  # after the first layers, which may differ, as without experts
    return (start + some, start + 2 * some) if start + 2 * some < config.n_layer else (config.n_layer, config.n_layer)


def measure(run: "Run", device: torch.device) -> int:
    """The peak of the same steps, really run on this device: what torch allocated, in bytes."""
    run = as_rehearsed(run)
    run.device = run.fabric.device = device  # type: ignore[misc]
    batches = [batch.to(device) for batch in largest_batches(run)]
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes lines of its own to stderr
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=not on_gpu) as profile:
        run.build()
        trainer = Rehearsal(run, batches, Meter(1))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with torch.profiler.record_function(STEPS_NAME):
            trainer.fit()
    if on_gpu:
        return torch.cuda.max_memory_allocated(device) - before
    total = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        peak = total if event.name() == STEPS_NAME else peak
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def rehearse(run: "Run", n_layer: int, gpu: bool, devices: int = 1) -> Prediction:
    """Build the run's model with this many layers, and train it for `STEPS` steps."""
    run = as_rehearsed(run)
    batches = largest_batches(run)
    run.base_model = shortened(run.base_model, n_layer)
    with torch.device("meta"):
        run.model = GPT(run.base_model.config)
    if run.quantize is not None:
        quantize(run.model, run.quantize, run.device)
    run.method.apply(run.model)
    meter = Meter(CUDA_BLOCK if gpu else CPU_BLOCK)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if devices > 1:
            from litgpt.train.memory.sharded import on_ranks

            stack.enter_context(on_ranks(run, devices, meter))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu_kernels() if gpu else nullcontext())
        stack.enter_context(meter)
        run.build()
        trainer = Rehearsal(run, batches, meter)
        meter.start()
        trainer.fit()
        places = {place: dict.fromkeys(KINDS, 0) | kinds for place, kinds in meter.at_peaks().items()}
        state = sum(life.size for life in meter.alive.values() if life.kind in ("trained", "optimizer"))
        trained = [p for p in run.model.parameters() if p.requires_grad]
        state = state * sum(p.numel() for p in trained) // sum(local_shard(p).numel() for p in trained)
    torch.set_num_threads(threads)
    return Prediction(places, batches[0].ids.numel(), flops_of(run, batches[0]), state)


def flops_of(run: "Run", batch: Batch) -> float:
    """FLOPs of the matmuls per token, forward and backward, those of activation checkpointing included."""
    again = 2 if run.train.activation_checkpointing else 0
    targets = batch.n_target_tokens / batch.ids.numel()
    flops = 0.0
    for name, module in linears(run.model):
        if "lm_head" in name:
            flops += targets * flops_per_token(name, module, run.model)
        else:
            size = module.in_features * module.out_features
            flops += flops_per_token(name, module, run.model) + again * used_share(name, run.model) * size
    return flops


def largest_batches(run: "Run") -> list[Batch]:
    """The micro-batches of a step. Two stand for more: from the second on, gradients are there in the forward pass."""
    n = min(2, -(-run.train.global_batch_size // run.train.micro_rows))
    return [run.train_rows.batch(run.train_rows.longest(run.train.micro_rows))] * n


def shortened(base: BaseModel, n_layer: int) -> BaseModel:
    """The model with its first layers alone, and weights without contents."""
    lists = (*REPEATED, "moe_layers")
    kept = {name: value[:n_layer] for name in lists if (value := getattr(base.config, name)) is not None}
    config = replace(base.config, n_layer=n_layer, **kept)
    folder, dtypes = base.tokenizer_folder, {}  # of random weights
    if base.checkpoint is not None:
        folder, dtypes = base.checkpoint.folder, base.checkpoint.dtypes
    with torch.device("meta"):
        shapes = EmptyWeights(GPT(config), base.fields, folder, dtypes)
    return replace(base, config=config, checkpoint=shapes, adapter=None)


def as_rehearsed(run: "Run") -> "Run":
    """A copy of a run for one device, without screen and files."""

    class Rehearsed(type(run)):  # type: ignore[misc]
        moves_model = False

        def prepare(self) -> None:
            """Compute no reference."""

        def make_saver(self, optimizer: Any) -> Any:
            return SimpleNamespace(optimizer=optimizer)

    run = copy.copy(run)
    run.__class__ = Rehearsed
    run.device, run.compile, run.checkpoint, run.notes = torch.device("cpu"), False, None, []
    run.signals, run.result, run.screen = Quiet(), Result(), Screen(active=False)  # type: ignore[assignment]
    run.metrics = Metrics(None)
    run.sharing, run.offloads, run.devices_per_node = "ddp", False, 1
    run.fabric = Device(run.device, run.precision_name)  # type: ignore[assignment]
    return run


class Device(OneDevice):
    """One device; with mixed precision, which Lightning's Fabric cannot set up on fake tensors."""

    def __init__(self, device: torch.device, precision: str) -> None:
        super().__init__(device)
        self.dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def setup(self, model: nn.Module, optimizer: Optimizer, move_to_device: bool = True) -> tuple[nn.Module, Optimizer]:
        if self.dtype is not None:
            model.forward = torch.autocast(self.device.type, self.dtype)(model.forward)
        return model, optimizer


class Quiet:
    """Signals that never come."""

    code, holds = 0, False
