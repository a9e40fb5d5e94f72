"""Runs on several devices: `python -m tests.ranks FOLDER litgpt-words...` is the command line with two additions.

Each rank writes what it holds when the run ends to FOLDER/rank-N.safetensors, and its number of forwards to
FOLDER/forwards-N; and what the environment variable FAULT names happens: `RANK:STEP:error` raises an error there,
`RANK:STEP:kill` kills the process. With CLOCK each rank has a clock of its own, the faster the higher its number; with
IDLE experts without tokens are not called, so that they have no gradient.
"""

import csv
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from litgpt.errors import UserError
from litgpt.model.sharded import full_tensor


def main() -> None:
    from litgpt.__main__ import main as command
    from litgpt.model import mlp
    from litgpt.train import loop
    from litgpt.train.resume import save

    folder = Path(sys.argv[1])
    final, clip, counts = save.Saver.final, loop.clip, {"steps": 0, "forwards": 0}

    def watched_final(self: Any) -> None:
        rank = self.fabric.global_rank
        weights = {n: full_tensor(p).detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(weights, folder / f"rank-{rank}.safetensors")
        (folder / f"forwards-{rank}").write_text(str(counts["forwards"]))
        final(self)

    def watched_clip(fabric: Any, model: Any, *args: Any) -> torch.Tensor:
        if not counts["steps"]:
            model.register_forward_hook(lambda *_: counts.update(forwards=counts["forwards"] + 1))
        counts["steps"] += 1
        rank, step, what = os.environ.get("FAULT", "-1:0:").split(":")
        if fabric.global_rank == int(rank) and counts["steps"] == int(step):
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("this rank has had enough")
        return clip(fabric, model, *args)

    if "CLOCK" in os.environ:
        ticks = itertools.count()
        speed = 1 + int(os.environ.get("LOCAL_RANK", 0))
        loop.time = SimpleNamespace(perf_counter=lambda: float(next(ticks) * speed))  # type: ignore[assignment]
    if "IDLE" in os.environ:
        forward = mlp.LLaMAMoE.forward

        def idle(self: Any, x: torch.Tensor) -> torch.Tensor:
            self.training = False
            return forward(self, x)

        mlp.LLaMAMoE.forward = idle  # type: ignore[method-assign]
    save.Saver.final, loop.clip = watched_final, watched_clip  # type: ignore[method-assign]
    command(sys.argv[2:])


def start(folder: Path, words: list[str], *launcher: str, **environment: str) -> subprocess.Popen:
    """Begin a run.

    Args:
        launcher: What stands between `python` and `-m`.
    """
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.ranks", str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of it can be ended
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ended(process: subprocess.Popen, code: int = 0, within: float = 120) -> str:
    """What a run printed, once it ended with this code."""
    try:
        text = process.communicate(timeout=within)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its other processes hold the pipe
        raise AssertionError(f"the run did not end: {process.communicate(timeout=10)[0]}") from None
    assert process.returncode == code, text
    return text


def curve(out: Path) -> list[float]:
    """All losses of a run, in the order of its metrics."""
    with open(out / "metrics.csv", newline="") as f:
        return [float(row["loss"] or row["val_loss"]) for row in csv.DictReader(f)]


def alike(folder: Path, ranks: int) -> None:
    """Assert that all ranks hold the same trained weights and ran the model equally often."""
    first = load_file(folder / "rank-0.safetensors")
    for rank in range(1, ranks):
        other = load_file(folder / f"rank-{rank}.safetensors")
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert len({(folder / f"forwards-{rank}").read_text() for rank in range(ranks)}) == 1


if __name__ == "__main__":
    main()
