"""Short runs of every method, from the words of the command line to the numbers that they leave."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from litgpt.__main__ import main

METHODS = {
    "full": ["full"],
    "full-sgd": ["full", "--optimizer", "SGD", "--optimizer.momentum", "0.9"],
    "full-bf16": ["full", "--precision", "bf16-true"],
    "full-packs": ["full", "--train.pack", "true", "--train.max_seq_length", "256"],
    "full-16-mixed": ["full", "--precision", "16-mixed"],
    "lora": ["lora", "--lora_dropout", "0.2"],
    "lora-bf16": ["lora", "--precision", "bf16-true", "--train.activation_checkpointing", "true"],
    "lora-plus-muon": ["lora", "--optimizer", "Muon", "--lora_plus_ratio", "4"],
    "lora-embeddings": ["lora", "--train_embeddings", "true"],
    "rslora": ["lora", "--lora_variant", "rslora"],
    "dora": ["lora", "--lora_variant", "dora"],
    "pissa": ["lora", "--lora_init", "pissa"],
    "nf4": ["lora", "--quantize", "bnb.nf4"],
    "dora-nf4-dq": ["lora", "--lora_variant", "dora", "--quantize", "bnb.nf4-dq"],
    "adamw8bit": ["lora", "--optimizer", "AdamW8bit"],
    "adapter": ["adapter"],
    "adapter-int8": ["adapter", "--quantize", "bnb.int8"],
    "adapter_v2": ["adapter_v2"],
    "adapter_v2-muon": ["adapter_v2", "--optimizer", "Muon"],
    "pretrain": ["pretrain"],
    "pretrain-bf16-muon": ["pretrain", "--precision", "bf16-true", "--optimizer", "Muon"],
}
TIMES = ("seconds", "tokens_per_s", "mfu", "peak_memory")
Line = dict[str, str]


def words(method: str, base: Path, rows: Path, out: Path, *flags: object) -> list[str]:
    """The command line of a run of 12 steps."""
    name, *own = METHODS[method]
    options: dict[str, Any] = {
        "--data": "JSON",
        "--data.json_path": rows,
        "--data.val_split_fraction": 0.1,
        "--out_dir": out,
        "--train.max_steps": 12,
        "--train.epochs": 20,
        "--train.global_batch_size": 8,
        "--train.micro_batch_size": 4,
        "--train.lr_warmup_steps": 2,
        "--train.save_interval": 5,
        "--optimizer.lr": 0.01,
        "--eval.interval": 4,
        "--eval.max_new_tokens": "null",
        "--accelerator": "cpu",
    }
    if "--precision" not in own and "--precision" not in flags:
        options["--precision"] = "32-true"
    if name == "pretrain":
        start = ["pretrain", "--model_name", base, "--tokenizer_dir", base]
    else:
        start = ["finetune", name, base]
    return [str(w) for w in (*start, *(w for pair in options.items() for w in pair), *own, *flags)]


def exit_code(*line: Any) -> int:
    """Run a command line in this process."""
    try:
        main([str(word) for word in line])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def go(*args: Any) -> int:
    """Run a method; the exit code."""
    return exit_code(*words(*args))


def lines(out: Path) -> list[Line]:
    """The metrics of a run, without what differs from one machine to the next."""
    with open(out / "metrics.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "final").glob("*.safetensors")
    return load_file(file)


def same(a: Path, b: Path) -> None:
    """Assert that two runs have the same numbers, bit for bit."""
    assert lines(a) == lines(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def start(*args: Any, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "litgpt", *words(*args)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


FORKING = """
import contextlib, json, os, sys, traceback
import lightning.fabric, torch
import litgpt.finetune.adapter_v2, litgpt.finetune.full, litgpt.finetune.lora, litgpt.finetune.pretrain
from litgpt.__main__ import main
with contextlib.suppress(ImportError):
    import bitsandbytes
torch.set_num_threads(1)
for line in sys.stdin:
    words, log = json.loads(line)
    process = os.fork()
    if not process:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = 1
        try:
            main(words)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Processes:
    """Runs as processes of their own that need not import everything again, since they are forked. One at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKING]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, words: list[str], log: Path) -> int:
        """Begin a run; what it prints is added to a file. Returns the number of its process."""
        assert self.parent.stdin and self.parent.stdout
        self.parent.stdin.write(json.dumps([words, str(log)]) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run, once it ended; that of a killed one is negative."""
        assert self.parent.stdout
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.communicate(timeout=60)
