"""The learning rate of a run that sets none."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """factor * width^exponent, at least `lowest` and at most `highest`"""

    factor: float
    exponent: float
    lowest: float
    highest: float


RULES = {
    "full": Rule(2.0, -1.5, 1e-6, 2e-3),
    "lora": Rule(2.9, -1.2, 1e-4, 2e-2),
    "dora": Rule(2.9, -1.2, 1e-4, 2e-2),
    "rslora": Rule(1.0, -1.2, 3.5e-5, 7e-3),
    "pissa": Rule(0.97, -1.2, 3.3e-5, 6.7e-3),
    "adapter": Rule(15.0, -0.9, 3e-3, 0.2),
    "adapter_v2": Rule(7.5, -0.9, 1.5e-3, 0.06),
}


def default_learning_rate(method: str, width: int) -> float:
    """The peak learning rate of AdamW for a method and the width of a model, with two digits, so that it can be typed.

    The rules of full finetuning and of LoRA were fitted to the best rates for models of width 64 and 128, and to the
    rates that people use at width 4096: 7.6e-6 and 1.3e-4. The optima are flat: a factor of 3 costs 2 to 9 % of the
    validation loss. `tutorials/optimizers.md` has measurements. Those of the adapters are few: short runs at widths 64
    and 128, one seed each, whose best rates were 0.2 and more for `adapter`, and 0.02 to 0.08 for `adapter_v2`. Their
    rules are extrapolated to wider models.

    DoRA takes LoRA's rate. rsLoRA multiplies the updates by sqrt(r) more; from LoRA's default rank of 8 on, the same
    steps need a rate that is lower by sqrt(8), whatever the rank. With PiSSA, both factors start at the size of the
    weights, so that a step changes their product about three times as much.
    """
    rule = RULES[method]
    rate = min(max(rule.factor * width**rule.exponent, rule.lowest), rule.highest)
    return float(f"{rate:.1e}")


def takes_default(optimizer: Callable[..., Any]) -> bool:
    """Whether an optimizer is of Adam's type and has no learning rate. It is a class, or a `partial` with one, as from
    jsonargparse; other functions choose the rate themselves."""
    if isinstance(optimizer, partial):
        return "lr" not in optimizer.keywords and any(map(takes_default, (optimizer.func, *optimizer.args)))
    return isinstance(optimizer, type) and "adam" in optimizer.__name__.lower()
