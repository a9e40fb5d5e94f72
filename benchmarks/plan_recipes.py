"""Predict the peak memory of all recipes, and of runs that others published, beside the published peaks.

    python benchmarks/plan_recipes.py                    # all tables
    python benchmarks/plan_recipes.py recipes --only phi-2/

Each line is what `litgpt plan` predicts for one GPU (`--devices 1`). Nothing is downloaded: a model is a folder with a
config.json and the tokenizer of the built-in model, and each row is as long as the table says. The tables:

    recipes    the recipes, with rows of train.max_seq_length tokens; published: LitGPT's, from config_hub/finetune
    litgpt     LitGPT's older tables: the longest row of Alpaca, r=8 on queries and values, AdamW
    long       2 rows of 8,192 tokens with activation checkpointing, in another program than LitGPT
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional
from unittest import mock

from litgpt.__main__ import main as litgpt
from litgpt.checkpoint.hub import PICO
from litgpt.cli.recipes import Recipe, shipped_recipes
from litgpt.errors import UserError
from litgpt.families import write_config
from litgpt.model.config import Config
from litgpt.train.args import PlanArgs, planning
from litgpt.train.memory.plan import load
from litgpt.train.memory.predict import Prediction, predict

HUB = Path(__file__).parent.parent / "config_hub" / "finetune"
TIED = (
    r"gemma|Llama-3\.2|Qwen3-(0\.6|1\.7|4)B|SmolLM2|Phi-4-mini|falcon-7b|granite-4|EXAONE-4\.0-1|Hunyuan|Ministral-3-3B"
    r"|Qwen3\.5-(0\.8|2|4)B"
)
TIED = re.compile(TIED, re.IGNORECASE)  # models that were published so
ALPACA = {"phi-1_5": 1044, "stablelm-base-alpha-3b": 1034, "Llama-2-7b-hf": 1304, "Llama-2-13b-hf": 1304}  # tokens
ALPACA["falcon-40b"] = 1079
LITGPT = """
    lora phi-1_5 1 none 4.82, lora phi-1_5 1 nf4 3.78, lora phi-1_5 1 nf4-dq 3.72, lora phi-1_5 2 none 6.76
    lora phi-1_5 4 none 10.68, lora stablelm-base-alpha-3b 1 none 9.69, lora stablelm-base-alpha-3b 1 nf4 6.35
    lora stablelm-base-alpha-3b 1 nf4-dq 6.19, lora stablelm-base-alpha-3b 2 none 12.10
    lora stablelm-base-alpha-3b 4 none 16.92, lora Llama-2-7b-hf 1 none 21.30, lora Llama-2-7b-hf 1 nf4 14.14
    lora Llama-2-7b-hf 1 nf4-dq 13.84, lora Llama-2-7b-hf 2 none 29.07, lora Llama-2-7b-hf 4 none >40
    lora Llama-2-13b-hf 1 none 38.12, lora Llama-2-13b-hf 1 nf4 23.14, lora Llama-2-13b-hf 1 nf4-dq 22.55
    lora Llama-2-13b-hf 2 none >40, lora Llama-2-13b-hf 4 none >40, lora falcon-40b 1 none >40
    lora falcon-40b 1 nf4 >40, lora falcon-40b 1 nf4-dq >40, adapter stablelm-base-alpha-3b 1 none 9.10
    adapter stablelm-base-alpha-3b 1 nf4 5.65, adapter stablelm-base-alpha-3b 1 nf4-dq 5.48
    adapter Llama-2-7b-hf 1 none 19.98, adapter Llama-2-7b-hf 1 nf4 12.68, adapter Llama-2-7b-hf 1 nf4-dq 12.38
    adapter_v2 stablelm-base-alpha-3b 1 none 10.71, adapter_v2 stablelm-base-alpha-3b 1 nf4 7.41
    adapter_v2 stablelm-base-alpha-3b 1 nf4-dq 7.25, adapter_v2 Llama-2-7b-hf 1 none 25.51
    adapter_v2 Llama-2-7b-hf 1 nf4 18.30, adapter_v2 Llama-2-7b-hf 1 nf4-dq 17.98
"""  # method, model, micro-batch, quantization, GB on one A100 with 40 GB
LONG = """
    full Llama-3.1-8B none 78, lora Llama-3.1-8B none 36, lora Llama-3.1-8B nf4 48, lora Llama-2-13b-hf none 43
    lora Llama-2-13b-hf nf4 38, lora Gemma-2-9b none 60, lora Gemma-2-9b nf4 >80, lora Gemma-7b none 51
    lora Gemma-7b nf4 70, full Phi-3-mini-4k-instruct none 40, lora Phi-3-mini-4k-instruct none 17
    lora Phi-3-mini-4k-instruct nf4 21
"""  # method, model, quantization, GiB on one H100

LESS = {  # recipes that do not fit on the published GPU as they are, and options that take less
    "llama-3.2-3B/full": "--optimizer AdamW8bit",
    "phi-3/full": "--optimizer Adafactor --train.activation_checkpointing true",
    "gemma2-9b/lora": "--train.activation_checkpointing true",
}


@dataclass
class Case:
    """A run to plan.

    Args:
        name: What the table calls it.
        settings: What the table says of it.
        words: The command, without its model.
        model: A name for `Config.from_name`, or nothing if the words say what the model is.
        tokens: The length of a row.
        published: The published peak.
        context: The model's context length, if it is not the model's own.
        config: The model, if it is not that of the name.
    """

    name: str
    settings: str
    words: list[str]
    model: str
    tokens: int
    published: str
    context: int = 0
    config: Optional[Config] = None


def recipe_cases() -> Iterator[Case]:
    table = (HUB / "README.md").read_text(encoding="utf-8")
    for recipe in shipped_recipes():
        fields = recipe.fields()
        train = fields["train"]
        row = re.search(rf"^\| \[{re.escape(recipe.name)}\]\(.*A10G.*$", table, re.M)
        found = row[0].split(" | ")[7] if row else ""
        micro, tokens = train.get("micro_batch_size", 1), train.get("max_seq_length", 512)
        settings = [f"{micro} x {tokens}", fields.get("quantize", "")]
        settings.append("checkpointing" if train.get("activation_checkpointing") else "")
        words = [*recipe.command.split()[1:-2], "--config", recipe.name, "--devices", "1"]
        case = Case(recipe.name, ", ".join(filter(None, settings)), words, model_of(recipe), tokens, found)
        yield case
        if (options := LESS.get(recipe.name)) is not None:
            yield replace(case, settings=f"{case.settings}, `{options}`", words=[*words, *options.split()])


def model_of(recipe: Recipe) -> str:
    name = recipe.fields().get("checkpoint_dir") or recipe.fields().get("model_name") or ""
    return "" if name == "pico" else name.removeprefix("checkpoints/")


def litgpt_cases() -> Iterator[Case]:
    for entry in re.split(r",|\n", LITGPT.strip()):
        method, model, micro, quantize, published = entry.split()
        words = ["finetune", method, "--train.micro_batch_size", micro, "--train.global_batch_size", "128"]
        words += ["--precision", "bf16-true", *quantized(quantize)]
        settings = f"{micro} x {ALPACA[model]}, {quantize}"
        yield Case(f"{model}, {method}", settings, words, model, ALPACA[model], f"{published} GB")


def long_cases() -> Iterator[Case]:
    for entry in re.split(r",|\n", LONG.strip()):
        method, model, quantize, published = entry.split()
        rows_of_a_step = "2" if method == "full" else "64"
        words = ["finetune", method, "--train.micro_batch_size", "2", "--train.global_batch_size", rows_of_a_step]
        words += ["--precision", "bf16-true", "--train.activation_checkpointing", "true", *quantized(quantize)]
        yield Case(f"{model}, {method}", f"2 x 8192, {quantize}", words, model, 8192, f"{published} GiB", 8192)


def quantized(name: str) -> list[str]:
    return [] if name == "none" else ["--quantize", f"bnb.{name}"]


def make_folder(case: Case, root: Path) -> Path:
    """A folder that `litgpt plan` takes for the model: config.json and a tokenizer, without weights."""
    folder = root / f"{case.model.replace('/', '--')}-{case.context}"
    if folder.exists():
        return folder
    config = case.config
    if config is None:
        config = replace(Config.from_name(case.model), tie_embeddings=bool(TIED.search(case.model)))
    config = replace(config, block_size=case.context or config.block_size)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)), encoding="utf-8")
    for file in PICO.iterdir():
        if "token" in file.name:
            shutil.copyfile(file, folder / file.name)
    return folder


def predicted(case: Case, root: Path) -> Prediction:
    """The first line of what `litgpt plan` prints, as numbers."""
    found: list[Prediction] = []

    def keep(run: Any, args: PlanArgs) -> None:
        run.out_dir = root / "out"
        load(run, args.tokens)
        if run.precision is None:
            run.precision_name = "bf16-true" if run.is_frozen else "bf16-mixed"
        found.append(predict(run, gpu=True))

    source = "model_name" if case.words[0] == "pretrain" else "checkpoint_dir"
    model = [f"--{source}", str(make_folder(case, root))] if case.model else []
    if "tinystories" in case.words:
        model = ["--tokenizer_dir", str(PICO)]
    token = planning.set(PlanArgs(tokens=case.tokens))
    try:
        with mock.patch("litgpt.train.memory.plan.plan", keep):
            litgpt([*case.words, *model])
    finally:
        planning.reset(token)
    return found[0]


CASES = {"recipes": recipe_cases, "litgpt": litgpt_cases, "long": long_cases}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*CASES, []], help="The tables to print; by default all.")
    parser.add_argument("--only", default="", help="Only lines with this text in their first column.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="litgpt-plan-recipes-") as name:
        for table in args.tables or CASES:
            print(f"\n| {table} | rows and settings | predicted peak | | at the peak in | published |")
            print("|---|---|---:|---:|---|---:|", flush=True)
            for case in CASES[table]():
                if args.only not in case.name:
                    continue
                try:
                    found = predicted(case, Path(name))
                    cells = f"{found.peak / 2**30:.2f} GiB | {found.peak / 1e9:.2f} GB | {found.place}"
                except (UserError, SystemExit) as e:
                    cells = f"not planned: {e} | | "
                print(f"| {case.name} | {case.settings} | {cells} | {case.published} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
