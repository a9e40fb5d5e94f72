"""gpt-oss as it is released, with experts in MXFP4: as in `transformers`, dequantized or kept in 4 bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.errors import UserError
from litgpt.families import mxfp4, read_config, write_config
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.config import Config, differences
from litgpt.model.gpt import GPT
from tests.families import save_random
from tests.test_families import CPU, assert_close, ids, ours
from tests.test_families_peft import save_tokenizer
from tests.test_lora import flags as lora_flags
from tests.test_training import files, finetune, losses, reference  # noqa: F401 (a fixture)

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """In two files, which have the blocks and the scales."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    folder = save_random(tmp_path_factory.mktemp("m") / "gpt-oss", "gpt_oss", "plain", torch.bfloat16, sizes)
    save_tokenizer(folder)
    weights, scales = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith((".gate_up_proj", ".down_proj"))]:
        weights[f"{name}_blocks"], scales[f"{name}_scales"] = mxfp4.quantized(weights.pop(name).transpose(1, 2))
    (folder / "model.safetensors").unlink()
    index = {}
    for i, part in enumerate((weights, scales), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: t.contiguous() for n, t in part.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": MXFP4}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def in_4_bits(folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    return ModelSource.open(folder).model(dtype, CPU, "mxfp4")


def test_the_released_config():
    """As the hub has it, with fields that nobody reads."""
    rope = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64}
    counts = {"num_key_value_heads": 8, "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4}
    fields = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "output_router_logits": False,
        "quantization_config": MXFP4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**rope, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
        **sizes,
        **counts,
    }
    known = Config.from_name("openai/gpt-oss-20b")
    assert differences(read_config(fields), known) == [] == differences(read_config(write_config(known)), known)


def test_numbers():
    """Each byte and the scales of weights, as `transformers` reads them; and again what was read."""
    blocks = torch.arange(256, dtype=torch.uint8).view(2, 4, 2, 16)
    scales = torch.tensor([1, 90, 120, 127, 128, 140, 200, 250], dtype=torch.uint8).repeat(2).view(2, 4, 2)
    read = mxfp4.dequantized(blocks, scales)
    assert torch.equal(read.transpose(1, 2), convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(mxfp4.dequantized(*mxfp4.quantized(read)), read)
    assert torch.equal(mxfp4.dequantized(*mxfp4.quantized(torch.zeros(3, 64))), torch.zeros(3, 64).bfloat16())
    drawn = torch.randn(50, 320)
    error = (mxfp4.dequantized(*mxfp4.quantized(drawn)) - drawn).abs().unflatten(1, (-1, 32))
    assert (error <= 0.2501 * drawn.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)).all()


@torch.no_grad()
def test_logits(folder):
    expected = theirs(folder)(ids(60)).logits
    assert_close(ours(folder)(ids(60)), expected, 2e-5)
    assert_close(in_4_bits(folder)(ids(60)), expected, 2e-5)
    rounded = [model(ids(60)) for model in (in_4_bits(folder, torch.bfloat16), ours(folder, torch.bfloat16))]
    assert_close(*rounded, 0.02)


def test_experts_alone_are_in_4_bits(folder):
    model = in_4_bits(folder)
    kept = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(kept) == 2 * 3 * 4 and all(".experts." in name for name in kept)
    weights = sum(t.nbytes for m in kept.values() for both in m.stored for t in both)
    assert weights == sum(m.in_features * m.out_features for m in kept.values()) * 17 / 32
    before = {n: m.dequantized() for n, m in kept.items()}
    model.to(torch.float16)
    assert all(torch.equal(m.dequantized(), before[n]) for n, m in kept.items())


def test_lora_gradients(folder):
    """Over experts in 4 bits as over the dequantized ones."""
    results = []
    for scheme in ("mxfp4", None):
        with torch.device("meta"):
            model = GPT(Checkpoint(folder).config)
        if scheme is not None:
            quantize(model, scheme, CPU)
        LoRA(r=2, dropout=0.0, **lora_flags({"query", "mlp"})).apply(model)
        torch.manual_seed(0)
        load_weights(model, Checkpoint(folder), torch.float32, CPU)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        draw = torch.Generator().manual_seed(1)
        for p in named.values():
            p.data.copy_(torch.randn(p.shape, generator=draw) / 10)
        torch.nn.functional.cross_entropy(model.train()(ids(40))[0, :-1], ids(40)[0, 1:]).backward()
        results.append({n: p.grad for n, p in named.items()})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert_close(grad, results[1][name], 1e-4, 1e-7)


@pytest.mark.long
def test_loss_curve_of_peft(folder, files, tokenizer_file, tmp_path):  # noqa: F811
    """On padded batches, over experts in 4 bits, with updates of some of their layers."""
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    flags = ["--lora_targets", "q_proj|o_proj|experts.*down_proj", "--quantize", "mxfp4", "--train.epochs", 10]
    finetune(base, files, tmp_path / "start", *flags, "--train.max_steps", 1, "--optimizer.lr", 1e-30)
    stacks = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}  # the first has updates of zero
    expected = reference(base, files, tmp_path / "start" / "final", ["q_proj", "o_proj"], **stacks)
    curve = losses(finetune(base, files, tmp_path / "out", *flags, "--train.micro_batch_size", 8))
    assert curve == pytest.approx(expected, abs=1e-4) and curve[-1] < curve[0] - 0.3


@torch.no_grad()
def test_what_is_written_is_dequantized(folder, tmp_path):
    main(["export", str(folder), "--to", "hf", "--out", str(tmp_path / "out")])
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in fields and fields["dtype"] == "bfloat16"
    assert_close(theirs(tmp_path / "out")(ids(60)).logits, theirs(folder)(ids(60)).logits, 1e-6)


def test_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    scales = tmp_path / "model-00002-of-00002.safetensors"
    kept = load_file(scales)
    gone = sorted(kept)[0]
    save_file({n: t for n, t in kept.items() if n != gone}, scales, {"format": "pt"})
    with pytest.raises(UserError, match=f"has {gone.replace('_scales', '_blocks')} without {gone}"):
        ours(tmp_path)
    llama = Checkpoint(save_random(tmp_path / "llama", "llama", "plain")).config
    with torch.device("meta"):
        model = GPT(llama)
    with pytest.raises(UserError, match=r"--quantize mxfp4 is for experts .* llama, has none"):
        quantize(model, "mxfp4", CPU)
