# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""Clients of `litgpt serve` that break off, wait, or send too much keep neither memory nor connections nor places."""

import contextlib
import gc
import json
import logging
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.generate.answers import TextStream
from litgpt.generate.engine import Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.serve import guard as guard_module
from litgpt.serve import server as server_module
from litgpt.serve import service as service_module
from tests.conftest import save_llama
from tests.servers import in_process, in_thread, n_files

LONG = {"prompt": "the quick brown fox", "temperature": 0, "max_tokens": 5000}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A model that goes on for thousands of tokens."""
    return save_llama(tmp_path_factory.mktemp("m") / "talker", tokenizer_file, max_position_embeddings=6000)


def connect(url: str, buffer: int = 0) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    made = socket.socket()
    if buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(30)
    made.connect((host, int(port)))
    return made


def post(path: str, body: Any, length: int = 0) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content


def read(made: socket.socket) -> tuple[int, Any]:
    answer = HTTPResponse(made)
    answer.begin()
    return answer.status, json.loads(answer.read())


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def reset(made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()


@pytest.mark.parametrize("n", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_connections_are_closed(n, tmp_path):
    """Half of them are broken, each in another way."""
    ask = post("/v1/completions", {"prompt": "Hi", "max_tokens": 2})
    stream = post("/v1/completions", {"prompt": "Once", "max_tokens": 100, "stream": True})
    broken = [b"", ask[:20], ask[:-5], stream, b"\x16\x03\x01" * 9, post("/v1/completions", b"{", 10**6)]
    log = tmp_path / "log"
    with in_process(PICO, log=log) as (url, process):
        httpx.post(url + "/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
        before = n_files(process.pid)  # with the connection of that request, or without
        for _ in range(5):
            httpx.post(url + "/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
        for i in range(n):
            with connect(url) as made:
                if i % 2:
                    made.sendall(ask)
                    assert read(made)[0] == 200
                    continue
                made.sendall(broken[i // 2 % len(broken)])
                if i // 2 % len(broken) == 3:
                    made.recv(100)
                if i % 4:
                    reset(made)
        until(lambda: n_files(process.pid) <= before)
        assert httpx.get(url + "/health").json() == {"status": "ok"}
    assert "Traceback" not in log.read_text()


# what is kept


BIG = 1_000_000
TEXT = '{"prompt": "' + "the fox " * (BIG // 8) + '"}'
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}] * (BIG // 36)})
KEPT: dict[str, tuple[str, bytes, int]] = {  # path, body, the status of its answer
    "a prompt": ("/v1/completions", TEXT.encode(), 400),
    "messages": ("/v1/chat/completions", CHAT.encode(), 400),
    "messages that are wrong": ("/v1/chat/completions", CHAT.replace('"user"', '"x"').encode(), 400),
    "no JSON": ("/v1/chat/completions", CHAT[:-1].encode(), 400),
    "too large": ("/v1/completions", TEXT.encode() + b" " * BIG, 413),
    "no such model": ("/v1/completions", TEXT.replace("{", '{"model": "x", ', 1).encode(), 404),
    "an answer": (
        "/v1/completions",
        json.dumps({"prompt": "Hi", "max_tokens": 2, "metadata": "x" * BIG}).encode(),
        200,
    ),
}


@pytest.fixture
def traced() -> Iterator[None]:
    """Without the collector of cycles: what is freed is freed at once."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def kept() -> int:
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("name", KEPT)
def test_a_body_is_freed_with_its_answer(name, traced, monkeypatch):
    monkeypatch.setattr(gc, "enable", lambda: None)  # by the lane of large bodies
    path, body, status = KEPT[name]
    with in_thread(PICO, max_body=BIG + BIG // 2) as running, httpx.Client(base_url=running.url) as client:
        headers = {"Content-Type": "application/json"}
        for part in (body[:100], body):  # what the first request keeps stays
            client.post(path, content=part, headers=headers)
        before = kept()
        for _ in range(2):
            answer = client.post(path, content=body, headers=headers, timeout=60)
            assert answer.status_code == status
            del answer
        until(lambda: running.app.guard.bodies.held == 0 and kept() < before + BIG // 10)


def test_a_body_is_not_kept_while_its_answer_is_made(talker, traced):
    body = {**LONG, "stream": True, "metadata": ["x" * 1000] * (BIG // 1000)}
    with in_thread(talker) as running:
        httpx.post(running.url + "/v1/completions", json={**LONG, "max_tokens": 2})
        sent = post("/v1/completions", body)
        before = kept()
        with connect(running.url) as made:
            made.sendall(sent)
            made.recv(100)
            assert running.service.worker.n_sequences == 1
            until(lambda: kept() < before + BIG // 3, 5)
        running.wait_idle()


def test_a_prompt_is_freed_when_its_answer_ends(talker, traced):
    """Not only when the collector of cycles comes by."""

    def held() -> int:
        return sum(type(o) in (Request, TextStream) for o in gc.get_objects())

    with in_thread(talker) as running:
        url = running.url + "/v1/completions"
        for body in (
            {"max_tokens": 3},
            {"max_tokens": 3, "stream": True},
            {"max_tokens": 50, "stop": "e"},
            {"n": 2, "max_tokens": 3},
        ):
            assert httpx.post(url, json={**LONG, **body}).status_code == 200
        with connect(running.url) as made:
            made.sendall(post("/v1/completions", {**LONG, "stream": True}))
            made.recv(100)
        running.wait_idle()
        until(lambda: held() == 0)


# who waits


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading takes as long as the event is not set."""
    go_on, parse = threading.Event(), service_module.parse
    monkeypatch.setattr(service_module, "parse", lambda *a: go_on.wait(30) and parse(*a))
    yield go_on
    go_on.set()


def test_small_bodies_do_not_wait_for_large_ones(slow):
    large = post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "metadata": "x" * 100_000})
    small = {"prompt": "Hi", "max_tokens": 2}
    with in_thread(PICO) as running:
        with contextlib.ExitStack() as stack:
            made = [stack.enter_context(connect(running.url)) for _ in range(5)]
            for each in made:
                each.sendall(large)
            until(lambda: running.app.guard.active == 5)
            original, service_module.parse = service_module.parse, service_module.parse.__closure__ and _parse
            assert httpx.post(running.url + "/v1/completions", json=small).status_code == 200
            service_module.parse = original
            for each in made[1:4]:  # who waits in the queue may leave it
                reset(each)
            until(lambda: running.app.guard.active == 2)
            assert running.app.guard.bodies.held < 3 * len(large)
            slow.set()
            assert [read(made[i])[0] for i in (0, 4)] == [200, 200]
        until(lambda: running.app.guard.active == 0 and running.app.guard.bodies.held == 0)
        assert running.service.lanes.large._value == 1 and running.service.lanes.small._value == 2


_parse = service_module.parse


def test_time_in_the_queue_counts(slow):
    with in_thread(PICO, timeout=0.3) as running:
        answer = httpx.post(running.url + "/v1/completions", json={"prompt": "Hi"})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        slow.set()
        until(lambda: running.service.lanes.small._value == 2)


def test_bodies_that_are_large_together(monkeypatch):
    """Bytes that came are counted, whoever has sent all of them; small bodies are never refused for that."""
    monkeypatch.setattr(guard_module, "N_BODIES", 2)
    body = post("/v1/completions", {"prompt": "x" * 190_000})
    with in_thread(PICO, max_body=200_000) as running, contextlib.ExitStack() as stack:
        made = [stack.enter_context(connect(running.url)) for _ in range(3)]
        for i, each in enumerate(made[:2]):
            each.sendall(body[:-1])
            until(lambda i=i: running.app.guard.bodies.held > 189_000 * (i + 1))
        made[2].sendall(body)
        status, content = read(made[2])
        assert status == 429 and content["error"]["code"] == "queue_full"
        assert running.app.guard.bodies.held < 390_000
        assert httpx.post(running.url + "/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200
        reset(made[1])
        made[0].sendall(body[-1:])
        assert read(made[0])[0] == 400
        until(lambda: running.app.guard.bodies.held == 0)


def test_who_sends_slowly_takes_no_place(monkeypatch):
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 1.0)
    body = post("/v1/completions", {"prompt": "Hi", "max_tokens": 1})
    with in_thread(PICO, max_batch=1, max_queue=1) as running, contextlib.ExitStack() as stack:
        made = [stack.enter_context(connect(running.url)) for _ in range(5)]
        for each in made:
            each.sendall(body[:-1])
        assert httpx.post(running.url + "/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200
        for each in made:
            status, content = read(each)
            assert status == 408 and content["error"]["code"] == "body_too_slow"


def test_refusals_are_heard_by_who_still_sends():
    """Also by a client that closes its connection after each request, and reads no answer before all is sent."""
    with in_thread(PICO, api_key="k", max_body=1000) as running:
        for key, expected in ((b"k", 413), (b"x", 401)):
            sent = post("/v1/completions", b"x" * 5_000_000)
            head = b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer " + key
            with connect(running.url) as made:
                made.sendall(sent.replace(b"POST /v1/completions HTTP/1.1", head))
                assert read(made)[0] == expected


def test_prompts_are_counted_before_they_are_read(monkeypatch):
    with in_thread(PICO) as running:
        monkeypatch.setattr(type(running.service.registry.models["pico"].tokenizer), "encode", None)
        answer = httpx.post(running.url + "/v1/completions", json={"prompt": ["Hi"] * 81})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/predict"])
def test_a_long_prompt_is_not_tokenized(path, monkeypatch):
    body = {"prompt": "x" * 100_000, "messages": [{"role": "user", "content": "x" * 100_000}]}
    del body["messages" if path != "/v1/chat/completions" else "prompt"]
    with in_thread(PICO) as running:
        monkeypatch.setattr(type(running.service.registry.models["pico"].tokenizer.backend), "encode", None)
        answer = httpx.post(running.url + path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


# connections


def test_who_says_nothing_is_left(monkeypatch):
    """Neither at the beginning nor between two requests; an answer that takes longer is finished."""
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.5)
    ask = post("/v1/completions", {"prompt": "Hi", "max_tokens": 1})
    with in_thread(PICO) as running, contextlib.ExitStack() as stack:
        silent, partly, after = (stack.enter_context(connect(running.url)) for _ in range(3))
        partly.sendall(ask[:30])
        after.sendall(ask)
        assert read(after)[0] == 200
        after.sendall(ask[:30])
        for each in (silent, partly, after):
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""
        until(lambda: not running.server.server_state.connections)


def test_a_long_answer_is_not_cut_off(talker, monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.2)
    with in_thread(talker) as running:
        began = time.monotonic()
        answer = httpx.post(running.url + "/v1/completions", json={**LONG, "max_tokens": 1000}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 1000 and time.monotonic() - began > 0.3


def test_who_takes_nothing_is_left(talker, monkeypatch):
    monkeypatch.setattr(server_module, "STALL_SECONDS", 0.5)
    body = {**LONG, "n": 8, "logprobs": 20, "stream": True}
    with in_thread(talker, timeout=60) as running, connect(running.url, buffer=4096) as made:
        made.sendall(post("/v1/completions", body))
        until(lambda: running.app.guard.active == 1)
        until(lambda: running.app.guard.active == 0 and not running.service.worker.n_sequences, 60)
        until(lambda: not running.server.server_state.connections)


def test_one_connection_too_many(monkeypatch):
    monkeypatch.setattr(server_module.Protocol, "limit", 3)
    with in_thread(PICO) as running:
        with contextlib.ExitStack() as stack:
            made = [stack.enter_context(connect(running.url)) for _ in range(3)]
            until(lambda: len(running.server.server_state.connections) == 3)
            with connect(running.url) as late:
                status, content = read(late)
                assert status == 503 and content["error"]["code"] == "too_many_connections"
            made[0].sendall(post("/v1/completions", {"prompt": "Hi", "max_tokens": 1}))
            assert read(made[0])[0] == 200
        until(lambda: not running.server.server_state.connections)
        assert httpx.get(running.url + "/health").status_code == 200


INVALID: dict[str, list[bytes]] = {  # parts of what is sent, one after the other
    "no HTTP": [b"\x16\x03\x01" * 30],
    "another version": [b"GET / HTTP/9\r\n\r\n"],
    "no size": [b"zz\r\n"],
    "a chunk that is too long": [b"1\r\nabc\r\n"],
    "no size, later": [b"1\r\n{\r\n", b"zz\r\n"],
    "tiny chunks": [b"1\r\nx\r\n" * 1100],
    "a bad trailer": [b"0\r\nno trailer\r\n\r\n"],
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_http(name, caplog):
    """One line in the log, an answer in OpenAI's form, and the request is over."""
    head = post("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with in_thread(PICO) as running, connect(running.url) as made, caplog.at_level(logging.WARNING):
        if name not in ("no HTTP", "another version"):
            made.sendall(head)
        for part in INVALID[name]:
            made.sendall(part)
            time.sleep(0.05)
        status, content = read(made)
        assert status == 400 and content["error"]["code"] == "invalid_http"
        until(lambda: running.app.guard.active == 0 and running.app.guard.bodies.held == 0)
        assert httpx.get(running.url + "/health").status_code == 200
    assert len(caplog.records) == 1 and caplog.records[0].exc_info is None


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_http_in_mid_answer(talker, caplog, stream):
    """The client sends nonsense behind its request, which ends the answer or comes after it."""
    with in_thread(talker) as running, connect(running.url) as made, caplog.at_level(logging.WARNING):
        made.sendall(post("/v1/completions", {**LONG, "max_tokens": 300, "stream": stream}))
        if stream:
            made.recv(100)
        made.sendall(b"\x16\x03\x01" * 30)
        while made.recv(65536):
            pass
        running.wait_idle()
        until(lambda: running.app.guard.active == 0)
        assert httpx.get(running.url + "/health").status_code == 200
    assert all(record.exc_info is None for record in caplog.records)


def test_a_failure_of_the_program_is_still_a_traceback(monkeypatch, caplog):
    monkeypatch.setattr(InferenceModel, "render", lambda *_: 1 / 0)
    with in_thread(PICO) as running:
        answer = httpx.post(running.url + "/predict", json={"prompt": "Hi"})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert running.app.guard.active == 0
    assert any(record.exc_info for record in caplog.records)
