# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""`litgpt serve` stays small and quick while clients send the largest bodies that it takes."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from tests.conftest import save_llama
from tests.servers import in_process, resident

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"role": "user", "content": "hi"}


def filled(start: str, unit: str, end: str, size: int) -> bytes:
    """A body of so many bytes: a beginning, something over and over, and an end."""
    n = (size - len(start.encode()) - len(end.encode())) // len(unit.encode())
    return (start + unit * n + end).encode()


MESSAGE = json.dumps(ASK)
CHAT_START = f'{{"max_tokens": 1, "messages": [{MESSAGE}], '
HEAVY: dict[str, tuple[str, Callable[[int], bytes]]] = {  # path, and the body of a size
    "one message": (CHAT, lambda n: filled('{"messages": [{"role": "user", "content": "', "the fox ", '"}]}', n)),
    "one message of emoji": (CHAT, lambda n: filled('{"messages": [{"role": "user", "content": "', "😀", '"}]}', n)),
    "many messages": (CHAT, lambda n: filled('{"messages": [', MESSAGE + ",", MESSAGE + "]}", n)),
    "many parts": (
        CHAT,
        lambda n: filled(
            '{"messages": [{"role": "user", "content": [',
            '{"type": "text", "text": ""},',
            '{"type": "text", "text": ""}]}]}',
            n,
        ),
    ),
    "many calls": (
        CHAT,
        lambda n: filled(
            '{"messages": [{"role": "assistant", "tool_calls": [',
            '{"function": {"name": "f"}},',
            '{"function": {"name": "f"}}]}]}',
            n,
        ),
    ),
    "wrong messages": (CHAT, lambda n: filled('{"messages": [', "{},", "{}]}", n)),
    "prompt": (COMPLETIONS, lambda n: filled('{"prompt": "', "!?", '"}', n)),
    "prompt for /predict": ("/predict", lambda n: filled('{"prompt": "', "\\u0001", '"}', n)),
    "prompts": (COMPLETIONS, lambda n: filled('{"prompt": [', '"",', '""]}', n)),
    "token ids": (COMPLETIONS, lambda n: filled('{"prompt": [[', "1,", "1]]}", n)),
    "lists of ids": (COMPLETIONS, lambda n: filled('{"prompt": [', "[1],", "[1]]}", n)),
    "stop": (CHAT, lambda n: filled(CHAT_START + '"stop": "', "x", '"}', n)),
    "stops": (CHAT, lambda n: filled(CHAT_START + '"stop": [', '"x",', '"x"]}', n)),
    "one tool": (CHAT, lambda n: filled(CHAT_START + '"tools": [{"x": "', "x", '"}]}', n)),
    "many tools": (CHAT, lambda n: filled(CHAT_START + '"tools": [', '{"a": {"b": []}},', "{}]}", n)),
    "wrong tools": (CHAT, lambda n: filled(CHAT_START + '"tools": [', "1,", "1]}", n)),
    "metadata": (CHAT, lambda n: filled(CHAT_START + '"metadata": [', "{},", "{}]}", n)),
    "fields": (
        COMPLETIONS,
        lambda n: filled('{"prompt": "x", ', " ", '"a": {' + ",".join(f'"{i}": 1' for i in range(n // 16)) + "}}", n),
    ),
    "unknown fields": (
        COMPLETIONS,
        lambda n: ('{"prompt": "x", ' + ",".join(f'"k{i}": 1' for i in range(n // 14)) + "}").encode(),
    ),
    "half of it": (CHAT, lambda n: filled('{"messages": [{"role": "user", "content": "', "x", "", n)),
    "brackets": (CHAT, lambda n: filled("", "[", "", n)),
    "no JSON": (CHAT, lambda n: b"x" * n),
    "no text": (CHAT, lambda n: b'"' + b"\xff" * n),
    "surrogates": (CHAT, lambda n: filled('{"messages": [{"role": "user", "content": "', "\\ud800", '"}]}', n)),
    "too large": (CHAT, lambda n: b"x" * (2 * n)),
}


class Load:
    """Clients of a server, for some seconds."""

    def __init__(self, url: str, seconds: float) -> None:
        self.host = url.removeprefix("http://")
        self.end = time.monotonic() + seconds
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.slowest, self.texts = 0.0, set[str]()
        self.errors: list[BaseException] = []

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        made = http.client.HTTPConnection(self.host, timeout=120)
        try:
            made.request("POST", path, body, {"Content-Type": "application/json"})
            answer = made.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            made.close()

    def large(self, name: str, size: int) -> None:
        path, make = HEAVY[name]
        body = make(size)
        while time.monotonic() < self.end:
            status, content = self.post(path, body)
            assert status == 200 or content["error"].keys() == {"message", "type", "param", "code"}
            self.statuses[name, status] += 1

    def short(self) -> None:
        body = json.dumps({"prompt": "the quick", "max_tokens": 3, "temperature": 0}).encode()
        while time.monotonic() < self.end:
            began = time.monotonic()
            status, content = self.post(COMPLETIONS, body)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.statuses["short", status] += 1
            self.texts.add(content["choices"][0]["text"])
            time.sleep(0.05)

    def run(self, n_large: int, n_short: int, size: int) -> None:
        names = [*HEAVY] * 2
        works = [lambda i=i: self.large(names[i], size) for i in range(n_large)] + [self.short] * n_short

        def one(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as e:
                self.errors.append(e)

        threads = [threading.Thread(target=one, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("context", "n_large", "n_short", "seconds"),
    [
        pytest.param(256, 25, 4, 3, id="some"),
        pytest.param(256, 30, 34, 30, id="many", marks=pytest.mark.long),
        pytest.param(131_072, 30, 34, 60, id="long context", marks=pytest.mark.long),
    ],
)
def test_large_bodies(tmp_path, tokenizer_file, context, n_large, n_short, seconds):
    folder = save_llama(tmp_path / "m", tokenizer_file, max_position_embeddings=context)
    size = 4_194_304 if seconds > 10 else 1_000_000
    log = tmp_path / "log"
    with in_process(folder, log=log) as (url, process):
        body = {"prompt": "the quick", "max_tokens": 3, "temperature": 0}
        text = httpx.post(url + COMPLETIONS, json=body).json()["choices"][0]["text"]
        before = resident(process.pid, "VmHWM")
        load = Load(url, seconds)
        load.run(n_large, n_short, size)
        peak, after = resident(process.pid, "VmHWM"), resident(process.pid)
        assert httpx.post(url + COMPLETIONS, json=body).json()["choices"][0]["text"] == text
    print(f"{before:.0f} MB before, {peak:.0f} MB peak, {after:.0f} MB after; slowest short one {load.slowest:.2f} s")
    print(sorted(load.statuses.items()))
    assert not load.errors, load.errors
    assert load.texts == {text} and {status for (name, status) in load.statuses if name == "short"} == {200}
    assert peak < 1000 and load.slowest < 2
    assert "Traceback" not in log.read_text()
