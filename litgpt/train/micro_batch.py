"""The memory dry run: whether the largest micro-batch fits in memory, and the largest size that does."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from litgpt.data.batches import Batch
from litgpt.model.sharded import local_shard
from litgpt.train.devices.launch import usable_memory
from litgpt.train.faults import is_out_of_memory
from litgpt.train.loop import sum_over_ranks
from litgpt.train.memory.bound import upper_bound
from litgpt.train.resume.state import MICRO_BATCH

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from litgpt.train.run import Run

LARGEST_ON_CPU = 8  # rows of a micro-batch whose size the run picks
MOST_TOKENS = 2**16  # in such a micro-batch: more would not be faster
USABLE = 0.9  # of the free memory of a GPU, where one row must tell how many fit


def settle_micro_batch(run: "Run") -> None:
    """Run the largest micro-batch, unless it is sure to fit, so that a run that needs too much memory fails at once. Of
    several sizes, take the first one that fits on all devices."""
    device = run.fabric.device
    *larger, smallest = run.micro_batch_sizes
    if larger:  # processes may have different amounts of memory
        *larger, smallest = run.fabric.broadcast(sizes_to_try(run))
    if larger and run.sharing == "fsdp" and device.type == "cuda":
        larger, smallest = [], likely_to_fit(run, [*larger, smallest])
    if not any(fits(run, size) for size in larger):
        run.train = replace(run.train, micro_batch_size=smallest)
        if larger or not is_sure_to_fit(run, smallest):
            dry_run(run, smallest)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of sizes that did not fit
    run.saver.settings[MICRO_BATCH] = run.train.micro_batch_size


def plan_micro_batch(run: "Run", is_gpu: bool) -> None:
    """Use the size that a CPU would take, without running anything; for a GPU, one row: if that does not fit, nothing
    does."""
    if len(run.micro_batch_sizes) > 1:
        largest = 1 if is_gpu else LARGEST_ON_CPU
        run.use_micro_batch([n for n in run.micro_batch_sizes if n <= largest])


def sizes_to_try(run: "Run") -> list[int]:
    """Of several sizes, those that are worth it and the smallest. A CPU tries only what fits for sure: a system that is
    out of memory kills the run without an error."""
    *larger, smallest = run.micro_batch_sizes
    longest = run.train_rows.lengths.sort(descending=True).values
    larger = [n for n in larger if int(longest[:n].sum()) <= MOST_TOKENS]
    return [*(n for n in larger if run.device.type == "cuda" or is_sure_to_fit(run, n)), smallest]


def is_sure_to_fit(run: "Run", size: int) -> bool:
    """Never on a GPU, whose memory other programs may take."""
    memory = None if run.device.type == "cuda" else usable_memory(run.device, run.devices_per_node)
    return memory is not None and upper_bound(run, size) <= memory


def fits(run: "Run", size: int) -> bool:
    """Whether all devices have the memory for a micro-batch of this size."""
    failed = False
    try:
        dry_run(run, size)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        failed = True
    if failed:  # here, where the error no longer holds the activations
        run.fabric_optimizer.zero_grad()
        if run.fabric.device.type == "cuda":
            torch.cuda.empty_cache()
    n_failed = sum_over_ranks(run.fabric, torch.tensor(float(failed), device=run.fabric.device))
    return not float(n_failed)


def likely_to_fit(run: "Run", sizes: list[int]) -> int:
    """The largest size that fits on all devices if each row takes as much memory as the longest one. Devices that share
    the weights cannot try: they would wait for the one that ran out of memory."""
    device = run.fabric.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    dry_run(run, 1)
    row = torch.cuda.max_memory_allocated(device) - before
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
    rows = run.fabric.all_reduce(torch.tensor(USABLE * free / row, device=device), reduce_op="min")
    return next((n for n in sizes if n <= float(rows)), 1)  # type: ignore[arg-type]


def dry_run(run: "Run", size: int) -> None:
    """Run the largest micro-batch of this size. If there are several sizes, as it is run later: with the gradients of
    another one and the moments of the optimizer in memory."""
    run.train = replace(run.train, micro_batch_size=size)
    run.last_batch = run.train_rows.batch(run.train_rows.longest(size))
    optimizer, picks, moments = run.saver.optimizer, len(run.micro_batch_sizes) > 1, []
    if picks and not optimizer.state:
        weights = [local_shard(p) for group in optimizer.param_groups for p in group["params"]]
        moments = [torch.empty_like(weight) for weight in weights for _ in range(2)]
    several = picks and run.train.global_batch_size > size * run.fabric.world_size
    batch = run.last_batch.to(run.fabric.device)
    memory_dry_run(run.fabric, run.fabric_model, run.fabric_optimizer, batch, 2 if several else 1)
    run.method.objective.take_sums(run.fabric.device)  # which are not those of a step
    del moments


def memory_dry_run(fabric: "Fabric", model: Any, optimizer: Optimizer, batch: Batch, times: int = 1) -> None:
    """Run a micro-batch forward and backward and discard the gradients. The random state stays as it was."""
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    for _ in range(times):
        with torch.random.fork_rng(devices), fabric.no_backward_sync(model):
            fabric.backward(model(batch).sum() / max(1, batch.n_target_tokens))
    optimizer.zero_grad()
