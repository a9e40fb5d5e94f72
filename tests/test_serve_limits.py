# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""What a server refuses, how it stops, and that nothing a client sends breaks it."""

import contextlib
import json
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from tests.conftest import save_llama
from tests.servers import in_process, in_thread, resident


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A model that goes on for thousands of tokens."""
    folder = tmp_path_factory.mktemp("m") / "talker"
    return save_llama(folder, tokenizer_file, max_position_embeddings=6000)


LONG = {"prompt": "the quick brown fox", "temperature": 0, "max_tokens": 5000}


def test_a_key(talker):
    with in_thread(talker, api_key="open sesame") as running:
        body = {"prompt": "x", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "open sesame"}):
            for answer in (
                httpx.post(running.url + "/v1/completions", json=body, headers=headers),
                httpx.get(running.url + "/v1/models", headers=headers),
                httpx.get(running.url + "/metrics", headers=headers),
            ):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer open sesame"}
        assert httpx.post(running.url + "/v1/completions", json=body, headers=right).status_code == 200
        assert httpx.get(running.url + "/health").status_code == 200 and httpx.get(running.url + "/").status_code == 200


def test_limits(talker):
    with in_thread(talker, max_batch=1, max_queue=1, max_body=2000, timeout=1.5) as running:
        url = running.url + "/v1/completions"
        large = httpx.post(url, json={"prompt": "x" * 3000})
        assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
        assert httpx.get(running.url + "/health", headers={"Host": "elsewhere.example"}).status_code == 403
        with contextlib.ExitStack() as both:
            for _ in range(2):
                both.enter_context(httpx.stream("POST", url, json={**LONG, "stream": True}))
            busy = httpx.post(url, json={"prompt": "x"})
            assert busy.status_code == 429 and int(busy.headers["Retry-After"]) > 0
            assert running.figure("litgpt_texts_running") == 1 and running.figure("litgpt_texts_waiting") == 1
        running.wait_idle()  # they went away
        slow = httpx.post(url, json=LONG, timeout=30)
        assert slow.status_code == 504 and slow.json()["error"]["code"] == "timeout"
        with httpx.stream("POST", url, json={**LONG, "stream": True}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout" and len(events) > 10
        running.wait_idle()


def test_who_goes_away_frees_the_place(talker):
    with in_thread(talker, max_batch=2) as running:
        url = running.url + "/v1/completions"
        with httpx.stream("POST", url, json={**LONG, "n": 2, "stream": True}) as answer:
            next(answer.iter_lines())
        running.wait_idle(1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={**LONG, "n": 2}, timeout=0.5)
        running.wait_idle(1)
        assert httpx.post(running.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_stops_when_answers_are_finished(talker):
    with in_process(talker, "--max_batch", "4") as (url, process):
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            body = {**LONG, "max_tokens": 400, "prompt": f"secret {i}", "stream": bool(i % 2)}
            answers[i] = httpx.post(url + "/v1/completions", json=body, timeout=120)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        while "litgpt_texts_running 4" not in httpx.get(url + "/metrics").text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = httpx.post(url + "/v1/completions", json={"prompt": "x"})
        assert late.status_code == 503 and late.json()["error"]["code"] == "stopping"
        assert httpx.get(url + "/health").status_code == 503
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        for i, answer in answers.items():
            assert answer.status_code == 200
            if i % 2:
                *parts, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
                assert last == "[DONE]" and json.loads(parts[-1])["choices"][0]["finish_reason"] in ("stop", "length")
            else:
                assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
        assert "secret" not in process.stderr.read()


def mangled(draw: random.Random) -> dict[str, Any]:
    """A request that is wrong in some way, or none; how to send it."""
    odd = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        float("nan"),
        "",
        "x",
        "\0",
        "\ud800",
        "é" * 50,
        [],
        [[]],
        {},
        {"a": [1]},
        [None],
    ]
    body: dict[str, Any] = {"model": "pico", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    if draw.random() < 0.5:
        body = {"model": "pico", "max_tokens": 2, "prompt": "hi"}
    keys = [
        *body,
        "n",
        "stop",
        "stream",
        "temperature",
        "top_p",
        "seed",
        "logprobs",
        "tools",
        "stream_options",
        "top_k",
    ]
    for key in draw.sample(keys, draw.randrange(1, 4)):
        body[key] = draw.choice(odd)
    content = json.dumps(body).encode()
    kind = draw.randrange(8)
    if kind == 0:
        content = b'{"messages":' + b"[" * draw.choice([10, 1000, 100_000])
    elif kind == 1:
        content = bytes(draw.randrange(256) for _ in range(200))
    elif kind == 2:
        content = content[: draw.randrange(len(content))]
    elif kind == 3:
        content = content.decode().encode(draw.choice(["utf-16", "utf-32", "cp500"]))
    elif kind == 4:
        content = b'{"prompt": "' + b"a" * draw.choice([10_000, 300_000]) + b'"}'
    types = ["application/json"] * 4 + ["text/plain", "application/json; charset=utf-16", "multipart/form-data"]
    path = draw.choice(["/v1/chat/completions", "/v1/completions", "/predict", "/v1/nothing", "/%00", "/v1/models"])
    return {"url": path, "content": content, "headers": {"Content-Type": draw.choice(types)}}


def hang_up(url: str, draw: random.Random) -> None:
    """Send a part of a request, and go."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "hi", "max_tokens": 200, "stream": draw.random() < 0.5}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % draw.choice([len(body), 10**9, 0]) + body
    with socket.create_connection((host, int(port))) as made:
        made.sendall(
            draw.choice([whole, whole[: draw.randrange(len(whole))], b"\x16\x03\x01" * 30, b"GET / HTTP/9\r\n\r\n"])
        )


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_mangled_requests(n):
    draw = random.Random(n)
    with in_process(PICO, "--max_body", "200000") as (url, process), httpx.Client(base_url=url, timeout=60) as client:
        statuses: dict[int, int] = {}
        sizes = []
        for i in range(n):
            if i % 10 == 9:
                hang_up(url, draw)
                continue
            answer = client.post(**mangled(draw))
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
            if i % (n // 10) == 0 and Path("/proc").is_dir():
                sizes.append(resident(process.pid))
        assert statuses.keys() <= {200, 400, 404, 405, 413} and statuses[400] > n // 4, statuses
        sane = client.post("/v1/completions", json={"prompt": "The cat", "max_tokens": 5})
        assert sane.status_code == 200 and client.get("/health").json() == {"status": "ok"}
        assert not sizes or sizes[-1] < sizes[len(sizes) // 2] + 20, sizes
