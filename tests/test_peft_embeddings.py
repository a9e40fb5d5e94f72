"""What adapters of `peft` change beside linear layers: embeddings, their number, some tokens of them, and biases.

`peft` says what is right: it reads the adapter again, and its logits are ours.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.errors import UserError
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.serve.models import ModelRegistry
from tests.families import save_random
from tests.test_families import CPU, assert_close
from tests.test_families_peft import IDS as MANY_IDS
from tests.test_families_peft import quiet, save_tokenizer, theirs  # noqa: F401 (a fixture)

IDS = MANY_IDS % 180
FAMILY = {  # the variant, the embedding, a linear layer
    "llama": ("plain", "embed_tokens", "q_proj"),
    "llama tied": ("llama3", "embed_tokens", "q_proj"),
    "gemma": ("plain", "embed_tokens", "q_proj"),
    "qwen2": ("windows", "embed_tokens", "q_proj"),
    "gemma2": ("plain", "embed_tokens", "q_proj"),
    "gemma3": ("plain", "embed_tokens", "q_proj"),
    "gpt_neox": ("gelu_new", "embed_in", "query_key_value"),
    "gpt2": ("plain", "wte", "c_attn"),
    "phi": ("norms", "embed_tokens", "q_proj"),
    "mixtral": ("window", "embed_tokens", "q_proj"),
}
E, HEAD, LINEAR = "EMBEDDING", "lm_head", "LINEAR"
CASES: dict[str, dict[str, Any]] = {  # options of LoraConfig, and by how many tokens the base is resized
    "resized": {"more": 5},
    "resized less": {"more": -9},
    "resized and trained": {"more": 5, "modules_to_save": [E, HEAD]},
    "resized and tied": {"more": 5, "modules_to_save": [E], "ensure_weight_tying": True},
    "trained": {"modules_to_save": [E, HEAD]},
    "trained embedding": {"modules_to_save": [E]},
    "trained head": {"modules_to_save": [HEAD]},
    "trained and tied": {"modules_to_save": [E], "ensure_weight_tying": True},
    "all biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [3, 150, 7]},
    "tokens by name": {"trainable_token_indices": {E: [3, 7]}},
    "tokens of both": {"trainable_token_indices": {E: [3, 7], HEAD: [3, 7]}},
    "tokens of each": {"trainable_token_indices": {E: [3, 7], HEAD: [5]}},
    "tokens of the head": {"trainable_token_indices": {HEAD: [5, 9]}},
    "new tokens": {"more": 5, "trainable_token_indices": [3, -1]},
    "LoRA": {"target_modules": [LINEAR, E]},
    "LoRA of both": {"target_modules": [LINEAR, E, HEAD]},
    "LoRA of both, tied": {"target_modules": [LINEAR, E], "ensure_weight_tying": True},
    "DoRA": {"target_modules": [LINEAR, E], "use_dora": True},
    "LoRA of its own scale": {"target_modules": [LINEAR, E], "rank_pattern": {E: 3}, "alpha_pattern": {E: 11}},
    "LoRA and tokens of the head": {"target_modules": [LINEAR, E], "trainable_token_indices": {HEAD: [5]}},
    "LoRA of the head and tokens": {"target_modules": [LINEAR, HEAD], "trainable_token_indices": [5]},
    "resized LoRA": {"more": 5, "target_modules": [LINEAR, E, HEAD]},
}
TIED = "resized|trained embedding|trained and tied|tokens|tokens of each|new tokens|LoRA|LoRA of both, tied|DoRA".split(
    "|"
)
QUICK = [("gemma", case) for case in TIED] + [("gpt_neox", "all biases")]
QUICK += [("llama", case) for case in CASES if "tied" not in case and case not in ("resized less", "trained head")]
MATRIX = [
    pytest.param(family, case, marks=() if (family, case) in QUICK else pytest.mark.long)
    for family, case in itertools.product(FAMILY, CASES)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}

    class Bases(dict):
        def __missing__(self, family: str) -> Path:
            folder = save_random(tmp_path_factory.mktemp("m") / "base", family.split()[0], FAMILY[family][0])
            save_tokenizer(folder)
            made[family] = self[family] = folder
            return folder

    return Bases()


def resized(base: Path, more: int) -> Any:
    model = theirs(base)
    if more:
        torch.manual_seed(5)
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + more)
    return model


def named(value: Any, family: str, n: int) -> Any:
    """The options with the names and the last tokens of a family."""
    if isinstance(value, dict):
        return {named(k, family, n): named(v, family, n) for k, v in value.items()}
    if isinstance(value, list):
        return [named(v, family, n) for v in value]
    return {E: FAMILY[family][1], LINEAR: FAMILY[family][2], -1: n - 1}.get(value, value)


def adapter_of_peft(base: Path, family: str, case: str, folder: Path, **save: Any) -> Any:
    """An adapter whose trained weights all moved, as `peft` reads it again; or a reason why it does not."""
    options = dict(CASES[case])
    more = options.pop("more", 0)
    model = resized(base, more)
    n = model.get_input_embeddings().num_embeddings
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": [LINEAR], **options}
    torch.manual_seed(1)
    try:
        trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **named(options, family, n)))
        draw = torch.Generator().manual_seed(2)
        for p in trained.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn(p.shape, generator=draw)
        trained.save_pretrained(folder, **save)
        again = PeftModel.from_pretrained(resized(base, more), folder).eval()
        with torch.no_grad():
            again(IDS)
    except Exception as e:
        return f"peft: {type(e).__name__} {e}"
    return again


WITHOUT_BIAS = {  # peft leaves the bias of a head out here, and its merged model has it
    ("phi", case) for case, options in CASES.items() if "trainable_token_indices" in options or "tied" in case
}


@torch.no_grad()
@pytest.mark.parametrize(("family", "case"), MATRIX)
def test_adapters_of_peft(family, case, bases, tmp_path):
    base, folder = bases[family], tmp_path / "adapter"
    model = adapter_of_peft(base, family, case, folder)
    if isinstance(model, str) or (family, case) in WITHOUT_BIAS:
        pytest.skip(str(model))
    expected = model(IDS).logits
    config, shapes = Checkpoint(base).config, open_adapter(folder).shapes
    rows = {n: s[0] for n, s in shapes.items() if s[0] == expected.size(-1) and ".lora" not in n}
    if "more" in CASES[case] and not open_adapter(folder).in_full:
        pytest.skip("peft stored nothing of what was resized")
    if "more" in CASES[case] and len(rows) < (1 if config.tie_embeddings else 2):  # not all of it
        with pytest.raises(UserError, match=r"save_embedding_layers|trained tokens"):
            ModelSource.open(folder, base).model(torch.float32, CPU)
        return
    assert_close(ModelSource.open(folder, base).model(torch.float32, CPU)(IDS), expected, 1e-4)
    main(["merge_lora", str(folder), "--base", str(base)])
    merged = tmp_path / "adapter-merged"
    assert_close(theirs(merged)(IDS).logits, expected, 1e-4)
    assert_close(ModelSource.open(merged).model(torch.float32, CPU)(IDS), expected, 1e-4)
    if not config.tie_embeddings:  # of tied weights, peft's merged model is not its adapter: both get what one has
        assert_close(theirs(merged)(IDS).logits, model.merge_and_unload()(IDS).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["resized and trained", "LoRA", "all biases"])
def test_files_of_torch(case, bases, tmp_path):
    """The same from `adapter_model.bin`, whose path stands for its folder."""
    base, folder = bases["llama"], tmp_path / "adapter"
    expected = adapter_of_peft(base, "llama", case, folder, safe_serialization=False)(IDS).logits
    assert not (folder / "adapter_model.safetensors").exists()
    assert_close(ModelSource.open(folder / "adapter_model.bin", base).model(torch.float32, CPU)(IDS), expected, 1e-4)
    main(["merge_lora", str(folder), "--base", str(base)])
    assert_close(theirs(tmp_path / "adapter-merged")(IDS).logits, expected, 1e-4)


class Harm:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm"),))


def test_files_of_torch_are_not_run(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter_of_peft(bases["llama"], "llama", "tokens", tmp_path / "adapter", safe_serialization=False)
    torch.save({"a": Harm()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="requires code"):
        open_adapter(tmp_path / "adapter")
    assert not Path("harm").exists()
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        open_adapter(tmp_path / "adapter")


@torch.no_grad()
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_not_there(bias, llama, tmp_path):
    """The model has none, so the file has none."""
    config = LoraConfig(r=2, bias=bias, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(theirs(llama), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours = ModelSource.open(tmp_path / "adapter", llama).model(torch.float32, CPU)
    assert_close(ours(IDS), model(IDS).logits, 1e-4)


@pytest.fixture
def larger(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of an adapter with more tokens than its base, and a tokenizer that has them."""
    folder = tmp_path / "larger"
    adapter_of_peft(bases["llama"], "llama", "resized and trained", folder)
    save_tokenizer(folder)
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"]["tool"] = 203
    file.write_text(json.dumps(fields))
    return folder


@torch.no_grad()
def test_more_tokens_everywhere(larger, bases, tmp_path, capsys):
    """The model has the adapter's tokens in every command; no config but the merged one says so."""
    loaded = InferenceModel.open(larger, bases["llama"], "32-true", accelerator="cpu")
    assert loaded.model.config.padded_vocab_size == loaded.tokenizer.n_embeddings == 204
    assert loaded.tokenizer.encode("the tool")[-1] == 203
    assert LLM.load(larger, base=bases["llama"]).generate("the tool", max_new_tokens=2) is not None
    assert ModelRegistry.open(larger, {}, base=bases["llama"]).models["larger"].model.config.padded_vocab_size == 204
    main(["validate", str(larger), "--base", str(bases["llama"])])
    assert "complete and usable" in capsys.readouterr().out
    main(["merge_lora", str(larger), "--base", str(bases["llama"])])
    merged = tmp_path / "larger-merged"
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 204
    main(["validate", str(merged)])


def test_the_base_beside_more_tokens(larger, bases, tmp_path):
    """What shares the base's embedding cannot have another one: that is said before any work."""
    source = ModelSource.open(larger, bases["llama"])
    with pytest.raises(UserError, match="number of embeddings"):
        source.check_base()
    with pytest.raises(UserError, match="replaces complete weights"):
        ModelRegistry.open(bases["llama"], {"more": larger})


@torch.no_grad()
@pytest.mark.parametrize("case", ["tokens", "LoRA", "trained embedding", "trained and tied", "all biases"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_without_the_adapter(family, case, bases, tmp_path):
    """The model is the base inside the block, and itself again behind it, also where a tied head was torn off."""
    base, folder = bases[family], tmp_path / "adapter"
    adapter_of_peft(base, family, case, folder)
    source = ModelSource.open(folder, base)
    model = source.model(torch.float32, CPU)
    expected = model(IDS)
    with source.without_adapter(model):
        assert_close(model(IDS), theirs(base)(IDS).logits, 1e-4)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("case", ["tokens", "LoRA", "resized", "all biases"])
def test_adapters_that_share_a_base(case, bases, tmp_path):
    adapter_of_peft(bases["llama"], "llama", case, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--adapters a: .*replaces complete weights"):
        ModelRegistry.open(bases["llama"], {"a": tmp_path / "adapter"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": float("-inf")}}, "q_proj"),
        ({"rank_pattern": {"q_proj": float("nan")}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": float("inf")}}, "rank_pattern"),
        ({"r": float("inf")}, "r: "),
        ({"bias": "some"}, "bias 'some'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": None}, "trained tokens"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"trainable_token_indices": {"lm_head": [3, 150, 7]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [3, 1.5, 7]}, "trainable_token_indices"),
        ({"trainable_token_indices": [3, 150, 199]}, "trained tokens"),
        ({"trainable_token_indices": [3, 150, -1]}, "trained tokens"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "peft_type"),
    ],
    ids=str,
)
def test_what_is_refused(changes, named, bases, tmp_path):
    folder = tmp_path / "adapter"
    adapter_of_peft(bases["llama"], "llama", "tokens", folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(UserError, match=named):
        ModelSource.open(folder, bases["llama"]).model(torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.lora_embedding_B", None),
        ("model.embed_tokens.lora_embedding_A", (2, 198)),
        ("model.embed_tokens.lora_embedding_B", (31, 2)),
        ("model.embed_tokens.lora_embedding_B", (2,)),
        ("model.embed_tokens.weight", ()),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", (3,)),
        ("model.embed_positions.lora_embedding_A", (2, 199)),
    ],
)
def test_embeddings_that_do_not_fit(name, shape, bases, tmp_path):
    folder = tmp_path / "adapter"
    adapter_of_peft(bases["llama"], "llama", "LoRA", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {n: t for n, t in weights.items() if n != "base_model.model.model.embed_tokens.base_layer.weight"}
    if shape is None:
        del weights[f"base_model.model.{name}"]
    else:
        weights[f"base_model.model.{name}"] = torch.zeros(shape)
    if "positions" in name:
        weights[f"base_model.model.{name[:-1]}B"] = torch.zeros(32, 2)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"embed_(tokens|positions)"):
        ModelSource.open(folder, bases["llama"]).model(torch.float32, CPU)


@torch.no_grad()
@pytest.mark.parametrize("case", ["tokens", "trained embedding", "LoRA", "resized and trained"])
def test_a_tied_head_that_is_stored(case, bases, tmp_path):
    """The base stores its head beside the embedding that it is tied to."""
    adapter = tmp_path / "adapter"
    expected = adapter_of_peft(bases["gemma"], "gemma", case, adapter)(IDS).logits
    base = shutil.copytree(bases["gemma"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, base / "model.safetensors", {"format": "pt"})
    assert_close(ModelSource.open(adapter, base).model(torch.float32, CPU)(IDS), expected, 1e-4)
    main(["merge_lora", str(adapter), "--base", str(base)])
    assert_close(theirs(tmp_path / "adapter-merged")(IDS).logits, expected, 1e-4)


@pytest.mark.parametrize("case", ["trained embedding", "LoRA", "tokens of each", "resized and trained"])
def test_the_types_of_the_base(case, tmp_path):
    """A merged folder has them, also in a head that is no longer tied, whatever the adapter's are."""
    base = save_random(tmp_path / "base", "gemma", "plain", torch.bfloat16)
    save_tokenizer(base)
    adapter_of_peft(base, "gemma", case, tmp_path / "adapter")
    main(["merge_lora", str(tmp_path / "adapter"), "--base", str(base)])
    assert set(Checkpoint(tmp_path / "adapter-merged").dtypes.values()) == {"BF16"}
