"""What holds for every finetuning method: what is trained, what stays, what is written, and who reads it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train.loop import Trainer
from tests.conftest import save_llama

CPU = torch.device("cpu")
IDS = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(0))
METHODS = {
    "full": ["full"],
    "lora": ["lora", "--lora_head", "true", "--lora_mlp", "true"],
    "embeddings": ["lora", "--train_embeddings", "true"],
    "dora": ["lora", "--lora_variant", "dora", "--lora_key", "true"],
    "pissa": ["lora", "--lora_init", "pissa"],
    "nf4": ["lora", "--quantize", "bnb.nf4"],
    "dora-fp4": ["lora", "--lora_variant", "dora", "--quantize", "bnb.fp4"],
    "int8": ["lora", "--quantize", "bnb.int8"],
    "adapter": ["adapter"],
    "adapter-nf4-dq": ["adapter", "--quantize", "bnb.nf4-dq"],
    "adapter_v2": ["adapter_v2"],
    "adapter_v2-int8": ["adapter_v2", "--quantize", "bnb.int8-training"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("m") / "base"
    return save_llama(
        folder, tokenizer_file, num_hidden_layers=4, hidden_size=64, intermediate_size=96, attention_bias=True
    )


def finetune(method: str, base: Path, rows_file: Path, out: Path, *flags: object) -> Path:
    options = {
        "--data": "JSON",
        "--data.json_path": rows_file,
        "--data.val_split_fraction": 0.1,
        "--out_dir": out,
        "--precision": "32-true",
        "--train.max_steps": 3,
        "--train.global_batch_size": 8,
        "--train.micro_batch_size": 4,
        "--train.lr_warmup_steps": 0,
        "--optimizer.lr": 0.01,
        "--eval.interval": 1,
        "--eval.max_new_tokens": 4,
    }
    words = [str(w) for pair in options.items() for w in pair]
    main(["finetune", *METHODS[method][:1], str(base), *words, *METHODS[method][1:], *map(str, flags)])
    return out / "final"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained(method, base, rows_file, tmp_path, monkeypatch, capsys):
    """Every trained weight gets a gradient that is not zero by the second step, with validations in between; what is
    frozen does not change by a bit; and the folder answers as the model in memory did."""
    if "--quantize" in METHODS[method]:
        pytest.importorskip("bitsandbytes")
    grads: list[set[str]] = []
    frozen: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.Tensor] = {}
    logits = []
    fit = Trainer.fit

    def watched(self):
        model, optimizer = self.model, self.optimizer
        gpt = model.module.gpt if hasattr(model, "module") else model.gpt
        named = dict(gpt.named_parameters())
        step = optimizer.optimizer.step if hasattr(optimizer, "optimizer") else optimizer.step

        def record(*a, **k):
            grads.append({n for n, p in named.items() if p.grad is not None and bool(p.grad.any())})
            return step(*a, **k)

        monkeypatch.setattr(getattr(optimizer, "optimizer", optimizer), "step", record)
        frozen.update({n: p.detach().clone() for n, p in named.items() if not p.requires_grad})
        trained.update({n: p.detach().clone() for n, p in named.items() if p.requires_grad})
        result = fit(self)
        for name, before in frozen.items():
            assert torch.equal(named[name], before), name
        for name, before in trained.items():
            assert not torch.equal(named[name], before), name
        with torch.no_grad():
            logits.append(gpt.eval()(IDS))
        return result

    monkeypatch.setattr(Trainer, "fit", watched)
    final = finetune(method, base, rows_file, tmp_path / "out")
    printed = capsys.readouterr().out
    assert len(grads) == 3 and not set(trained) - grads[1], sorted(set(trained) - grads[1])
    assert grads[1] == grads[2] == set(trained)
    assert ("frozen" if method == "full" else "trained") and bool(frozen) == (method != "full")

    with torch.no_grad():
        scheme = METHODS[method][METHODS[method].index("--quantize") + 1] if "--quantize" in METHODS[method] else None
        again = ModelSource.open(final).model(torch.float32, CPU, scheme)(IDS)
    torch.testing.assert_close(again, logits[0], rtol=0, atol=1e-4)
    for command in (["validate"], ["generate", "--max_new_tokens", "3"]):
        main([command[0], str(final), *command[1:]])
    assert "give their recorded outputs" in capsys.readouterr().out
    if METHODS[method][0] == "lora":
        main(["merge_lora", str(final)])
        assert json.loads((tmp_path / "out" / "final-merged" / "config.json").read_text())["num_hidden_layers"] == 4
    elif method != "full":
        assert "cannot be merged" in printed
        with pytest.raises(SystemExit):
            main(["merge_lora", str(final)])
        assert "LLaMA-Adapter" in capsys.readouterr().err
    assert yaml.safe_load((final / "hyperparameters.yaml").read_text())["quantize"] == scheme


def test_full_writes_a_model_that_transformers_reads(base, rows_file, tmp_path):
    from transformers import AutoModelForCausalLM

    final = finetune("full", base, rows_file, tmp_path / "out")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()(IDS).logits
        torch.testing.assert_close(ModelSource.open(final).model(torch.float32, CPU)(IDS), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("full", ["--quantize", "bnb.nf4"], "--quantize bnb.nf4 needs frozen weights"),
        ("lora", ["--quantize", "bnb.int4"], "--quantize bnb.int4: expected bnb.nf4"),
        ("pissa", ["--quantize", "bnb.nf4"], "--lora_init pissa changes the frozen weights"),
        ("adapter", ["--adapter_start_layer", "4"], "--adapter_start_layer 4"),
        ("adapter", ["--adapter_prompt_length", "0"], "--adapter_prompt_length 0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(method, flags, message, base, rows_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune(method, base, rows_file, tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_prefix_of_another_model(base, rows_file, tmp_path, tokenizer_file):
    final = finetune("adapter", base, rows_file, tmp_path / "out")
    other = save_llama(tmp_path / "other", tokenizer_file, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"does not fit the model: .*h\.3\.attn\.prefix\.embedding is unknown"):
        ModelSource.open(final, base=other).model(torch.float32, CPU)
    fields = json.loads((final / "adapter_config.json").read_text())
    (final / "adapter_config.json").write_text(json.dumps(fields | {"peft_type": "LITGPT_ADAPTER_V3"}))
    with pytest.raises(UserError, match="Did you mean 'LITGPT_ADAPTER_V2'"):
        ModelSource.open(final)


def test_lora_plus(base, rows_file, tmp_path, monkeypatch):
    """B has a multiple of A's learning rate, in the groups and in every step."""
    rates: list[dict[float, float]] = []

    step = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        rates.append({group["lr_ratio"]: group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    finetune("lora", base, rows_file, tmp_path / "out", "--lora_plus_ratio", 16, "--optimizer", "SGD")
    assert len(rates) == 3 and all(r[16.0] == pytest.approx(16 * r[1.0]) for r in rates)


LLAMA_2_7B = {"n_layer": 32, "n_embd": 4096, "n_head": 32, "intermediate_size": 11008, "padded_vocab_size": 32000}
LLAMA_2_13B = {**LLAMA_2_7B, "n_layer": 40, "n_embd": 5120, "n_head": 40, "intermediate_size": 13824}
EVERYTHING = dict.fromkeys(("query", "key", "value", "projection", "mlp", "head"), True)


@pytest.mark.parametrize(
    ("config", "method", "count"),
    [
        (LLAMA_2_7B, LoRA(r=8), 4_194_304),
        (LLAMA_2_13B, LoRA(r=8), 6_553_600),
        (LLAMA_2_7B, LLaMAAdapter(), 1_229_760),
        (LLAMA_2_7B, LLaMAAdapterV2(), 4_279_744),
        (LLAMA_2_7B, LoRA(r=8, **EVERYTHING), 20_277_248),
        (LLAMA_2_7B, LoRA(r=16, **EVERYTHING), 40_554_496),
        (LLAMA_2_7B, LoRA(r=256, **EVERYTHING), 648_871_936),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_published_numbers_of_trained_parameters(config, method, count):
    with torch.device("meta"):
        model = GPT(Config(**config))
    assert sum(p.numel() for p in model.parameters()) == (6_738_415_616 if config["n_layer"] == 32 else 13_015_864_320)
    method.apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
