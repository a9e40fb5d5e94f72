"""What LitGPT's classes do here beyond LitGPT's contract, and that the inner classes stay apart from them."""

import json
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

import litgpt
import litgpt.model
from litgpt import LLM
from litgpt.checkpoint.folder import open_checkpoint
from litgpt.checkpoint.hub import PICO
from litgpt.compat import adapter_v2, lora
from litgpt.errors import UserError
from litgpt.litgpt_format.config import Config, name_to_config
from litgpt.litgpt_format.folder import to_lit
from litgpt.litgpt_format.model import GPT
from litgpt.litgpt_format.tokenizer import Tokenizer
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model import config as inner_config
from litgpt.model import gpt, kv_cache
from litgpt.text import tokenizer as inner_tokenizer
from tests.families import save_random

SIZES = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 30, "padding_multiple": 8, "block_size": 16}
IDS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def test_public_and_inner_classes():
    assert litgpt.GPT is litgpt.model.GPT is GPT and litgpt.Config is litgpt.model.Config is Config
    assert litgpt.Tokenizer is Tokenizer and litgpt.model.KVCache is kv_cache.KVCache
    assert not issubclass(GPT, gpt.GPT) and not issubclass(Config, inner_config.Config)
    assert not issubclass(Tokenizer, inner_tokenizer.Tokenizer)
    assert isinstance(GPT(Config(**SIZES)).inner, gpt.GPT)
    with pytest.raises(AttributeError):
        litgpt.model.NoSuchName  # noqa: B018
    with pytest.raises(AttributeError):
        litgpt.no_such_name  # noqa: B018


def test_known_models():
    """The math is that of the inner config, for those that LitGPT can express."""
    with pytest.raises(UserError, match="LitGPT has no model with the same logits_scaling, norm_bias, rope_layers"):
        Config.from_name("c4ai-command-r7b-12-2024")
    others = inner_config.known_models().keys() - name_to_config.keys()
    assert {"c4ai-command-r7b-12-2024", "Qwen3.5-9B"} < others and len(name_to_config) > 220
    for name in others:
        with pytest.raises(UserError):
            Config.from_name(name)
    for name in name_to_config:
        config = Config.from_name(name)
        assert not inner_config.differences(config.to_model(), inner_config.Config.from_name(name)), name
        repository = f"{config.hf_config['org']}/{config.hf_config['name']}"
        assert Config.from_name(repository).hf_config == config.hf_config
        assert Config.from_name(repository.partition("/")[2]).hf_config["name"] == config.hf_config["name"]


def test_names_are_not_shared():
    litgpt.Config.from_name("pythia-14m").hf_config["org"] = "changed"
    assert litgpt.Config.from_name("pythia-14m").hf_config["org"] == "EleutherAI"


def test_a_hugging_face_folder():
    checkpoint = open_checkpoint(PICO)
    model = GPT(Config.from_checkpoint(PICO)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in to_lit(checkpoint)})
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = ModelSource.open(PICO).model(torch.float32, torch.device("cpu"))(ids)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)


def test_positions_that_do_not_fit_the_cache():
    model = GPT(Config(**SIZES)).eval()
    model.set_kv_cache(2)
    for positions in (torch.arange(1, 10), torch.arange(9).flip(0), torch.zeros(9, dtype=torch.long)):
        with pytest.raises(UserError, match="input_pos"):
            model(IDS, positions)
    with pytest.raises(UserError, match="shape"):
        model(IDS, torch.arange(9).expand(3, 9))
    with pytest.raises(UserError, match="cache"):
        model(IDS, torch.arange(8, 17))


def test_rows_of_different_lengths():
    model = GPT(Config(**SIZES)).eval()
    model.set_kv_cache(2)
    with torch.no_grad():
        expected = model(IDS)
        model(IDS[:, :4], torch.arange(4))
        model(IDS[:1, 4:7], torch.arange(4, 7))
        ids, positions = torch.stack([IDS[0, 7:9], IDS[1, 4:6]]), torch.tensor([[7, 8], [4, 5]])
        found = model(ids, positions)
    torch.testing.assert_close(found[0], expected[0, 7:9])
    torch.testing.assert_close(found[1], expected[1, 4:6])


def test_math_that_is_not_implemented():
    config = Config(**SIZES, latent_attention={"q_lora_rank": 2})
    with pytest.raises(UserError, match="latent_attention"):
        GPT(config)


def test_half_of_a_layer_is_not_lost():
    """A state dict with one of the two tensors of a fused layer says what is missing."""
    fields = SIZES | {"mlp_class_name": "LLaMAMLP", "intermediate_size": 24}
    model = GPT(Config(**fields))
    state = model.state_dict()
    del state["transformer.h.0.mlp.fc_2.weight"]
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["transformer.h.0.mlp.fc_2.weight"] and not result.unexpected_keys
    with pytest.raises(RuntimeError, match="fc_2"):
        model.load_state_dict(state)


def test_quantized_layers_are_not_merged():
    layer = lora.LoRALinear(8, 8, r=2)
    layer.linear.__class__ = type("Quantized", (QuantizedLinear,), {})
    with pytest.raises(UserError, match="merge"):
        layer.merge()


def test_updates_start_where_lightning_initializes_nothing():
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        models = [lora.GPT(lora.Config(**SIZES, lora_r=2, lora_query=True)), adapter_v2.GPT(adapter_v2.Config(**SIZES))]
    for model, module in zip(models, (lora, adapter_v2)):
        own = {n: t for n, t in model.state_dict().items() if module.__name__.rpartition(".")[2].split("_")[0] in n}
        assert own and all(t.isfinite().all() for t in own.values())
        assert all(not t.any() for n, t in own.items() if n.endswith(("lora_B", "adapter_bias")))
        assert all(t.any() for n, t in own.items() if n.endswith(("lora_A", "adapter_scale")))


def test_an_llm_of_math_that_litgpt_does_not_have(tmp_path):
    """Its config has the fields that LitGPT knows; the model computes the rest all the same."""
    folder = save_random(tmp_path / "m", "gpt2", "plain")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": 640}))
    llm = LLM.load(folder, init="random", tokenizer_dir=PICO)
    assert llm.config.n_layer == llm.inner.config.n_layer and llm.inner.config.learned_positions
    assert llm.model(IDS).shape == (2, 9, llm.config.padded_vocab_size)
    assert set(llm.model.state_dict()) == set(llm.state_dict())


def test_training_the_model_of_an_llm(tmp_path):
    """Without `trainer_setup`, also from a reference that is older than an answer."""
    llm = LLM.load("pico", precision="32-true", accelerator="cpu")
    model, ids = llm.model, torch.arange(2, 30)[None]
    llm.generate("Hello", max_new_tokens=2)
    optimizer = torch.optim.SGD(llm.model.parameters(), lr=0.1)
    model(ids).logsumexp(-1).sum().backward()
    optimizer.step()
    llm.distribute(accelerator="cpu")
    before = LLM.load("pico", precision="32-true", accelerator="cpu")
    assert llm.changed and not torch.allclose(llm.model(ids), before.model(ids), atol=1e-3)
    llm.save(tmp_path / "out")
    again = LLM.load(tmp_path / "out", precision="32-true", accelerator="cpu")
    torch.testing.assert_close(again.model(ids), llm.model(ids))


def test_the_length_of_an_llm():
    llm = LLM.load("pico", precision="32-true", accelerator="cpu")
    llm.model.max_seq_length = 30
    ids = llm.generate("Hello", top_k=1, max_new_tokens=50, return_as_token_ids=True)
    assert len(ids) < 30
    with pytest.raises(UserError, match="30"):
        llm.generate("word " * 40)


def test_tokenizer_keeps_the_inner_one():
    tokenizer = litgpt.Tokenizer(PICO)
    assert isinstance(tokenizer.inner, inner_tokenizer.Tokenizer)
    assert tokenizer.encode("Hello").tolist() == tokenizer.inner.encode("Hello")


def test_stream_of_an_incomplete_character():
    tokenizer = litgpt.Tokenizer(str(Path(PICO)))
    ids = tokenizer.encode("a €", bos=False)
    assert "".join(tokenizer.decode_stream(iter(ids[:-1]))).startswith("a ")
    many = [torch.tensor(i) for i in ids.tolist()[-1:] * 9]
    assert "".join(tokenizer.decode_stream(many)).count("\ufffd") >= 8


def test_modules_are_attributes():
    assert litgpt.config.Config is Config and litgpt.tokenizer.Tokenizer is Tokenizer
    assert litgpt.lora.GPT is lora.GPT


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama", "convert_hf_checkpoint"),
        ("from litgpt.scripts.convert_lit_checkpoint import copy_weights_falcon", "convert_hf_checkpoint"),
        ("from litgpt.utils import incremental_save", "torch.save"),
        ("from litgpt.generate.tp import tensor_parallel", "generate_tp"),
        ("import litgpt.data.prepare_slimpajama", "TextFiles"),
    ],
)
def test_what_is_not_here_names_what_to_use(line, instead):
    with pytest.raises(ImportError, match=f"is not available: .*{instead}"):
        exec(line)
    with pytest.raises(AttributeError):
        litgpt.utils.no_such_name  # noqa: B018
