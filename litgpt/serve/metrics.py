"""Metrics in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

from litgpt.serve.worker import TokenEvent

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

    def samples(self) -> list[tuple[str, str]]:
        rows = [(f'_bucket{{le="{bound:g}"}}', str(count)) for bound, count in zip(self.bounds, self.counts)]
        return [*rows, ('_bucket{le="+Inf"}', str(self.n)), ("_sum", f"{self.sum:.6f}"), ("_count", str(self.n))]


class Metrics:
    """What the server has done so far. Belongs to the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[tuple[str, str]] = Counter()  # by model and kind
        self.first_token, self.request = Histogram(), Histogram()

    def count(self, events: Iterable[TokenEvent]) -> None:
        """Count what a step of the engine produced."""
        now = asyncio.get_running_loop().time()
        for event in events:
            generation = event.generation
            model, seconds = generation.model, now - generation.began
            self.tokens[model, "answer"] += len(event.tokens)
            if event.tokens and not generation.started:
                generation.started = True
                self.tokens[model, "prompt"] += generation.n_prompt
                self.first_token.add(seconds)
            if event.finish and all(generation.closed) and not generation.ended:
                generation.ended = True
                self.request.add(seconds)

    def text(self, running: int, waiting: int, failures: int, up: bool) -> str:
        """All metrics; those of the engine are given."""
        requests = [
            (f'{{path="{escaped(path)}",status="{status}"}}', str(n))
            for (path, status), n in sorted(self.requests.items())
        ]
        tokens = [
            (f'{{model="{escaped(model)}",kind="{kind}"}}', str(n)) for (model, kind), n in sorted(self.tokens.items())
        ]
        return "".join(
            (
                metric("requests_total", "counter", "Requests by path and status.", requests),
                metric("tokens_total", "counter", "Tokens of prompts and of answers.", tokens),
                metric("texts_running", "gauge", "Sequences that are being decoded.", [("", str(running))]),
                metric("texts_waiting", "gauge", "Sequences that wait.", [("", str(waiting))]),
                metric("engine_up", "gauge", "1 if the model answers, else 0.", [("", f"{up:d}")]),
                metric("engine_failures_total", "counter", "Failures of the engine.", [("", str(failures))]),
                metric("first_token_seconds", "histogram", "Time to the first token.", self.first_token.samples()),
                metric("request_seconds", "histogram", "Time to the end of the answer.", self.request.samples()),
            )
        )


def metric(name: str, kind: str, about: str, samples: Iterable[tuple[str, str]]) -> str:
    """One metric. A sample is what follows the name, and the value."""
    name = f"litgpt_{name}"
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(f"{name}{rest} {value}" for rest, value in samples)]
    return "\n".join(lines) + "\n"


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
