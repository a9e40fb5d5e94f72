"""Commands of LitGPT 0.5's README and tutorials, with tiny models under the names of the published ones.

Each row has the page, the command, and what it has to print: the words of a result, or the reason of a refusal. Long
runs are shortened; `limited` adds the options for that.
"""

import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from litgpt.prompts import Alpaca

from litgpt import LLM
from litgpt.__main__ import main
from tests.conftest import make_rows, save_llama
from tests.eval_tasks import made_rows, write_tasks
from tests.test_docs import TRAINING, limited

MODELS = """
    meta-llama/Llama-3.2-3B-Instruct microsoft/phi-2 tiiuae/falcon-7b stabilityai/stablelm-base-alpha-3b
    EleutherAI/pythia-160m meta-llama/Llama-2-70b-chat-hf meta-llama/Llama-2-7b-hf
""".split()
FALCON = "finetune_lora tiiuae/falcon-7b"
STABLELM = "stabilityai/stablelm-base-alpha-3b"
LLAMA = "meta-llama/Llama-2-70b-chat-hf"
PHI = "--config config_hub/finetune/phi-2"
LIBRE = "--data.file_url https://example.org/libre.json --data.file_name libre.json"
TEXTS = "--data TextFiles --data.train_data_path texts/ --train.max_tokens 10_000_000 --train.global_batch_size 4"
MIXED = "'choice,likelihood' --include_path tasks"
PROMPT = "--prompt 'Recommend a film.'"
ROLES = (("user", "instruction"), ("assistant", "output"))

# page, command, what it prints
TRAINED = [
    ("README", "finetune meta-llama/Llama-3.2-3B-Instruct", "validation loss"),
    (
        "README",
        "finetune microsoft/phi-2 --data JSON --data.json_path my.json --data.val_split_fraction 0.1",
        "training      54 rows",
    ),
    (
        "README",
        f"pretrain EleutherAI/pythia-160m --tokenizer_dir EleutherAI/pythia-160m {TEXTS}",
        "model         random weights",
    ),
    (
        "README",
        "pretrain EleutherAI/pythia-160m --tokenizer_dir EleutherAI/pythia-160m "
        f"--initial_checkpoint_dir EleutherAI/pythia-160m {TEXTS}",
        "model         checkpoints/EleutherAI/pythia-160m",
    ),
    ("0_to_litgpt", f"finetune_lora microsoft/phi-2 {PHI}/lora.yaml --train.max_steps 5", "step 2/2"),
    ("config_hub", f"finetune lora {PHI}/lora.yaml --precision 16-true", "16-true"),
    ("config_hub", f"finetune lora {PHI}/lora.yaml --precision 16-mixed", "16-mixed"),
    ("config_hub", f"finetune_lora {PHI}/lora.yaml --max_seq_length 1024", "--max_seq_length is called"),
    ("config_hub", f"finetune_lora {PHI}/lora.yaml --lora_projection false --lora_r 2", "trainable"),
    ("config_hub", f"finetune_lora {PHI}/qlora.yaml", "bnb.nf4"),
    ("config_hub", f"finetune_full {PHI}/full.yaml --devices 1", "(100.00%)"),
    ("config_hub", "finetune --config config_hub/finetune/llama-2-7b/lora.yaml --lora_r 4", "Llama-2-7b-hf"),
    ("finetune_lora", f"finetune_lora {STABLELM} --data Alpaca", "60 alpaca"),
    ("finetune_lora", f"finetune_lora {STABLELM} --data Alpaca --quantize bnb.nf4-dq", "bnb.nf4-dq"),
    ("finetune_lora", f"finetune_lora {STABLELM} --data Alpaca --precision bf16-true --quantize bnb.nf4", "bnb.nf4"),
    ("finetune_full", "finetune_full tiiuae/falcon-7b --data Alpaca --precision 32-true", "32-true"),
    ("finetune_full", "finetune_full tiiuae/falcon-7b --data JSON --data.json_path split", "validation    9 rows"),
    ("finetune_adapter", f"finetune_adapter {STABLELM} --data Alpaca --quantize bnb.nf4", "bnb.nf4"),
    ("finetune_adapter", f"finetune_adapter_v2 {STABLELM} --data Alpaca --quantize bnb.nf4-dq", "bnb.nf4-dq"),
    ("prepare_dataset", f"{FALCON} --data Alpaca --train.max_seq_length 256", "60 read"),
    ("prepare_dataset", f"{FALCON} --data Alpaca2k", "60 read"),
    ("prepare_dataset", f"{FALCON} --data AlpacaGPT4", "60 read"),
    ("prepare_dataset", f"{FALCON} --data Alpaca {LIBRE}", "60 read"),
    ("prepare_dataset", f"{FALCON} --data Deita --train.max_seq_length 1024", "validation    9 rows"),
    ("prepare_dataset", f"{FALCON} --data Deita --data.include_multiturn_conversations True", "72 messages"),
    ("prepare_dataset", f"{FALCON} --data Dolly", "60 read"),
    ("prepare_dataset", f"{FALCON} --data LongForm --train.max_seq_length 1500", "validation    9 rows"),
    ("prepare_dataset", "finetune lora --data LIMA --checkpoint_dir tiiuae/falcon-7b", "60 messages"),
    ("prepare_dataset", f"{FALCON} --data FLAN --data.subsets 'cola_10templates,rte_10templates'", "120 read"),
    (
        "prepare_dataset",
        f"{FALCON} --data JSON --data.json_path my.json --data.seed 42 --data.mask_inputs True "
        "--data.ignore_index -100",
        "loss on answers",
    ),
    ("quantize", f"{FALCON} --quantize bnb.int8-training", "int8"),
    ("oom", f"{FALCON} --train.micro_batch_size 2 --train.max_seq_length 1000 --precision bf16-true", "micro-batch 2"),
    ("oom", "finetune_full tiiuae/falcon-7b --optimizer SGD", "SGD"),
]
USED = [
    ("README", "download list", "microsoft/phi-2"),
    ("README", "download EleutherAI/pythia-160m --tokenizer_only True", "checkpoints/EleutherAI/pythia-160m"),
    ("README", "chat out/lora/final", "'alpaca'"),
    ("0_to_litgpt", "chat --checkpoint_dir out/lora/final/ --precision bf16-true", "'alpaca'"),
    ("0_to_litgpt", "chat microsoft/phi-2 --multiline true", "phi-2"),
    ("0_to_litgpt", "pretrain list", "tiny-llama-1.1b"),
    ("0_to_litgpt", "pretrain --help", "--tokenizer_dir"),
    ("0_to_litgpt", "finetune_lora --help", "--lora_r"),
    ("prepare_dataset", "finetune --data.help Alpaca", "--data.download_dir"),
    ("prepare_dataset", "finetune --data.help FLAN", "--data.subsets"),
    ("prepare_dataset", "finetune --data.help LIMA", "--data.include_multiturn_conversations"),
    ("prepare_dataset", "finetune --data.help JSON", "--data.json_path"),
    ("finetune_lora", f"generate out/lora/final {PROMPT}", "### Instruction:"),
    ("finetune_lora", f"generate out/lora/final {PROMPT} --precision bf16-true --quantize bnb.nf4", "### Instruction:"),
    ("finetune_lora", "merge_lora out/lora/final --overwrite true", "out/lora/final-merged"),
    (
        "finetune_full",
        f"generate_full {STABLELM} {PROMPT} --finetuned_path out/full/final/lit_model.pth",
        "### Response:",
    ),
    ("finetune_adapter", f"generate_adapter {STABLELM} {PROMPT}", "### Response:"),
    ("finetune_adapter", f"generate_adapter_v2 {STABLELM} {PROMPT}", "### Response:"),
    (
        "finetune_adapter",
        f"generate_adapter {STABLELM} {PROMPT} --adapter_path out/finetune/adapter/final/lit_model.pth.adapter",
        "### Response:",
    ),
    ("inference", f"generate {STABLELM} --prompt 'Hello, my name is'", "Hello, my name is"),
    ("inference", f"generate base --checkpoint_dir checkpoints/{STABLELM} --prompt 'Hello, my name is'", "Hello"),
    ("inference", f"generate_sequentially {LLAMA} --max_new_tokens 256 --num_samples 2", "[INST]"),
    ("inference", f"generate_sequentially {LLAMA} --max_new_tokens 256 --quantize bnb.nf4-dq", "[INST]"),
    *(
        (
            "quantize",
            f"generate tiiuae/falcon-7b --quantize bnb.{name} --precision bf16-true --max_new_tokens 256",
            "4 tokens",
        )
        for name in ("nf4", "nf4-dq", "fp4", "fp4-dq")
    ),
    ("quantize", "generate tiiuae/falcon-7b --quantize bnb.int8 --precision 16-true --max_new_tokens 256", "4 tokens"),
    ("quantize", "generate tiiuae/falcon-7b --precision 16-true --max_new_tokens 256", "4 tokens"),
    ("evaluation", f"evaluate microsoft/phi-2/ --batch_size 4 --tasks {MIXED} --out_dir scores/", "likelihood"),
    (
        "evaluation",
        f"evaluate out/lora/final --batch_size 4 --tasks {MIXED} --out_dir scores/ --force_conversion true --limit 10",
        "likelihood",
    ),
]
REFUSED = [
    ("README", "pretrain meta-llama/Llama-3.2-3B-Instruct", "--data"),
    ("README", "evaluate meta-llama/Llama-3.2-3B-Instruct", "--tasks"),
    ("README", "evaluate microsoft/phi-2 --tasks 'truthfulqa_mc2'", "truthfulqa_mc2: the data set"),
    ("0_to_litgpt", f"pretrain tiny-llama-1.1b --data OpenWebText --tokenizer_dir {STABLELM}", "TextFiles"),
    ("finetune", "finetune_full", "the model folder"),
    ("finetune_lora", "generate lora --checkpoint_dir out/lora/final", "got 2: out/lora/final, lora"),
    ("config_hub", f"finetune_lora {PHI}/lora.yaml --train.max_seq_length 4096", "--train.max_seq_length 4096"),
    ("inference", f"generate_tp {LLAMA} --quantize bnb.nf4-dq", "--quantize bnb.nf4-dq"),
    ("finetune_lora", f"finetune_lora {STABLELM} --precision 32-full", "32-true"),
]
UNDERSTOOD = [
    ("README", "serve microsoft/phi-2"),
    ("deploy", "serve microsoft/phi-2 --stream true"),
    ("deploy", "serve HuggingFaceTB/SmolLM2-135M-Instruct --openai_spec true"),
    ("inference", f"generate_tp {LLAMA} --max_new_tokens 256 --num_samples 2"),
    ("config_hub", f"finetune lora {PHI}/lora.yaml --devices 4"),
    ("0_to_litgpt", "download TinyLlama/TinyLlama-1.1B-Chat-v1.0 --tokenizer_only true"),
    ("0_to_litgpt", "download --repo_id TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("0_to_litgpt", "convert_from_litgpt microsoft/phi-2 --output_dir out/converted_model/"),
]
SLOW = (
    "bnb.",
    "16-",
    "full ",
    "pretrain EleutherAI",
    "truthfulqa",
    "evaluate out",
    "qlora",
    "GPT4",
    "Dolly",
    "file_url",
)  # in the long tests
KEPT = ("bnb.int8 ", "generate_tp", "--data.json_path split")  # but not these


def rows(table: list[tuple[str, ...]]) -> list[Any]:
    """The rows as parameters of a test."""
    found = []
    for page, command, *expected in table:
        slow = any(word in command for word in SLOW) and not any(word in command for word in KEPT)
        marks = [pytest.mark.long] if slow else []
        found.append(pytest.param(command, *expected, marks=marks, id=f"{page}: {command[:60]}"))
    return found


def write(path: Path, content: list[Any], lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def write_data(folder: Path) -> None:
    """The files that the data sets download, each with 60 rows, and 9 other rows for validation."""
    ours = make_rows(60)
    val = [{"instruction": f"say {i}", "input": "", "output": f"this is {i}"} for i in range(9)]
    for name in ("my", "data/alpaca2k/alpaca2k", "data/alpaca/alpaca_data_cleaned_archive", "data/alpaca/libre"):
        write(folder / f"{name}.json", ours)
    write(folder / "data/alpacagpt4/alpaca_gpt4_data.json", ours)
    dolly = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in ours]
    write(folder / "data/dolly/databricks-dolly-15k.jsonl", dolly, lines=True)
    turns = [[r["instruction"], r["output"]] * (2 if i % 5 == 0 else 1) for i, r in enumerate(ours)]
    write(folder / "data/lima/train.jsonl", [{"conversations": pair, "source": "x"} for pair in turns], lines=True)
    for name, some in (("train", ours), ("val", val)):
        write(folder / f"split/{name}.json", some)
        write(folder / f"data/longform/{name}.json", [{"input": r["instruction"], "output": r["output"]} for r in some])
        chats = [
            {"messages": [{"role": role, "content": r[key]} for role, key in ROLES] * (2 if i % 5 == 0 else 1)}
            for i, r in enumerate(some)
        ]
        write(folder / f"data/deita/{'test' if name == 'val' else name}_sft.json", chats)
        for subset in ("cola", "rte"):
            pairs = [{"inputs": f"{subset} {r['instruction']}", "targets": r["output"]} for r in some]
            split = "test" if name == "val" else name
            write(folder / f"data/flan/{subset}_10templates_{split}.jsonl", pairs, lines=True)
    text = "\n".join(f"{row['instruction']}. {row['output']}." for row in make_rows(300))
    for number in (1, 2):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"book{number}.txt").write_text(text, encoding="utf-8")
    write_tasks(folder / "tasks", made_rows(12))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A folder with models under checkpoints/, data, and results of runs in out/."""
    folder = tmp_path_factory.mktemp("litgpt")
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 2048}
    tiny = save_llama(folder / "tiny", tokenizer_file, **sizes)
    for name in MODELS:
        shutil.copytree(tiny, folder / "checkpoints" / name)
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method, out in (
            ("lora", "out/lora"),
            ("full", "out/full"),
            ("adapter", "out/finetune/adapter"),
            ("adapter_v2", "out/finetune/adapter-v2"),
        ):
            options = ["--data", "Alpaca2k", "--out_dir", out, "--train.epochs", "1"]
            main(limited([f"finetune_{method}", f"checkpoints/{STABLELM}", *options]))
    return folder


@pytest.fixture
def ran(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Iterator[Callable[..., str]]:
    """Runs a command in that folder; all that it prints."""
    monkeypatch.chdir(place)

    def run(command: str, code: int = 0) -> str:
        words = limited(shlex.split(command))
        if words[0] in TRAINING and not any("help" in word for word in words):
            words += ["--out_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "stdin", io.StringIO("What do llamas eat?\n!submit\n"))
        capfd.readouterr()
        try:
            main(words)
            found: Any = 0
        except SystemExit as e:
            found = e.code or 0
        printed = "".join(capfd.readouterr())
        assert found == code, printed
        return printed

    yield run


@pytest.mark.parametrize(("command", "expected"), rows(TRAINED))
def test_what_trains(command, expected, ran, tmp_path):
    assert expected in ran(command)
    assert list((tmp_path / "out" / "final").glob("*.safetensors"))


@pytest.mark.parametrize(("command", "expected"), rows(USED))
def test_what_uses_a_model(command, expected, ran):
    assert expected in ran(command)


@pytest.mark.parametrize(("command", "expected"), rows(REFUSED))
def test_what_is_refused(command, expected, ran):
    printed = ran(command, code=2)
    assert "litgpt: error: " in printed and expected in printed


@pytest.mark.parametrize("command", [command for _, command in UNDERSTOOD])
def test_what_needs_more_than_a_test(command, settings):
    """A server, a hub, several processes: the options are read."""
    assert settings(*command.split())


def test_answers_to_a_test_set(place, monkeypatch):
    """evaluation: the prompts of a style, and the answers of a model to them."""
    monkeypatch.chdir(place)
    entries, style = make_rows(2), Alpaca()
    model = LLM.load("microsoft/phi-2")
    for entry in entries:
        prompt = style.apply(prompt=entry["instruction"], **entry)
        assert prompt.startswith("Below is an instruction") and entry["instruction"] in prompt
        entry["response"] = model.generate(prompt, max_new_tokens=4)
        assert isinstance(entry["response"], str) and entry["response"]
