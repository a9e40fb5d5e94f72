"""Scores models on rows: the loss per target token, the perplexity, and exact answers. Does not need lm-eval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Optional

import torch

from litgpt.data.data_module import DataModule, TokenizedDataset
from litgpt.data.preferences import PreferenceRows
from litgpt.data.tokens import TokenizedRows
from litgpt.evaluation.compare import NORMAL, Difference, normal_interval
from litgpt.methods.model_source import ModelSource, style_folder
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import PrecisionName
from litgpt.model.gpt import GPT
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.examples import expected_answer, greedy_answers
from litgpt.train.loss import LossModel
from litgpt.train.objectives import CPO, PreferenceArgs
from litgpt.train.progress import Screen
from litgpt.train.rows import check_dataset, row_limit

TASK = "rows"  # their name in the results
METRICS = {"loss": False, "perplexity": False, "exact_match": True, "chosen_wins": True}  # and whether higher is better

NAMES = {"exact_match": "exact answers", "chosen_wins": "chosen wins"}  # on the screen


@dataclass
class Scores:
    """The scores of a model.

    Args:
        losses: The loss of each row, summed over its target tokens, in nats.
        counts: The target tokens of each row.
        exact: Whether the greedy answer to a row is that of the row, for the first rows.
        rejected: The loss of the rejected answer of each pair, summed over its tokens, in nats. Empty for other rows.
    """

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean over all target tokens, as in training."""
        return sum(self.losses) / sum(self.counts)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def per_row(self, metric: str) -> list[float]:
        """A value for each row. Their mean is the metric, and the standard error of that is the metric's to first
        order: the loss is a ratio of two sums over rows."""
        if metric == "exact_match":
            return [float(exact) for exact in self.exact]
        if metric == "chosen_wins":
            return [float(win) for win in self.wins()]
        size = fmean(self.counts)
        residuals = [(total - self.loss * n) / size for total, n in zip(self.losses, self.counts)]
        if metric == "loss":
            return [self.loss + r for r in residuals]
        return [self.perplexity * (1 + r) for r in residuals]

    def wins(self) -> list[bool]:
        """Whether the chosen answer of each pair is more likely than the rejected one."""
        return [chosen < rejected for chosen, rejected in zip(self.losses, self.rejected)]

    def gains(self, base: "Scores") -> list[bool]:
        """Whether the chosen answer of each pair gained more over the base than the rejected one did."""
        pairs = zip(self.losses, base.losses, self.rejected, base.rejected)
        return [b - a > d - c for a, b, c, d in pairs]

    def metrics(self) -> dict[str, float]:
        found = {"loss": self.loss, "perplexity": self.perplexity}
        found |= {"exact_match": fmean(self.exact)} if self.exact else {}
        return found | ({"chosen_wins": fmean(self.wins())} if self.rejected else {})


@dataclass
class Options:
    """The rows to score a model on, and the options of a run that determine their tokens and their losses."""

    data: Optional[DataModule] = None
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    precision: Optional[PrecisionName] = None
    quantize: Optional[QuantizeName] = None


class RowScorer:
    """Scores models on the same rows, with the losses of one row at a time. Of pairs it scores the chosen answers, and
    how likely the rejected ones are.

    Args:
        rows: The rows.
        dataset: The data set that they belong to.
        n_answers: How many of the first rows to answer.
        limit: Maximum length of an answer, in tokens.
    """

    def __init__(
        self, rows: TokenizedRows, dataset: TokenizedDataset, tokenizer: Tokenizer, n_answers: int, limit: int
    ) -> None:
        self.rows, self.style, self.tokenizer, self.unit = rows, dataset.style, tokenizer, dataset.unit
        self.n_answers, self.limit = min(n_answers, len(rows)), limit

    @torch.no_grad()
    def score(self, model: GPT, screen: Screen) -> Scores:
        loss_model, scores = LossModel(model), Scores()
        with screen.counting("rows evaluated") as show:
            for row in range(len(self.rows)):
                if self.unit == "pair":
                    self.score_pair(model, row, scores)
                else:
                    batch = self.rows.batch([row])
                    scores.losses.append(float(loss_model(batch.to(model.device))))
                    scores.counts.append(batch.n_target_tokens)
                show(row + 1, len(self.rows))
        with screen.counting("rows answered") as show:
            chosen = range(self.n_answers)
            prompts = [self.rows.prompt(row) for row in chosen]
            answers = greedy_answers(model, self.tokenizer, prompts, self.style, self.limit, show)
            scores.exact = [answers[row] == expected_answer(self.tokenizer, self.rows, row) for row in chosen]
        return scores

    def score_pair(self, model: GPT, row: int, scores: Scores) -> None:
        batch = PreferenceRows(self.rows).batch([row]).to(model.device)
        objective = CPO("cpo", PreferenceArgs())
        objective.reads_logps = True
        chosen, rejected = (-LossModel(model, objective)(batch)).tolist()
        scores.losses.append(chosen)
        scores.rejected.append(rejected)
        scores.counts.append(int(batch.answer[batch.sequence == 0].sum()))


def load_rows(source: ModelSource, data: DataModule, train: TrainArgs, screen: Screen) -> TokenizedDataset:
    """The rows in the style of the model. Raises `UserError` if they cannot be used."""
    folder, config = style_folder(source.folder, source.tokenizer_folder), source.config
    limit = row_limit(train, config, data)
    with screen.counting("rows tokenized") as show:
        dataset = data.load(source.tokenizer(), folder, limit, show, config.block_size)
    check_dataset(dataset, config)
    return dataset


def first(rows: TokenizedRows, limit: Optional[float]) -> TokenizedRows:
    """The first `limit` rows, or this share of them if it is below 1."""
    n = len(rows) if limit is None else limit if limit >= 1 else max(1, round(limit * len(rows)))
    return rows.subset(torch.arange(min(len(rows), int(n))))


def differences(base: Scores, scores: Scores) -> list[Difference]:
    """The differences of the metrics between two models on the same rows."""
    found = []
    for name in scores.metrics():
        before, after = base.per_row(name), scores.per_row(name)
        interval = normal_interval([b - a for a, b in zip(before, after)])
        values = base.metrics()[name], scores.metrics()[name]
        difference = values[1] - values[0]
        found.append(Difference(TASK, name, *values, difference, *interval, len(after), NORMAL, METRICS[name]))
    return found


def as_results(scores: Scores, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of lm-eval's results for a task of that many `rows`."""
    metrics = scores.metrics()
    return {
        "results": {TASK: {"alias": TASK, **{f"{name},none": value for name, value in metrics.items()}}},
        "higher_is_better": {TASK: {name: METRICS[name] for name in metrics}},
        "n-samples": {TASK: {"original": rows, "effective": len(scores.losses)}},
        "config": {"model_dtype": str(dtype)},
    }


def describe(scores: Scores) -> dict[str, str]:
    """The metrics as text."""
    wins = f"{counted(scores.wins())}: more likely than the rejected answer" if scores.rejected else ""
    return {
        "loss": figure(scores.loss),
        "perplexity": figure(scores.perplexity),
        NAMES["exact_match"]: counted(scores.exact),
        NAMES["chosen_wins"]: wins,
    }


def counted(found: list[bool]) -> str:
    """How many are true. Empty for none at all."""
    return f"{sum(found):,} of {len(found):,} ({fmean(found):.1%})" if found else ""


def table(found: Sequence[Difference]) -> str:
    """The differences as text of at most 80 columns."""
    lines = [("", "base", "result", "difference", "95 % interval")]
    for d in found:
        interval = "-"
        if d.low is not None and d.high is not None:
            interval = f"{figure(d.low, '+')} to {figure(d.high, '+')}{' *' * d.clear}"
        name = NAMES.get(d.metric, d.metric)
        lines.append((name, figure(d.base), figure(d.adapter), figure(d.difference, "+"), interval))
    texts = [f" {name:13} {base:>10} {own:>10} {gap:>11}  {interval}" for name, base, own, gap, interval in lines]
    return "\n".join([*texts, *[" * the interval excludes zero"] * any(d.clear for d in found)])


def figure(x: float, sign: str = "") -> str:
    return f"{x:{sign}{'.4f' if abs(x) < 1000 else ',.1f' if abs(x) < 1e6 else '.2e'}}"
