"""rsLoRA, DoRA, PiSSA, LoRA+, selections and trained embeddings, exported to `peft` and read back."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.errors import UserError
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.lora import TARGETS, LoRA, lora_layers
from litgpt.methods.model_source import ModelSource
from litgpt.model.gpt import GPT
from tests.test_lora import CPU, IDS, base, flags, save, theirs, with_lora  # noqa: F401 (a fixture)

EVERYTHING = flags(set(TARGETS))
NEARLY = flags(set(TARGETS) - {"head"})


def trained(folder: Path, lora: LoRA, std: float = 0.05) -> GPT:
    """A model whose trained weights have all moved."""
    model = with_lora(folder, lora)
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += std * torch.randn(p.shape, generator=draw)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=3, alpha=5, variant="rslora", **EVERYTHING),
        LoRA(r=3, alpha=5, variant="dora", **EVERYTHING),
        LoRA(r=3, alpha=5, variant="dora", query=True, value=False),
        LoRA(r=3, alpha=5, init="pissa", **NEARLY),
        LoRA(r=30, alpha=5, init="pissa", **NEARLY),  # above the rank of k and v
        LoRA(r=3, alpha=5, variant="rslora", init="pissa"),
        LoRA(r=3, alpha=5, targets=r"layers\.1\.self_attn\.[qo]_proj|layers\.0\.mlp\.up"),
        LoRA(r=3, alpha=5, layers=[-1], **EVERYTHING),
        LoRA(r=3, alpha=5, train_embeddings=True, **NEARLY),
    ],
    ids=["rslora", "dora", "dora of q", "pissa", "pissa of high rank", "pissa rslora", "regex", "layer", "embedding"],
)
def test_export_and_merge(base, lora, tmp_path):  # noqa: F811
    model = trained(base, lora)
    expected = model(IDS)
    assert (expected - ModelSource.open(base).model(torch.float32, CPU)(IDS)).abs().max() > 0.05
    folder = save(model, lora, base, tmp_path / "adapter")
    written = {n.removeprefix("base_model.model.") for n in load_file(folder / "adapter_model.safetensors")}

    in_peft = PeftModel.from_pretrained(theirs(base), folder).eval()
    torch.testing.assert_close(in_peft(IDS).logits, expected, rtol=0, atol=1e-4)
    adapted = {n.removeprefix("base_model.model.").rpartition(".lora_A")[0] for n, _ in in_peft.named_modules()}
    assert adapted - {""} == {n.rpartition(".lora_A")[0] for n in written if ".lora_A" in n}
    again = ModelSource.open(folder).model(torch.float32, CPU)(IDS)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)

    main(["merge_lora", str(folder)])
    merged = tmp_path / "adapter-merged"
    torch.testing.assert_close(theirs(merged)(IDS).logits, expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True, "target_modules": "all-linear"},
        {
            "rank_pattern": {"q_proj": 2, r"layers.1.*up_proj": 7},
            "alpha_pattern": {"layers.0.*q_proj": 12, "up_proj": 3},
        },
        {"rank_pattern": {"q_proj": 9}, "use_rslora": True, "use_dora": True},
        {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["rslora", "dora", "patterns", "all at once", "regex", "whole modules"],
)
def test_adapters_of_peft(base, changes, tmp_path, request):  # noqa: F811
    if "modules_to_save" in changes and "-tied" in request.node.name:
        changes = {**changes, "ensure_weight_tying": True}
    torch.manual_seed(1)
    given = {"target_modules": ["q_proj", "v_proj", "up_proj"], **changes}
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **given)
    model = get_peft_model(theirs(base), config).eval()
    for name, p in model.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            p *= 1 + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))  # one draw for a tied pair
    model.save_pretrained(tmp_path / "adapter")
    ours = ModelSource.open(tmp_path / "adapter", base=base).model(torch.float32, CPU)
    torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_training_starts_from_the_base(base, variant, init):  # noqa: F811
    if (variant, init) == ("dora", "pissa"):
        with pytest.raises(UserError, match="--lora_init pissa"):
            LoRA(variant=variant, init=init)
        return
    lora = LoRA(variant=variant, init=init, **EVERYTHING)
    with torch.device("meta"):
        model = GPT(Checkpoint(base).config)
    lora.apply(model)
    load_weights(model, Checkpoint(base), torch.float32, CPU)
    plain = ModelSource.open(base).model(torch.float32, CPU)(IDS)
    if init == "pissa" and model.config.tie_embeddings:
        return  # the embedding is what is left of the head, too
    torch.testing.assert_close(model.eval()(IDS), plain, rtol=0, atol=1e-4)


def test_pissa_starts_with_the_principal_part(base):  # noqa: F811
    model = with_lora(base, LoRA(r=4, init="pissa"))
    whole = Checkpoint(base).tensor("model.layers.0.self_attn.q_proj.weight")
    layer = lora_layers(model)["transformer.h.0.attn.qkv"]
    left = layer.linear.weight[: len(whole)]
    assert torch.linalg.svdvals(left)[0] == pytest.approx(float(torch.linalg.svdvals(whole)[4]), rel=1e-3)


def test_dora_with_dropout_and_the_norm_in_full(base):  # noqa: F811
    """The norm that is written out is that of the sum; with dropout the update and the base see the same inputs."""
    lora = LoRA(r=3, alpha=5, variant="dora", dropout=0.5, **EVERYTHING)
    layer = lora_layers(trained(base, lora))["transformer.h.0.attn.qkv"]
    layer.magnitude.data *= 1.3
    w, b = layer.linear.weight, layer.linear.bias
    update = torch.cat([lb @ la for _, la, lb in layer.blocks()]) * lora.scaling
    torch.testing.assert_close(layer.row_norms(), (w + update).norm(dim=1), rtol=1e-5, atol=0)
    x = torch.randn(7, w.size(1))
    layer.train()
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    seen = layer.dropout(x)
    ratio = layer.magnitude / (w + update).norm(dim=1)
    expected = x @ w.T + b + (ratio - 1) * (seen @ w.T) + ratio * (seen @ update.T)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": "q_porj"}, r"'q_porj' matches no layer.*q_proj"),
        ({"layers": [2]}, r"--lora_layers has 2"),
        ({"layers": []}, "empty list"),
    ],
)
def test_selections_that_fail(base, wrong, message):  # noqa: F811
    with torch.device("meta"):
        model = GPT(Checkpoint(base).config)
    with pytest.raises(UserError, match=message):
        LoRA(**wrong).apply(model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": "("}, "--lora_targets: .* is not a regular expression"),
        ({"plus_ratio": 0.0}, "--lora_plus_ratio"),
        ({"r": 0, "dropout": 1.0}, "--lora_r 0 must be above 0; --lora_dropout 1.0"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(UserError, match=message):
        LoRA(**wrong)


def test_a_magnitude_that_is_missing(base, tmp_path):  # noqa: F811
    lora = LoRA(r=2)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match=r"lacks lora_A or lora_B or lora_magnitude_vector for: model\.layers\.0"):
        open_adapter(folder).deltas(Checkpoint(base).config)
