"""Generation prints what `transformers` would, draws as it is told, and ends where it must."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.sampling import Sampling
from litgpt.methods.model_source import ModelSource
from litgpt.text.prompts import STYLES
from litgpt.text.tokenizer import Tokenizer
from tests.nasty import pieces

CPU = torch.device("cpu")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `litgpt generate` prints to stdout, as on a terminal."""

    def run(folder: Path, *flags: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        words = [folder, "--precision", "32-true", "--accelerator", "cpu", *flags]
        main(["generate", *map(str, words)])
        out, err = capsys.readouterr()
        figures = r"(The answer .*\n)*\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, peak memory .*\n"
        assert re.fullmatch(figures, err), err
        return out

    return run


@pytest.fixture(scope="module")
def adapter(llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, trained on Alpaca's prompts. Read only."""
    out = tmp_path_factory.mktemp("finetuned") / "out"
    words = (
        f"finetune lora {llama} --data JSON --data.json_path {rows_file} --data.prompt_style alpaca --out_dir {out} "
        "--precision 32-true --accelerator cpu --train.max_steps 2 --train.lr_warmup_steps 0 --optimizer.lr 0.05"
    )
    main(words.split())
    return out / "final"


# the text


@pytest.mark.parametrize("prompt", ["Once upon a time", 'Lily said: "I want', "The end.", "Tom's 東京 😀"])
def test_greedy_text_of_transformers(real_data, printed, prompt):
    folder = real_data / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=80)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.startswith(prompt) and len(expected) > len(prompt) + 100
    assert printed(folder, "--prompt", prompt, "--temperature", 0, "--max_new_tokens", 80) == expected + "\n"


def greedy(folder: Path, text: str, n: int, bos: int = 1) -> str:
    """What the engine makes of a text behind so many BOS."""
    source, tokenizer = ModelSource.open(folder), Tokenizer(folder)
    ids = [tokenizer.bos_id] * bos + tokenizer.encode(text, special=False)
    return tokenizer.decode(generate(source.model(torch.float32, CPU), ids, n, stop_ids=tokenizer.stop_ids))


FIXED = ["--temperature", 0, "--max_new_tokens", 12, "--prompt", "the quick"]


def test_adapter_has_its_prompt_style(adapter, llama, printed):
    text = STYLES["alpaca"].prompt([{"role": "user", "content": "the quick"}])
    assert printed(adapter, *FIXED) == f"{text}{greedy(adapter, text, 12)}\n"
    assert printed(llama, *FIXED) == f"the quick{greedy(llama, 'the quick', 12)}\n"
    assert greedy(adapter, text, 12) != greedy(llama, text, 12), "the adapter changes the answer"


def test_adapter_without_a_tokenizer_has_that_of_its_base(adapter, llama, printed, tmp_path, capsys):
    """As `peft` writes it: with two files."""
    folder, expected = shutil.copytree(adapter, tmp_path / "adapter"), printed(adapter, *FIXED)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert printed(folder, *FIXED) == expected, "the style of training is in a file of its own"
    for file in folder.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    assert printed(folder, *FIXED) == f"the quick{greedy(adapter, 'the quick', 12)}\n"
    main(["merge_lora", str(folder)])
    assert printed(tmp_path / "adapter-merged", *FIXED) == f"the quick{greedy(adapter, 'the quick', 12)}\n"


@pytest.mark.parametrize("bos", ["<s>", ""])
def test_chat_template_writes_bos_or_none(llama, printed, tmp_path, bos):
    folder = shutil.copytree(llama, tmp_path / "chat")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %} ->{% endif %}"
    fields["chat_template"] = "{{ bos_token }}" * bool(bos) + template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    expected = [greedy(folder, "[user] the quick ->", 12, n) for n in range(3)]
    assert len(set(expected)) == 3
    assert printed(folder, *FIXED) == f"{bos}[user] the quick ->{expected[len(bos) // 3]}\n"


def test_base_that_moved(adapter, llama, printed, tmp_path, capsys):
    expected = printed(adapter, *FIXED)
    folder, moved = shutil.copytree(adapter, tmp_path / "adapter"), shutil.copytree(llama, tmp_path / "elsewhere")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/not/here"}))
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(folder)])
    assert stop.value.code == 2
    assert re.search(r"base model of .* is not at '/not/here'.*--base DIR", capsys.readouterr().err)
    assert printed(folder, *FIXED, "--base", moved) == expected


def test_seed(llama, printed):
    def draw(seed: int, n: int = 1) -> str:
        return printed(llama, "--seed", seed, "--prompt", "fox", "--num_samples", n, "--max_new_tokens", 30)

    assert draw(1) == draw(1) and len({draw(seed) for seed in (1, 2, 3)}) == 3
    two = draw(1, n=2)
    assert two.startswith(draw(1)) and two != draw(1) * 2


@pytest.mark.parametrize("flags", [["--top_k", 1], ["--top_p", 0.0], ["--top_p", 1e-6], ["--temperature", 1e-6]])
def test_what_equals_greedy(llama, printed, flags):
    words = ["--prompt", "over the", "--max_new_tokens", 40]
    assert printed(llama, *words, *flags) == printed(llama, *words, "--temperature", 0)


def test_stop_token_ends_the_text(llama, printed, tmp_path):
    source, tokenizer = ModelSource.open(llama), Tokenizer(llama)
    model, prompt = source.model(torch.float32, CPU), tokenizer.encode("the quick")
    ids = list(generate(model, prompt, 30))
    stop = ids[7]
    whole = ids[: ids.index(stop)]
    assert len(ids) == 30 and list(generate(model, prompt, 30, stop_ids={stop})) == whole
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    assert printed(folder, *FIXED, "--max_new_tokens", 30) == f"the quick{tokenizer.decode(whole)}\n"


def test_the_end_of_the_context(llama, capsys):
    model = ModelSource.open(llama).model(torch.float32, CPU)
    assert len(list(generate(model, [5] * 250, 50))) == 6
    with pytest.raises(UserError, match="has 256 tokens; the model reads at most 256"):
        generate(model, [5] * 256, 1)
    with pytest.raises(UserError, match="empty"):
        generate(model, [], 1)
    with pytest.raises(UserError, match="tokenizer belongs to another model"):
        generate(model, [5, 300], 1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(llama), "--prompt", "é" * 400])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert re.fullmatch(r"litgpt: error: The prompt has \d{3} tokens; the model reads at most 256.\n", err)


# drawing


def shares(sampling: Sampling, logits: list[float], n: int = 20_000) -> list[float]:
    """How often each token is drawn."""
    drawn = sampling.draw(torch.tensor(logits).expand(n, -1), [random.Random(0)] * n)
    assert drawn.shape == (n,)
    return (drawn.bincount(minlength=len(logits)) / n).tolist()


PROBABILITIES = [0.15, 0.5, 0.05, 0.3]
LOGITS = torch.tensor(PROBABILITIES).log().add(3).tolist()


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0, 10.0])
def test_temperature(temperature):
    expected = torch.tensor(PROBABILITIES).pow(1 / temperature)
    expected /= expected.sum()
    assert shares(Sampling(temperature, top_k=None), LOGITS) == pytest.approx(expected.tolist(), abs=0.015)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, 1.0, {0, 1, 2, 3}), (9, 1.0, {0, 1, 2, 3}), (4, 1.0, {0, 1, 2, 3}), (3, 1.0, {0, 1, 3}),
        (2, 1.0, {1, 3}), (1, 1.0, {1}), (None, 0.0, {1}), (None, 0.49, {1}), (None, 0.51, {1, 3}),
        (None, 0.79, {1, 3}), (None, 0.81, {0, 1, 3}), (None, 0.96, {0, 1, 2, 3}), (2, 0.61, {1}),
        (2, 0.64, {1, 3}), (3, 0.51, {1}),
    ],
)  # fmt: skip
def test_top_k_and_top_p(top_k, top_p, kept):
    """Of the k most likely tokens the fewest that sum up to p, in their old proportions."""
    whole = sum(PROBABILITIES[i] for i in kept)
    expected = [p / whole if i in kept else 0 for i, p in enumerate(PROBABILITIES)]
    found = shares(Sampling(1.0, top_k, top_p), LOGITS)
    assert found == pytest.approx(expected, abs=0.015)
    assert {i for i, share in enumerate(found) if share} == kept


def test_top_k_among_equals():
    """In bfloat16 many logits are equal; still no more than k are drawn from."""
    assert sum(share > 0 for share in shares(Sampling(1.0, top_k=3), [1.0] * 10)) == 3
    logits = torch.randint(3, (50, 300), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(Sampling(1.0, top_k=1).draw(logits, []), Sampling(0.0).draw(logits, []))


def test_rows_are_drawn_each_by_itself():
    logits = torch.full((3, 5), -50.0)
    logits[[0, 1, 2], [4, 0, 2]] = 0.0
    for sampling in (Sampling(1.0, None, 1.0), Sampling(1.0, 2, 0.9), Sampling(0.0)):
        assert sampling.draw(logits, [random.Random(1)] * 3).tolist() == [4, 0, 2]


# the stream


TEXTS = [
    "Once upon a time, there was a fox.",
    "  two  blanks\tand\n\nlines\n  ",
    "naïve café — “quoted”",
    "👩‍👩‍👧😀😀🇯🇵 a😀 b",
    "龘龘龘龘龘龘東京都は😀日本の首都です。漢字",
    "def f(x):\n    return {'é': x}\n",
]


@pytest.fixture(params=["tiny", "llama-2", "llama-2 spm", "qwen2.5", "stories260k"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "tiny":
        return Tokenizer(request.getfixturevalue("llama"))
    real = request.getfixturevalue("real_data")
    if request.param == "llama-2 spm":
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(real / "tokenizers" / "llama-2" / name, tmp_path / name)
        return Tokenizer(tmp_path)
    return Tokenizer(real / ("models" if request.param == "stories260k" else "tokenizers") / request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_of_a_whole_text(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    given = pieces(tokenizer, [], ids)
    assert "".join(given) == tokenizer.decode(ids) and len(given) > 5
    assert not any("\ufffd" in piece for piece in given), "half a character is shown"


@pytest.mark.parametrize("text", TEXTS)
def test_stream_behind_every_prompt(tokenizer, text):
    ids = tokenizer.encode(text)
    whole, tried = tokenizer.decode(ids), 0
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            tried += 1
            assert before + "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == whole, f"after {before!r}"
    assert tried > 5


def test_stream_shows_what_is_left_at_the_end(tokenizer):
    ids = tokenizer.encode("ab 龘", special=False)[:-1]
    text = "".join(pieces(tokenizer, [], ids))
    assert text == tokenizer.decode(ids) and text.startswith("ab ") and text.endswith("\ufffd")
