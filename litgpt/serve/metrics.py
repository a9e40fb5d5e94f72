"""Figures in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from collections import Counter
from collections.abc import Sequence

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper bounds of the buckets


class Histogram:
    """How often something took how long."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds, self.counts, self.n, self.sum = bounds, [0] * len(bounds), 0, 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self.sum += value
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound

    def lines(self, name: str) -> list[str]:
        rows = [f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in zip(self.bounds, self.counts)]
        return [*rows, f'{name}_bucket{{le="+Inf"}} {self.n}', f"{name}_sum {self.sum:.6f}", f"{name}_count {self.n}"]


class Metrics:
    """What the server did so far. Belongs to the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[tuple[str, str]] = Counter()  # by model and kind
        self.first, self.whole = Histogram(), Histogram()

    def text(self, running: int, waiting: int, failures: int, up: bool) -> str:
        """Everything.

        Args:
            running: Texts that are decoded at this moment.
            waiting: Texts that wait.
            failures: How often the engine has failed.
            up: Whether it answers.
        """
        lines = head("litgpt_requests_total", "counter", "Requests by path and status.")
        for (path, status), n in sorted(self.requests.items()):
            lines.append(f'litgpt_requests_total{{path="{label(path)}",status="{status}"}} {n}')
        lines += head("litgpt_tokens_total", "counter", "Tokens that were read (prompt) and made (answer).")
        for (model, kind), n in sorted(self.tokens.items()):
            lines.append(f'litgpt_tokens_total{{model="{label(model)}",kind="{kind}"}} {n}')
        lines += [*head("litgpt_texts_running", "gauge", "Texts that are decoded."), f"litgpt_texts_running {running}"]
        lines += [*head("litgpt_texts_waiting", "gauge", "Texts that wait."), f"litgpt_texts_waiting {waiting}"]
        lines += [*head("litgpt_engine_up", "gauge", "1 if the model answers, else 0."), f"litgpt_engine_up {up:d}"]
        lines += head("litgpt_engine_failures_total", "counter", "Failures, each of which ends all requests.")
        lines += [f"litgpt_engine_failures_total {failures}"]
        lines += head("litgpt_first_token_seconds", "histogram", "From the request to its first token.")
        lines += self.first.lines("litgpt_first_token_seconds")
        lines += head("litgpt_request_seconds", "histogram", "From the request to the end of its answer.")
        lines += self.whole.lines("litgpt_request_seconds")
        return "\n".join(lines) + "\n"


def head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
