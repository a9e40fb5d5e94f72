"""What LitGPT's pages on Python, conversion, downloads, and pretraining tell a reader to run, with tiny models in the
place of the named ones."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
from transformers import AutoModel

import litgpt
from litgpt import LLM
from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from tests.conftest import make_rows, save_llama
from tests.hub_server import Repo, serve

MODELS = ("EleutherAI/pythia-160m", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "meta-llama/Llama-3.1-8B")
NEOX, TINY, LLAMA = MODELS
TEXT = "--data TextFiles --data.train_data_path texts --train.max_seq_length 32 --train.micro_batch_size 1"
SMALL = f"--train.global_batch_size 2 --train.save_interval 2 --eval.interval 100 {TEXT} --accelerator cpu"
PAUSED = 75  # the exit status of a run that stops to be resumed
MINE = "copies/tiny-llama.yaml"

# page, command, a part of what it says; commands that are refused begin with "!"
COMMANDS = [
    ("convert_hf_checkpoint", f"download {NEOX} --convert_checkpoint false", "complete"),
    ("convert_hf_checkpoint", f"convert_to_litgpt {NEOX}", "model_config.yaml"),
    ("download_model_weights", "download list", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("download_model_weights", f"download --repo_id {TINY}", "complete"),
    ("download_model_weights", f"download {TINY} --access_token abc", "complete"),
    ("download_model_weights", f"download {TINY} --model_name Mistral-7B-v0.1", "--model_name Mistral-7B-v0.1 has no"),
    ("download_model_weights", f"download {TINY} --dtype bf16-true", "--precision"),
    ("download_model_weights", f"download {TINY} --tokenizer_only true", "complete"),
    ("download_model_weights", f"convert to_litgpt --checkpoint_dir checkpoints/{LLAMA}", "lit_model.pth"),
    ("pretrain", "pretrain list", "pythia-14m"),
    ("pretrain", f"pretrain {NEOX} --tokenizer_dir {NEOX} --out_dir a --train.max_steps 1 {SMALL}", "a/final"),
    (
        "pretrain",
        f"pretrain {NEOX} --tokenizer_dir {NEOX} --out_dir f --train.max_steps 1 "
        + SMALL.replace("TextFiles", "litgpt.data.text_files.TextFiles"),
        "f/final",
    ),
    (
        "pretrain",
        f"pretrain {NEOX} --initial_checkpoint_dir {NEOX} --tokenizer_dir {NEOX} --out_dir b --train.pause_after 2 "
        f"--train.max_tokens 200 {SMALL}",
        "To resume",
    ),
    (  # without the model that the run began with
        "pretrain",
        f"pretrain {NEOX} --resume auto --tokenizer_dir {NEOX} --out_dir b --train.max_tokens 200 {SMALL}",
        "b/final",
    ),
    ("pretrain", "convert_pretrained_checkpoint b/final converted", "needs no conversion"),
    (
        "pretrain",
        f"pretrain {NEOX} --initial_checkpoint_dir converted --tokenizer_dir {NEOX} --out_dir c --train.max_steps 1 "
        f"{SMALL}",
        "c/final",
    ),
    ("pretrain_tinyllama", "convert pretrained_checkpoint --checkpoint_dir b/final --output_dir d", "copied"),
    ("pretrain_tinyllama", "! pretrain --config config_hub/pretrain/tinyllama.yaml", "--data TextFiles"),
    ("pretrain_tinyllama", f"! pretrain --config {MINE} --tokenizer_dir {NEOX}", "--data TinyLlama is not available"),
    (
        "pretrain_tinyllama",
        f"pretrain --config {MINE} --tokenizer_dir {NEOX} --out_dir e --train.max_steps 1 {SMALL}",
        "e/final",
    ),
    ("pretrain_tinyllama", "! pretrain --model_name Gemma-2b", "--data"),
    ("adding-models", f"generate {LLAMA} --max_new_tokens 3", "tokens/s"),
    (
        "convert_lit_models",
        f"finetune_lora {TINY} --out_dir lit --train.epochs 1 --data rows.json --train.max_steps 1 --accelerator cpu "
        "--eval.max_new_tokens null",
        "lit/final",
    ),
    ("convert_lit_models", "! convert_from_litgpt lit/final hf", "litgpt merge_lora lit/final"),
    ("convert_lit_models", "merge_lora lit/final", "lit/final-merged"),
    ("convert_lit_models", "convert_from_litgpt lit/final/ hf", "lit/final-merged"),
    ("convert_lit_models", "convert from_litgpt --checkpoint_dir lit/final --output_dir hf2", "hf2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with models, texts, and rows, and a hub with the same models."""
    root = tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch, serve() as hub:
        for name in MODELS:
            place = root / "checkpoints" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            save_llama(place, PICO / "tokenizer.json", vocab_size=640, max_position_embeddings=256)
            hub.repos[name] = Repo({file.name: file.read_bytes() for file in place.iterdir()})
        (root / "texts").mkdir()
        for i in (1, 2):
            (root / "texts" / f"{i}.txt").write_text("Once upon a time there was a fox. " * 40)
        (root / "rows.json").write_text(json.dumps(make_rows(24)))
        (root / "copies").mkdir()
        (root / MINE).write_text(f"model_name: {NEOX}\ndata: TinyLlama\ntrain:\n  max_seq_length: 2048\n")
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(root / "home"))
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.chdir(root)
        yield root


def run(command: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """The exit status of a command and what it says."""
    capsys.readouterr()
    try:
        main(shlex.split(command))
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_commands(folder, capsys):
    """One after the other, since a page goes on with what it has made."""
    for page, command, expected in COMMANDS:
        code, said = run(command.removeprefix("! "), capsys)
        assert code == (2 if command.startswith("!") else PAUSED if expected == "To resume" else 0), (
            page,
            command,
            said,
        )
        assert expected in said, (page, command, said)
    state = torch.load("hf/model.pth")  # as the page has it
    model = AutoModel.from_pretrained("hf", local_files_only=True)
    torch.testing.assert_close(model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_generate_step_by_step(folder, capsys):
    """`examples/minimal-generate-scripts`."""
    from litgpt.config import Config
    from litgpt.generate.base import generate
    from litgpt.generate.base import main as generate_main
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer
    from litgpt.utils import get_default_supported_precision, load_checkpoint

    from litgpt.model import GPT

    place, precision = Path("checkpoints") / NEOX, get_default_supported_precision(training=False)
    run(f"convert_to_litgpt {NEOX}", capsys)
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    config, tokenizer = Config.from_file(place / "model_config.yaml"), Tokenizer(place)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    with fabric.init_tensor():
        model.set_kv_cache(batch_size=1)
    model = fabric.setup_module(model.eval())
    load_checkpoint(fabric, model, place / "lit_model.pth")
    ids = tokenizer.encode(PromptStyle.from_config(config).apply("What is new?"), device=fabric.device)
    for _ in range(2):
        found = generate(model, ids, len(ids) + 8, temperature=0.5, top_k=200, top_p=1.0, eos_id=tokenizer.eos_id)
        assert found[: len(ids)].tolist() == ids.tolist() and tokenizer.decode(found)
        for block in model.transformer.h:
            block.attn.kv_cache.reset_parameters()
    options: dict[str, Any] = {"prompt": "Hi", "max_new_tokens": 3, "temperature": 0.5, "top_k": 200, "top_p": 1.0}
    generate_main(checkpoint_dir=place, precision=precision, compile=False, **options)
    assert "tokens/s" in capsys.readouterr().err


class Lit(L.LightningModule):
    """`python-api`, and `examples/ptl-trainer` for a small model."""

    def __init__(self, folder: str, tokenizer_dir: Any = None, checkpoint: Any = None) -> None:
        super().__init__()
        self.llm = LLM.load(folder, tokenizer_dir=tokenizer_dir, distribute=None)
        self.checkpoint = checkpoint

    def setup(self, stage: str) -> None:
        self.llm.trainer_setup(trainer_ckpt=self.checkpoint)

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])[1]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.llm.model.parameters(), lr=0.01)


def fit(model: L.LightningModule) -> L.Trainer:
    data = litgpt.data.JSON(Path("rows.json"), num_workers=0, val_split_fraction=0.5)
    data.connect(litgpt.Tokenizer(f"checkpoints/{NEOX}"), batch_size=4, max_seq_length=48)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": "bf16-true", **quiet}
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, enable_checkpointing=False, **options)
    trainer.fit(model, data)
    return trainer


def test_trainer(folder):
    """From random weights, from a checkpoint of the trainer, and from what `save` wrote."""
    LLM.load(NEOX, tokenizer_dir=NEOX, init="random").save("random")
    first = Lit("random", tokenizer_dir=NEOX)
    fit(first).save_checkpoint("last.ckpt")
    second = Lit(NEOX, checkpoint="last.ckpt")
    fit(second)
    second.llm.model.to(second.llm.preprocessor.device)
    assert isinstance(second.llm.generate("hello world"), str)
    second.llm.save("saved")
    third = Lit("saved")
    saved = {name: tensor.clone() for name, tensor in third.llm.state_dict().items()}
    assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in second.llm.state_dict().items())
    fit(third)
    assert any(not torch.equal(tensor.cpu(), saved[name]) for name, tensor in third.llm.state_dict().items())


def test_trainer_with_lora(folder, capsys):
    """`examples/ptl-trainer` for a large model."""
    from litgpt.lora import GPT, mark_only_lora_as_trainable, merge_lora_weights

    run(f"convert_to_litgpt {LLAMA}", capsys)

    class LitLoRA(Lit):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            path = f"checkpoints/{LLAMA}/model_config.yaml"
            config = litgpt.lora.Config.from_file(path, lora_r=4, lora_alpha=8, lora_query=True, lora_value=True)
            self.model, self.losses = GPT(config), list[float]()
            mark_only_lora_as_trainable(self.model)

        def setup(self, stage: str) -> None:
            state = torch.load(f"checkpoints/{LLAMA}/lit_model.pth", mmap=True)
            assert not self.model.load_state_dict(state, strict=False).unexpected_keys

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            logits = self.model(batch["input_ids"])
            loss = litgpt.utils.chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), lr=0.01)

    with L.Trainer(accelerator="cpu", logger=False).init_module(empty_init=True):
        model = LitLoRA()
    trainer = fit(model)
    assert all(torch.tensor(model.losses).isfinite())
    merge_lora_weights(model.model)
    trainer.save_checkpoint("merged.ckpt", weights_only=True)


def test_fabric_loop(folder, capsys):
    """`full_finetune_example`."""
    from litgpt.model import GPT, Config

    run(f"convert_to_litgpt {TINY}", capsys)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    data = litgpt.data.JSON(Path("rows.json"), num_workers=0)
    data.connect(tokenizer=litgpt.Tokenizer(checkpoint_dir=f"checkpoints/{TINY}"), batch_size=4, max_seq_length=48)
    data.setup()
    batches = fabric.setup_dataloaders(data.train_dataloader())
    model = fabric.setup(GPT(Config.from_file(f"checkpoints/{TINY}/model_config.yaml")))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
    losses = []
    for batch in batches:
        logits = model(batch["input_ids"])
        loss = litgpt.utils.chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_benchmark(folder):
    from litgpt.api import benchmark_dict_to_markdown_table

    llm = LLM.load(model=NEOX, distribute=None)
    llm.distribute(accelerator="cpu", fixed_kv_cache_size=60)
    text, figures = llm.benchmark(num_iterations=2, prompt="Hi", max_new_tokens=4, top_k=1, stream=True)
    assert isinstance(text, str)
    figures = {name: values[1:] for name, values in figures.items()}
    assert "Tokens generated" in benchmark_dict_to_markdown_table(figures)


def test_strategies_that_need_several_processes(folder):
    llm = LLM.load(NEOX, distribute=None)
    with pytest.raises(ValueError, match="generate_tp"):
        llm.distribute(generate_strategy="tensor_parallel", devices=2)
