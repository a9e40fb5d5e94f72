"""The modules that scripts for LitGPT import: `litgpt.utils`, `litgpt.scripts`, `litgpt.generate.base`, and others."""

import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import torch
import yaml

from litgpt import LLM

sys.path.insert(0, str(Path(__file__).parent))
from tiny import checkpoint, weights

IDS = torch.tensor([5, 9, 200, 31, 7, 320, 9, 12])


@cache
def root() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def folder() -> Path:
    return checkpoint(root() / "checkpoints" / "me" / "tiny")


def fresh() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def model() -> torch.nn.Module:
    return LLM.load(str(folder())).model


def ready(rows: int = 1) -> torch.nn.Module:
    """The model with an empty cache."""
    model().clear_kv_cache()
    model().set_kv_cache(batch_size=rows, max_seq_length=60)
    return model()


@contextmanager
def chdir(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def raised(error: type, function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except error as e:
        return str(e)
    raise AssertionError(f"no {error.__name__}")


# litgpt.utils


def test_num_parameters():
    from litgpt.utils import num_parameters

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net[0].requires_grad_(False)
    assert [num_parameters(net, requires_grad=grad) for grad in (None, True, False)] == [26, 10, 16]


def test_chunked_cross_entropy():
    from litgpt.utils import chunked_cross_entropy

    logits, targets = torch.randn(2, 150, 9), torch.randint(9, (2, 150))
    targets[0, :40] = -100
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 9), targets.view(-1))
    for size in (0, 7, 128):
        torch.testing.assert_close(chunked_cross_entropy(logits, targets, chunk_size=size), expected)
        torch.testing.assert_close(chunked_cross_entropy(list(logits.split(60, 1)), targets, chunk_size=size), expected)
    assert chunked_cross_entropy(logits, torch.full_like(targets, -100)) == 0


def test_check_valid_checkpoint_dir():
    from litgpt.utils import check_valid_checkpoint_dir

    assert check_valid_checkpoint_dir(folder()) is None
    empty = fresh()
    assert str(empty) in raised(FileNotFoundError, check_valid_checkpoint_dir, empty, verbose=False, raise_error=True)
    with redirect_stderr(StringIO()) as said:
        raised(SystemExit, check_valid_checkpoint_dir, empty / "nowhere")
    assert "nowhere" in said.getvalue()


def test_check_without_a_tokenizer():
    from litgpt.utils import check_valid_checkpoint_dir

    bare = checkpoint(fresh() / "bare")
    (bare / "tokenizer.json").unlink()
    assert "tokenizer" in raised(FileNotFoundError, check_valid_checkpoint_dir, bare, verbose=False, raise_error=True)
    check_valid_checkpoint_dir(bare, ignore_tokenizer_files=True)


def test_load_checkpoint():
    from litgpt.utils import load_checkpoint

    llm = LLM.load(str(folder()), distribute=None)
    llm.trainer_setup()
    torch.save({name: tensor + 1 for name, tensor in weights().items()}, file := fresh() / "lit_model.pth")
    load_checkpoint(LLM.load(str(folder())).fabric, llm.model, file)
    for name in ("transformer.h.0.mlp.fc_1.weight", "lm_head.weight"):
        torch.testing.assert_close(llm.state_dict()[name], weights()[name] + 1)
    load_checkpoint(LLM.load(str(folder())).fabric, llm.model, folder() / "lit_model.pth", strict=False)
    torch.testing.assert_close(llm.state_dict()["lm_head.weight"], weights()["lm_head.weight"])


def test_load_checkpoint_update():
    from litgpt.utils import load_checkpoint_update

    llm = LLM.load(str(folder()), distribute=None)
    llm.trainer_setup()
    torch.save({"lm_head.weight": weights()["lm_head.weight"] * 3}, file := fresh() / "lit_model.pth.adapter")
    load_checkpoint_update(LLM.load(str(folder())).fabric, file, llm.model, folder() / "lit_model.pth")
    torch.testing.assert_close(llm.state_dict()["lm_head.weight"], weights()["lm_head.weight"] * 3)
    torch.testing.assert_close(llm.state_dict()["transformer.ln_f.weight"], weights()["transformer.ln_f.weight"])


def test_map_old_state_dict_weights():
    from litgpt.utils import map_old_state_dict_weights

    state = {"h.attn.weight": 1, "h.bias": 2}
    renamed = map_old_state_dict_weights(state, {"attn.weight": "qkv.weight", "gone": "there"}, "h.")
    assert renamed is state and state == {"h.qkv.weight": 1, "h.bias": 2}


def test_find_resume_path():
    from litgpt.utils import find_resume_path

    out = fresh()
    assert find_resume_path(False, out) is False and find_resume_path(Path("a"), out) == Path("a")
    assert find_resume_path("auto", out) is None
    raised(FileNotFoundError, find_resume_path, True, out)
    for step in ("step-000002", "step-000010"):
        (out / step).mkdir()
        (out / step / "lit_model.pth").touch()
    for resume in (True, "auto"):
        assert find_resume_path(resume, out).parent.name == "step-000010"


def test_batched_generate_fn():
    from litgpt.generate.base import batched_generate_fn, batched_next_token, generate_fn

    greedy, device = {"temperature": 0.0}, next(model().parameters()).device
    prompts = torch.stack([IDS[:4], IDS[4:]]).to(device)
    alone = [
        torch.cat(list(generate_fn(ready(), p, 12, temperature=0.0, include_prompt=False, include_eos=True))).tolist()
        for p in prompts
    ]
    options = {"sample_args": greedy, "include_eos": True}
    found = list(batched_generate_fn(ready(2), prompts, 12, include_prompt=False, **options))
    assert [[int(column[row]) for column in found] for row in (0, 1)] == alone
    found = list(batched_generate_fn(ready(2), prompts, 12, include_prompt=True, **options))
    assert [int(column[1]) for column in found[:4]] == prompts[1].tolist() and len(found) == 12
    token = batched_next_token(ready(2), torch.arange(4, device=device), prompts, greedy)
    assert token.flatten().tolist() == [ids[0] for ids in alone]
    stop = ([alone[0][2]],) if alone[0][2] not in (*alone[0][:2], *alone[1]) else ()
    found = list(batched_generate_fn(ready(2), prompts, 12, stop_tokens=stop, include_prompt=False, **options))
    assert len(found) == 8 and (not stop or found[-1][0] is None)


def test_parse_devices():
    from litgpt.utils import parse_devices

    assert parse_devices(3) == 3
    assert parse_devices("auto") == parse_devices(-1) == max(1, torch.cuda.device_count())
    for wrong in (0, -2, "two"):
        raised(ValueError, parse_devices, wrong)


def test_cycle_iterator():
    from litgpt.utils import CycleIterator

    iterator = CycleIterator([1, 2, 3])
    assert iterator.epoch == 0 and [next(iterator) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert iterator.epoch == 2 and iter(iterator) is iterator
    raised(StopIteration, next, CycleIterator([]))


def test_extend_checkpoint_dir():
    from litgpt.utils import extend_checkpoint_dir

    folder()
    with chdir(root()):
        assert extend_checkpoint_dir(Path("me/tiny")) == Path("checkpoints/me/tiny")
        assert extend_checkpoint_dir(Path("checkpoints/me/tiny")) == Path("checkpoints/me/tiny")
        assert extend_checkpoint_dir(Path("me/other")) == Path("me/other")
    assert extend_checkpoint_dir(folder()) == folder()


def test_auto_download_checkpoint_finds_a_folder():
    from litgpt.utils import auto_download_checkpoint

    folder()
    with chdir(root()):
        assert Path(auto_download_checkpoint("me/tiny")) == Path("checkpoints/me/tiny")


def test_get_default_supported_precision():
    from litgpt.utils import get_default_supported_precision

    bits = "16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16"
    assert get_default_supported_precision(training=True) == f"{bits}-mixed"
    assert get_default_supported_precision(training=False) == f"{bits}-true"


def test_copy_config_files():
    from litgpt.utils import copy_config_files

    out = fresh()
    copy_config_files(folder(), out)
    names = {"model_config.yaml", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == names
    assert all((out / name).read_bytes() == (folder() / name).read_bytes() for name in names)


def test_save_hyperparameters():
    from litgpt.parser_config import save_hyperparameters

    def setup(checkpoint_dir: Path, rank: int = 8, train: bool = False) -> None:
        raise AssertionError("called")

    out, words = fresh(), sys.argv
    sys.argv = ["litgpt", "finetune_lora", "there", "--rank", "3"]
    try:
        save_hyperparameters(setup, out)
    finally:
        sys.argv = words
    settings = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert settings == {"checkpoint_dir": "there", "rank": 3, "train": False}


def test_capture_hparams():
    from litgpt.utils import capture_hparams

    @dataclass
    class Options:
        a: int = 1

    def function(number: int, path: Path, options: Options, nothing: None, other: torch.device):
        return capture_hparams()

    found = function(3, Path("x"), Options(), None, torch.device("cpu"))
    assert {k: found[k] for k in ("number", "path", "options", "nothing", "other")} == {
        "number": 3, "path": Path("x"), "options": {"a": 1}, "nothing": None, "other": "cpu"}  # fmt: skip


def test_choose_logger():
    from litgpt.utils import choose_logger

    out = fresh()
    logger = choose_logger("csv", out, "run", log_interval=2)
    logger.log_metrics({"loss": 1.5}, step=1)
    logger.finalize("success")
    assert list(out.glob("logs/csv/version_0/metrics.csv"))
    raised(ValueError, choose_logger, "paper", out, "run")


def test_estimate_flops():
    from litgpt.utils import estimate_flops, num_parameters

    llm = LLM.load(str(folder()))
    n, length = num_parameters(llm.model), llm.config.block_size
    forward = 2 * n * length + 4 * 2 * 32 * length**2
    assert estimate_flops(llm.model, training=False) == forward + 4 * 2 * 32 * length**2  # none of them is frozen


def test_instantiate_torch_optimizer():
    from litgpt.utils import instantiate_torch_optimizer

    layer = torch.nn.Linear(2, 2)
    first = instantiate_torch_optimizer("AdamW", layer.parameters(), lr=0.5, unknown=3)
    assert isinstance(first, torch.optim.AdamW) and first.param_groups[0]["lr"] == 0.5
    given = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}}
    assert instantiate_torch_optimizer(given, layer.parameters()).param_groups[0]["lr"] == 0.25


def test_init_out_dir():
    from litgpt.utils import init_out_dir

    assert init_out_dir("a/b") == Path("a/b")
    os.environ["LIGHTNING_ARTIFACTS_DIR"] = "/artifacts"
    try:
        assert init_out_dir("a/b") == Path("/artifacts/a/b") and init_out_dir(Path("/x")) == Path("/x")
    finally:
        del os.environ["LIGHTNING_ARTIFACTS_DIR"]


# litgpt.generate.base and litgpt.chat.base


def test_sample():
    from litgpt.generate.base import sample

    logits = torch.zeros(1, 3, 10)
    logits[0, -1, 7] = 5
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-4}):
        token = sample(logits, **options)
        assert token.shape == (1,) and token.item() == 7
    logits[0, -1, 2] = 5
    assert {sample(logits, top_k=2).item() for _ in range(40)} == {2, 7}
    raised(ValueError, sample, logits, top_p=1.5)


def test_sample_follows_torchs_seed():
    from litgpt.generate.base import sample

    def draw() -> list[int]:
        torch.manual_seed(4)
        return [sample(torch.zeros(1, 1, 100)).item() for _ in range(5)]

    assert draw() == draw() and len(set(draw())) > 1


@torch.no_grad()
def test_next_token():
    from litgpt.generate.base import next_token

    token = next_token(ready(), torch.arange(8), IDS.view(1, -1), temperature=0.0)
    assert token.shape == (1,) and token.dtype == torch.int64
    assert token.item() == model()(IDS.view(1, -1))[0, -1].argmax().item()


@torch.no_grad()
def greedy(n: int) -> list[int]:
    ids = IDS.tolist()
    for _ in range(n):
        ids.append(model()(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(IDS) :]


def test_generate():
    from litgpt.generate.base import generate

    expected = greedy(5)
    found = generate(ready(), IDS, 13, temperature=0.0)
    assert found[:8].tolist() == IDS.tolist() and found[8:].tolist() == expected
    assert generate(ready(), IDS, 13, top_k=1, include_prompt=False).tolist() == expected


def test_generate_ends_with_eos():
    from litgpt.generate.base import generate

    expected = greedy(5)
    stop = expected[2]
    found = generate(ready(), IDS, 20, temperature=0.0, eos_id=stop, include_prompt=False)
    assert found.tolist() == expected[: expected.index(stop) + 1]


def test_generate_has_limits():
    from litgpt.generate.base import generate

    raised(Exception, generate, ready(), IDS, len(IDS))
    raised(NotImplementedError, generate, ready(), IDS, 1000)


def test_chat_generate_streams_up_to_a_stop_sequence():
    from litgpt.chat.base import generate

    expected = greedy(6)
    parts = list(generate(ready(), IDS, 14, temperature=0.0))
    assert torch.cat([part.view(-1) for part in parts]).tolist() == expected
    stop = expected[3:5]
    cut = next(i for i in range(6) if expected[i : i + 2] == stop)
    parts = list(generate(ready(), IDS, 14, temperature=0.0, stop_tokens=([639, 638], stop)))
    assert torch.cat([part.view(-1) for part in parts]).tolist() == expected[:cut]


# litgpt.scripts and the functions of commands


def test_convert_lit_checkpoint_writes_model_pth():
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    out = fresh() / "out"
    convert_lit_checkpoint(folder(), out)
    state = torch.load(out / "model.pth", weights_only=True)
    torch.testing.assert_close(state["model.embed_tokens.weight"], weights()["transformer.wte.weight"])
    torch.testing.assert_close(
        state["model.layers.1.mlp.gate_proj.weight"], weights()["transformer.h.1.mlp.fc_1.weight"]
    )


def test_convert_pretrained_checkpoint():
    from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint

    source, out = checkpoint(fresh() / "source"), fresh() / "out"
    torch.save({"model": weights(), "step_count": 3}, source / "lit_model.pth")
    convert_pretrained_checkpoint(source, out)
    assert set(torch.load(out / "lit_model.pth", weights_only=True)) == set(weights())


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_functions_of_scripts_take_litgpts_arguments():
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from litgpt.scripts.download import download_from_hub
    from litgpt.scripts.merge_lora import merge_lora
    from litgpt.scripts.validate import validate_setup

    assert {"checkpoint_dir", "model_name", "dtype", "debug_mode"} <= parameters(convert_hf_checkpoint)
    assert {"repo_id", "access_token", "tokenizer_only", "checkpoint_dir"} <= parameters(download_from_hub)
    assert {"checkpoint_dir", "pretrained_checkpoint_dir", "precision"} <= parameters(merge_lora)
    assert {"checkpoint_dir", "model_filename", "dtype", "training"} <= parameters(validate_setup)


def test_functions_of_commands_take_litgpts_arguments():
    from litgpt.chat.base import main as chat
    from litgpt.deploy.serve import run_server
    from litgpt.eval.evaluate import convert_and_evaluate
    from litgpt.generate.base import main as generate

    assert {"checkpoint_dir", "prompt"} <= parameters(generate)
    assert {"checkpoint_dir", "max_new_tokens", "temperature", "multiline"} <= parameters(chat)
    assert {"checkpoint_dir", "tasks", "out_dir", "num_fewshot", "limit"} <= parameters(convert_and_evaluate)
    assert {"checkpoint_dir", "port", "max_new_tokens", "temperature"} <= parameters(run_server)


def test_setups_of_training():
    import litgpt.pretrain

    import litgpt.finetune.adapter
    import litgpt.finetune.adapter_v2
    import litgpt.finetune.full
    import litgpt.finetune.lora

    for module in (litgpt.finetune.adapter, litgpt.finetune.adapter_v2, litgpt.finetune.full, litgpt.finetune.lora):
        assert {"checkpoint_dir", "out_dir"} <= parameters(module.setup)
    assert {"lora_r", "lora_alpha", "lora_dropout", "lora_query"} <= parameters(litgpt.finetune.lora.setup)
    assert {"model_name", "model_config", "initial_checkpoint_dir", "data"} <= parameters(litgpt.pretrain.setup)


if __name__ == "__main__":
    from runner import main

    main(globals())
