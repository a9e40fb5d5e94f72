"""Ids and texts are those of `transformers` or, for a `tokenizer.model` alone, those of sentencepiece."""

import io
import itertools
import json
import random
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from litgpt.checkpoint.hub import PICO
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.text.token_fields import CLASSES, KEPT_FILES
from litgpt.text.tokenizer import Tokenizer, TooLong
from tests.nasty import nasty_texts, pieces

NAMES = ("falcon", "llama-2", "llama-3-8b-instruct", "minimind", "phi-3", "pythia", "qwen2.5", "smollm2", "stories260k")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXT = "the quick brown fox jumps over the lazy dog; ein Straßencafé, 123 times. Привет мир"


def made_folder(folder: Path, **changes: Any) -> Path:
    """A Llama's kind of tokenizer: BPE over characters, bytes for the others, a blank before the text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    tokens = ["<unk>", "<s>", "</s>", *BYTES, *sorted({"▁", *TEXT.replace(" ", "")})]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("e", "r"), ("▁", "d"), ("o", "g")]
    tokens += [a + b for a, b in merges]
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend: Any = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, "tokenizer_config.json", fields | changes)
    return folder


def write(folder: Path, name: str, fields: Any) -> None:
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")


def apart(source: Path, folder: Path, **changes: Any) -> Path:
    """The `vocab.json` and `merges.txt` that a `tokenizer.json` stands for, with the added tokens where they belong."""
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    write(folder, "vocab.json", whole["model"]["vocab"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    fields = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {str(t.pop("id")): t for t in whole["added_tokens"]}
    write(folder, "tokenizer_config.json", {**fields, "added_tokens_decoder": added, **changes})
    return folder


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[str]:
    """Texts of 1,000 real rows, where they are at hand."""
    folder = request.getfixturevalue("real_data") / "instruct"
    alpaca = json.loads((folder / "alpaca_13k.json").read_text(encoding="utf-8"))[:600]
    lima = json.loads((folder / "lima.json").read_text(encoding="utf-8"))[:150]
    sql = (folder / "wikisql_train.jsonl").read_text(encoding="utf-8").splitlines()[:250]
    return [*("\n\n".join(r.values()) for r in alpaca), *(json.dumps(r) for r in lima), *sql]


def check(folder: Path, texts: list[str]) -> None:
    """Ids, with and without what is added, and the texts that they stand for, with and without special tokens."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    bos = ours.backend.before
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)
    assert theirs.bos_token_id in (None, ours.bos_id)
    texts = [*texts, *(f"{a}a {a} b" for a in ours.special_tokens[:30])]
    for text in texts:
        plain = theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert ours.encode(text, special=False) == plain, text
        whole = theirs(text, truncation=False)["input_ids"]
        if bos and plain[: len(bos)] == bos:  # there, the text has BOS twice
            whole = whole[len(bos) :]
        assert ours.encode(text) == whole, text
        for skip in (True, False):
            assert ours.decode(whole, skip) == theirs.decode(whole, skip_special_tokens=skip), text


def real(real_data: Path, name: str) -> Path:
    return real_data / "models" / name if name == "stories260k" else real_data / "tokenizers" / name


@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers(name, real_data, rows):
    check(real(real_data, name), [*nasty_texts(), *rows])


@pytest.mark.parametrize("name", ["minimind", "pythia", "qwen2.5", "smollm2"])
def test_real_vocabularies(name, real_data, rows, tmp_path):
    kind = {"tokenizer_class": "GPT2Tokenizer"} if name == "minimind" else {}  # `transformers` wants one that it knows
    check(apart(real(real_data, name), tmp_path, **kind), [*nasty_texts(), *rows[::5]])


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "stablelm",
        "olmo2",
        "gemma",
        "granite",
        "glm4",
        "ernie4_5",
        "seed_oss",
        "cohere2",
        "qwen2_5_vl",
        "qwen3_vl",
        "nemotron",
        "mistral3",
        "olmoe",
    ],
)
def test_what_the_family_changes(model_type, tmp_path):
    """A class of tokenizers that `transformers` builds anew for one family is left as in the file for another."""
    write(made_folder(tmp_path), "config.json", {"model_type": model_type})
    check(tmp_path, nasty_texts())


FIELDS: list[dict[str, Any]] = [
    {},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    {"add_prefix_space": False},
    {"add_bos_token": False, "add_eos_token": True},  # the post-processor of the file decides
    {"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>", "the"]},  # which the file does not have
    {"added_tokens_decoder": {"500": {"content": "<|end|>", "rstrip": True, "special": False, "normalized": False}}},
    {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|user|>"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_fields(fields, tmp_path):
    if isinstance(fields.get("bos_token"), dict):
        fields["bos_token"]["__type"] = "AddedToken"
    check(made_folder(tmp_path, **fields), nasty_texts())


def test_built_in():
    check(PICO, nasty_texts())


def test_files_of_older_folders(tmp_path):
    write(made_folder(tmp_path), "added_tokens.json", {"<|im_end|>": 500, "[INST]": 501})
    write(tmp_path, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"})
    check(tmp_path, nasty_texts())


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("GPT2Tokenizer", {}),
    ("GPT2Tokenizer", {"add_bos_token": True, "add_prefix_space": True}),
    ("GPTNeoXTokenizer", {"add_eos_token": True}),
    ("Qwen2Tokenizer", {"add_bos_token": True}),
]


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_vocabularies(kind, fields, llama, tmp_path):
    fields = {"tokenizer_class": kind, "unk_token": "</s>", "pad_token": "</s>", **fields}
    check(apart(llama, tmp_path, **fields), nasty_texts())


def test_vocabulary_of_a_family(llama, tmp_path):
    folder = apart(llama, tmp_path, tokenizer_class=None, unk_token="</s>", pad_token="</s>")
    for model_type in ("gpt2", "qwen3"):
        write(folder, "config.json", {"model_type": model_type, "vocab_size": 300})
        check(folder, nasty_texts())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_of_a_family(family):
    wanted = TOKENIZER_MAPPING_NAMES.get(family) or ""
    found = "TokenizersBackend" if family in KEPT_FILES else CLASSES.get(family, "")
    assert found == wanted or (found == "" and wanted not in {"TokenizersBackend", *CLASSES.values()})


def sentencepiece(folder: Path) -> Path:
    """A `tokenizer.model` with bytes, made of a few sentences."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        character_coverage=0.99, control_symbols=["[INST]", "[/INST]"], normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


SPM = {
    "made": lambda folder, real: sentencepiece(folder) / "tokenizer.model",
    "llama-2": lambda folder, real: real() / "tokenizers/llama-2/tokenizer.model",
    "mistral v1": lambda folder, real: real() / "tokenizers/mistral/tokenizer.model.v1",
    "mistral v3": lambda folder, real: real() / "tokenizers/mistral/tokenizer.model.v3",
    "stories260k": lambda folder, real: real() / "models/stories260k/tokenizer.model",
}


@pytest.fixture
def spm(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SentencePieceProcessor, Path]:
    file = SPM[request.param](tmp_path / "made", lambda: request.getfixturevalue("real_data"))
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    return SentencePieceProcessor(model_file=str(file)), tmp_path


@pytest.mark.parametrize("spm", SPM, indirect=True)
def test_sentencepiece_alone(spm, request):
    theirs, folder = spm
    ours = Tokenizer(folder)
    controls = [theirs.id_to_piece(i) for i in range(theirs.vocab_size()) if theirs.is_control(i)]
    texts = nasty_texts()
    if "made" not in request.node.name:
        texts += request.getfixturevalue("rows")
    compared = 0
    for text in texts:
        if not any(token in text for token in controls):
            ids = theirs.encode(text)
            assert ours.encode(text) == [theirs.bos_id(), *ids], text
            assert ours.decode(ids) == ours.decode([1, *ids, 2]) == theirs.decode(ids), text
            compared += 1
    assert compared > 500
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    keeps_blanks = theirs.decode(theirs.encode("a  ")) == "a  "
    for token in controls[:30]:  # a token in a text is that token, and what stands around it is kept
        token_id = theirs.piece_to_id(token)
        for before, after in (("", ""), ("a", "b"), ("a ", " b"), (" é\n", "\n\né"), ("", " c"), ("x", "🦙")):
            text = f"{before}{token}{after}"
            ids = ours.encode(text, special=False)
            assert ids.count(token_id) == 1 and ids[: ids.index(token_id)] == theirs.encode(before)
            if keeps_blanks:
                assert ours.decode(ids, skip_special=False) == text
                assert ours.decode(ids) == theirs.decode([i for i in ids if i != token_id])


def test_sentencepiece_as_transformers_reads_the_whole_folder(real_data, tmp_path):
    """Llama 2 without its `tokenizer.json` is Llama 2 with it, special tokens in the text included; a blank at the very
    start is another matter, of which sentencepiece makes two."""
    folder = real_data / "tokenizers" / "llama-2"
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    one, other = Tokenizer(tmp_path), Tokenizer(folder)
    for text in nasty_texts():
        if not re.search("^[ ▁]|<unk>", text):  # which is no control token
            assert one.encode(text) == other.encode(text), text
            ids = one.encode(text)
            assert one.decode(ids, skip_special=False) == other.decode(ids, skip_special=False), text


def test_tokens_added_to_sentencepiece(tmp_path):
    """Beside the model: tokens that lie behind its own, BOS and EOS."""
    n = SentencePieceProcessor(model_file=str(sentencepiece(tmp_path) / "tokenizer.model")).vocab_size()
    write(tmp_path, "added_tokens.json", {"<|im_start|>": n, "<|im_end|>": n + 1, "<tool>": n + 2})
    write(
        tmp_path, "special_tokens_map.json", {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    write(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    ours = Tokenizer(tmp_path)
    text = "<|im_start|>the fox<tool> x<|im_end|>"
    ids = ours.encode(text, special=False)
    assert (ids[0], ids[-1], ids.count(n + 2)) == (n, n + 1, 1) and ours.vocab_size == n + 3
    assert ours.decode(ids, skip_special=False) == text and ours.decode(ids) == "the fox<tool> x"
    assert ours.encode("fox") == [*ours.encode("fox", special=False), 2] and ours.eos_id == n + 1


def tiny_folders(folder: Path, llama: Path) -> dict[str, Path]:
    return {
        "bytes": llama,
        "fallback": made_folder(folder / "json"),
        "spm": sentencepiece(folder / "spm"),
        "pico": PICO,
    }


STREAMED = (
    "the 龘 quick😀fox  é\n\nx🦙.", "  two blanks ▁", "👩‍👩‍👧‍👦🏴\U000e0067", "ends within é", "\ufffd alone \ufffd",
    "a\n\n\nb</s>c <s> d",
    "Привет, 龘🦙é龘", "\x00\x01\x7f", "🦙", "",
)  # fmt: skip


@pytest.mark.parametrize("name", ["bytes", "fallback", "spm", "pico", "llama-2", "llama-3-8b-instruct", "qwen2.5"])
def test_a_stream_is_the_whole_text(name, request, llama, tmp_path):
    """For every place where the prompt may end, and every place where the answer may."""
    folder = tiny_folders(tmp_path, llama).get(name) or real(request.getfixturevalue("real_data"), name)
    tokenizer = Tokenizer(folder)
    for text in STREAMED:
        ids = tokenizer.encode(text)
        for end in range(len(ids) + 1):
            whole = tokenizer.decode(ids[:end])
            assert "".join(pieces(tokenizer, [], ids[:end])) == whole, (text, end)
        for start in range(len(ids) + 1):
            given = pieces(tokenizer, ids[:start], ids[start:])
            prompt = tokenizer.decode(ids[:start])
            n_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole)))
            kept = prompt[:n_same]  # all of it, unless it ended within a character
            assert kept + "".join(given) == whole and set(prompt[len(kept) :]) <= {"\ufffd"}, (text, start)
            assert all(given)


def long_answers(tokenizer: Tokenizer, n: int) -> dict[str, list[int]]:
    """Answers of `n` tokens, as no model gives them."""
    draw = random.Random(0)
    known = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i], skip_special=False)]
    parts = [i for i in known if "\ufffd" in tokenizer.decode([i])]  # of characters
    hidden = [i for i in known if not tokenizer.decode([i]) and tokenizer.decode([i], skip_special=False).strip("▁ ")]
    text = tokenizer.encode("the quick brown fox and 龘🦙é ", special=False)
    answers = {
        "text": (text * n)[:n],
        "any tokens": draw.choices(known, k=n),
        "parts of characters": draw.choices(parts or known, k=n),
        "one part of a character": draw.choices(parts or known, k=1) * n,
        "special tokens": draw.choices(hidden or known, k=n),
        "special tokens in a character": [*text[:-1], *draw.choices(hidden or known, k=n), text[-1]],
        "special tokens in a text": [i for pair in zip(text * n, draw.choices(hidden or known, k=n)) for i in pair][:n],
    }
    return answers


@pytest.mark.parametrize("name", ["bytes", "fallback", "spm", "pico", "llama-2", "llama-3-8b-instruct", "qwen2.5"])
def test_a_long_stream(name, request, llama, tmp_path, monkeypatch):
    """It is the whole text, and takes as long for each token as a short one."""
    folder = tiny_folders(tmp_path, llama).get(name) or real(request.getfixturevalue("real_data"), name)
    tokenizer = Tokenizer(folder)
    decode, decoded = Tokenizer.decode, 0

    def counted(self: Tokenizer, ids: Sequence[int], skip_special: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, skip_special)

    for kind, ids in long_answers(tokenizer, 600).items():
        whole = tokenizer.decode(ids)
        monkeypatch.setattr(Tokenizer, "decode", counted)
        for start in (0, 250):
            decoded = 0
            given = pieces(tokenizer, ids[:start], ids[start:])
            assert decoded < 60 * len(ids), (kind, start)
            rest = whole if start == 0 else whole[len(decode(tokenizer, ids[:start]).rstrip("\ufffd")) :]
            assert "".join(given).lstrip("\ufffd") == rest.lstrip("\ufffd"), (kind, start)
        monkeypatch.undo()


def test_an_answer_that_ends_within_a_character(tmp_path):
    """What stands before it is shown, also where all of it is written as bytes."""
    tokenizer = Tokenizer(made_folder(tmp_path))
    ids = tokenizer.encode("x龘🦙")
    assert tokenizer.decode(ids[:-1]) == "x龘\ufffd\ufffd\ufffd" and tokenizer.decode(ids[-2:]) == "\ufffd\ufffd"
    assert pieces(tokenizer, ids[:3], ids[3:]) == ["龘", "🦙"]


def test_never_two_bos(tmp_path):
    """Neither where a template writes it, nor where no file names it."""
    folder = made_folder(tmp_path)
    for _ in range(2):
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode("<s>the") == tokenizer.encode("<s>the", special=False)
        assert tokenizer.encode("the</s>", eos=True).count(2) == 1 == tokenizer.encode("the", eos=True).count(2)
        assert tokenizer.encode("the") == [1, *tokenizer.encode("the", special=False)]
        write(folder, "tokenizer_config.json", {})
        write(folder, "config.json", {"bos_token_id": 1, "eos_token_id": 2})
    (folder / "tokenizer.json").unlink()
    tokenizer = Tokenizer(sentencepiece(folder))
    assert tokenizer.encode("<s>the") == tokenizer.encode("<s>the", special=False) == tokenizer.encode("<s>the")


def test_stops(tmp_path):
    folder = made_folder(tmp_path)
    write(folder, "config.json", {"eos_token_id": 7})
    write(folder, "generation_config.json", {"eos_token_id": [8, 9]})
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (2, {2, 7, 8, 9})
    adapter = made_folder(tmp_path / "adapter")  # without these files
    assert Tokenizer(adapter, folder).stop_ids == {2, 7, 8, 9}


def remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text[:500], encoding="utf-8")


def no_model(folder: Path) -> None:
    remove(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")


def no_merges(folder: Path) -> None:
    remove(folder)
    write(folder, "vocab.json", {"a": 0})


def bad_merges(folder: Path) -> None:
    no_merges(folder)
    (folder / "merges.txt").write_text("a b c d\n")


BROKEN: list[Callable[[Path], None]] = [remove, cut, no_model, no_merges, bad_merges]


@pytest.mark.parametrize("damage", BROKEN)
def test_damaged_folders(damage, tmp_path):
    folder = made_folder(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=r"cannot be used|has no tokenizer.json"):
        Tokenizer(folder)


def test_half_a_surrogate_pair(llama, tmp_path):
    for folder in tiny_folders(tmp_path, llama).values():
        with pytest.raises(UserError, match="surrogate"):
            Tokenizer(folder).encode("a\ud800b")
        with pytest.raises(UserError, match=r"is not UTF-8 \(byte 0xe9\)"):
            Tokenizer(folder).encode(b"x\xe9".decode("utf-8", "surrogateescape"))
        assert Tokenizer(folder).decode(Tokenizer(folder).encode("\U00010000")) == "\U00010000"


# how many tokens a text has at least


def by_bytes(normalizer: Any = None, pre_tokenizer: Any = None, **token: Any) -> Any:
    """A byte-level tokenizer with further steps, with one token of three bytes, U+1F82, and an added token `<x>`."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    a, b, c = letters.pre_tokenize_str("\u1f82")[0][0]
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), a + b, a + b + c]
    backend = Backend(models.BPE({token: i for i, token in enumerate(vocabulary)}, [(a, b), (a + b, c)]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, letters]) if pre_tokenizer else letters
    if normalizer:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken("<x>", **token)])
    return backend


def of_words(model: Any) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend(model)


def steps() -> dict[str, tuple[Any, str, bool]]:
    """Tokenizers that shorten a text before they cut it; a text that becomes as short as possible; whether there is a
    bound all the same."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    blanks, composed = " " * 400 + "a", unicodedata.normalize("NFD", "\u1f82") * 100
    plain = pre_tokenizers.ByteLevel.alphabet()
    control = models.BPE({c: i for i, c in enumerate(sorted(set(plain) - {"Ą"}))}, [])  # without the byte 4
    letter = models.BPE({c: i for i, c in enumerate(sorted(set(plain) - {"a"}))}, [])
    later = models.BPE({c: i for i, c in enumerate(sorted(set(plain) - {"©", "Ã"}))}, [])
    found: dict[str, tuple[Any, str, bool]] = {
        "nothing": (by_bytes(), "a" * 400, True),
        "NFC": (by_bytes(normalizers.NFC()), composed, True),
        "NFKC": (by_bytes(normalizers.NFKC()), composed, True),
        "two of them": (by_bytes(normalizers.Sequence([normalizers.NFD(), normalizers.NFC()])), composed, True),
        "lower case": (by_bytes(normalizers.Lowercase()), "\u212a" * 400, True),
        "strip": (by_bytes(normalizers.Strip()), blanks, True),
        "strip accents": (by_bytes(normalizers.StripAccents()), "\u0301" * 400 + "a", False),
        "replace": (by_bytes(normalizers.Replace("aaaa", "b")), "a" * 400, True),
        "replace by nothing": (by_bytes(normalizers.Replace("a", "")), "a" * 400, False),
        "fold blanks": (by_bytes(normalizers.Replace(Regex(" +"), " ")), blanks, False),
        "BERT's": (by_bytes(normalizers.BertNormalizer()), "\x01" * 400 + "a", False),
        "Nmt": (by_bytes(normalizers.Nmt()), "\x01" * 400 + "a", False),
        "words": (by_bytes(pre_tokenizer=pre_tokenizers.WhitespaceSplit()), blanks, True),
        "BERT's words": (by_bytes(pre_tokenizer=pre_tokenizers.BertPreTokenizer()), blanks, True),
        "split off": (by_bytes(pre_tokenizer=pre_tokenizers.Split("a", "removed")), "a" * 400 + "b", False),
        "split": (by_bytes(pre_tokenizer=pre_tokenizers.Split("a", "isolated")), "a" * 400 + "b", True),
        "punctuation": (by_bytes(pre_tokenizer=pre_tokenizers.Punctuation("removed")), "." * 400 + "b", False),
        "delimiter": (by_bytes(pre_tokenizer=pre_tokenizers.CharDelimiterSplit("a")), "a" * 400 + "b", False),
        "token with blanks before": (by_bytes(lstrip=True), " " * 400 + "<x>", True),
        "token with blanks behind": (by_bytes(rstrip=True), "<x>" + " \n\u3000" * 400, True),
        "token": (by_bytes(), "<x>" * 400, True),
        "unknown words": (of_words(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), "a" * 400, False),
        "unknown pieces": (of_words(models.WordPiece({"<unk>": 0}, unk_token="<unk>")), "a" * 400, False),
        "unknown letters": (of_words(models.BPE({"a": 0}, [])), "b" * 400 + "a", False),
        "unknown run": (of_words(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)), "b" * 400, False),
    }
    for name, model, text, bound in (
        ("no control character", control, "\x04" * 400 + "a", True),
        ("no letter", letter, "a" * 400 + "b", False),
        ("no later byte", later, "é" * 400 + "b", False),
    ):
        backend = of_words(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found[name] = backend, text, bound
    return found


STEPS = steps()


@pytest.mark.parametrize("name", STEPS)
def test_no_text_has_fewer_tokens_than_its_length_shows(name, tmp_path):
    backend, text, bound = STEPS[name]
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path).backend
    for inner in (text, f"<x>{text}<x> {text}", "".join(nasty_texts(50, special=("<x>",)))):
        assert ours.least(inner) <= len(backend.encode(inner, add_special_tokens=False).ids)
    assert (ours.least("xyz" * 1000) > 0) == bound


@pytest.mark.parametrize("name", [*NAMES, "bytes", "fallback", "spm", "pico", "llama-2 alone"])
def test_real_tokenizers_show_it(name, request, llama, tmp_path):
    """Also texts of their longest tokens, of blanks, and of what their normalizers shorten."""
    if name == "llama-2 alone":
        shutil.copyfile(
            real(request.getfixturevalue("real_data"), "llama-2") / "tokenizer.model", tmp_path / "tokenizer.model"
        )
    folder = tmp_path if name == "llama-2 alone" else tiny_folders(tmp_path, llama).get(name)
    tokenizer = Tokenizer(folder or real(request.getfixturevalue("real_data"), name))
    tokens = sorted((tokenizer.decode([i], skip_special=False) for i in range(tokenizer.vocab_size)), key=len)[-9:]
    special = tuple(tokenizer.special_tokens[:20])
    hostile = [token * 50 for token in tokens] + [f" {token} " * 50 for token in special]
    hostile += [" " * 900, "\u1112\u1161\u11ab" * 300, unicodedata.normalize("NFD", "\u1f82") * 300, "\x04" * 900]
    for text in (*hostile, *nasty_texts(200, special)):
        assert tokenizer.backend.least(text) <= len(tokenizer.encode(text, special=False)), text
    assert tokenizer.backend.least("the quick brown fox " * 1000) > 0


def test_a_long_text_is_refused_before_it_is_tokenized(llama, tmp_path, monkeypatch):
    for folder in (llama, sentencepiece(tmp_path)):
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("the quick brown fox", special=False)
        assert tokenizer.encode("the quick brown fox", special=False, limit=len(ids) + 1) == ids
        with pytest.raises(TooLong, match=f"has {len(ids)} tokens.* at most {len(ids)}"):
            tokenizer.encode("the quick brown fox", special=False, limit=len(ids))
        monkeypatch.delattr(type(tokenizer.backend), "encode")
        with pytest.raises(TooLong, match="at least"):
            tokenizer.encode("the quick brown fox" * 1000, limit=100)
        monkeypatch.undo()
