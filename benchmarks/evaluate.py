"""How long `litgpt evaluate` takes beside lm-eval's own class for `transformers`, over the same requests.

    python benchmarks/evaluate.py --model checkpoints/ORG/MODEL [--questions 200] [--batch 16]

Three kinds of requests are made of random words: questions with four answers, the same after five examples, and
sentences in pairs. Only the scoring is timed, after a warm-up; both have the model in float32 and the same threads.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.evaluation.lm import LitGPT
from litgpt.generate.inference_model import InferenceModel

WORDS = "the quick brown fox jumps over a lazy dog and then it runs away from all of them before they see it".split()


def requests(kind: str, n: int) -> list[Instance]:
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    examples = "\n\n".join(f"Question: {words(20, 40)}\nAnswer: {words(2, 6)}" for _ in range(5))
    pairs = []
    for _ in range(n):
        if kind == "pairs":
            begin = words(4, 8)
            pairs += [("", f"{begin} {words(1, 3)}.") for _ in range(2)]
        else:
            before = f"{examples}\n\n" if kind == "five examples" else ""
            question = f"{before}Question: {words(20, 40)}\nAnswer:"
            pairs += [(question, f" {words(2, 6)}") for _ in range(4)]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf = HFLM(
        pretrained=theirs, tokenizer=AutoTokenizer.from_pretrained(args.model), batch_size=args.batch, device=device
    )
    loaded = InferenceModel.open(args.model, precision="32-true")
    programs = {
        f"lm-eval's hf, batch {args.batch}": hf,
        f"ours, batch {args.batch}": LitGPT(loaded, args.batch),
        "ours, auto": LitGPT(loaded),
    }
    for kind in ("four answers", "five examples", "pairs"):
        asked = requests(kind, args.questions)
        answers, best = {}, dict.fromkeys(programs, float("inf"))
        for _ in range(args.rounds):
            for name, lm in programs.items():
                lm.loglikelihood(asked[:8])
                began = time.perf_counter()
                answers[name] = lm.loglikelihood(asked)
                best[name] = min(best[name], time.perf_counter() - began)
        first = next(iter(answers.values()))
        for name, seconds in best.items():
            apart = max(abs(a[0] - b[0]) for a, b in zip(answers[name], first))
            row = {"kind": kind, "program": name, "requests": len(asked), "seconds": round(seconds, 2)}
            line = json.dumps({**row, "largest_difference": float(f"{apart:.1e}")})
            print(line, flush=True)
            if args.json:
                with open(args.json, "a", encoding="utf-8") as f:
                    f.write(line + "\n")


if __name__ == "__main__":
    main()
