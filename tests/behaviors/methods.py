"""Behaviors of `litgpt.lora`, `litgpt.adapter` and `litgpt.adapter_v2`: a finetuning loop of one's own."""

import tempfile
from pathlib import Path

import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora
import torch
import yaml
from torch.nn import functional as F

import litgpt

LLAMA = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "vocab_size": 50,
    "padding_multiple": 16,
    "block_size": 40,
    "intermediate_size": 44,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
NEOX = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 60, "padding_multiple": 8, "block_size": 32}
MIXTRAL = LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2}
SOFTCAPPED = LLAMA | {"attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
IDS = torch.tensor([[1, 7, 3, 22, 9, 41, 5, 13, 2, 30], [4, 4, 8, 33, 17, 6, 12, 0, 45, 21]])
LORA = {"lora_r": 3, "lora_alpha": 6, "lora_query": True, "lora_value": True}
EVERYWHERE = LORA | {f"lora_{name}": True for name in ("key", "projection", "mlp", "head")}
MODULES = {"lora": litgpt.lora, "adapter": litgpt.adapter, "adapter_v2": litgpt.adapter_v2}
LOGITS = {  # of LitGPT, of the second text, every third token
    "lora llama": [
        -1.455959,
        -0.065768,
        1.755476,
        -1.749244,
        2.563033,
        1.199738,
        1.013155,
        -0.18133,
        1.281759,
        3.314512,
        1.08871,
        0.352049,
        0.265204,
        1.281696,
        3.449497,
        -2.228825,
        0.087727,
        0.675468,
        -0.086443,
        2.285181,
    ],
    "lora llama everywhere": [
        -0.754374,
        -0.382905,
        0.662734,
        0.356134,
        1.250428,
        0.940812,
        -0.46361,
        -0.970081,
        0.490636,
        1.531004,
        1.330401,
        -0.291299,
        0.737259,
        0.207472,
        1.665144,
        2.784191,
        -1.840761,
        -0.286589,
        0.545827,
        -1.871869,
    ],
    "lora neox": [
        -2.23934,
        -0.906786,
        5.084033,
        -3.001198,
        -1.297006,
        -1.575737,
        -0.742819,
        4.122673,
        -1.314832,
        -1.235805,
        -3.966125,
        -0.498508,
        4.373312,
        -2.697823,
        -1.056665,
        -3.75974,
        -0.655195,
        3.717748,
        -1.612667,
        -0.746428,
    ],
    "lora mixtral": [
        0.962898,
        -1.127463,
        -1.870074,
        0.100036,
        -2.622725,
        1.765666,
        0.09368,
        -1.073312,
        1.791316,
        -2.530114,
        1.693329,
        -1.137748,
        -1.463874,
        0.556637,
        -2.147883,
        1.493849,
        1.068349,
        -0.603436,
        1.782762,
        -3.347408,
    ],
    "lora softcapped": [
        -0.738866,
        -0.380839,
        0.65216,
        0.35447,
        1.182717,
        1.087337,
        -0.620411,
        0.178508,
        0.542299,
        0.953253,
        1.632748,
        -0.567154,
        0.423531,
        0.023355,
        1.165545,
        2.231297,
        -1.58239,
        0.611049,
        0.194837,
        -1.770617,
    ],
    "adapter llama": [
        -1.143608,
        -1.774071,
        -1.434258,
        0.727114,
        1.039276,
        1.874475,
        1.713535,
        -0.768175,
        0.863097,
        0.583265,
        1.585505,
        0.789072,
        0.340628,
        -1.387005,
        -2.038545,
        1.041794,
        1.883184,
        -0.450273,
        0.833047,
        1.044887,
    ],
    "adapter neox": [
        -4.332304,
        -3.954336,
        1.251616,
        -1.319635,
        -1.80665,
        -4.555861,
        -3.858348,
        0.780066,
        -0.829261,
        -1.295533,
        -4.598406,
        -3.865926,
        0.497958,
        -0.862524,
        -1.409818,
        -4.492417,
        -3.656121,
        0.967887,
        -0.569039,
        -2.148207,
    ],
    "adapter softcapped": [
        -1.095954,
        -1.589294,
        -1.336178,
        0.7338,
        1.057989,
        1.643847,
        1.538384,
        -0.743208,
        0.840611,
        0.623777,
        1.497036,
        0.752365,
        0.296489,
        -1.352676,
        -1.564469,
        0.807487,
        0.962808,
        -0.497491,
        1.221873,
        1.22464,
    ],
    "adapter_v2 llama": [
        1.572799,
        0.990111,
        -0.095031,
        0.644518,
        -0.547199,
        0.732615,
        1.717909,
        -0.183959,
        0.511981,
        -0.719407,
        1.524037,
        2.61742,
        -1.802059,
        0.49843,
        -0.332639,
        0.668302,
        2.102975,
        -2.751473,
        1.399555,
        -0.53522,
    ],
    "adapter_v2 neox": [
        -0.77177,
        -0.933904,
        2.054924,
        -2.063145,
        -0.379269,
        -0.639646,
        0.089524,
        1.859209,
        -1.717977,
        -0.419349,
        -1.45224,
        -0.456788,
        2.098659,
        -2.215166,
        -0.787815,
        -1.701035,
        -0.636842,
        2.160833,
        -1.968668,
        -0.995801,
    ],
    "adapter_v2 mixtral": [
        -1.532893,
        -1.225937,
        0.1722,
        0.955749,
        -0.257464,
        -1.971129,
        -0.147011,
        0.449632,
        0.636889,
        -0.449641,
        0.013422,
        0.58202,
        0.158391,
        0.196821,
        -1.18677,
        -2.302893,
        -1.611811,
        0.301343,
        0.207057,
        -1.459042,
    ],
    "adapter_v2 without prefix": [
        1.606761,
        0.979809,
        -0.072251,
        0.672395,
        -0.547542,
        0.751943,
        1.705501,
        -0.158489,
        0.518452,
        -0.712378,
        1.541877,
        2.603054,
        -1.780147,
        0.499977,
        -0.320644,
        0.692494,
        2.091886,
        -2.75275,
        1.422802,
        -0.535474,
    ],
}


def filled(model, std=0.2):
    """The model with weights that depend on their names alone."""
    state = model.state_dict()
    for name in sorted(state):
        generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        shape = state[name].shape
        size = std if len(shape) == 1 or "lora" in name or "gating" in name else 1.2 / shape[-1] ** 0.5
        mean = 1.0 if "norm" in name or "ln_f" in name or "adapter_scale" in name else 0.0
        state[name] = torch.randn(shape, generator=generator) * size + mean
    model.load_state_dict(state)
    return model.eval()


def made(kind, fields, **options):
    module = MODULES[kind]
    return filled(module.GPT(module.Config(**fields, **options)))


CASES = {
    "lora llama": ("lora", LLAMA, LORA),
    "lora llama everywhere": ("lora", LLAMA, EVERYWHERE),
    "lora neox": ("lora", NEOX, EVERYWHERE | {"lora_query": False}),
    "lora mixtral": ("lora", MIXTRAL, EVERYWHERE),
    "lora softcapped": ("lora", SOFTCAPPED, EVERYWHERE),
    "adapter llama": ("adapter", LLAMA, {"adapter_prompt_length": 4, "adapter_start_layer": 1}),
    "adapter neox": ("adapter", NEOX, {}),
    "adapter softcapped": ("adapter", SOFTCAPPED, {}),
    "adapter_v2 llama": ("adapter_v2", LLAMA, {}),
    "adapter_v2 neox": ("adapter_v2", NEOX, {"adapter_start_layer": 0}),
    "adapter_v2 mixtral": ("adapter_v2", MIXTRAL, {}),
    "adapter_v2 without prefix": ("adapter_v2", LLAMA, {"adapter_start_layer": 3}),
}


def raises(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind}")


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, float((a - b).abs().max())


def steps(model, n=4, lr=3e-2):
    """Losses of a loop over the parameters that are trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(n):
        for block in model.transformer.h:
            block.attn.adapter_kv_cache = None  # LitGPT needs this before each step of a loop
        logits = model(IDS)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def n_trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def base_state(fields=LLAMA):
    return filled(litgpt.GPT(litgpt.Config(**fields))).state_dict()


def check_logits(start):
    for name in CASES:
        if name.startswith(start):
            kind, fields, options = CASES[name]
            with torch.no_grad():
                found = made(kind, fields, **options)(IDS)
            close(found[1, ::3, :5].flatten(), torch.tensor(LOGITS[name]), 2e-5)


def test_logits_of_lora():
    check_logits("lora")


def test_logits_of_adapter():
    check_logits("adapter ")


def test_logits_of_adapter_v2():
    check_logits("adapter_v2")


# LoRA


def test_lora_config():
    config = litgpt.lora.Config.from_name("pythia-14m", lora_r=8, lora_query=True)
    assert isinstance(config, litgpt.Config) and (config.lora_r, config.lora_query, config.lora_key) == (8, True, False)
    bare = litgpt.lora.Config()
    assert (bare.lora_r, bare.lora_alpha, bare.lora_dropout) == (0, 1, 0.0)
    switches = ("query", "key", "value", "projection", "mlp", "head")
    assert not any(getattr(bare, f"lora_{name}") for name in switches)


def test_lora_config_of_a_file():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model_config.yaml").write_text(yaml.safe_dump(LLAMA))
        config = litgpt.lora.Config.from_file(Path(folder, "model_config.yaml"), **LORA)
        assert config == litgpt.lora.Config.from_checkpoint(Path(folder), **LORA)
    assert config == litgpt.lora.Config(**LLAMA, **LORA)


def test_lora_from_name():
    model = litgpt.lora.GPT.from_name("pythia-14m", n_layer=1, lora_r=2, lora_query=True)
    assert isinstance(model, litgpt.GPT) and isinstance(model.config, litgpt.lora.Config)
    assert model(IDS).shape == (2, 10, 50304)


def test_lora_starts_as_its_base():
    base = filled(litgpt.GPT(litgpt.Config(**LLAMA)))
    model = litgpt.lora.GPT(litgpt.lora.Config(**LLAMA, **EVERYWHERE)).eval()
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys and all("lora_" in key for key in result.missing_keys)
    with torch.no_grad():
        close(model(IDS), base(IDS))


def test_lora_trains_its_updates_alone():
    model = made("lora", LLAMA, **LORA)
    assert n_trainable(model) == sum(p.numel() for p in model.parameters())
    litgpt.lora.mark_only_lora_as_trainable(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all(name.endswith(("attn.qkv.lora_A", "attn.qkv.lora_B")) for name in trained)
    assert n_trainable(model) == 3 * (6 * 32 + 48 * 3)


def test_lora_biases():
    model = made("lora", NEOX, **LORA)
    litgpt.lora.mark_only_lora_as_trainable(model, bias="all")
    assert model.transformer.h[0].norm_1.bias.requires_grad and not model.transformer.h[0].norm_1.weight.requires_grad
    assert model.transformer.h[0].attn.qkv.linear.bias.requires_grad
    litgpt.lora.mark_only_lora_as_trainable(model, bias="none")
    assert not model.transformer.h[0].attn.qkv.linear.bias.requires_grad
    raises(NotImplementedError, lambda: litgpt.lora.mark_only_lora_as_trainable(model, bias="some"))


def test_lora_state_dict():
    state = made("lora", LLAMA, **EVERYWHERE).state_dict()
    layer = "transformer.h.1."
    shapes = {name.removeprefix(layer): tuple(t.shape) for name, t in state.items() if name.startswith(layer)}
    assert shapes["attn.qkv.lora_A"] == (9, 32) and shapes["attn.qkv.lora_B"] == (64, 3)
    assert shapes["mlp.fc_1.lora_A"] == (3, 32) and shapes["mlp.fc_2.lora_B"] == (44, 3)
    assert shapes["mlp.fc_2.linear.weight"] == (44, 32) and state["lm_head.linear.weight"].shape == (64, 32)
    assert "lm_head.lora_A" in state and "transformer.wte.weight" in state


def test_lora_linear_names_without_updates():
    state = made("lora", LLAMA, **LORA).state_dict()
    assert "transformer.h.0.mlp.fc_1.linear.weight" in state and "transformer.h.0.mlp.fc_1.weight" not in state


def test_lora_filter():
    state = made("lora", LLAMA, **LORA).state_dict()
    kept = {name: t for name, t in state.items() if litgpt.lora.lora_filter(name, t)}
    assert set(kept) == {f"transformer.h.{i}.attn.qkv.lora_{x}" for i in range(3) for x in "AB"}


def test_lora_loop():
    """Train, save the updates, load them again, merge, and load the merged weights as a plain model."""
    model = litgpt.lora.GPT(litgpt.lora.Config(**LLAMA, **EVERYWHERE))
    model.load_state_dict(base_state(), strict=False)
    litgpt.lora.mark_only_lora_as_trainable(model)
    losses = steps(model)
    assert losses[-1] < losses[0] - 0.5
    with tempfile.TemporaryDirectory() as folder:
        state = {n: t for n, t in model.state_dict().items() if litgpt.lora.lora_filter(n, t)}
        torch.save({"model": state}, Path(folder, "lit_model.pth.lora"))
        state = torch.load(Path(folder, "lit_model.pth.lora"), weights_only=True)["model"]
    again = litgpt.lora.GPT(litgpt.lora.Config(**LLAMA, **EVERYWHERE)).eval()
    result = again.load_state_dict(base_state() | state, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        expected = model(IDS)
        close(again(IDS), expected)
        litgpt.lora.merge_lora_weights(again)
        close(again(IDS), expected, 3e-5)
    merged = {n.replace("linear.", ""): t for n, t in again.state_dict().items() if not litgpt.lora.lora_filter(n, t)}
    plain = litgpt.GPT(litgpt.Config(**LLAMA)).eval()
    plain.load_state_dict(merged)
    with torch.no_grad():
        close(plain(IDS), expected, 3e-5)


def test_merge_once():
    for name in ("lora llama", "lora neox", "lora mixtral", "lora softcapped"):
        _, fields, options = CASES[name]
        model = made("lora", fields, **options)
        with torch.no_grad():
            expected = model(IDS)
            litgpt.lora.merge_lora_weights(model)
            litgpt.lora.merge_lora_weights(model)
            close(model(IDS), expected, 5e-5)


def test_lora_in_another_precision():
    model = made("lora", LLAMA, **LORA).to(torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS)
        litgpt.lora.merge_lora_weights(model)
        close(model(IDS).float(), expected.float(), 0.3)


def test_lora_with_a_cache():
    model = made("lora", LLAMA, **EVERYWHERE)
    with torch.no_grad():
        expected = model(IDS)[:, -1:]
        model.set_kv_cache(2)
        model(IDS[:, :9], torch.arange(9))
        close(model(IDS[:, 9:], torch.tensor([9])), expected)


def test_lora_dropout():
    model = made("lora", LLAMA, **LORA, lora_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS))
        model.train()
        assert not torch.equal(model(IDS), model(IDS))


def test_lora_off():
    for options in ({}, {"lora_r": 4}, {"lora_query": True}):
        model = made("lora", LLAMA, **options)
        assert not any("lora_" in name for name in model.state_dict())


def test_lora_linear():
    torch.manual_seed(0)
    layer = litgpt.lora.LoRALinear(8, 5, r=2, lora_alpha=4, bias=False)
    x = torch.randn(3, 8)
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "linear.weight"} and not layer.merged
    assert layer.scaling == 2 and layer.r == 2
    with torch.no_grad():
        close(layer(x), layer.linear(x))
        layer.lora_B.normal_()
        expected = layer.linear(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T
        close(layer(x), expected)
        layer.merge()
        close(layer(x), expected)
    assert layer.merged
    plain = litgpt.lora.LoRALinear(8, 5)
    assert set(plain.state_dict()) == {"linear.weight", "linear.bias"} and plain(x).shape == (3, 5)


def test_lora_qkv_linear():
    layer = litgpt.lora.LoRAQKVLinear(
        8, 16, head_size=2, n_head=4, n_query_groups=2, r=2, lora_alpha=4, enable_lora=(True, False, True), bias=False
    )
    assert isinstance(layer, litgpt.lora.LoRALinear) and isinstance(layer, litgpt.lora.LoRALayer)
    assert layer.lora_A.shape == (4, 8) and layer.lora_B.shape == (12, 2)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        close(layer(x), layer.linear(x))
        layer.lora_B.normal_()
        q, v = ((x @ a.T @ b.T) * 2 for a, b in zip(layer.lora_A.split(2), layer.lora_B.split([8, 4])))
        expected = layer.linear(x) + torch.cat([q, torch.zeros(3, 5, 4), v], dim=-1)
        close(layer(x), expected)
        layer.merge()
        close(layer(x), expected)


def test_classes_of_layers():
    model = made("lora", LLAMA, **EVERYWHERE)
    assert isinstance(model.transformer.h[0].attn.qkv, litgpt.lora.LoRAQKVLinear)
    assert isinstance(model.lm_head, litgpt.lora.LoRALinear)
    assert sum(isinstance(m, litgpt.lora.LoRALayer) for m in model.modules()) >= 3 * 4 + 1
    assert isinstance(model.transformer.h[0], litgpt.lora.Block)
    assert isinstance(made("adapter", LLAMA).transformer.h[0], litgpt.adapter.Block)
    linear = made("adapter_v2", LLAMA).transformer.h[0].attn.proj
    assert isinstance(linear, litgpt.adapter_v2.AdapterV2Linear)


# adapters


def test_adapter_config():
    config = litgpt.adapter.Config.from_name("pythia-14m", adapter_prompt_length=5)
    assert isinstance(config, litgpt.Config)
    assert (config.adapter_prompt_length, config.adapter_start_layer) == (5, 2)
    assert isinstance(litgpt.adapter_v2.Config(), litgpt.adapter.Config)


def test_adapter_state_dict():
    state = made("adapter", LLAMA).state_dict()
    own = {name: tuple(t.shape) for name, t in state.items() if litgpt.adapter.adapter_filter(name, t)}
    attn = "transformer.h.2.attn."
    assert own == {f"{attn}adapter_wte.weight": (10, 32), f"{attn}gating_factor": (1, 1, 4, 1)}
    assert "transformer.h.2.mlp.fc_1.weight" in state


def test_adapter_starts_as_its_base():
    base = filled(litgpt.GPT(litgpt.Config(**LLAMA)))
    for module in (litgpt.adapter, litgpt.adapter_v2):
        model = module.GPT(module.Config(**LLAMA)).eval()
        result = model.load_state_dict(base.state_dict(), strict=False)
        assert not result.unexpected_keys and all(module.adapter_filter(key, None) for key in result.missing_keys)
        with torch.no_grad():
            close(model(IDS), base(IDS))


def check_loop(module, mark, **options):
    """Train, save what is trained, and load it again over the base."""
    model = module.GPT(module.Config(**LLAMA, **options))
    model.load_state_dict(base_state(), strict=False)
    mark(model)
    losses = steps(model, lr=0.1)
    assert losses[-1] < losses[0] - 0.05
    for block in model.transformer.h:
        block.attn.adapter_kv_cache = None
    with tempfile.TemporaryDirectory() as folder:
        state = {n: t for n, t in model.state_dict().items() if module.adapter_filter(n, t)}
        torch.save({"model": state}, Path(folder, "file.pth"))
        state = torch.load(Path(folder, "file.pth"), weights_only=True)["model"]
    again = module.GPT(module.Config(**LLAMA, **options)).eval()
    result = again.load_state_dict(base_state() | state, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        close(again(IDS), model(IDS))


def test_adapter_loop():
    check_loop(litgpt.adapter, litgpt.adapter.mark_only_adapter_as_trainable, adapter_start_layer=0)


def test_adapter_v2_loop():
    check_loop(litgpt.adapter_v2, litgpt.adapter_v2.mark_only_adapter_v2_as_trainable)


def test_adapter_loop_without_a_reset():
    """A loop of one's own needs no knowledge of what an attention layer keeps."""
    model = made("adapter", LLAMA)
    litgpt.adapter.mark_only_adapter_as_trainable(model)
    for _ in range(2):
        model(IDS).sum().backward()


def test_adapter_trains_its_prefixes_alone():
    model = made("adapter", LLAMA)
    assert n_trainable(model) == sum(p.numel() for p in model.parameters())
    litgpt.adapter.mark_only_adapter_as_trainable(model)
    assert n_trainable(model) == 10 * 32 + 4


def test_adapter_v2_trains_norms_too():
    model = made("adapter_v2", LLAMA)
    litgpt.adapter_v2.mark_only_adapter_v2_as_trainable(model)
    features = 64 + 32 + 44 + 44 + 32
    assert n_trainable(model) == 10 * 32 + 4 + 3 * 2 * features + 2 * 64 + 7 * 32


def test_adapter_v2_state_dict():
    state = made("adapter_v2", LLAMA).state_dict()
    assert state["transformer.h.0.mlp.fc_1.adapter_bias"].shape == (44,)
    assert state["transformer.h.0.attn.qkv.adapter_scale"].shape == (64,)
    assert "lm_head.linear.weight" in state and "transformer.h.0.attn.proj.linear.weight" in state
    kept = [name for name in state if litgpt.adapter_v2.adapter_filter(name, None)]
    assert "transformer.ln_f.weight" in kept and "transformer.wte.weight" not in kept
    assert len(kept) == 2 + 2 * (3 * 5 + 1) + 7


def test_few_layers_have_no_prefix():
    model = made("adapter", LLAMA | {"n_layer": 2})
    assert not any("adapter" in name for name in model.state_dict()) and model(IDS).shape == (2, 10, 64)


if __name__ == "__main__":
    from runner import main

    main(globals())
