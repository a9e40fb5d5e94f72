"""Whether an adapter is better than its base: paired differences of their scores on the same questions."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

from litgpt.errors import UserError

Z = 1.96  # standard deviations around the mean that contain 95 % of a normal distribution
RESAMPLES = 1000
SLOW_RESAMPLES = 100  # for slow metrics, as in lm-eval
NORMAL = "paired normal"  # the method of `Difference` for means
SLOW = ("bleu", "chrf", "chrf++", "ter")


@dataclass
class Difference:
    """A metric of a task with and without the adapter.

    The interval contains the difference with 95 % confidence. It is `paired normal`, from the mean and the standard
    error of the differences of the samples, or, for metrics that are not means, `paired bootstrap`, from resampled
    pairs.
    """

    task: str
    metric: str
    base: float
    adapter: float
    difference: float  # with the adapter minus without it
    low: Optional[float]  # the ends of the interval; None for a single sample
    high: Optional[float]
    n: int  # samples
    method: str
    higher_is_better: Optional[bool]  # None if neither is

    @property
    def clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def drop(self) -> float:
        """How much worse the adapter is, as a share of the base's score; negative if it is better."""
        if self.higher_is_better is None or self.difference == 0:
            return 0.0
        worse = -self.difference if self.higher_is_better else self.difference
        return worse / abs(self.base) if self.base else math.copysign(math.inf, worse)


def compare(
    base: dict[str, Any], adapter: dict[str, Any], tasks: dict[str, Any], groups: dict[str, Any], seed: int
) -> list[Difference]:
    """The differences between two of lm-eval's results for the same tasks and groups, both with their samples."""
    found = []
    for name, task in tasks.items():
        for key in adapter["results"][name]:
            if "," in key and not key.partition(",")[0].endswith("_stderr"):
                found += task_difference(task, name, key, (base, adapter), seed)
    for name, group in groups.items():
        for key in adapter.get("groups", {}).get(name, {}):
            if "," in key and "_stderr" not in key:
                before, after = (float(r["groups"][name][key]) for r in (base, adapter))
                found.append(group_difference(group, key, before, after, found))
    return found


def task_difference(
    task: Any, name: str, key: str, results: tuple[dict[str, Any], dict[str, Any]], seed: int
) -> list[Difference]:
    """The difference of one metric of a task, unless it has no values by sample. `key` has the metric and the filter of
    its answers, as in lm-eval's results, which are without and with the adapter."""
    from lm_eval.api.metrics import mean

    metric, _, kind = key.partition(",")
    base, adapter = (per_sample(r["samples"][name], metric, kind) for r in results)
    if not base:
        return []
    pairs = [(base[i], adapter[i]) for i in sorted(base.keys() & adapter.keys())]
    before, after = (float(r["results"][name][key]) for r in results)
    aggregate = task.aggregation().get(metric, mean)
    if aggregate is mean:
        method, interval = NORMAL, normal_interval([float(b) - float(a) for a, b in pairs])
    else:
        draws = SLOW_RESAMPLES if metric in SLOW else RESAMPLES
        method, interval = "paired bootstrap", bootstrap_interval(pairs, aggregate, draws, seed)
    higher_is_better = task.higher_is_better().get(metric)
    scores = (before, after, after - before)
    return [Difference(name, label(key), *scores, *interval, len(pairs), method, higher_is_better)]


def group_difference(group: Any, key: str, before: float, after: float, found: Sequence[Difference]) -> Difference:
    """The difference of a group's score, which is a mean of the scores of its tasks."""
    names = {task.task_name for task in group.get_all_tasks()}
    parts = [d for d in found if d.task in names and d.metric == label(key)]
    metric = key.partition(",")[0]
    by_size = next((m.weight_by_size for m in group.aggregate_metric_list if m.metric == metric), True)
    total = sum(d.n for d in parts)
    weights = [d.n / total if by_size else 1 / len(parts) for d in parts]
    interval: tuple[Optional[float], Optional[float]] = (None, None)
    halves = [(d.high - d.low) / 2 for d in parts if d.low is not None and d.high is not None]
    if len(halves) == len(parts) and all(d.method == NORMAL for d in parts):
        half = math.sqrt(sum((w * h) ** 2 for w, h in zip(weights, halves)))
        interval = (after - before - half, after - before + half)
    higher_is_better = parts[0].higher_is_better if parts else None
    scores = (before, after, after - before)
    return Difference(group.name, label(key), *scores, *interval, total, NORMAL, higher_is_better)


def label(key: str) -> str:
    """How a metric is shown: without the filter if there is none."""
    return key.removesuffix(",none")


def per_sample(samples: Sequence[dict[str, Any]], metric: str, kind: str) -> dict[int, Any]:
    return {s["doc_id"]: s[metric] for s in samples if s["filter"] == kind and metric in s}


def normal_interval(differences: Sequence[float]) -> tuple[Optional[float], Optional[float]]:
    n = len(differences)
    if n < 2:
        return None, None
    centre = sum(differences) / n
    error = math.sqrt(sum((d - centre) ** 2 for d in differences) / (n - 1) / n)
    return centre - Z * error, centre + Z * error


def bootstrap_interval(
    pairs: Sequence[tuple[Any, Any]], aggregate: Any, draws: int, seed: int
) -> tuple[Optional[float], Optional[float]]:
    """The middle 95 % of the differences of resampled pairs."""
    if len(pairs) < 2:
        return None, None
    rng, found = random.Random(seed), []
    for _ in range(draws):
        resampled = rng.choices(pairs, k=len(pairs))
        found.append(float(aggregate([b for _, b in resampled])) - float(aggregate([a for a, _ in resampled])))
    found.sort()
    tail = round(0.025 * draws)
    return found[tail], found[-1 - tail]


def table(differences: Sequence[Difference]) -> str:
    from pytablewriter import MarkdownTableWriter  # a package of lm-eval's

    rows = []
    for d in differences:
        interval = "-" if d.low is None or d.high is None else f"{d.low:+.4f} to {d.high:+.4f}"
        scores = (f"{d.base:.4f}", f"{d.adapter:.4f}", f"{d.difference:+.4f}", interval + (" *" if d.clear else ""))
        rows.append((d.task, d.metric, *scores, d.n, d.method))
    headers = ["task", "metric", "base", "adapter", "difference", "95 % interval", "n", "interval by"]
    writer = MarkdownTableWriter(headers=headers, value_matrix=rows, type_hints=["str"] * len(headers))  # keeps digits
    return writer.dumps() + "\n* the interval excludes zero"


def as_fields(differences: Sequence[Difference]) -> dict[str, dict[str, Any]]:
    """The metrics of each task, as in `results.json`."""
    found: dict[str, dict[str, Any]] = {}
    for d in differences:
        found.setdefault(d.task, {})[d.metric] = {k: v for k, v in asdict(d).items() if k not in ("task", "metric")}
    return found


def read_share(text: str) -> float:
    """Parse a share such as `2%` or `0.02`. Raises `UserError` for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise UserError(f"--fail_if_drop {text} is not a share of the base's score, such as 2% or 0.02.")
    return share
