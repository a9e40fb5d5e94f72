"""Measure decoding: tokens per second for one prompt and for several at once, beside the model's products alone.

    python benchmarks/generate.py --precision bf16-true
    python benchmarks/generate.py --model checkpoints/ORG/MODEL --prompts 8 --new_tokens 128

Decoding one prompt is a sequence of products of every weight with one vector; "products alone" runs those and nothing
else, with torch's `F.linear` and as the model that answers does (litgpt/model/linear.py), in turn with decoding, so
that all have the same machine. Prompts are random tokens, prompts are read before the clock starts. Each figure is
the median of the rounds.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import add_model_flags, machine, publish
from prepare import write_random_model

from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.model.gpt import GPT
from litgpt.model.linear import linear


def products_alone(model: GPT, product: Callable, steps: int) -> float:
    """Passes of one vector through every linear layer, per second."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    vectors = [torch.randn(1, layer.in_features, dtype=model.dtype, device=model.device) for layer in layers]
    began = time.perf_counter()
    for _ in range(steps):
        for layer, x in zip(layers, vectors):
            product(x, layer.weight, layer.bias)
    return steps / (time.perf_counter() - began)


def decoding(model: GPT, prompts: int, length: int, steps: int) -> float:
    """Tokens per second of all prompts together, after these were read."""
    draw = random.Random(0)
    engine = Engine(model, prompts)
    for _ in range(prompts):
        ids = [draw.randrange(3, model.config.padded_vocab_size) for _ in range(length)]
        engine.submit(Request(ids, steps + 1))
    while any(not text.ids for text in [*engine.waiting, *filter(None, engine.rows)]):
        engine.step()
    began = time.perf_counter()
    for _ in range(steps - 1):
        engine.step()
    return (steps - 1) * prompts / (time.perf_counter() - began)


@torch.no_grad()
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A model folder; by default a random model is made.")
    parser.add_argument("--precision", default="bf16-true", help="bf16-true (the default), 32-true, ...")
    parser.add_argument("--prompts", type=int, default=8, help="How many at once (8).")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="Tokens of a prompt (32).")
    parser.add_argument("--new_tokens", type=int, default=64, help="Tokens of an answer (64).")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_random_model(Path(folder), args)
        plain = InferenceModel.open(args.model or Path(folder), precision=args.precision).model
        model = InferenceModel.open(args.model or Path(folder), precision=args.precision).prepare().model
        measures: dict[str, Callable[[], float]] = {
            "f_linear": lambda: products_alone(plain, torch.nn.functional.linear, args.new_tokens),
            "products": lambda: products_alone(model, linear, args.new_tokens),
            "one": lambda: decoding(model, 1, args.prompt_tokens, args.new_tokens),
            "many": lambda: decoding(model, args.prompts, args.prompt_tokens, args.new_tokens),
        }
        for measure in measures.values():
            measure()
        rounds = [{name: measure() for name, measure in measures.items()} for _ in range(args.rounds)]
    found = {name: statistics.median(r[name] for r in rounds) for name in measures}
    print(f"products alone, F.linear  {found['f_linear']:8.1f} passes/s")
    print(f"products alone, our own   {found['products']:8.1f} passes/s")
    shares = [found["one"] / found[name] for name in ("f_linear", "products")]
    times = found["many"] / found["one"]
    shares_of = f"{shares[0]:.2f} of F.linear's, {shares[1]:.2f} of our own's"
    print(f"one prompt                {found['one']:8.1f} tokens/s, {shares_of}")
    print(f"{args.prompts:<2} prompts                {found['many']:8.1f} tokens/s, {times:.2f} of one")
    settings = {name: getattr(args, name) for name in ("precision", "prompts", "prompt_tokens", "new_tokens")}
    publish({"program": "this project", **machine(), **settings, **found}, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
