"""Measure decoding on a GPU: tokens per second after the prompts were read, the time to read them, and peak memory.

    python benchmarks/gpu_decode.py                     # the shape of Llama-3.1-8B, bf16 and nf4, 1 and 16 sequences
    python benchmarks/gpu_decode.py --model smoke       # a tiny shape, on a CPU too

The weights are random, as in `gpu.py`. All sequences are decoded at once by the engine that the commands use, greedily;
each has a prompt of random tokens. The first of two rounds is not timed.
"""

import argparse
import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import gigabytes, machine, publish
from gpu import SMOKE, build, device_facts, timed

import litgpt
from litgpt.generate.engine import Engine, Request
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model.blocks import check_compiler, compile_blocks
from litgpt.model.config import Config
from litgpt.model.devices import DTYPES, peak_memory, pick_device
from litgpt.model.gpt import GPT

METHODS = {"bf16": "base", "nf4": "nf4"}


def requests(n: int, args: argparse.Namespace, vocabulary: int) -> list[Request]:
    ids = torch.randint(vocabulary, (n, args.prompt_tokens), generator=torch.Generator().manual_seed(n))
    return [Request(prompt, args.new_tokens) for prompt in ids.tolist()]


def measure(model: GPT, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: `n` sequences at once."""
    device, prompt_s, decode_s, steps = model.device, 0.0, 0.0, 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        engine = Engine(model, rows=n)
        texts = [engine.submit(request) for request in requests(n, args, model.config.padded_vocab_size)]
        prompt_s = timed(device, lambda engine=engine, texts=texts: run(engine, texts))
        already = sum(len(text.ids) for text in texts)
        decode_s = timed(device, lambda engine=engine, texts=texts: decode(engine, texts))
        steps = sum(len(text.ids) for text in texts) - already
    return {
        "prompt_s": round(prompt_s, 4),
        "tokens": steps,
        "tokens_per_s": round(steps / decode_s, 1),
        "peak_memory": peak_memory(device),
    }


def run(engine: Engine, texts: Iterable[Request]) -> None:
    """Until all prompts were read."""
    while not all(text.ids for text in texts):
        engine.step()


def decode(engine: Engine, texts: Iterable[Request]) -> None:
    """Until the first of them ends: up to then there are as many as at the start."""
    while not any(text.finish for text in texts):
        engine.step()


def weight_bytes(model: GPT) -> int:
    """What a token has to read of the weights: all but the embedding."""
    tensors = [p for name, p in model.named_parameters() if not name.endswith("wte.weight") and not p.is_meta]
    quantized = [w for m in model.modules() if isinstance(m, QuantizedLinear) for w, _ in m.stored]
    return sum(t.numel() * t.element_size() for t in (*tensors, *quantized))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3.1-8B", help="The name of a known model, for its shape; or smoke.")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="Sequences at once (1 and 16).")
    parser.add_argument("--precision", choices=[p for p in DTYPES if not p.startswith("16")], default="bf16-true")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="Tokens of a prompt (512).")
    parser.add_argument("--new_tokens", type=int, default=128, help="Tokens of an answer (128).")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks.")
    parser.add_argument("--json", type=Path, help="A file that the lines of JSON are added to.")
    args = parser.parse_args(argv)
    device = pick_device("auto")
    if device.type != "cuda" and args.model != "smoke":
        sys.exit("There is no GPU here: not measured. --model smoke runs on a CPU.")
    config = Config(**SMOKE) if args.model == "smoke" else Config.from_name(args.model)
    lines = ["| weights | sequences | s to read prompts | tokens/s | peak memory |", "|---|---:|---:|---:|---:|"]
    for method in args.method:
        gc.collect()
        model = build(config, METHODS[method], args.precision, device).eval()
        if args.compile:
            check_compiler(device)
            compile_blocks(model, decoding=True)
        for n in args.batch:
            about = {"case": "decode", "method": method, "model": args.model, "precision": args.precision}
            about |= {"compile": args.compile, "batch": n, "prompt_tokens": args.prompt_tokens}
            facts = {"version": litgpt.__version__, **machine(), **device_facts(device), **about}
            found = measure(model, n, args)
            publish({**facts, "weight_bytes": weight_bytes(model), **found}, args.json)
            lines.append(
                f"| {method} | {n} | {found['prompt_s']:.3f} | {found['tokens_per_s']:,.1f} | "
                f"{gigabytes(found['peak_memory'])} |"
            )
        del model
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
