"""`litgpt plan`: whether a run fits in memory, how long it takes, and which settings change that."""

import copy
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
import yaml

from litgpt.data.batches import Batch, PackedRows
from litgpt.data.data_module import Unit
from litgpt.data.named import Alpaca
from litgpt.data.preferences import make_batch
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED
from litgpt.errors import UserError
from litgpt.methods.quantize import bitsandbytes
from litgpt.model.devices import pick_device
from litgpt.train.args import AUTO, PlanArgs, run_words
from litgpt.train.devices.launch import CONTEXT, pick_strategy, usable_memory
from litgpt.train.memory.predict import Prediction, measure, predict
from litgpt.train.micro_batch import MOST_TOKENS, plan_micro_batch
from litgpt.train.peaks import Peak, find_peak
from litgpt.train.progress import duration
from litgpt.train.schedule import Plan, Result

if TYPE_CHECKING:
    from litgpt.train.run import Run

GIB = 2**30
USABLE = 0.97  # of the memory: the rest is too fragmented to be used
GPUS = {  # GiB, as torch reports them, and the name of the device
    "T4": (14.6, "Tesla T4"),
    "V100 16GB": (15.8, "Tesla V100-SXM2-16GB"),
    "V100 32GB": (31.7, "Tesla V100-SXM2-32GB"),
    "A10G": (22.0, "NVIDIA A10G"),
    "L4": (22.0, "NVIDIA L4"),
    "L40S": (44.4, "NVIDIA L40S"),
    "A100 40GB": (39.4, "NVIDIA A100-SXM4-40GB"),
    "A100 80GB": (79.1, "NVIDIA A100-SXM4-80GB"),
    "H100": (79.1, "NVIDIA H100 80GB HBM3"),
    "H100 PCIe": (79.1, "NVIDIA H100 PCIe"),
    "H100 NVL": (93.1, "NVIDIA H100 NVL"),
    "H200": (139.8, "NVIDIA H200"),
    "B200": (178.3, "NVIDIA B200"),
    "RTX 3090": (23.6, "NVIDIA GeForce RTX 3090"),
    "RTX 4090": (23.5, "NVIDIA GeForce RTX 4090"),
    "RTX 5090": (31.3, "NVIDIA GeForce RTX 5090"),
    "RTX PRO 6000": (94.9, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
}
TITLES = ("weights", "trained", "grads", "optim.", "kept", "temp.")  # of the kinds of memory
Changes = dict[str, Any]


class Target(NamedTuple):
    """The device that a plan is for."""

    name: str
    memory: float  # bytes
    is_gpu: bool
    peak: Optional[Peak] = None  # its throughput, if known
    devices: int = 1  # how many of them

    @property
    def limit(self) -> float:
        """The bytes that a run may allocate."""
        return (self.memory - CONTEXT) * USABLE if self.is_gpu else self.memory

    def fits(self, prediction: Prediction) -> bool:
        return prediction.peak <= self.limit


@dataclass
class Rung:
    """A variation of the run."""

    label: str
    changes: Changes
    prediction: Prediction
    fits: bool


def target_of(gpu: Optional[str], device: torch.device, devices: int = 1) -> Target:
    """What `--gpu` names, such as 24 GB, H100, or 2 x H100; by default the device of this machine, whose memory several
    processes on its CPU share. Raises `UserError` if it is neither an amount of memory nor a known GPU."""
    if gpu is not None and (several := re.fullmatch(r"\s*(\d+)\s*x\s*(.+)", gpu, re.IGNORECASE)):
        return target_of(several[2], device)._replace(devices=int(several[1]))
    if gpu is None:
        there = usable_memory(device, devices)
        if there is None:
            raise UserError("The memory of this machine is unknown. Pass --gpu, for example --gpu '24 GB'.")
        if device.type != "cuda":
            return Target("this machine", there, is_gpu=False)
        name = torch.cuda.get_device_name(device)
        return Target(name, there, True, find_peak(name))
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(G|M|)(?:B|iB)?\s*", gpu, re.IGNORECASE):
        return Target(gpu.strip(), float(match[1]) * (2**20 if match[2].upper() == "M" else GIB), is_gpu=True)
    named = {label for label, names in GPUS.items() if simplified(gpu) in map(simplified, (label, names[1]))}
    named = named or {label for label in GPUS if simplified(gpu) and simplified(label).startswith(simplified(gpu))}
    if len(named) == 1:
        memory, name = GPUS[label := named.pop()]
        return Target(label, memory * GIB, True, find_peak(name))
    if named:
        raise UserError(f"--gpu {gpu!r} is one of several. Choose one: {', '.join(sorted(named))}.")
    raise UserError(f"--gpu {gpu!r} is neither an amount of memory, such as '24 GB', nor one of: {', '.join(GPUS)}.")


def simplified(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())


def plan(run: "Run", args: PlanArgs) -> None:
    """Print what a run needs and which changes make it fit. Only `args.measure` reads weights."""
    with tempfile.TemporaryDirectory(prefix="litgpt-plan-") as folder:
        run.out_dir = Path(folder) / "out"  # an earlier run does not matter
        several = target_of(args.gpu, pick_device(run.accelerator)).devices
        if several > 1 and run.devices == 1:
            run.devices = several
        load(run, args.tokens, is_gpu=args.gpu is not None)
        target = target_of(args.gpu, run.device, run.devices_per_node)
        if target.is_gpu and run.precision is None:
            run.precision_name = default_precision(run, target)
        try:
            rungs = ladder(run, target)
        except RuntimeError as e:  # an operation that has no rule for fake tensors
            raise UserError(f"This run cannot be planned: {str(e).splitlines()[0]}") from e
        measured = measure(run, run.fabric.device) if args.measure else None
    print_plan(run, target, rungs, args)
    if measured is not None:
        predicted = rungs[0].prediction.peak
        print(f"Measured here: {measured:,} bytes; predicted / measured: {predicted / measured:.4f}")
    best = cheapest(rungs)
    if args.apply is not None and best is not None:
        args.apply.write_text(yaml.safe_dump(nested(best.changes)), encoding="utf-8")
        print(f"Written to {args.apply}. Use it with --config.")
    elif args.apply is not None:
        print(f"{args.apply} was not written, because nothing fits.")


def default_precision(run: "Run", target: Target) -> str:
    """What a run without --precision has on this GPU, which is taken for one with bfloat16 if it is not known."""
    if target.peak is not None and not target.peak.bf16:
        return "16-mixed"
    return "bf16-true" if run.is_frozen else "bf16-mixed"


def load(run: "Run", tokens: Optional[int] = None, is_gpu: bool = False) -> None:
    """Check the options of a run and load its rows; or assume rows of this many tokens. `is_gpu` tells whether the plan
    is for a GPU; else it is for the run's device."""
    if tokens is not None:
        run.data = run.data or Alpaca()
    run.check()
    run.pick_devices()
    run.checkpoint, run.last_batch, run.result = None, None, Result()
    plan_micro_batch(run, is_gpu or run.device.type == "cuda")
    if tokens is None:
        run.load()
        return
    if tokens < 2:
        raise UserError(f"--tokens {tokens} must be above 1.")
    run.train_rows = AssumedRows(min(tokens, run.row_limit), run.method.objective.unit)
    run.val_rows, run.dataset = [], SimpleNamespace(style=SimpleNamespace(printed_times=tuple))  # type: ignore[assignment]
    run.plan = Plan(run.train, run.train_rows)


class AssumedRows:
    """1,000 rows of one length, all of whose tokens are trained. A pair is two of them."""

    def __init__(self, tokens: int, unit: Unit = "row") -> None:
        self.tokens, self.unit = tokens, unit
        self.lengths = torch.full((1000,), 2 * tokens if unit == "pair" else tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        ids = torch.zeros(self.tokens, dtype=torch.int32)
        masks = [torch.full((self.tokens,), IN_LOSS | ANSWER | side, dtype=torch.uint8) for side in (0, REJECTED)]
        if self.unit != "row":
            sequences = [(ids, mask) for mask in (masks if self.unit == "pair" else masks[:1])] * len(rows)
            return make_batch(sequences, torch.zeros(len(sequences)), is_empty=False)
        flat = ids.repeat(len(rows)).long()[None]
        return Batch(flat, flat, [self.tokens] * len(rows), flat.numel())

    def longest(self, n: int) -> list[int]:
        return list(range(n))


def ladder(run: "Run", target: Target) -> list[Rung]:
    """The run, and changes that save memory: each alone, then together, until one fits."""
    steps: list[Changes] = []
    if not run.train.activation_checkpointing:
        steps.append({"train.activation_checkpointing": True})
    if run.can_quantize:
        steps.append({"quantize": "bnb.nf4"})
    if not run.is_frozen and not is_small(run) and run.devices_per_node == 1:
        steps.append({"optimizer": "AdamW8bit"})
    together = merged(steps)
    smaller = {"train.micro_batch_size": 1} if run.train.micro_rows > 1 else {}
    offload = {"train.activation_checkpointing": "offload"}
    tries: list[Changes] = [{}, *steps]
    tries += [together] if len(steps) > 1 else []
    tries += [smaller, together | smaller] if smaller else []
    tries.append(together | smaller | offload)
    rungs: list[Rung] = []
    for changes in tries:
        if any(rung.fits for rung in rungs[len(steps) + 1 :]) or changes in [rung.changes for rung in rungs]:
            continue
        rungs.append(rung_of(run, changes, target))
    sharded: Changes = {k: v for k, v in (together | smaller).items() if k not in ("quantize", "optimizer")}
    can_shard = target.is_gpu and run.quantize is None and run.precision_name != "16-mixed"
    for devices in (2, 4, 8):
        if can_shard and devices > run.fabric.world_size and not any(rung.fits for rung in rungs):
            rungs.append(rung_of(run, sharded | {"devices": devices, "strategy": "fsdp"}, target))
    return rungs


def rung_of(run: "Run", changes: Changes, target: Target) -> Rung:
    run = changed(run, changes)
    devices = changes.get("devices", run.fabric.world_size)
    strategy = pick_strategy(run.strategy, run.model, run.precision_name, run.quantize, target.memory)
    prediction = predict(run, target.is_gpu, devices if strategy == "fsdp" else 1)
    return Rung(words(changes) or "this run", changes, prediction, target.fits(prediction))


def largest_micro_batch(run: "Run", rung: Rung, target: Target) -> int:
    """The rows of a micro-batch that auto takes on a GPU with the settings of a rung, whose prediction is for one row:
    memory grows with the tokens."""
    one, two = rung.prediction, rung_of(run, rung.changes | {"train.micro_batch_size": 2}, target).prediction
    per_token = (two.peak - one.peak) / max(1, two.micro_tokens - one.micro_tokens)
    longest = run.train_rows.lengths.sort(descending=True).values
    for n in replace(run.train, micro_batch_size=AUTO).micro_batch_sizes(run.fabric.world_size, largest=None):
        tokens = int(longest[:n].sum())
        if tokens <= MOST_TOKENS and one.peak + per_token * (tokens - one.micro_tokens) <= target.limit:
            return n
    return 1


def is_small(run: "Run") -> bool:
    """Whether the optimizer already stores less than two float32 moments."""
    made = run.optimizer
    return "8bit" in str(getattr(made, "func", made)) or getattr(made, "__name__", "") in ("SGD", "Adafactor")


def merged(steps: list[Changes]) -> Changes:
    return {name: value for step in steps for name, value in step.items()}


def words(changes: Changes) -> str:
    return " ".join(f"--{name} {str(value).lower() if value is True else value}" for name, value in changes.items())


def nested(changes: Changes) -> dict[str, Any]:
    """The changes as the YAML of a config."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        group, _, leaf = name.rpartition(".")
        (found.setdefault(group, {}) if group else found)[leaf] = value
    return found


def changed(run: "Run", changes: Changes) -> "Run":
    run = copy.copy(run)
    for name, value in changes.items():
        if name.startswith("train."):
            run.train = replace(run.train, **{name.removeprefix("train."): value})
        elif name == "optimizer":
            run.optimizer = getattr(bitsandbytes().optim, value)
        else:
            setattr(run, name, value)
    return run


def cheapest(rungs: list[Rung]) -> Optional[Rung]:
    """Of those that fit, the one with the fewest changes of speed."""
    return next((rung for rung in sorted(rungs, key=lambda r: (r.prediction.flops, len(r.changes))) if rung.fits), None)


def print_plan(run: "Run", target: Target, rungs: list[Rung], args: PlanArgs) -> None:
    n_trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    rows, config, first = run.train_rows, run.base_model.config, rungs[0].prediction
    longest = int(rows.lengths.max())
    unit, size = ("GiB", GIB) if first.peak >= GIB else ("MiB", 2**20)
    parameters = f"{counted(run.n_parameters)} parameters, {counted(n_trained)} trained, {run.precision_name}"
    print(f"{config.model_type}, {parameters}; {target.name} ({target.memory / GIB:.1f} GiB)")
    kind = "assumed rows" if isinstance(rows, AssumedRows) else "packs" if isinstance(rows, PackedRows) else "rows"
    tokens = f"{int(rows.lengths.sum()):,} tokens, longest {longest:,}"
    print(f"{len(rows):,} {kind}, {tokens}; largest micro-batch {first.micro_tokens:,}")
    print(f"\n{unit:8}" + "".join(f"{title:>8}" for title in (*TITLES, "peak", "FLOPs", "fits")))
    for rung in rungs:
        numbers = (*rung.prediction.kinds.values(), rung.prediction.peak)
        print(rung.label)
        sizes = "".join(f"{n / size:8.2f}" for n in numbers)
        print(f"{'':8}{sizes}{rung.prediction.flops / first.flops:8.0%}{'yes' if rung.fits else 'no':>8}")
    if run.devices_per_node > 1:
        print("\nThe numbers are those of one of the devices.")
    print(f"\nThe peak of this run is in {first.place}.")
    print(f"A checkpoint takes {first.state / size:.2f} {unit}.")
    if target.is_gpu:
        print(f"CUDA takes about {CONTEXT / GIB:.1f} GiB more, which the last column includes.")
    best = cheapest(rungs)
    if best is not None and target.is_gpu and run.picks_micro_batch:
        n_rows = largest_micro_batch(run, best, target)
        print(f"The table is for micro-batches of one row. With the settings below, auto takes about {n_rows}.")
    print_time(run, target, rungs, args)
    if best is None:
        print(f"Nothing above fits. Try --train.max_seq_length {longest // 2}, a smaller model, or more devices.")
    else:
        command = without_dry_run(run_words.get() or ("litgpt", "finetune", "..."))
        if target.devices > 1 and "--devices" not in command:
            command += ["--devices", str(target.devices)]
        print(f"Run:  {shlex.join(command)} {words(best.changes)}".rstrip())


def without_dry_run(command: Sequence[str]) -> list[str]:
    """A command that runs what it planned."""
    found, follows = list[str](), False
    for word in command:
        name, has_value, _ = word.replace("-", "_").partition("=")
        is_value, follows = follows and word in ("true", "false"), name == "__dry_run" and not has_value
        if name != "__dry_run" and not is_value:
            found.append(word)
    return found


def counted(n: int) -> str:
    return next(f"{n / size:.2f} {unit}" for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1)) if n >= size)


def print_time(run: "Run", target: Target, rungs: list[Rung], args: PlanArgs) -> None:
    """The time of the run with the settings that fit, from its operations and the peak of the device."""
    best = cheapest(rungs)
    rate = None if target.peak is None else (target.peak.bf16 or target.peak.fp16) * 1e12
    if best is None or rate is None or args.utilization is None:
        print("Time: unknown. For an estimate, pass --gpu NAME and --utilization 0.4.")
        return
    devices = best.changes.get("devices", run.devices_per_node)
    speed = devices * rate * args.utilization / best.prediction.flops
    tokens = run.plan.tokens or (run.plan.steps or 0) * run.plan.tokens_per_step
    cost = f", {tokens / speed / 3600 * args.price:,.2f} at {args.price:g} an hour" if args.price else ""
    print(f"Time at {args.utilization:.0%} of the peak: {speed:,.0f} tokens/s, {duration(tokens / speed)}{cost}.")
