"""The learning rate over a run."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int, total: float, warmup: float, peak: float, least: float, schedule: Schedule = "cosine"
) -> float:
    """The rate of optimizer step `step`, counted from 0.

    It rises linearly over the first `warmup` steps, the last of which has the full rate. Then it follows a cosine
    (https://arxiv.org/abs/1608.03983) or a line from `peak` towards `least`, which it has from step `total` on, or it
    stays constant at `peak`. Both numbers of steps may be estimates, which are no whole numbers, or infinite.
    """
    if step < warmup:
        return peak * min(step + 1, warmup) / warmup if warmup < math.inf else 0.0
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[schedule]
    return least + (peak - least) * left
