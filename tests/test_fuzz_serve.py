# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""Mangled requests to `litgpt serve`: each gets a proper answer, and the server is afterwards what it was before.

Each request depends on its number alone, so that a failure is found again by that number.
"""

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from http.client import HTTPException, HTTPResponse
from typing import Any, Optional

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from tests.servers import in_process, n_files, resident

Sent = list[tuple[str, bytes]]  # requests as they are sent one after the other, each with its method
SANE = {"prompt": "The cat", "max_tokens": 12, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "pico",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ],
    "max_completion_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
}
SHARED: dict[str, Any] = {
    "model": "pico",
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "seed": 3,
    "stop": ["x", "yz"],
    "n": 2,
    "stream": False,
    "user": "me",
    "metadata": {"a": "b"},
    "frequency_penalty": 0,
    "logit_bias": {},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**SHARED, **CHAT},
    "/v1/completions": {**SHARED, "prompt": ["The cat", "Hi"], "logprobs": 1, "echo": False},
    "/predict": {**SHARED, "prompt": "Hi", "max_new_tokens": 2},
}
TEXTS = [
    "",
    "x",
    "\0",
    "\ud800",
    "a\udfffb",
    "é" * 50,
    "\U0001f600" * 9,
    "\u202e\ufeff",
    "<|user|>",
    "</s>" * 20,
    "%s{}",
    "\r\n\r\n",
]
ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    [[]],
    {},
    {"a": [1]},
    [None],
    [1, "a"],
    [[1, 2], [3]],
    ["a"] * 20,
    [0] * 300,
    [2**70],
    [-1],
    [True],
    *TEXTS,
]
PATHS = [
    "/",
    "/v1",
    "/v1/",
    "/v1/models",
    "/v1/models/",
    "/v1/models/none",
    "/v1/models/%00",
    "/v1/models/../x",
    "//",
    "/%2e%2e/%2f",
    "/health",
    "/metrics",
    "/style.css",
    "/v1/chat/completions/",
    "/predict?x=1&y=%ff",
    "/%ff%fe",
    "/docs",
    "/openapi.json",
    "/" + "a" * 3000,
    "*",
    "http://localhost/health",
    "http://evil.example/health",
    "/predict/",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QUERY", "FOO", "post", "A" * 300]
TYPES = [
    "text/plain",
    "application/json; charset=utf-16",
    "multipart/form-data; boundary=x",
    "",
    "application/x+json",
    ";;",
    "json",
    "application/x-www-form-urlencoded",
    "application/json, text/html",
    "é",
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values in a body."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(draw: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A body with a few values replaced, removed, moved or added."""
    made = json.loads(json.dumps(body))
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        *way, last = draw.choice(places(made))
        holder = made
        for key in way:
            holder = holder[key]
        kind = draw.random()
        if kind < 0.7:
            holder[last] = deepcopy(draw.choice(ODD))
        elif kind < 0.8:
            del holder[last]
        elif kind < 0.9:
            made[draw.choice(["heat", "", "é", "\ud800", "messages", "prompt", "response_format", "n"])] = deepcopy(
                draw.choice(ODD)
            )
        else:
            holder[last] = [deepcopy(holder[last]) for _ in range(draw.choice([1, 2, 30]))]
        if not isinstance(made, dict) or not made:
            break
    return made


def nested(draw: random.Random) -> str:
    depth = draw.choice([10, 300, 1100, 20_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")])
    inner = opening * depth + draw.choice(["1", "", "{}"]) + closing * draw.choice([depth, depth - 1, 0])
    return draw.choice(
        [
            inner,
            f'{{"messages": [{{"role": "user", "content": "x", "extra": {inner}}}], "max_tokens": 1}}',
            f'{{"messages": [{{"role": "user", "content": "x"}}], "tools": [{{"a": {inner}}}], "max_tokens": 1}}',
            f'{{"prompt": {inner}, "max_tokens": 1}}',
            f'{{"prompt": "x", "max_tokens": 1, "metadata": {inner}}}',
        ]
    )


def content(draw: random.Random, path: str) -> bytes:
    """The bytes of a body."""
    text = json.dumps(mutated(draw, BODIES.get(path, CHAT)), ensure_ascii=draw.random() < 0.6)
    whole = text.encode("utf-8", "surrogatepass")
    kind = draw.randrange(16)
    if kind == 0:
        return nested(draw).encode()
    if kind == 1:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(300)))
    if kind == 2:
        return whole[: draw.randrange(len(whole))]
    if kind == 3:
        return text.encode(
            draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "utf-7"]),
            "surrogatepass" if "7" not in text else "ignore",
        )
    if kind == 4:
        at = draw.randrange(len(whole))
        return whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
    if kind == 5:
        number = draw.choice(
            ["1e999", "-1e999", "9" * 5000, "0." + "1" * 5000, "1E-999", "-", "01", "0x10", "NaN", "+1"]
        )
        return b'{"prompt": "x", "max_tokens": 1, "%s": %s}' % (
            draw.choice([b"seed", b"temperature", b"n", b"top_k", b"x"]),
            number.encode(),
        )
    if kind == 6:
        return draw.choice(
            [b"", b"null", b"[]", b'"x"', b"1", b"{}", b" ", b"{}{}", whole + b"x", b"\xff\xfe", b"\xef\xbb\xbf{}"]
        )
    if kind == 7:
        return b'{"prompt": "%s", "max_tokens": 1}' % (
            draw.choice([b"a", b"\\u0041", b"\xe2\x82", b"\xed\xa0\x80", b" ", b"</s>"]) * draw.choice([1, 90, 9000])
        )
    if kind == 8:
        return b'{"prompt": "a", "prompt": 3, "max_tokens": 1, ' + b'"x": 1, ' * draw.choice([1, 3000]) + b'"n": 1}'
    if kind == 9:
        return (
            b'{"messages": ['
            + b'{"role": "user", "content": "a"},' * draw.choice([1, 50, 1000])
            + b'{"role": "user", "content": 1}]}'
        )
    return whole


def head(draw: random.Random, method: str, path: str, length: Optional[int], more: str = "") -> bytes:
    host = "localhost"
    if draw.random() < 0.1:
        host = draw.choice(
            [
                "localhost:x.evil.com",
                "evil.com",
                "[::1]:80",
                "localhost.",
                "",
                "a b",
                "é",
                "localhost\r\nHost: evil.com",
            ]
        )
    kind = "application/json" if draw.random() < 0.85 else draw.choice(TYPES)
    lines = [
        f"{method} {path} HTTP/{draw.choice(['1.1'] * 20 + ['1.0', '2.0', '9'])}",
        f"Host: {host}",
        f"Content-Type: {kind}",
    ]
    if draw.random() < 0.1:
        lines.append(
            draw.choice(
                [
                    "Connection: close",
                    "Expect: 100-continue",
                    "Connection: Upgrade\r\nUpgrade: websocket",
                    "Cookie: " + "c" * 20_000,
                    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x",
                    "Origin: http://evil.com",
                    "X-Forwarded-Host: evil.com",
                    "Authorization: Bearer \xff",
                    "Bad Header: x",
                    ": x",
                    "X: \x00",
                    *(["A: b"] * 3),
                ]
            )
        )
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n" + more + "\r\n").encode("latin-1")


def plain(draw: random.Random) -> Sent:
    """A whole request."""
    path = draw.choice([*BODIES] * 4 + PATHS)
    method = "POST" if draw.random() < 0.85 else draw.choice(METHODS)
    body = content(draw, path)
    return [(method, head(draw, method, path, len(body)) + body)]


def chunked(draw: random.Random) -> Sent:
    """A whole request in chunks, whose framing may be wrong."""
    path = draw.choice([*BODIES])
    body, made = content(draw, path)[:3000], b""
    while body:
        n = draw.choice([1, 7, 500, 3000])
        part, body = body[:n], body[n:]
        size = b"%x" % len(part)
        if draw.random() < 0.02:
            size = draw.choice([b"zz", b"-1", b"", b"f" * 30, b"%x" % (len(part) + 3), size + b";ext=1"])
        made += size + b"\r\n" + part + draw.choice([b"\r\n"] * 60 + [b"\n", b"xx", b""])
    made += draw.choice([b"0\r\n\r\n"] * 6 + [b"0\r\nTrailer: x\r\n\r\n", b"", b"0\r\n", b"0\r\nBad Trailer\r\n\r\n"])
    more = draw.choice(
        ["Transfer-Encoding: chunked\r\n"] * 9
        + ["Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n"]
    )
    return [("POST", head(draw, "POST", path, None, more) + made)]


def broken(draw: random.Random) -> Sent:
    """What is not a whole request, or not HTTP at all."""
    [(method, whole)] = plain(draw)
    made = draw.choice(
        [
            whole[: draw.randrange(len(whole))],
            whole.replace(b"Content-Length: ", b"Content-Length: 9"),
            whole.replace(b"Content-Length: ", b"Content-Length: -"),
            whole.replace(b"Content-Length: ", b"Content-Length: 1\r\nContent-Length: "),
            whole.replace(b"\r\n", b"\n"),
            b"\x16\x03\x01" * 30,
            b"GET / HTTP/9\r\n\r\n",
            b"GET /\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n" * 50,
            b"\0" * 2000,
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
            bytes(draw.randrange(256) for _ in range(300)),
        ]
    )
    return [(method, made)]


def pipelined(draw: random.Random) -> Sent:
    return [sent for _ in range(draw.randrange(2, 5)) for sent in plain(draw)]


STREAM: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 1, "stream": True}


def streamed(draw: random.Random) -> Sent:
    path = draw.choice([*BODIES])
    body = dict(STREAM, n=draw.choice([1, 1, 3]))
    if path.startswith("/v1/chat"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    return [("POST", "\r\n".join([*lines, "", ""]).encode() + content)]


KINDS: list[Callable[[random.Random], Sent]] = [*[plain] * 10, *[chunked] * 2, *[broken] * 2, pipelined, streamed]


class Client:
    """Sends bytes, and checks whatever comes back."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def one(self, number: int) -> None:
        draw = random.Random(number)
        kind = draw.choice(KINDS)
        sent = kind(draw)
        whole = kind in (plain, pipelined)  # else an answer may not come
        with socket.create_connection(self.address, timeout=60) as made:
            try:
                made.sendall(b"".join(part for _, part in sent))
                if kind is streamed:
                    made.recv(draw.choice([1, 300, 5000]))
                elif kind is not broken or draw.random() < 0.5:
                    made.settimeout(60 if whole else 0.3)
                    self.read(made, number, [method for method, _ in sent])
            except (OSError, HTTPException) as e:
                if whole:
                    self.wrong.append(f"request {number} ({kind.__name__}): {e!r}")
            if draw.random() < 0.3:  # go away impolitely
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def read(self, made: socket.socket, number: int, methods: Sequence[str]) -> None:
        """The answers that come, until the server closes."""
        file = made.makefile("rb")
        for method in methods:
            answer = HTTPResponse(_Socket(file), method=method)  # type: ignore[arg-type]
            answer.begin()
            content = answer.read()
            self.statuses[answer.status] += 1
            if not proper(answer.status, answer.getheader("Content-Type", ""), content):
                self.wrong.append(f"request {number}: {answer.status} {content[:200]!r}")
            if answer.will_close:
                break


def proper(status: int, kind: str, content: bytes) -> bool:
    """Whether an answer has a status that a client can cause, and OpenAI's form of an error."""
    if 200 <= status < 300:
        return not content or not kind.startswith("application/json") or isinstance(json.loads(content), dict)
    if not (400 <= status < 500 or status == 503):
        return False
    try:
        error = json.loads(content)["error"] if content else {}  # an answer to HEAD has no body
        return not content or (error.keys() == {"message", "type", "param", "code"} and bool(error["message"]))
    except (ValueError, KeyError):
        return False


class _Socket:
    """For `HTTPResponse`, which closes the file of its socket."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def makefile(self, mode: str) -> Any:
        return _Kept(self.file)


class _Kept:
    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def close(self) -> None:
        pass


def fill_caches(url: str, draw: random.Random) -> None:
    """The tokenizer's cache of words grows to its size and stays there."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for i in range(1200):
            words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=200)) for _ in range(14)]
            body = {
                "prompt": " ".join(words) if i % 6 else "The cat " * (i // 6 % 60 + 1),
                "max_tokens": 1,
                "n": i // 6 % 4 + 1,
            }
            client.post("/v1/completions", json=body)


@pytest.mark.parametrize(("n", "clients"), [(150, 4), pytest.param(20_000, 8, marks=pytest.mark.long)])
def test_mangled_requests(n, clients, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # grows for a long time up to its size of 1024
    log = tmp_path / "log"
    with in_process(PICO, "--max_body", "200000", log=log) as (url, process):
        sane = httpx.post(url + "/v1/completions", json=SANE).json()["choices"]
        client = Client(url)
        with ThreadPoolExecutor(clients) as pool:
            if n > 1000:
                fill_caches(url, random.Random(0))
                list(pool.map(client.one, range(10_000)))  # by then the heap has nearly reached its final size
            before = resident(process.pid), n_files(process.pid)
            list(pool.map(client.one, range(10_000, 10_000 + n)))
        assert httpx.post(url + "/v1/completions", json=SANE).json()["choices"] == sane
        end = time.monotonic() + 10
        while n_files(process.pid) > before[1] + 2 and time.monotonic() < end:
            time.sleep(0.1)
        after = resident(process.pid), n_files(process.pid)
        assert httpx.get(url + "/health").json() == {"status": "ok"}
        assert process.poll() is None
    text = log.read_text()
    print(client.statuses, before, after, f"{text.count('Traceback')} tracebacks")
    assert not client.wrong, (len(client.wrong), client.wrong[:20])
    assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:5000]
    assert after[1] <= before[1] + 2
    assert after[0] < before[0] + (15 if n > 1000 else 100)
    assert client.statuses[200] > n / 30 and client.statuses[400] > n / 10, client.statuses
