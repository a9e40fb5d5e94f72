"""Behaviors of `litgpt.Config` and `litgpt.GPT`. The expected logits are LitGPT's."""

import copy
import pickle
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import yaml

from litgpt import GPT, Config

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
NEOX = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 60, "padding_multiple": 8, "block_size": 32}
GEMMA = LLAMA | {
    "name": "Gemma-2-tiny",
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "scale_embeddings": True,
    "head_size": 12,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "attention_scores_scalar": 20,
    "sliding_window_size": 5,
    "sliding_window_indices": [1, 0, 1],
    "attention_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
MODELS = {
    "llama": LLAMA,
    "neox": NEOX,
    "gemma": GEMMA,
    "mixtral": LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "qwen": LLAMA | {"attn_bias": True, "norm_qk": True, "head_size": 12},
    "phi": NEOX | {"shared_attention_norm": True, "lm_head_bias": True, "rotary_percentage": 0.5},
    "llama 3": LLAMA
    | {
        "rope_base": 500000,
        "rope_adjustments": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_seq_len": 16,
        },
    },
    "condensed": LLAMA | {"rope_condense_ratio": 4},
}
IDS = torch.tensor([[1, 7, 3, 22, 9, 41, 5, 13, 2, 30], [4, 4, 8, 33, 17, 6, 12, 0, 45, 21]])
LOGITS = {  # of the second text, every third token
    "llama": [
        -1.161186,
        -1.767417,
        -1.43749,
        0.750311,
        1.106803,
        1.847,
        1.69352,
        -0.739494,
        0.82352,
        0.6645,
        1.617262,
        0.761229,
        0.234912,
        -1.345429,
        -1.760204,
        0.963312,
        1.675669,
        -0.483238,
        0.956616,
        1.250882,
    ],
    "neox": [
        -4.930871,
        -3.635157,
        1.012463,
        -1.774437,
        -2.090181,
        -5.14972,
        -3.804785,
        0.316565,
        -1.520276,
        -1.642044,
        -5.40209,
        -3.569214,
        -0.099127,
        -1.423547,
        -1.779649,
        -5.432146,
        -3.910199,
        0.59589,
        -1.164932,
        -2.60355,
    ],
    "gemma": [
        2.589,
        0.939281,
        1.854506,
        -0.691147,
        -2.437829,
        0.715165,
        -2.320897,
        -1.574754,
        1.233565,
        -1.22155,
        -1.756492,
        -0.698623,
        -1.989247,
        -1.657723,
        -2.346825,
        1.847387,
        1.288533,
        0.388812,
        -2.009542,
        1.718341,
    ],
    "mixtral": [
        -0.283771,
        0.820989,
        1.360095,
        2.300339,
        -0.298229,
        2.072479,
        2.965033,
        0.832936,
        0.215354,
        2.459575,
        1.543584,
        2.871377,
        2.199585,
        0.560326,
        0.734972,
        3.033315,
        3.115724,
        0.233112,
        0.442899,
        0.548053,
    ],
    "qwen": [
        -0.285637,
        0.690639,
        1.473778,
        -0.16779,
        -1.625319,
        0.292772,
        -1.619678,
        0.598264,
        -1.457226,
        -2.820078,
        -1.143346,
        -1.821391,
        0.078268,
        -0.002279,
        -0.970534,
        -1.416793,
        0.146262,
        0.885325,
        0.770384,
        -1.274313,
    ],
    "phi": [
        -5.121701,
        -3.412419,
        0.726252,
        -1.959562,
        -1.67633,
        -5.364826,
        -3.488176,
        0.329747,
        -1.821211,
        -1.897671,
        -5.511789,
        -3.444066,
        -0.034728,
        -1.414685,
        -1.456414,
        -5.204324,
        -3.62395,
        0.867447,
        -1.354422,
        -1.700796,
    ],
    "llama 3": [
        -1.161186,
        -1.767417,
        -1.43749,
        0.750311,
        1.106803,
        1.992919,
        1.520143,
        -0.551785,
        0.49003,
        0.306506,
        0.899414,
        1.387615,
        0.345676,
        -2.058291,
        -2.100757,
        1.56268,
        0.742029,
        -1.538805,
        0.778795,
        1.858538,
    ],
    "condensed": [
        -1.161186,
        -1.767417,
        -1.43749,
        0.750311,
        1.106803,
        2.271217,
        1.43748,
        -0.114449,
        -0.061194,
        0.254295,
        1.179639,
        1.038675,
        0.143838,
        -0.392801,
        1.649431,
        0.195425,
        -0.593962,
        0.230839,
        1.872597,
        1.43999,
    ],
}


def filled(model):
    """The model with weights that depend on their names alone."""
    state = model.state_dict()
    for name in sorted(state):
        generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        shape = state[name].shape
        std = 0.2 if len(shape) == 1 else 1.2 / shape[-1] ** 0.5
        mean = 1.0 if "norm" in name or "ln_f" in name else 0.0
        state[name] = torch.randn(shape, generator=generator) * std + mean
    model.load_state_dict(state)
    return model.eval()


def tiny(model="llama", **changes):
    return filled(GPT(Config(**MODELS[model] | changes)))


def raises(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind}")


@torch.no_grad()
def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, float((a - b).abs().max())


# configs


def test_names():
    import litgpt.config

    import litgpt.model

    assert litgpt.Config is litgpt.config.Config is litgpt.model.Config
    assert litgpt.GPT is litgpt.model.GPT
    assert all(hasattr(litgpt.model, name) for name in ("Block", "CausalSelfAttention", "LLaMAMLP", "RMSNorm"))
    assert isinstance(tiny().transformer.h[0], litgpt.model.Block)


def test_default_config():
    config = Config()
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (16, 32, 4096, 4096)
    assert (config.vocab_size, config.padded_vocab_size, config.intermediate_size) == (50254, 50688, 16384)
    assert (config.head_size, config.n_query_groups, config.rope_n_elem) == (128, 32, 32)
    assert config.bias and config.parallel_residual and config.mlp_class_name == "GptNeoxMLP"
    assert config.name == "" and config.hf_config == {} and config.norm_class_name == "LayerNorm"


def test_fields():
    known = "name hf_config block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size".split()
    assert [f.name for f in fields(Config)][:8] == known and len(fields(Config)) == 51
    assert Config(**asdict(Config(**LLAMA))) == Config(**LLAMA)


def test_from_name():
    config = Config.from_name("pythia-14m")
    assert config.name == "pythia-14m" and config.hf_config == {"org": "EleutherAI", "name": "pythia-14m"}
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (6, 128, 4, 512)
    assert (config.vocab_size, config.padded_vocab_size, config.padding_multiple) == (50254, 50304, 128)


def test_from_repository():
    config = Config.from_name("Llama-3.1-8B")
    assert Config.from_name("Meta-Llama-3.1-8B") == Config.from_name("meta-llama/Meta-Llama-3.1-8B") == config
    assert config.rope_adjustments["original_max_seq_len"] == 8192
    assert (config.vocab_size, config.padded_vocab_size) == (128000, 128256)


def test_from_name_with_changes():
    config = Config.from_name("pythia-14m", n_layer=2, n_embd=64, vocab_size=100)
    assert (config.n_layer, config.n_embd, config.head_size, config.intermediate_size) == (2, 64, 16, 256)
    assert (config.vocab_size, config.padded_vocab_size) == (100, 128)
    gemma = Config.from_name("Gemma-2-2b", n_layer=3)
    assert gemma.sliding_window_indices == [1, 0, 1]
    assert len(Config.from_name("Gemma-2-2b").sliding_window_indices) == 26


def test_unknown_name():
    raises(ValueError, lambda: Config.from_name("no-such-model"))
    raises(TypeError, lambda: Config.from_name("pythia-14m", no_such_field=1))


def test_all_names():
    import litgpt.config

    names = list(litgpt.config.name_to_config)
    assert len(names) == len(litgpt.config.configs) >= 210
    assert {c["name"] for c in litgpt.config.configs} == set(names)
    for name in names:
        config = Config.from_name(name)
        assert config == Config(**litgpt.config.name_to_config[name]), name
        assert config.name == name and config.hf_config["org"] and config.vocab_size <= config.padded_vocab_size


def test_vocabularies():
    expected = {"phi-2": (50257, 51200), "Qwen2.5-7B": (151643, 152064), "Gemma-2-2b": (256000, 256000)}
    expected |= {"OLMo-1B-hf": (50280, 50304), "CodeLlama-70b-Instruct-hf": (32015, 32016)}
    expected |= {"Mistral-7B-v0.1": (32000, 32000), "pythia-12b": (50254, 50688), "phi-4": (100352, 100352)}
    found = {name: Config.from_name(name) for name in expected}
    assert {name: (c.vocab_size, c.padded_vocab_size) for name, c in found.items()} == expected


def test_config_file():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model_config.yaml")
        file.write_text(yaml.safe_dump(asdict(Config(**LLAMA))))
        assert Config.from_file(file) == Config.from_file(str(file)) == Config(**LLAMA)
        assert Config.from_checkpoint(Path(folder)) == Config(**LLAMA)
        assert Config.from_checkpoint(Path(folder), block_size=8).block_size == 8
    raises(FileNotFoundError, lambda: Config.from_file("/no/such/file.yaml"))


def test_checkpoint_folder_with_a_known_name():
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder, "pythia-14m")
        named.mkdir()
        assert Config.from_checkpoint(named) == Config.from_name("pythia-14m")
        raises(FileNotFoundError, lambda: Config.from_checkpoint(Path(folder)))


def test_impossible_configs():
    raises((AssertionError, ValueError), lambda: Config(n_embd=10, n_head=3))
    raises((AssertionError, ValueError), lambda: Config(n_head=4, n_query_groups=3))
    raises(ValueError, lambda: Config(mlp_class_name="LLaMAMLP"))
    raises(ValueError, lambda: Config(n_layer=4, sliding_window_size=8, sliding_window_indices=[1, 0]))


def test_vocabulary_is_at_most_the_padded_one():
    assert Config(**NEOX | {"padded_vocab_size": 40}).vocab_size == 40
    assert Config(**NEOX).padded_vocab_size == 64


def test_windows_and_ropes_have_a_number_per_layer():
    assert Config(**LLAMA, sliding_window_size=8).sliding_window_indices == [1, 1, 1]
    config = Config(**LLAMA, rope_local_base_freq=10000.0, rope_indices=[1, 0, 1, 1])
    assert config.rope_indices == [1, 0, 1]


def test_classes():
    import litgpt.model

    config = Config(**LLAMA)
    assert config.mlp_class is litgpt.model.LLaMAMLP and config.mlp_class.__name__ == "LLaMAMLP"
    norm = config.norm_class(32, eps=config.norm_eps)
    assert isinstance(norm, litgpt.model.RMSNorm) and norm.weight.shape == (32,)
    assert isinstance(Config(**NEOX).norm_class(32, eps=1e-5), torch.nn.LayerNorm)
    assert Config.from_name("OLMo-1B-hf").norm_class(32).weight is None


# the model


def check_logits(model):
    with torch.no_grad():
        found = tiny(model)(IDS)
    assert found.shape == (2, 10, Config(**MODELS[model]).padded_vocab_size)
    close(found[1, ::3, :5].flatten(), torch.tensor(LOGITS[model]), 1e-5)


def test_logits_of_llama():
    check_logits("llama")


def test_logits_of_neox():
    check_logits("neox")


def test_logits_of_gemma():
    check_logits("gemma")


def test_logits_of_mixtral():
    check_logits("mixtral")


def test_logits_of_qwen():
    check_logits("qwen")


def test_logits_of_phi():
    check_logits("phi")


def test_logits_of_llama_3():
    check_logits("llama 3")


def test_logits_of_condensed_positions():
    check_logits("condensed")


def test_model_from_name():
    model = GPT.from_name("pythia-14m", n_layer=1)
    assert isinstance(model, torch.nn.Module) and model.config.name == "pythia-14m"
    assert model(torch.ones(1, 3, dtype=torch.long)).shape == (1, 3, 50304)
    assert len(model.transformer.h) == 1 and model.lm_head.out_features == 50304
    assert model.transformer.wte.weight.shape == (50304, 128)


def test_number_of_parameters():
    assert sum(p.numel() for p in tiny().parameters()) == 26208
    assert sum(p.numel() for p in tiny("neox").parameters()) == 29568


def test_integer_ids():
    model = tiny()
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS.int()))


def test_state_dict_has_the_names_of_the_file():
    layer = "transformer.h.0."
    expected = {"lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"}
    names = "norm_1 norm_2 attn.qkv attn.proj mlp.fc_1 mlp.fc_2 mlp.proj".split()
    expected |= {f"{layer}{name}.weight" for name in names}
    state = tiny(n_layer=1).state_dict()
    assert set(state) == expected
    assert state[f"{layer}mlp.fc_2.weight"].shape == (44, 32) and state[f"{layer}attn.qkv.weight"].shape == (64, 32)
    assert "lm_head.weight" in tiny("gemma").state_dict()
    assert "transformer.h.0.mlp.experts.1.fc_2.weight" in tiny("mixtral").state_dict()


def test_a_checkpoint_file():
    model = tiny("gemma")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict()}, Path(folder, "lit_model.pth"))
        state = torch.load(Path(folder, "lit_model.pth"), weights_only=True)["model"]
    other = GPT(Config(**GEMMA)).eval()
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        assert torch.equal(model(IDS), other(IDS))


def test_wrong_state_dicts():
    model = tiny()
    state = model.state_dict()
    raises(RuntimeError, lambda: model.load_state_dict({**state, "more": torch.ones(1)}))
    result = model.load_state_dict({"lm_head.weight": state["lm_head.weight"], "more": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["more"] and len(result.missing_keys) == len(state) - 1
    assert set(result.missing_keys) == set(state) - {"lm_head.weight"}
    raises(RuntimeError, lambda: model.load_state_dict({**state, "lm_head.weight": torch.ones(3, 3)}))


def test_files_with_another_order_of_qkv():
    """Old files have `attn.attn`, with the queries, the key and the value of each group together."""
    model = tiny(n_layer=1)
    state = model.state_dict()
    q, k, v = state.pop("transformer.h.0.attn.qkv.weight").split([32, 16, 16])
    groups = zip(q.chunk(2), k.chunk(2), v.chunk(2))
    state["transformer.h.0.attn.attn.weight"] = torch.cat([part for group in groups for part in group])
    other = GPT(model.config).eval()
    other.load_state_dict(state)
    with torch.no_grad():
        close(model(IDS), other(IDS), 0)


def test_within_another_module():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny()

    a, b = Wrapper(), Wrapper()
    state = {name: tensor * 2 for name, tensor in a.state_dict().items()}
    assert "model.transformer.h.0.mlp.fc_1.weight" in state
    b.load_state_dict(state)
    assert torch.equal(
        b.state_dict()["model.transformer.h.2.mlp.fc_2.weight"], state["model.transformer.h.2.mlp.fc_2.weight"]
    )


def test_max_seq_length():
    model = tiny()
    assert model.max_seq_length == 40
    raises(ValueError, lambda: setattr(model, "max_seq_length", 41))
    model.max_seq_length = 9
    assert model.max_seq_length == 9
    raises(ValueError, lambda: model(IDS))
    assert model(IDS[:, :9]).shape == (2, 9, 64)
    model.max_seq_length = 40
    assert model(IDS).shape == (2, 10, 64)


def decode(model, ids, steps):
    """Logits of the last tokens, with the cache."""
    logits = [model(ids[:, : ids.size(1) - steps], torch.arange(ids.size(1) - steps))[:, -1:]]
    for i in range(ids.size(1) - steps, ids.size(1)):
        logits.append(model(ids[:, i : i + 1], torch.tensor([i])))
    return torch.cat(logits, dim=1)


def test_cache():
    for name in MODELS:
        if name == "gemma":
            continue
        model = tiny(name)
        with torch.no_grad():
            expected = model(IDS[:1])[:, -6:]
            model.set_kv_cache(batch_size=1)
            close(decode(model, IDS[:1], 5), expected)
            close(decode(model, IDS[:1], 5), expected)  # from the beginning again
        model.clear_kv_cache()


def test_cache_with_a_sliding_window():
    model = tiny("gemma")
    with torch.no_grad():
        expected = model(IDS[:1])[:, -6:]
        model.set_kv_cache(batch_size=1)
        close(decode(model, IDS[:1], 5), expected)


def test_long_prompt_with_a_sliding_window():
    model = tiny("gemma")
    with torch.no_grad():
        expected = model(IDS[:1])[:, -3:]
        model.set_kv_cache(batch_size=1)
        close(decode(model, IDS[:1], 2), expected)


def test_cache_of_several_rows():
    for name in ("llama", "neox"):
        model = tiny(name)
        with torch.no_grad():
            expected = model(IDS)[:, -5:]
            model.set_kv_cache(2)
            close(decode(model, IDS, 4), expected)


def test_a_part_of_the_cache_is_replaced():
    model = tiny()
    other = torch.cat([IDS[:1, :5], torch.tensor([[40, 39, 38]])], dim=1)
    with torch.no_grad():
        expected = model(other)[:, -3:]
        model.set_kv_cache(1)
        model(IDS[:1], torch.arange(10))
        close(model(other[:, 5:], torch.arange(5, 8)), expected)


def test_positions_of_each_row():
    model = tiny()
    with torch.no_grad():
        expected = model(IDS)[:, -1:]
        model.set_kv_cache(2)
        positions = torch.arange(9).expand(2, 9)
        model(IDS[:, :9], positions)
        close(model(IDS[:, 9:], torch.tensor([[9], [9]])), expected)


def test_cache_must_be_set():
    model = tiny()
    raises(TypeError, lambda: model(IDS, torch.arange(10)))
    model.set_kv_cache(2)
    raises(ValueError, lambda: model(IDS, torch.arange(9)))
    model.clear_kv_cache()
    raises(TypeError, lambda: model(IDS, torch.arange(10)))


def test_cache_is_as_large_as_asked():
    model = tiny()
    model.max_seq_length = 12
    model.set_kv_cache(1)
    raises((IndexError, ValueError), lambda: model(IDS[:1], torch.arange(4, 14)))
    raises((RuntimeError, ValueError), lambda: model(torch.cat([IDS, IDS]), torch.arange(10)))


def test_chunks_of_the_head():
    model = tiny()
    with torch.no_grad():
        parts = model(IDS, lm_head_chunk_size=4)
        assert [part.shape[1] for part in parts] == [4, 4, 2]
        close(torch.cat(parts, dim=1), model(IDS))


def test_training_step():
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        logits = model(IDS)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_init_weights():
    model = GPT(Config(**NEOX))
    model.apply(model._init_weights)
    assert 0.018 < model.lm_head.weight.std() < 0.022 and 0.018 < model.transformer.wte.weight.std() < 0.022
    assert not model.transformer.h[0].attn.proj.bias.any()


def test_dtype_and_meta_device():
    model = tiny().to(torch.bfloat16)
    with torch.no_grad():
        assert model(IDS).dtype == torch.bfloat16
    with torch.device("meta"):
        model = GPT(Config(**LLAMA))
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(tiny().state_dict(), assign=True)
    model.max_seq_length = 40
    model.eval()
    assert all(not p.is_meta for p in model.parameters())


def test_fabric():
    """The loop of LitGPT's own scripts."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    with fabric.init_module(empty_init=False):
        model = GPT(Config(**LLAMA))
    model = fabric.setup(model)
    model.max_seq_length = 12
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lit_model.pth")
        torch.save(tiny().state_dict(), file)
        fabric.load_raw(file, model, strict=True)
        with torch.no_grad():
            close(model(IDS), tiny()(IDS))
        fabric.backward(model(IDS).sum())
        optimizer.step()
        fabric.save(file, {"model": model})
        state = torch.load(file, weights_only=True)["model"]
    assert "transformer.h.0.mlp.fc_2.weight" in state and model.max_seq_length == 12


def test_positions():
    from litgpt.model import apply_rope, build_rope_cache

    cos, sin = build_rope_cache(seq_len=12, n_elem=8)
    assert cos.shape == sin.shape == (12, 8)
    close(cos[1], torch.tensor([1.0, 0.1, 0.01, 0.001] * 2).cos())
    close(sin[5], torch.tensor([5.0, 0.5, 0.05, 0.005] * 2).sin())
    close(
        build_rope_cache(12, 8, base=500, condense_ratio=2)[0][2],
        torch.tensor([500 ** (-i / 4) for i in range(4)] * 2).cos(),
    )
    x = torch.randn(2, 3, 12, 8)
    rotated = apply_rope(x, cos[None], sin[None])
    close(rotated[:, :, 0], x[:, :, 0])
    close(rotated.norm(dim=-1), x.norm(dim=-1))
    close(rotated[..., 1, 0], x[..., 1, 0] * cos[1, 0] - x[..., 1, 4] * sin[1, 0])
    raises(ValueError, lambda: apply_rope(x, cos, sin))


def test_positions_of_a_model():
    model = tiny("llama 3")
    cos, sin = model.rope_cache()
    assert cos.shape == sin.shape == (40, 8) and torch.equal(cos, model.cos) and torch.equal(sin, model.sin)
    close(cos[9], torch.tensor([0.4548, 0.9991, 1.0, 1.0] * 2), 1e-4)
    model.max_seq_length = 7
    assert model.cos.shape == (7, 8) and model.rope_cache_length() == 8


def test_copies():
    model = tiny()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        assert not other(IDS).any() and model(IDS).any()
    assert pickle.loads(pickle.dumps(model.config)) == model.config


if __name__ == "__main__":
    from runner import main

    main(globals())
