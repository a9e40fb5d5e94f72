"""Many texts at once are decoded as each would be alone."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.checkpoint.hub import PICO
from litgpt.errors import UserError
from litgpt.generate import engine as engine_module
from litgpt.generate.answers import TextStream
from litgpt.generate.engine import Engine, Request, generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.model.gpt import GPT

SAMPLED = Sampling(1.0, top_k=20, top_p=0.95)


@pytest.fixture(scope="module")
def pico() -> InferenceModel:
    return InferenceModel.open(PICO, precision="32-true")


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 400) for _ in range(draw.randrange(1, 60))] for _ in range(n)]


@pytest.mark.parametrize("sampling", [Sampling(0.0), SAMPLED, Sampling(0.0, repetition_penalty=1.3)])
def test_a_text_does_not_depend_on_the_others(pico, sampling):
    def texts() -> list[Request]:
        return [Request(p, 5 + 3 * (i % 9), sampling, seed=i) for i, p in enumerate(prompts(20))]

    alone = [list(generate(pico.model, t.prompt, t.max_new_tokens, sampling, seed=t.seed)) for t in texts()]
    for rows in (1, 3, 16):
        together = texts()
        assert len(list(Engine(pico.model, rows).run(together))) == 20
        assert [t.ids for t in together] == alone
    assert len({tuple(ids) for ids in alone}) > 15


@pytest.mark.parametrize("name", ["pico", "stories260k"])
def test_greedy_text_of_twenty_is_that_of_transformers(request, name):
    """As the command has the model: with its weights laid out for answering."""
    folder = PICO if name == "pico" else request.getfixturevalue("real_data") / "models" / name
    loaded = InferenceModel.open(folder, precision="32-true", accelerator="cpu").prepare()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = "Once upon a time there was a little girl called Lily , who had 12 red balls and a dog .".split()
    prompts = [" ".join((2 * words)[i : i + 1 + 7 * i % 20]) for i in range(20)]
    texts = [Request(loaded.tokenizer.encode(prompt), 4 + 7 * i % 29) for i, prompt in enumerate(prompts)]
    assert len(list(Engine(loaded.model, 8).run(texts))) == 20 and len({len(text.prompt) for text in texts}) > 10
    for text in texts:
        prompt = torch.tensor([text.prompt])
        options = {"do_sample": False, "max_new_tokens": text.max_new_tokens, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(text.prompt) :]
        assert text.ids == expected.tolist()


@pytest.mark.parametrize(
    ("precision", "packed"),
    [
        ("32-true", False),
        ("bf16-true", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("32-true", True), ("bf16-true", False))),
    ],
)
def test_in_4_bits_a_text_does_not_depend_on_the_others(precision, packed):
    pytest.importorskip("bitsandbytes")
    loaded = InferenceModel.open(PICO, precision=precision, quantize="bnb.nf4", accelerator="cpu")
    model = (loaded.prepare() if packed else loaded).model
    texts = [Request(p, 4 + 7 * i % 29) for i, p in enumerate(prompts(20))]
    alone = [list(generate(model, t.prompt, t.max_new_tokens)) for t in texts]
    assert len(list(Engine(model, 8).run(texts))) == 20
    assert [t.ids for t in texts] == alone


def test_long_prompts_are_read_in_parts(pico, monkeypatch):
    text = [token for prompt in prompts(60) for token in prompt][:200]
    expected = list(generate(pico.model, text, 30))
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    read = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *more: read.append(ids.size(1)) or hidden(self, ids, *more))
    engine = Engine(pico.model, 4)
    short = engine.submit(Request(text[:5], 20))
    for _ in range(3):
        engine.step()
    other = engine.submit(Request(text, 30))
    while not short.finish:
        engine.step()
    assert len(other.ids) == 0, "the short text went on while the long prompt was read"
    while not other.finish:
        engine.step()
    assert other.ids == expected and max(read) == 7


def test_the_beginning_of_a_text_is_read_once(pico, monkeypatch):
    start = [token for prompt in prompts(50) for token in prompt][:120]
    engine = Engine(pico.model, 2)
    (one,) = engine.run([Request(start, 10)])
    read = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *more: read.append(ids.size(1)) or hidden(self, ids, *more))
    longer = [*start, *one.ids, 7, 8, 9]
    (two,) = engine.run([Request(longer, 10)])
    assert read[0] == 4, "the last token of an answer was not read yet"
    other = [*start[:100], 5, 5]
    (three,) = engine.run([Request(other, 10)])
    assert read[10] == 2
    for text in (two, three):
        assert text.ids == list(generate(pico.model, text.prompt, 10))


def test_stop_cancel_and_length(pico):
    prompt = prompts(1)[0]
    whole = list(generate(pico.model, prompt, 30))
    engine = Engine(pico.model, 2)
    stopped = Request(prompt, 30, stop_ids={whole[5]})
    cancelled, waiting, late = Request(prompt, 30), Request(prompt, 30), Request(prompt, 30)
    for text in (stopped, cancelled, waiting, late):
        engine.submit(text)
    for _ in range(3):
        engine.step()
    cancelled.cancel()
    waiting.cancel()
    assert {id(text) for text in engine.step()} >= {id(cancelled), id(waiting)}
    while engine.busy:
        engine.step()
    assert stopped.ids == whole[: whole.index(whole[5])] and stopped.finish == "stop"
    assert cancelled.ids == whole[:3] and cancelled.finish == waiting.finish == "cancelled" and not waiting.ids
    assert late.ids == whole and late.finish == "length"
    most = pico.model.config.block_size
    (full,) = Engine(pico.model).run([Request((prompt * most)[: most - 3], 30)])
    assert len(full.ids) == 3 and full.finish == "length"
    (short,) = Engine(pico.model, max_length=len(prompt) + 2).run([Request(prompt, 30)])
    assert short.ids == whole[:2]


def test_what_cannot_be_decoded(pico):
    most = pico.model.config.block_size
    for prompt, words in (([], "empty"), ([5] * most, "at most"), ([10**6], "another model")):
        with pytest.raises(UserError, match=words):
            Engine(pico.model).submit(Request(prompt, 5))


def test_logprobs(pico):
    prompt = prompts(1, seed=3)[0]
    (text,) = Engine(pico.model).run([Request(prompt, 12, SAMPLED, logprobs=3)])
    with torch.no_grad():
        logits = pico.model(torch.tensor([[*prompt, *text.ids]]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    own = expected.gather(1, torch.tensor(text.ids)[:, None]).squeeze(1)
    assert text.token_logprobs == pytest.approx(own.tolist(), abs=1e-4)
    top = expected.topk(3)
    assert [[i for i, _ in place] for place in text.top_logprobs] == top.indices.tolist()
    assert [[p for _, p in place] for place in text.top_logprobs] == [
        pytest.approx(r, abs=1e-4) for r in top.values.tolist()
    ]


def test_logprobs_beside_an_answer_that_ends(pico):
    """A stop token has log-probabilities, which belong to no answer."""
    first, second = prompts(2, seed=3)
    (alone,) = Engine(pico.model).run([Request(second, 6, logprobs=3)])
    (text,) = Engine(pico.model).run([Request(first, 1)])
    both = [Request(first, 6, stop_ids=text.ids, logprobs=2), Request(second, 6, logprobs=3)]
    list(Engine(pico.model, rows=2).run(both))
    assert both[0].ids == [] and both[1].ids == alone.ids
    assert both[1].token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -1.0, 0.5], [2.0, -1.0, 0.5]])
    penalized = Sampling(repetition_penalty=2.0).penalize(logits, [[0, 1, 1], [2]])
    assert penalized.tolist() == [[1.0, -2.0, 0.5], [2.0, -1.0, 0.25]]


def test_min_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    drawn = Sampling(1.0, None, min_p=0.4).draw(logits, [random.Random(0)] * 2000)
    share = drawn.bincount(minlength=4) / 2000
    assert share.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_text_comes_in_whole_characters_and_ends_before_a_stop_string(pico, size):
    text = "Once there was a naïve café, 東京 and 😀. The END came. Nothing after."
    ids = pico.tokenizer.encode(text, special=False)

    def told(stop: list[str]) -> tuple[list[str], TextStream]:
        stream = TextStream(pico.tokenizer, [], stop)
        pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        return [*pieces, stream.close()], stream

    pieces, stream = told([])
    assert "".join(pieces) == stream.text == pico.tokenizer.decode(ids) and not any("\ufffd" in p for p in pieces)
    for stop in (["END"], ["Nothing", "END ca", "THE"], ["The END"]):
        pieces, stream = told(stop)
        cut = min(text.index(word) for word in stop if word in text)
        assert "".join(pieces) == stream.text == text[:cut] and stream.stopped
    pieces, stream = told(["after.!", "xyz"])
    assert "".join(pieces) == stream.text == text and not stream.stopped


def test_a_text_that_waits_for_its_prompt_may_change_its_row(pico, monkeypatch):
    """A row closes up while nothing of its text was read, so that the cache has no such row yet."""
    monkeypatch.setattr(engine_module, "CHUNK", 8)
    texts = [Request(p[:8], 1 if i == 0 else 6, seed=i) for i, p in enumerate(prompts(6))]
    alone = [list(generate(pico.model, t.prompt, t.max_new_tokens)) for t in texts]
    assert len(list(Engine(pico.model, 6).run(texts))) == 6 and [t.ids for t in texts] == alone
