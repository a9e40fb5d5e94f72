"""Medians and ratios of the lines of JSON that `compare.sh` collects, as a Markdown table: medians.py FILE

Ratios are ours over theirs: of speed above 1 where we are faster, of memory below 1 where we need less.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

OURS = "this project"
HEAD = "| method | precision | program | rounds | real tokens/s | ours / theirs | peak memory | ours / theirs |"


def median(records: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if r[key] is not None]
    return statistics.median(values) if values else None


def ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours is not None and theirs else "-"


def table(records: list[dict[str, Any]]) -> str:
    """A row for each program in each case, in the order in which they were run."""
    cases: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    for r in records:
        programs = cases.setdefault((r["method"], r["precision"]), {})
        programs.setdefault(f"{r['program']} {r['version']}", []).append(r)
    lines = [HEAD, "|---|---|---|---:|---:|---:|---:|---:|"]
    for (method, precision), programs in cases.items():
        own = [r for runs in programs.values() for r in runs if r["program"] == OURS]
        for name, runs in programs.items():
            other = runs[0]["program"] != OURS
            speed, memory = (median(runs, key) for key in ("tokens_per_s", "peak_memory"))
            lines.append(
                f"| {method} | {precision} | {name} | {len(runs)} | {speed:,.0f} | "
                f"{ratio(median(own, 'tokens_per_s'), speed) if other else ''} | "
                f"{f'{memory / 1e9:.2f} GB' if memory is not None else 'not measured'} | "
                f"{ratio(median(own, 'peak_memory'), memory) if other else ''} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print(table([json.loads(line) for line in lines if line.strip()]))
