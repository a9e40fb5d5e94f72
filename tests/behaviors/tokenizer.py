"""Behaviors of `litgpt.Tokenizer`. `BEHAVIOR_FOLDER` has a `tokenizer.json` with a BOS post-processor."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from litgpt import Tokenizer

SOURCE = Path(os.environ["BEHAVIOR_FOLDER"])
TEXT = "Once upon a time, 3 wolves met a fox. Über den Wolken: 🙂"


def made(folder, name="model", post=True, generation=False, **fields):
    """A folder with the tokenizer, and these fields of its `tokenizer_config.json`; none without fields."""
    folder = Path(folder) / name
    folder.mkdir()
    content = json.loads((SOURCE / "tokenizer.json").read_text())
    if not post:
        content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 3}))
    if fields:
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", **fields}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def plain(folder, **fields):
    """A tokenizer that adds nothing by itself, with `<s>` and `</s>`."""
    return Tokenizer(made(folder, post=False, **{"bos_token": "<s>", "eos_token": "</s>", **fields}))


def with_plain(check, **fields):
    with tempfile.TemporaryDirectory() as folder:
        check(plain(folder, **fields))


def raises(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def test_names():
    import litgpt.tokenizer

    assert litgpt.Tokenizer is litgpt.tokenizer.Tokenizer


def test_folder_as_text_or_path():
    a, b = Tokenizer(str(SOURCE)), Tokenizer(checkpoint_dir=SOURCE)
    assert a.encode(TEXT).tolist() == b.encode(TEXT).tolist()
    assert a.model_name == b.model_name == SOURCE.stem


def test_encode_gives_a_tensor():
    ids = Tokenizer(SOURCE).encode(TEXT)
    assert isinstance(ids, torch.Tensor) and ids.dtype == torch.int and ids.dim() == 1 and len(ids) > 5


def test_device():
    assert Tokenizer(SOURCE).encode(TEXT, device=torch.device("cpu")).device.type == "cpu"
    assert Tokenizer(SOURCE).encode(TEXT, device=torch.device("meta")).device.type == "meta"


def test_decode_gives_the_text():
    def check(tokenizer):
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.decode(tokenizer.encode(TEXT, bos=True, eos=True)) == TEXT

    with_plain(check)


def test_decode_one_token():
    def check(tokenizer):
        ids = tokenizer.encode("hello there")
        assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[:1])
        assert "".join(tokenizer.decode(i) for i in ids) == "hello there"

    with_plain(check)


def test_bos():
    def check(tokenizer):
        ids = tokenizer.encode(TEXT, bos=False).tolist()
        assert ids[0] != tokenizer.bos_id
        assert tokenizer.encode(TEXT, bos=True).tolist() == [tokenizer.bos_id, *ids]
        assert tokenizer.encode("<s>" + TEXT, bos=True).tolist() == [tokenizer.bos_id, *ids]
        assert tokenizer.encode("<s>" + TEXT, bos=False).tolist() == ids

    with_plain(check)


def test_eos():
    def check(tokenizer):
        ids = tokenizer.encode(TEXT).tolist()
        assert tokenizer.encode(TEXT, eos=True).tolist() == [*ids, tokenizer.eos_id]
        assert tokenizer.encode(TEXT + "</s>").tolist() == ids

    with_plain(check)


def test_eos_that_the_text_ends_with():
    def check(tokenizer):
        assert tokenizer.encode(TEXT + "</s>", eos=True).tolist() == tokenizer.encode(TEXT, eos=True).tolist()

    with_plain(check)


def test_empty_text():
    def check(tokenizer):
        assert tokenizer.encode("").tolist() == []
        assert tokenizer.encode("", bos=True, eos=True).tolist() == [0, 1]
        assert tokenizer.encode("").dtype == torch.int

    with_plain(check)


def test_max_length():
    def check(tokenizer):
        ids = tokenizer.encode(TEXT, bos=True, eos=True).tolist()
        assert tokenizer.encode(TEXT, bos=True, eos=True, max_length=3).tolist() == ids[:3]
        for n in (-1, 0, 1000):
            assert tokenizer.encode(TEXT, bos=True, eos=True, max_length=n).tolist() == ids

    with_plain(check)


def test_bos_of_a_post_processor():
    tokenizer = Tokenizer(SOURCE)
    ids = tokenizer.encode(TEXT, bos=False).tolist()
    assert tokenizer.encode(TEXT, bos=True).tolist() == [tokenizer.bos_id, *ids]


def test_default_of_a_tokenizer_that_adds_bos():
    """Its texts begin with BOS in training, so they do here."""
    tokenizer = Tokenizer(SOURCE)
    assert tokenizer.use_bos and tokenizer.encode(TEXT)[0] == tokenizer.bos_id


def test_add_bos_token():
    with tempfile.TemporaryDirectory() as folder:
        on = Tokenizer(made(folder, "on", False, bos_token="<s>", add_bos_token=True))
        off = Tokenizer(made(folder, "off", True, bos_token="<s>", add_bos_token=False))
    assert on.use_bos is True and on.encode("ab")[0] == on.bos_id == 0
    assert off.use_bos is False and off.encode("ab")[0] != off.bos_id == 0


def test_llama_adds_bos():
    with tempfile.TemporaryDirectory() as folder:
        llama = Tokenizer(made(folder, "a", False, bos_token="<s>", tokenizer_class="LlamaTokenizer"))
        other = Tokenizer(made(folder, "b", False, bos_token="<s>", tokenizer_class="GPT2Tokenizer"))
        llama_3 = Tokenizer(made(folder, "Llama-3.2-1B", bos_token="<s>"))
        smol = Tokenizer(made(folder, "SmolLM2-135M-Instruct", False, bos_token="<s>"))
    assert [t.use_bos for t in (llama, other, llama_3, smol)] == [True, False, True, True]


def test_without_bos():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(made(folder, post=False))
    assert tokenizer.bos_id is None and tokenizer.eos_id is None and not tokenizer.use_bos
    assert len(tokenizer.encode("ab")) == 2
    raises(NotImplementedError, lambda: tokenizer.encode("ab", bos=True))


def test_ids_of_generation_config():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(made(folder, "a", generation=True))
        own = Tokenizer(made(folder, "b", generation=True, bos_token="<s>", eos_token="</s>"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    assert (own.bos_id, own.eos_id) == (0, 1)


def test_special_tokens_as_objects():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(made(folder, bos_token={"content": "<s>"}, eos_token={"content": "</s>"}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_token_to_id():
    tokenizer = Tokenizer(SOURCE)
    assert tokenizer.token_to_id("<s>") == 0 and tokenizer.token_to_id("</s>") == 1
    raises(ValueError, lambda: tokenizer.token_to_id("no such token"))


def test_backend():
    tokenizer = Tokenizer(SOURCE)
    assert tokenizer.backend == "huggingface"
    assert type(tokenizer.processor).__module__.startswith("tokenizers")
    assert tokenizer.processor.token_to_id("<s>") == 0
    assert tokenizer.vocab_size == len(json.loads((SOURCE / "tokenizer.json").read_text())["model"]["vocab"])


def test_decode_stream():
    def check(tokenizer):
        ids = tokenizer.encode("A fox met a wolf.")
        parts = list(tokenizer.decode_stream(iter(ids)))
        assert "".join(parts) == "A fox met a wolf." and len(parts) == len(ids)
        parts = list(tokenizer.decode_stream(iter(ids[:, None]), device=torch.device("cpu")))
        assert "".join(parts) == "A fox met a wolf."

    with_plain(check)


def test_decode_stream_within_characters():
    """A character of several tokens arrives complete."""

    def check(tokenizer):
        assert "".join(tokenizer.decode_stream(iter(tokenizer.encode(TEXT)))) == TEXT

    with_plain(check)


def test_sentencepiece():
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("A fox met a wolf.\nThe wolf met the fox.\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(folder, "tokenizer")),
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("The fox met a wolf.", bos=False)
    assert tokenizer.backend == "sentencepiece" and tokenizer.vocab_size == tokenizer.processor.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.token_to_id("</s>") == 2
    assert ids.dtype == torch.int and tokenizer.decode(ids) == "The fox met a wolf."
    assert tokenizer.encode("The fox met a wolf.", bos=True, eos=True).tolist() == [1, *ids.tolist(), 2]
    assert "".join(tokenizer.decode_stream(iter(ids))) == "The fox met a wolf."


def test_json_before_sentencepiece():
    with tempfile.TemporaryDirectory() as folder:
        made_folder = made(folder)
        (made_folder / "tokenizer.model").write_bytes(b"not read")
        assert Tokenizer(made_folder).backend == "huggingface"


def test_missing_folder():
    raises(NotADirectoryError, lambda: Tokenizer("/no/such/folder"))
    with tempfile.TemporaryDirectory() as folder:
        raises(NotImplementedError, lambda: Tokenizer(folder))


def test_text_must_be_text():
    raises(TypeError, lambda: Tokenizer(SOURCE).encode(5))


def test_moved_folder():
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(SOURCE, Path(folder, "copy"))
        tokenizer = Tokenizer(copy)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


if __name__ == "__main__":
    from runner import main

    main(globals())
