"""The learning rate over a run."""

import math


def learning_rate(step: int, total: int, warmup: int, peak: float, least: float) -> float:
    """The rate of optimizer step `step`, counted from 0.

    It rises linearly over the first `warmup` steps, the last of which has the full rate, then follows a cosine from
    `peak` towards `least`, which it would reach at step `total` (https://arxiv.org/abs/1608.03983).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * share))
