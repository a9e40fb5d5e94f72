"""What training minimizes: the cross-entropy of the target tokens, or a loss of preferences between answers.

An objective says what the units of a batch are, turns the losses of its target tokens into sums over units, and keeps
sums for its metrics. The training loop divides by the numbers of units of a step, over all micro-batches and ranks.

Shapes: S sequences, n target tokens, P pairs.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional

import torch
from torch.nn import functional as F

from litgpt.data.batches import Batch, PackedRows, Rows
from litgpt.data.data_module import DataModule, Unit
from litgpt.data.named import or_alpaca
from litgpt.data.preferences import PreferenceBatch, PreferenceRows
from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError
from litgpt.model.devices import to_device
from litgpt.model.gpt import GPT
from litgpt.train.loss import LossModel
from litgpt.train.reference import Mismatches, compute_reference, mismatched_logps, mismatches

if TYPE_CHECKING:
    from litgpt.train.run import Run

PairLoss = Literal["sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "apo_zero"]
Name = Literal["dpo", "orpo", "simpo", "cpo", "kto"]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
ROUNDING = 1e-6  # of log-probabilities, relative
LOGPS = ("logps/chosen", "logps/rejected")


@dataclass(frozen=True)
class PreferenceArgs:
    """Preference training.

    Args:
        loss: Loss of DPO: sigmoid (DPO), robust (labels that are wrong with the probability label_smoothing), ipo,
            hinge (SLiC), sigmoid_norm (log-probabilities per token), or apo_zero.
        beta: Strength of the preference. Smaller values let the model move farther from the reference. SimPO usually
            takes 2.
        label_smoothing: Probability that a pair is the wrong way around, for robust, cpo, and simpo.
        gamma: Margin of simpo, by which the chosen answer should win.
        sft_weight: Weight of the mean negative log-likelihood of the chosen answers, which is added to the loss. By
            default 1 for cpo and orpo, and 0 otherwise.
        desirable_weight: Weight of the desirable answers of kto.
        undesirable_weight: Weight of the undesirable answers of kto.
        reference: Reference model of dpo and kto: start for the model before the first step, with its adapter; base for
            its base without the adapter; or a folder.
    """

    loss: PairLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    sft_weight: Optional[float] = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str = "start"

    def check(self, name: Name) -> None:
        """Raise `UserError` for values that cannot be trained with, and for options without effect."""
        if not self.beta > 0 or not math.isfinite(self.beta):
            raise UserError(f"--preference.beta {self.beta} must be above 0.")
        for option in ("gamma", "sft_weight", "desirable_weight", "undesirable_weight"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--preference.{option} {value} must be at least 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--preference.label_smoothing {self.label_smoothing} must be at least 0 and below 0.5.")
        uses = {
            "loss": name == "dpo",
            "label_smoothing": self.loss == "robust" if name == "dpo" else name in ("cpo", "simpo"),
            "gamma": name == "simpo",
            "sft_weight": name != "kto",
            "desirable_weight": name == "kto",
            "undesirable_weight": name == "kto",
            "reference": name in ("dpo", "kto"),
        }
        for option, used in uses.items():
            if not used and getattr(self, option) != getattr(PreferenceArgs, option):
                more = " with this loss" if name == "dpo" and option == "label_smoothing" else ""
                raise UserError(f"--preference.{option} has no effect on {name}{more}. Remove it.")


class Objective:
    """The cross-entropy of the target tokens.

    Attributes:
        name: Shown on the screen.
        unit: What a row of the data must be.
        metrics: The names of what is measured besides the loss.
    """

    name = ""
    unit: Unit = "row"
    metrics: tuple[str, ...] = ()

    def source(self, data: Optional[DataModule]) -> DataModule:
        """The data of a run, by default Alpaca. Raises `UserError` if the objective needs other data."""
        return or_alpaca(data)

    def rows(self, rows: TokenizedRows, capacity: Optional[int]) -> Rows:
        """What the batch sizes count: rows, or packs of `capacity` tokens."""
        return rows if capacity is None else PackedRows(rows, capacity)

    def counts(self, batches: list[Batch]) -> list[int]:
        """The units of micro-batches: the loss is the sum of its parts, each divided by one of these."""
        return [sum(batch.n_target_tokens for batch in batches)]

    def loss_model(self, gpt: GPT) -> LossModel:
        return LossModel(gpt)

    def prepare(self, run: "Run") -> None:
        """Compute what training needs of the model before the first step."""

    def begin_step(self, run: "Run", rows: list[int]) -> None:
        """Compute what all micro-batches of a step share. `rows` are those of all ranks."""

    def begin_validation(self, run: "Run", rows: list[int]) -> None:
        """The same for a validation on the first rows."""

    def take_sums(self, device: torch.device) -> torch.Tensor:
        """The sums for the metrics of the batches since the last call, float32. Those of all ranks are added up."""
        return torch.zeros(0, device=device)

    def values(self, sums: list[float]) -> dict[str, float]:
        """The metrics from sums over all ranks. A metric that nothing was measured for is missing."""
        return {}

    def describe(self, values: dict[str, float]) -> str:
        """The metrics of a validation in a few words. Empty if there are none."""
        return ""

    def summary(self, values: list[dict[str, float]], perplexities: list[str]) -> dict[str, str]:
        """Lines of the report: from the metrics of all validations, or the perplexities of the first and the last."""
        return {"perplexity": " -> ".join(perplexities)}

    def remarks(self, values: list[dict[str, float]]) -> list[str]:
        """What a user may not expect in the metrics of all validations."""
        return []

    def notes(self, run: "Run") -> list[str]:
        """What a user should know before the first step."""
        return []

    def settings(self) -> dict[str, str]:
        """Lines of the table at the beginning."""
        return {}


class Preference(Objective, ABC):
    """A loss of preferences between answers. Losses are computed in float32.

    Args:
        name: The algorithm.
        args: Its options.
    """

    unit: Unit = "pair"
    needs_reference = False

    def __init__(self, name: Name, args: PreferenceArgs) -> None:
        args.check(name)
        self.name, self.args = name, args
        default = 1.0 if name in ("cpo", "orpo") else 0.0
        self.sft_weight = default if args.sft_weight is None else args.sft_weight
        self.metrics = (*REWARDS, *LOGPS)
        self.collected: list[torch.Tensor] = []
        self.reads_logps = False  # whether the model returns log-probabilities instead of losses

    def source(self, data: Optional[DataModule]) -> DataModule:
        if data is None:
            rows = "pairs of a chosen and a rejected answer" if self.unit == "pair" else "answers with a label"
            raise UserError(f"Missing data. Pass a file with {rows}, such as --data {self.unit}s.jsonl.")
        data.unit = self.unit
        if data.mask_prompt is None and data.train_on is None:
            data.mask_prompt = self.name != "orpo"
        return data

    def rows(self, rows: TokenizedRows, capacity: Optional[int]) -> PreferenceRows:
        if capacity is not None:
            raise UserError(f"--train.pack true does not work with {self.name}. Remove it.")
        return PreferenceRows(rows)

    def counts(self, batches: list[Batch]) -> list[int]:
        n_rows = sum(self.n_rows(batch) for batch in batches)
        n_tokens = sum(batch.n_chosen_tokens for batch in batches if isinstance(batch, PreferenceBatch))
        return [n_rows, n_tokens] if self.sft_weight else [n_rows]

    @abstractmethod
    def n_rows(self, batch: Batch) -> int:
        """The rows of a batch: pairs, or answers with a label."""

    @abstractmethod
    def row_losses(self, logps: torch.Tensor, n_tokens: torch.Tensor, batch: PreferenceBatch) -> torch.Tensor:
        """The loss of each row, (rows,). Collects the sums for the metrics.

        Args:
            logps: The log-probability of each answer, (S,).
            n_tokens: The number of its tokens, (S,).
        """

    def loss_model(self, gpt: GPT) -> LossModel:
        return LossModel(gpt, self)

    def loss(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The parts of the loss, summed over the batch, (parts,), or the log-probability of each answer, (S,).
        `losses` are those of the target tokens, (n,)."""
        assert isinstance(batch, PreferenceBatch)
        logps, n_tokens = batch.summed(-losses * batch.answer), batch.n_answer_tokens
        if self.reads_logps:
            return logps
        parts = [self.row_losses(logps, n_tokens, batch).sum()]
        if self.sft_weight:
            parts.append(self.sft_weight * (losses * (1 - batch.rejected[batch.sequence])).sum())
        return torch.stack(parts)

    def scores(self, logps: torch.Tensor, batch: PreferenceBatch) -> torch.Tensor:
        """The log-probability of each answer, less that under the reference model if there is one, (S,). A difference
        within rounding is 0, so that other micro-batches do not decide which answer wins before the first step."""
        if not self.needs_reference:
            return logps
        scores = logps - batch.reference
        is_noise = scores.abs() <= ROUNDING * batch.reference.abs()
        return torch.where(is_noise, scores - scores.detach(), scores)

    def take_sums(self, device: torch.device) -> torch.Tensor:
        sums = sum(self.collected) if self.collected else torch.zeros(len(self.metrics) + 1, device=device)
        self.collected = []
        assert isinstance(sums, torch.Tensor)
        return sums

    def values(self, sums: list[float]) -> dict[str, float]:
        *sums, n = sums
        return {name: value / n for name, value in zip(self.metrics, sums)} if n else {}

    def describe(self, values: dict[str, float]) -> str:
        accuracy, margin = values.get("rewards/accuracies"), values.get("rewards/margins")
        found = [] if accuracy is None else [f"reward accuracy {accuracy:.1%}"]
        return " | ".join(found if margin is None else [*found, f"margin {margin:.3f}"])

    def summary(self, values: list[dict[str, float]], perplexities: list[str]) -> dict[str, str]:
        ends = [values[0], values[-1]] if len(values) > 1 else values
        names = {"reward accuracy": ("rewards/accuracies", "{:.1%}"), "reward margin": ("rewards/margins", "{:.3f}")}
        return {
            title: " -> ".join(form.format(found[name]) for found in ends if name in found)
            for title, (name, form) in names.items()
        }

    def settings(self) -> dict[str, str]:
        args, loss = self.args, f"{self.args.loss}, " if self.name == "dpo" else ""
        sft = f", plus {self.sft_weight:g} x the loss of the chosen answers" if self.sft_weight else ""
        references = {"start": "the model before the first step", "base": "the base model, without an adapter"}
        reference = references.get(args.reference, args.reference) if self.needs_reference else ""
        return {"preference": f"{loss}beta {args.beta:g}{sft}", "reference": reference}

    def prepare(self, run: "Run") -> None:
        if self.needs_reference:
            compute_reference(run, self)


class Pairs(Preference):
    """A loss of pairs of a chosen and a rejected answer."""

    averages = False  # whether log-probabilities are averages over tokens

    def n_rows(self, batch: Batch) -> int:
        assert isinstance(batch, PreferenceBatch)
        return batch.n_rejected  # each pair has one

    def row_losses(self, logps: torch.Tensor, n_tokens: torch.Tensor, batch: PreferenceBatch) -> torch.Tensor:
        if not batch.n_rejected:  # a rank that has no share of the step
            self.collected.append(logps.new_zeros(len(self.metrics) + 1))
            return logps[:0]
        if self.averages:
            logps = logps / n_tokens
        chosen, rejected = logps[::2], logps[1::2]
        scores = self.scores(logps, batch)
        rewards = self.args.beta * scores.detach()
        margins = rewards[::2] - rewards[1::2]
        columns = [rewards[::2], rewards[1::2], margins, (margins > 0).float(), chosen.detach(), rejected.detach()]
        self.collected.append(torch.stack([*(column.sum() for column in columns), scores.new_full((), len(margins))]))
        return self.pair_losses(scores[::2], scores[1::2], n_tokens[::2], n_tokens[1::2])

    @abstractmethod
    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, n_chosen: torch.Tensor, n_rejected: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each pair, (P,), from the scores of its answers and the numbers of their tokens, each (P,)."""

    def remarks(self, values: list[dict[str, float]]) -> list[str]:
        if len(values) < 2 or self.sft_weight:
            return []
        first, last = values[0], values[-1]
        falls = all(last[name] < first[name] for name in LOGPS)
        if not falls or last["rewards/margins"] <= first["rewards/margins"]:
            return []
        return [
            "Both log-probabilities fell while the margin grew. That is usual. --preference.sft_weight 0.1 holds the "
            "chosen answers up."
        ]


class DPO(Pairs):
    """Direct preference optimization (https://arxiv.org/abs/2305.18290) and losses of its kind, over the scores
    log p(answer) - log p_reference(answer)."""

    needs_reference = True

    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, n_chosen: torch.Tensor, n_rejected: torch.Tensor
    ) -> torch.Tensor:
        beta, smoothing, kind = self.args.beta, self.args.label_smoothing, self.args.loss
        if kind in ("ipo", "sigmoid_norm"):
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        margin = beta * (chosen - rejected)
        if kind == "ipo":  # eq. 17 of https://arxiv.org/abs/2310.12036
            return (chosen - rejected - 1 / (2 * beta)).square()
        if kind == "hinge":  # https://arxiv.org/abs/2305.10425
            return (1 - margin).relu()
        if kind == "apo_zero":  # eq. 7 of https://arxiv.org/abs/2408.06266
            return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
        if kind == "robust":  # https://arxiv.org/abs/2403.00409
            flipped = smoothing * F.logsigmoid(-margin)
            return (flipped - (1 - smoothing) * F.logsigmoid(margin)) / (1 - 2 * smoothing)
        return -F.logsigmoid(margin)


class CPO(Pairs):
    """Contrastive preference optimization (https://arxiv.org/abs/2401.08417), which needs no reference model."""

    margin = 0.0

    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, n_chosen: torch.Tensor, n_rejected: torch.Tensor
    ) -> torch.Tensor:
        logits, smoothing = self.args.beta * (chosen - rejected) - self.margin, self.args.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


class SimPO(CPO):
    """Simple preference optimization (https://arxiv.org/abs/2405.14734): CPO over averages, with a margin."""

    averages = True

    @property
    def margin(self) -> float:  # type: ignore[override]
        return self.args.gamma

    def notes(self, run: "Run") -> list[str]:
        beta = self.args.beta
        return [f"SimPO usually takes --preference.beta 2 to 10. It is {beta:g}."] if beta < 1 else []


class ORPO(Pairs):
    """Odds ratio preference optimization (https://arxiv.org/abs/2403.07691), over averages. The likelihood that is
    added is that of prompts and chosen answers, as in the paper's code."""

    averages = True

    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, n_chosen: torch.Tensor, n_rejected: torch.Tensor
    ) -> torch.Tensor:
        log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
        return -self.args.beta * F.logsigmoid(log_odds)


class KTO(Preference):
    """Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306): single answers, desirable or not.

    The KL divergence from the reference is estimated once per step: over the answers of the step, each after the prompt
    of another row, in the order of the step.
    """

    unit: Unit = "label"
    needs_reference = True

    def __init__(self, name: Name, args: PreferenceArgs) -> None:
        super().__init__(name, args)
        self.metrics = (*REWARDS[:3], *LOGPS, "kl")
        self.kl: Optional[torch.Tensor] = None  # None for a step of one row
        self.kl_reference: dict[str, dict[tuple[int, int], float]] = {}  # of mismatched answers, of train and val

    def n_rows(self, batch: Batch) -> int:
        return len(batch.seqlens) if batch.n_target_tokens else 0

    def notes(self, run: "Run") -> list[str]:
        """The balance of the labels, and the weights that the paper recommends for it (its eq. 8)."""
        found = balance(run.dataset.train, self.args)[0]
        if run.train.global_batch_size == 1:
            found.append("With --train.global_batch_size 1, the KL divergence is not estimated and counts as 0.")
        return found

    def begin_step(self, run: "Run", rows: list[int]) -> None:
        self.kl = self.estimate(run, "train", run.train_rows, mismatches(rows))

    def begin_validation(self, run: "Run", rows: list[int]) -> None:
        self.kl = self.estimate(run, "val", run.val_rows, mismatches(list(range(len(run.val_rows))))[: len(rows)])

    def estimate(self, run: "Run", name: str, rows: Rows, pairs: Mismatches) -> Optional[torch.Tensor]:
        """The KL divergence, a scalar of at least 0. None if there are no pairs. After an extension of the run, a few
        pairs were not foreseen and do not count."""
        known = self.kl_reference.get(name, {})
        pairs = [pair for pair in pairs if pair in known]
        if not pairs:
            return None
        logps = mismatched_logps(run, run.fabric_model, self, rows, pairs)
        reference = torch.tensor([known[pair] for pair in pairs])
        return (logps - to_device(logps.device, reference)[0]).mean().clamp(min=0)

    def row_losses(self, logps: torch.Tensor, n_tokens: torch.Tensor, batch: PreferenceBatch) -> torch.Tensor:
        kl = logps.new_zeros(()) if self.kl is None else self.kl
        if not batch.n_target_tokens:
            self.collected.append(logps.new_zeros(7))
            return logps[:0]
        bad, good = batch.rejected, 1 - batch.rejected
        scores = self.scores(logps, batch)
        rewards, n = self.args.beta * scores.detach(), float(len(scores))
        columns = [rewards * good, rewards * bad, logps.detach() * good, logps.detach() * bad, good, bad]
        self.collected.append(torch.stack([*(column.sum() for column in columns), n * kl]))
        weights = self.args.desirable_weight * good + self.args.undesirable_weight * bad
        return weights * torch.sigmoid(self.args.beta * (kl - scores) * (good - bad))

    def values(self, sums: list[float]) -> dict[str, float]:
        good_rewards, bad_rewards, good_logps, bad_logps, n_good, n_bad, kl = sums
        found = {"kl": kl / (n_good + n_bad)} if n_good + n_bad else {}
        if n_good:
            found |= {"rewards/chosen": good_rewards / n_good, "logps/chosen": good_logps / n_good}
        if n_bad:
            found |= {"rewards/rejected": bad_rewards / n_bad, "logps/rejected": bad_logps / n_bad}
        if n_good and n_bad:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


OBJECTIVES: dict[Name, type[Preference]] = {"dpo": DPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO, "cpo": CPO}


def balance(rows: TokenizedRows, args: PreferenceArgs) -> tuple[list[str], dict[str, float]]:
    """Notes about the numbers of desirable and undesirable answers, and the weight that balances them by its option."""
    n_bad = int(rows.is_rejected().sum())
    n_good = len(rows) - n_bad
    found = [f"Labels: {n_good:,} desirable and {n_bad:,} undesirable answers."]
    if not n_good or not n_bad:
        return [*found, "One kind of answers alone teaches little. Add answers of the other kind."], {}
    good, bad = args.desirable_weight * n_good, args.undesirable_weight * n_bad
    if not good or not bad or 0.99 <= good / bad <= 4 / 3:  # the weight below is rounded
        return found, {}
    option, weight = ("desirable", bad / n_good) if n_good < n_bad else ("undesirable", good / n_bad)
    weight = float(f"{weight:.3g}")
    found.append(f"To balance them, pass --preference.{option}_weight {weight:g}.")
    return found, {f"{option}_weight": weight}


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, without NaN or infinity in the value or the gradient (Mächler, "Accurately computing
    log(1 - exp(-|a|))", 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    near_0, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-near_0.expm1()).log(), (-far.exp()).log1p())
