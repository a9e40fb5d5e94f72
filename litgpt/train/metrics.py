"""The numbers of a run: `metrics.csv`, and `loss.png` where matplotlib is installed."""

import csv
from pathlib import Path
from typing import Any, Optional

FIELDS = ("step", "epoch", "loss", "lr", "val_loss", "tokens", "seconds", "tokens_per_s", "peak_memory")


class Metrics:
    """Writes a line as soon as there is one.

    Args:
        path: The file, begun anew; None to write nothing (on all ranks but the first).
    """

    def __init__(self, path: Optional[Path]) -> None:
        self.file = open(path, "w", newline="", encoding="utf-8", buffering=1) if path else None  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, FIELDS, lineterminator="\n") if self.file else None
        if self.writer:
            self.writer.writeheader()

    def write(self, **values: Any) -> None:
        """One line. Fields: losses in nats per token, tokens and seconds since the start, memory in bytes."""
        if self.writer:
            self.writer.writerow(values)

    def close(self) -> None:
        if self.file:
            self.file.close()


def plot(metrics: Path, image: Path) -> bool:
    """Draw the losses of a metrics file. Returns whether matplotlib was there to do it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    with open(metrics, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        if points:
            axes.plot(*zip(*points), style, label={"loss": "training", "val_loss": "validation"}[name])
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
    return True
