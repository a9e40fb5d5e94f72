"""Measure how fast rows become tokens, and how much memory that takes.

    python benchmarks/rows.py --rows 1000000
    python benchmarks/rows.py --tokenizer checkpoints/ORG/MODEL --rows 200000

The rows are short: an instruction of 6 words and an answer of 5. They are read, rendered, tokenized, marked, and
written as in a finetune, once in one process and once in a process per core. For comparison, one thread of the library
`tokenizers` encodes the same texts, already rendered and in memory.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from common import WORDS, machine, publish, run

from litgpt.checkpoint.hub import PICO

CODE = """
import os, sys, time
from pathlib import Path
if sys.argv[3] == "1":
    os.sched_getaffinity = lambda pid: {0}
from litgpt.data.json_file import JSON
from litgpt.text.tokenizer import Tokenizer
folder = Path(sys.argv[1])
tokenizer, data = Tokenizer(folder), JSON(sys.argv[2], val_split_fraction=0)
began = time.perf_counter()
rows = data.load(tokenizer, folder, 512).train
print(time.perf_counter() - began, len(rows), int(rows.lengths.sum()))
"""


def write_rows(path: Path, n: int) -> None:
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            row = {
                "instruction": f"{' '.join(draw.choices(WORDS, k=6))} {i}",
                "output": " ".join(draw.choices(WORDS, k=5)),
            }
            f.write(json.dumps(row) + "\n")


def encode_alone(folder: Path, path: Path) -> float:
    """Seconds in which one thread encodes the rendered texts."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from litgpt.text.prompts import choose_style
    from litgpt.text.tokenizer import Tokenizer

    tokenizer, style = Tokenizer(folder), choose_style("auto", folder)
    texts = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            texts.append(style.render_row(turns).text)
    encode = tokenizer.backend.backend.encode_batch  # type: ignore[union-attr]
    began = time.perf_counter()
    for i in range(0, len(texts), 1000):
        encode(texts[i : i + 1000], add_special_tokens=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=PICO, help="A folder with a tokenizer; by default pico's.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", args.rows)
        found: dict[str, list[float]] = {"one process": [], "all cores": []}
        peak, n_tokens = 0, 0
        for number in range(args.rounds):
            for name, cores in (("one process", 1), ("all cores", 0)):
                cache = str(folder / f"cache-{number}-{cores}")
                command = [sys.executable, "-c", CODE, args.tokenizer, folder / "rows.jsonl", cores]
                measured = run(command, folder / "log", LITGPT_CACHE=cache)
                seconds, _, tokens = measured.output.split()[-3:]
                found[name].append(float(seconds))
                peak, n_tokens = max(peak, measured.peak_memory or 0), int(tokens)
        alone = encode_alone(args.tokenizer, folder / "rows.jsonl")
    one, many = (sorted(seconds)[len(seconds) // 2] for seconds in found.values())
    record = {
        **machine(),
        "rows": args.rows,
        "tokens_per_row": round(n_tokens / args.rows, 1),
        "one_process_rows_per_s": round(args.rows / one),
        "all_cores_rows_per_s": round(args.rows / many),
        "ratio": round(one / many, 2),
        "encode_batch_rows_per_s": round(args.rows / alone),
        "peak_memory": peak,
    }
    publish(record, args.json)


if __name__ == "__main__":
    main()
