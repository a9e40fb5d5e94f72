"""What a run returns to Python."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

from litgpt.train.metrics import ALL, METRICS, lines_until
from litgpt.train.schedule import Result


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run. Losses are in nats per target token.

    Args:
        out_dir: Output folder.
        folder: The model or adapter to use: `best/` in the output folder if that was saved and has a lower validation
            loss than the last step, else `final/`.
        steps: Optimizer steps.
        loss: Training loss of the last step.
        val_losses: Pairs of step and validation loss.
        best: The pair with the lowest validation loss after the first step. None without validation.
        scores: Fraction of exact answers before and after training, if they were counted.
        tokens: Tokens that were read.
        seconds: Seconds of training, without validation.
    """

    out_dir: Path
    folder: Path
    steps: int
    loss: float
    val_losses: list[tuple[int, float]]
    best: Optional[tuple[int, float]]
    scores: list[float]
    tokens: int
    seconds: float

    @classmethod
    def of(cls, result: Result, out_dir: Path, partial: bool = False) -> "TrainingResult":
        """The result in an output folder. `partial` tells whether validations during the run read only some of the
        rows, so that the loss after the last step, of all rows, cannot be compared with them."""
        pairs = [(step, loss) for step, loss in result.val_losses if step and math.isfinite(loss)]
        if partial:
            pairs = [pair for pair in pairs if pair[0] < result.steps] or pairs
        best = min(pairs, key=lambda pair: pair[1], default=None)
        is_earlier = best is not None and best[0] < result.steps and (out_dir / "best").is_dir()
        folder = out_dir / ("best" if is_earlier else "final")
        own = {name: getattr(result, name) for name in ("steps", "loss", "val_losses", "scores", "tokens", "seconds")}
        return cls(out_dir, folder, best=best, **own)

    @classmethod
    def read(cls, out_dir: Path) -> "TrainingResult":
        """The result of an earlier run."""
        result = Result()
        for row in lines_until(out_dir / METRICS, ALL, ALL):
            if row["val_loss"]:
                result.val_losses.append((int(row["step"]), float(row["val_loss"])))
            elif row["loss"]:
                result.steps, result.loss = int(row["step"]), float(row["loss"])
                result.tokens, result.seconds = int(row["tokens"]), float(row["seconds"])
        return cls.of(result, out_dir)

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Pairs of step and training loss."""
        rows = lines_until(self.out_dir / METRICS, ALL, ALL)
        return [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
