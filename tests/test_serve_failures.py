# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""A failure of the engine ends its requests and frees the cache, and shows where nothing works any more."""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt import LLM
from litgpt.checkpoint.hub import PICO
from litgpt.commands.answer_file import PromptFile
from litgpt.generate.conversation import Conversation
from litgpt.generate.engine import Engine, Request, generate
from litgpt.generate.inference_model import InferenceModel, PromptOptions
from litgpt.generate.prompt_file import Prompts
from litgpt.generate.sampling import Sampling
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from litgpt.serve.worker import MAX_FAILURES, Worker
from tests.servers import Running, in_thread

BODY = {"prompt": "The cat", "max_tokens": 6, "temperature": 0}
SMALL = [0]  # how the worker tries whether anything works


class Tensors:
    """The tensors of all caches that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref] = []
        self.most = 0
        room = KVCache.room

        def counted(cache: KVCache, *args: Any) -> Any:
            pair = room(cache, *args)
            known = {id(ref()) for ref in self.made}
            self.made += [weakref.ref(t) for t in pair if id(t) not in known]
            self.most = max(self.most, self.alive)
            return pair

        monkeypatch.setattr(KVCache, "room", counted)

    @property
    def alive(self) -> int:
        self.made = [ref for ref in self.made if ref() is not None]
        return len(self.made)


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensors]:
    """Without the collector of cycles: what is freed is freed at once."""
    gc.collect()
    gc.disable()
    yield Tensors(monkeypatch)
    gc.enable()


@pytest.fixture
def running() -> Iterator[Running]:
    with in_thread(PICO) as made:
        yield made


N_LAYERS = InferenceModel.open(PICO).model.config.n_layer


class Fault:
    """Lets a method raise, where a condition on its arguments holds."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
        self.error, self.on = error, False
        self.after = 0  # calls that still work
        original = getattr(owner, name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.on and not self.spared(args):
                self.after -= 1
                if self.after < 0:
                    raise self.error
            return original(*args, **kwargs)

        patch.setattr(owner, name, staticmethod(faulty) if name == "event" else faulty)

    def spared(self, args: Any) -> bool:
        """The small text of the worker is answered."""
        texts = [a for a in args if isinstance(a, Request)]
        ids = [a for a in args if torch.is_tensor(a) and a.dtype == torch.long]
        rows = next(([*a.rows, *a.waiting] for a in args if isinstance(a, Engine)), [])
        prompts = [t.prompt for t in texts] + [t.prompt for t in rows if t is not None]
        return SMALL in prompts or any(t.numel() == 1 and t.item() == SMALL[0] for t in ids)


PLACES: dict[str, tuple[Any, str, int]] = {  # where it fails, after how many calls
    "submit": (Engine, "submit", 0),
    "the second of two answers in submit": (Engine, "submit", 1),
    "step": (Engine, "step", 2),
    "model": (GPT, "hidden", 2),
    "sampling": (Engine, "draw", 2),
    "between a token and its log-probability": (Request, "add", 2),
    "event": (Worker, "event", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_is_survived(running, tensors, monkeypatch, capfd, place):
    """All requests that are there hear of it, and the new cache is never beside the old one."""
    owner, name, after = PLACES[place]
    fault = Fault(monkeypatch, owner, name, RuntimeError("it failed"))
    for failures in (1, 2):
        fault.on, fault.after = True, after
        failed = httpx.post(running.url + "/v1/completions", json={**BODY, "prompt": "secret words", "n": 2})
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        fault.on = False
        running.wait_idle()
        assert httpx.get(running.url + "/health").json() == {"status": "ok"}
        assert running.figure("litgpt_engine_failures_total") == failures
        assert running.figure("litgpt_engine_up") == 1 and not running.service.worker.open
        assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 200
    assert tensors.alive == 2 * N_LAYERS
    assert tensors.most <= 2 * N_LAYERS + 2, "a layer's tensors may be copied while they grow"
    log = capfd.readouterr().err
    assert log.count("it failed") == 2 and "secret" not in log


def test_a_failure_in_the_event_loop_is_survived(running, monkeypatch):
    figures = running.service.metrics
    monkeypatch.setattr(running.service.worker, "on_events", lambda news: figures.nothing)
    assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 200
    running.wait_idle()


def test_a_text_that_was_cancelled_while_it_waited_is_counted(monkeypatch):
    """The step that frees its place fails. Else the place would be taken for ever."""
    began, go_on = threading.Event(), threading.Event()
    hidden = GPT.hidden

    def slow(self: GPT, *args: Any) -> Any:
        began.set()
        go_on.wait(10)
        return hidden(self, *args)

    with in_thread(PICO, max_batch=1) as running:
        monkeypatch.setattr(GPT, "hidden", slow)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(running.url + "/v1/completions", json={**BODY, "n": 2}, timeout=0.5)
        assert began.is_set() and running.service.worker.n_sequences == 2
        fault = Fault(monkeypatch, Engine, "fill_rows", RuntimeError("it failed"))
        fault.on = True
        time.sleep(0.2)  # the client has gone
        go_on.set()
        running.wait_idle()
        fault.on = False
        assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 200


FATAL: list[BaseException] = [
    RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    SystemExit(3),
    KeyboardInterrupt(),
]
if hasattr(torch, "AcceleratorError"):
    FATAL.append(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("error", FATAL, ids=lambda error: type(error).__name__)
def test_where_nothing_works_any_more(running, tensors, monkeypatch, capfd, error):
    """The device fails from some step on; an error that is not an `Exception` may come once."""
    assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 200
    fault = Fault(monkeypatch, GPT, "hidden", error)
    monkeypatch.setattr(fault, "spared", lambda args: False)
    fault.on, fault.after = True, 1
    answers = [httpx.post(running.url + path, json=BODY) for path in ("/v1/completions", "/predict")]
    fault.on = not isinstance(error, Exception)
    answers += [
        httpx.post(running.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]}),
        httpx.post(running.url + "/v1/completions", json={**BODY, "stream": True}),
    ]
    for answer in answers:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
    health = httpx.get(running.url + "/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert type(error).__name__ in health.json()["reason"] and "\n" not in health.json()["reason"]
    assert running.figure("litgpt_engine_up") == 0 and running.figure("litgpt_engine_failures_total") == 1
    assert httpx.get(running.url + "/v1/models").status_code == 200
    running.wait_idle()
    assert tensors.alive == 0
    assert capfd.readouterr().err.count("the model can no longer answer") == 1


def test_requests_that_wait_are_refused_too(monkeypatch):
    """Those in the engine, those that wait for a place, and those in the inbox."""
    with in_thread(PICO, max_batch=1) as running:
        began, go_on = threading.Event(), threading.Event()

        def hidden(*args: Any, **kwargs: Any) -> NoReturn:
            began.set()
            go_on.wait(10)
            raise RuntimeError("it failed")

        monkeypatch.setattr(GPT, "hidden", hidden)
        codes: list[int] = []

        def ask() -> None:
            codes.append(httpx.post(running.url + "/v1/completions", json=BODY, timeout=20).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        threads[0].start()
        assert began.wait(10)
        for thread in threads[1:]:
            thread.start()
        while running.service.worker.n_sequences < 4:
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join(10)
        assert codes == [503] * 4 and running.service.worker.n_sequences == 0


def test_failures_in_a_row(running, monkeypatch):
    """A small text is answered, and nothing else is: the server tries on, and does not call itself healthy."""
    fault = Fault(monkeypatch, GPT, "hidden", torch.OutOfMemoryError("CUDA out of memory"))
    fault.on = True
    for i in range(MAX_FAILURES + 1):
        assert httpx.get(running.url + "/health").status_code == (200 if i < MAX_FAILURES else 503)
        assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 500
    assert "OutOfMemoryError" in httpx.get(running.url + "/health").json()["reason"]
    assert running.figure("litgpt_engine_up") == 0
    fault.on = False
    assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 200
    assert httpx.get(running.url + "/health").status_code == 200 and running.figure("litgpt_engine_up") == 1


def test_a_thread_that_ended(running):
    worker = running.service.worker
    worker.stop()
    assert httpx.post(running.url + "/v1/completions", json=BODY).status_code == 503
    health = httpx.get(running.url + "/health")
    assert health.status_code == 503 and "thread" in health.json()["reason"]


# engines elsewhere


@pytest.fixture(scope="module")
def pico() -> InferenceModel:
    return InferenceModel.open(PICO, precision="32-true", accelerator="cpu")


def by_chat(pico: InferenceModel) -> Iterator[Any]:
    return Conversation(pico, Sampling(0.0), 20).ask("Hello")


def by_llm(pico: InferenceModel) -> Iterator[Any]:
    llm = LLM.load(PICO, precision="32-true", accelerator="cpu")
    return llm.generate("Hello", max_new_tokens=20, top_k=1, stream=True)


def by_generate(pico: InferenceModel) -> Iterator[Any]:
    return generate(pico.model, [5, 6, 7], 20)


def by_file(folder: Path) -> Callable[[InferenceModel], Iterator[Any]]:
    (folder / "p.jsonl").write_text('{"prompt": "Hello"}\n' * 3)

    def answer(pico: InferenceModel) -> Iterator[Any]:
        file = PromptFile(Prompts(str(folder / "p.jsonl")), None, PromptOptions(max_new_tokens=20))
        yield file.answer(pico, Engine(pico.model, 2), Sampling(0.0))

    return answer


WAYS = {"chat": by_chat, "LLM": by_llm, "generate": by_generate, "--prompts": None}


@pytest.mark.parametrize("error", [RuntimeError("it failed"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_is_freed_while_the_traceback_is_held(pico, tensors, monkeypatch, tmp_path, way, error):
    """As a notebook holds it. Of the call that failed a layer's tensors may be left."""
    begin = WAYS[way] or by_file(tmp_path)
    fault = Fault(monkeypatch, GPT, "hidden", error)
    pieces = begin(pico)
    fault.on, fault.after = True, 3
    with pytest.raises(type(error)) as held:
        list(pieces)
    assert held.value is error and tensors.most >= 2 * N_LAYERS
    assert tensors.alive == 0
    error.__traceback__ = None


@pytest.mark.parametrize("way", ["chat", "LLM", "generate"])
def test_an_answer_that_is_dropped_half_way_frees_its_cache(pico, tensors, way):
    pieces = WAYS[way](pico)
    next(pieces)
    assert tensors.alive == 2 * N_LAYERS
    del pieces
    assert tensors.alive == 0


def test_a_chat_goes_on_after_an_error(pico, tensors, monkeypatch):
    fault = Fault(monkeypatch, GPT, "hidden", RuntimeError("it failed"))
    conversation, fresh = (Conversation(pico, Sampling(0.0), 20) for _ in range(2))
    fault.on, fault.after = True, 0
    with pytest.raises(RuntimeError):
        list(conversation.ask("Hello"))
    fault.on = False
    assert list(conversation.ask("Who are you?")) == list(fresh.ask("Who are you?"))
