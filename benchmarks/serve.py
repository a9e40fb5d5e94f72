"""How much sixteen clients of `litgpt serve` get at once, beside one after the other.

Every answer of the first round is compared with that of the second: greedy ones have to be the same.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import WORDS


def ask(url: str, prompt: str, tokens: int) -> tuple[str, int, float]:
    """An answer, its tokens, and the seconds to the first of them."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text, first, began = "", 0.0, time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                part = json.loads(data)
                first = first or time.perf_counter() - began
                text += "".join(choice["text"] for choice in part["choices"])
                usage = part["usage"] or {}
    return text, usage["completion_tokens"], first


def together(url: str, prompts: list[str], tokens: int) -> list[Any]:
    """All of them at once, each by a client of its own."""
    found: list[Any] = [None] * len(prompts)

    def one(i: int) -> None:
        found[i] = ask(url, prompts[i], tokens)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="A model folder.")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100, help="Of an answer.")
    parser.add_argument("--words", type=int, default=40, help="Of a prompt.")
    parser.add_argument("--json", type=Path, help="Add the result to this file.")
    args = parser.parse_args()
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=args.words)) for _ in range(args.clients)]
    command = [sys.executable, "-m", "litgpt", "serve", args.model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        url = next(line.split()[1] for line in server.stdout if line.strip().startswith("chat "))
        for _ in range(100):
            try:
                ask(url, "warm", 4)
                break
            except OSError:
                time.sleep(0.1)
        began = time.perf_counter()
        alone = [ask(url, prompt, args.tokens) for prompt in prompts]
        middle = time.perf_counter()
        at_once = together(url, prompts, args.tokens)
        end = time.perf_counter()
    finally:
        server.terminate()
        server.wait()
    tokens = [sum(n for _, n, _ in answers) for answers in (alone, at_once)]
    result = {
        "model": Path(args.model).name,
        "clients": args.clients,
        "tokens": tokens[0],
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "one after the other, tokens/s": round(tokens[0] / (middle - began), 1),
        "at once, tokens/s": round(tokens[1] / (end - middle), 1),
        "ratio": round(tokens[1] / (end - middle) / (tokens[0] / (middle - began)), 2),
        "first token at once, seconds": round(max(first for _, _, first in at_once), 2),
        "same answers": sum(a[0] == b[0] for a, b in zip(alone, at_once)),
    }
    print(json.dumps(result))
    if args.json:
        with open(args.json, "a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
