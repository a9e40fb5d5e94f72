"""From files to batches: no row is lost, none is doubled, and exactly the answers are trained."""

import importlib
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from litgpt.checkpoint.hub import PICO
from litgpt.data.batches import UNTRAINED, micro_batches, steps_of_rows
from litgpt.data.data_module import TokenizedDataset
from litgpt.data.json_file import JSON
from litgpt.data.row_files import read_rows
from litgpt.data.tokens import ANSWER, IN_LOSS, Counts, TokenChunk, TokenizedRows, TokenWriter, read_tokens
from litgpt.errors import UserError
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows

EMOJI_ROWS = [
    {"instruction": "Which emoji? 😀👩‍👩‍👧", "input": "🇯🇵 flag" if i % 2 else "", "output": output}
    for i, output in enumerate(["😀", "👩‍👩‍👧 family", "東京 is 首都 🇯🇵!", "é", "naïve\n😀😀", "\u200d", "x" * 40])
]


def write_rows(path: Path, fields: list[dict]) -> Path:
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


# batches


@pytest.fixture
def rows(tmp_path: Path) -> TokenizedRows:
    """Three rows, read from their file."""
    writer, chunk = TokenWriter(tmp_path / "tokens.safetensors"), TokenChunk()
    T, A = IN_LOSS, ANSWER
    for ids, marks in (([5, 6, 7, 8], [0, 0, T | A, T]), ([9, 10], [T, T]), ([11, 12, 13], [0, T | A, A])):
        chunk.add(ids, bytes(marks))
    writer.counts.append(Counts())
    writer.add(chunk)
    writer.close()
    return read_tokens(tmp_path / "tokens.safetensors")[0]


@pytest.mark.parametrize("order", [[2, 0, 1], [1], [0, 2]])
def test_targets_are_the_next_tokens_of_the_same_row(rows, order):
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    targets = [[UNTRAINED, 7, 8, UNTRAINED], [10, UNTRAINED], [12, UNTRAINED, UNTRAINED]]
    batch = rows.batch(order)
    assert batch.ids.tolist() == [[i for row in order for i in ids[row]]]
    assert batch.targets.tolist() == [[t for row in order for t in targets[row]]]
    assert batch.seqlens == [len(ids[row]) for row in order]
    assert batch.n_target_tokens == sum(t != UNTRAINED for row in order for t in targets[row])


def test_a_batch_of_no_rows_trains_nothing(rows):
    batch = rows.batch([])
    assert batch.n_target_tokens == 0 and set(batch.targets.flatten().tolist()) == {UNTRAINED}
    assert batch.ids.numel() == batch.targets.numel() == sum(batch.seqlens) > 0


def test_subset_and_longest(rows):
    assert rows.longest(2) == [0, 2]
    some = rows.subset((rows.lengths < 4).nonzero().squeeze(1))
    assert len(some) == 2 and some.lengths.tolist() == [2, 3] and some.longest(1) == [1]
    assert some.batch([1, 0]).ids.tolist() == [[11, 12, 13, 9, 10]]
    again = some.subset(torch.tensor([1, 1]))
    assert again.batch([0, 1]).ids.tolist() == [[11, 12, 13] * 2]


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_a_prompt_longer_than_the_limit(llama, tmp_path, mask_prompt):
    """It is cut; where only answers are trained nothing is left of it, and the row is left out. Both are counted."""
    path = write_rows(tmp_path / "rows.json", [{"instruction": "the fox " * 60, "output": "jumps"}, *make_rows(6)])

    def load(**options: object) -> TokenizedDataset:
        data = JSON(path, mask_prompt=mask_prompt, val_split_fraction=0, prompt_style="none", **options)
        return data.load(Tokenizer(llama), llama, 100)

    loaded = load()
    assert (len(loaded.train), loaded.counts.no_targets) == ((6, 1) if mask_prompt else (7, 0))
    assert loaded.counts.truncated == 1 and loaded.counts.rows == 7 and len(loaded.val) == 0
    assert int(loaded.train.lengths.max()) == (100 if not mask_prompt else max(loaded.train.lengths))
    dropped = load(too_long="drop")
    assert (len(dropped.train), dropped.counts.too_long, dropped.counts.truncated) == (6, 1, 0)
    with pytest.raises(UserError, match=r"row 1\b.* 100\b.*--train.max_seq_length"):
        load(too_long="error")


def test_no_row_is_cut_that_fits(llama, tmp_path):
    fields = make_rows(6)
    path = write_rows(tmp_path / "rows.json", fields)
    data = JSON(path, val_split_fraction=0, prompt_style="none")
    longest = int(data.load(Tokenizer(llama), llama, 256).train.lengths.max())
    assert [data.load(Tokenizer(llama), llama, longest - less).counts.truncated for less in (0, 1)] == [0, 1]


# steps


@pytest.mark.parametrize(("n", "size", "epochs"), [(10, 4, 3), (8, 4, 2), (3, 8, 5), (7, 1, 2), (5, 5, 1), (1, 3, 2)])
def test_every_epoch_has_every_row_once(n, size, epochs):
    steps = list(steps_of_rows(n, size, epochs, seed=1))
    flat = list(chain(*steps))
    assert len(steps) == math.ceil(n * epochs / size)
    assert {len(s) for s in steps[:-1]} <= {size} and len(steps[-1]) == (n * epochs - 1) % size + 1
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_depends_on_the_seed_and_nothing_else():
    def order(size: int = 4, seed: int = 1, epochs: int = 3) -> list[int]:
        return list(chain(*steps_of_rows(20, size, epochs, seed)))

    assert order() == order() == order(size=7) and order() == order(epochs=4)[:60]
    assert order() != order(seed=2)
    assert len({tuple(order()[e * 20 : e * 20 + 20]) for e in range(3)}) == 3, "each epoch has an order of its own"


def test_without_a_number_of_epochs_it_goes_on():
    steps = steps_of_rows(5, 2, None, seed=0)
    assert Counter(chain(*islice(steps, 50))) == dict.fromkeys(range(5), 20)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
@pytest.mark.parametrize(("size", "world_size"), [(1, 1), (3, 1), (2, 2), (1, 4), (3, 3)])
def test_ranks_share_a_step(n, size, world_size):
    rows = list(range(100, 100 + n))
    shares = [micro_batches(rows, size, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for batch in share for i in batch) == rows
    assert len({len(share) for share in shares}) == 1, "a rank that has fewer would be waited for"
    assert all(len(batch) <= size for share in shares for batch in share)
    assert len(shares[0]) == math.ceil(n / (size * world_size))


# files


@pytest.fixture
def outputs(llama: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """The answers of the training and of the validation rows."""

    def load(path: Path, **options: object) -> tuple[list[str], list[str]]:
        tokenizer = Tokenizer(llama)
        loaded = JSON(path, mask_prompt=True, **options).load(tokenizer, llama, 256)
        return answers(loaded.train, tokenizer), answers(loaded.val, tokenizer)

    return load


def answers(rows: TokenizedRows, tokenizer: Tokenizer, skip_special: bool = True) -> list[str]:
    """What is trained of each row."""
    parts = (ids[(marks & IN_LOSS).bool()] for ids, marks in map(rows.row, range(len(rows))))
    return [tokenizer.decode(ids.tolist(), skip_special) for ids in parts]


def test_validation_split(outputs, tmp_path):
    expected = [f"answer {i}" for i in range(40)]
    path = write_rows(tmp_path / "rows.json", [{"instruction": "a", "output": o} for o in expected])
    train, val = outputs(path, val_split_fraction=0.25)
    assert len(val) == 10 and sorted(train + val) == sorted(expected)
    assert (train, val) == outputs(path, val_split_fraction=0.25, seed=42)
    assert set(val) != set(outputs(path, val_split_fraction=0.25, seed=43)[1])
    assert len(outputs(path)[1]) == 2, "5% if nothing is said"
    assert outputs(path, val_split_fraction=0) == (expected, [])
    assert len(outputs(path, val_split_fraction=0.001)[1]) == 1


def test_equal_rows_stay_on_one_side(outputs, tmp_path):
    path = write_rows(tmp_path / "rows.json", [{"instruction": "a", "output": str(i % 10)} for i in range(40)])
    for seed in range(5):
        train, val = outputs(path, val_split_fraction=0.3, seed=seed)
        assert not set(train) & set(val) and len(train + val) == 40 and len(val) == 12


def test_folder(outputs, tmp_path):
    (tmp_path / "train.json").write_text('[{"instruction": "a", "output": "one"}]')
    assert outputs(tmp_path) == (["one"], [])
    (tmp_path / "val.jsonl").write_text('{"instruction": "b", "output": "two"}\n{"instruction": "c", "output": "3"}\n')
    assert outputs(tmp_path) == (["one"], ["two", "3"])


def test_jsonl(outputs, tmp_path):
    lines = [
        '{"instruction": "ä", "output": "1\u2028\u0085 2"}',
        "",
        '{"output": "b", "instruction": "c", "input": null}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\n  \n\n").encode())
    found = list(read_rows(path))
    assert [fields for _, fields in found] == [json.loads(line) for line in lines if line]
    assert ["line 1" in found[0][0], "line 3" in found[1][0]] == [True, True]
    assert outputs(path, val_split_fraction=0) == (["1\u2028\u0085 2", "b"], [])


# what is trained


REAL = ("llama-2", "llama-2 spm", "qwen2.5", "llama-3-8b-instruct", "smollm2")


@pytest.mark.parametrize("folder", ["tiny", "pico", *REAL], indirect=True)
def test_span(folder):
    """For all characters from one to another: the first and the last token that hold some of them."""
    tokenizer, text = Tokenizer(folder), "the 龘 quick😀fox  é\n\nx🦙."
    encoded = tokenizer.encode_batch([text], [True])[0]

    def shown(n: int) -> tuple[int, bool]:
        """How many characters the first `n` tokens are, and whether they end within one."""
        begin = tokenizer.decode(encoded.ids[:n])
        return len(begin.rstrip("\ufffd")), begin.endswith("\ufffd")

    assert shown(len(encoded.ids)) == (len(text), False)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            first, behind = encoded.span(start, end)
            (before, within), (after, inside) = shown(first), shown(first + 1)
            assert before <= start and not within and (after > start or inside), (start, end)
            assert shown(behind - 1)[0] < end <= shown(behind)[0], (start, end)
    assert len(range(*encoded.span(5, 5))) == 0


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tokenizer by its name."""
    if request.param == "tiny":
        return request.getfixturevalue("llama")
    if request.param == "pico":
        return PICO
    real = request.getfixturevalue("real_data") / "tokenizers"
    return spm_alone(real, tmp_path) if request.param == "llama-2 spm" else real / request.param


def spm_alone(tokenizers: Path, target: Path) -> Path:
    """Llama 2's sentencepiece model without the `tokenizer.json`."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tokenizers / "llama-2" / name, target / name)
    return target


CASES = [("tiny", "alpaca"), *((name, style) for name in ("pico", *REAL) for style in ("alpaca", "chat"))]


@pytest.mark.parametrize(("folder", "style"), CASES, indirect=["folder"])
def test_the_answers_and_eos_are_trained_and_nothing_else(request, folder, style, llama, tmp_path):
    fields = make_rows(40) + EMOJI_ROWS
    if folder not in (llama, PICO):
        file = request.getfixturevalue("real_data") / "instruct" / "alpaca_en_demo.json"
        fields = json.loads(file.read_text(encoding="utf-8"))[:100] + EMOJI_ROWS
    tokenizer = Tokenizer(folder)
    path = write_rows(tmp_path / "rows.json", fields)
    loaded = JSON(path, mask_prompt=True, val_split_fraction=0, prompt_style=style).load(tokenizer, folder, 100_000)
    counts = loaded.counts
    assert (len(loaded.train), counts.truncated, counts.no_targets, counts.no_stop, counts.two_bos) == (
        len(fields),
        0,
        0,
        0,
        0,
    )
    eos = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    if folder == PICO:  # its template closes an answer with a token of its own
        eos = loaded.turn_end or eos
    blank = " " if style == "chat" and "llama-2" in request.node.callspec.params["folder"] else ""  # of the template
    assert answers(loaded.train, tokenizer, skip_special=False) == [f["output"] + blank + eos for f in fields]
    for i, row in enumerate(fields):  # and all of it is what the tokenizer makes of the whole text
        user = {"role": "user", "content": row["instruction"], "input": row["input"]}
        messages = [user, {"role": "assistant", "content": row["output"]}]
        text = loaded.style.render_row(messages, None, loaded.turn_end)[0]
        ids = tokenizer.encode(text, special=style != "chat", eos=style != "chat")
        assert loaded.train.row(i)[0].tolist() == ids


def test_sentencepiece_knows_special_tokens_in_a_text(real_data, tmp_path):
    text = "<s>[INST] Which? [/INST] This one. </s>"
    folders = (real_data / "tokenizers" / "llama-2", spm_alone(real_data / "tokenizers", tmp_path))
    one, other = (Tokenizer(f).encode(text, special=False) for f in folders)
    assert one == other and one[0] == 1 and one[-1] == 2


def test_a_tokenizer_that_would_cut_and_pad(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    fields["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    fields["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    text = "the quick brown fox jumps over the lazy dog"
    assert Tokenizer(folder).encode(text) == Tokenizer(llama).encode(text)


def test_without_masking_everything_is_trained(llama, tmp_path):
    path = write_rows(tmp_path / "rows.json", [{"instruction": "a b", "output": "c"}])
    loaded = JSON(path, mask_prompt=False, val_split_fraction=0, prompt_style="none").load(Tokenizer(llama), llama, 99)
    ids, marks = loaded.train.row(0)
    text = loaded.style.render_row([{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}])[0]
    assert ids.tolist() == Tokenizer(llama).encode(text, eos=True) and (marks & IN_LOSS).bool().all()
    assert loaded.train.batch([0]).n_target_tokens == len(ids) - 1


def test_tokens_of_an_own_class_follow_its_code(tmp_path, rows_file, llama, monkeypatch):
    """A class outside of the package whose `adapt` changed makes its tokens anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    code = (
        "from litgpt.data import JSON\n\n\nclass Mine(JSON):\n    def adapt(self, fields):\n"
        "        return {'prompt': 'ANSWER', 'completion': fields['output']}\n"
    )
    found = []
    for answer in ("yes", "no"):
        (tmp_path / "own_class.py").write_text(code.replace("ANSWER", answer))
        sys.modules.pop("own_class", None)
        importlib.invalidate_caches()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "dont_write_bytecode", True)
            data = importlib.import_module("own_class").Mine(str(rows_file))
        loaded = data.load(Tokenizer(llama), llama, 256)
        found.append((loaded.cached, loaded.train.row(0)[0].tolist()))
    (_, first), (cached, second) = found
    assert not cached and first != second
