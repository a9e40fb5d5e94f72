# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""Whom `litgpt serve` answers without a key: programs and pages of this machine. Hosts as in the URL standard."""

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, Optional

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.serve.guard import is_local, is_own
from litgpt.serve.server import bind
from tests.servers import Running, in_thread

LOCAL = [
    "localhost",
    "localhost:8000",
    "LocalHost:1",
    "localhost.",
    "localhost.:80",
    "localhost:",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.8.9.1",
    "127.0.0.1.",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]:1",
    "10.1.2.3:80",
    "[2001:db8::1]",
]
FOREIGN = [
    "localhost:x.evil.com",
    "localhost:80.evil.com",
    "evil.com",
    "evil.com:8000",
    "localhost.evil.com",
    "localhost..",
    ".",
    "..",
    ".localhost",
    "x.localhost",
    "127.0.0.1.evil.com",
    "127.0.0.1:80:80",
    "127.0.0.1:x",
    "[::1].evil.com",
    "[::1]evil.com",
    "[::1",
    "::1",
    "[::1]]",
    "[[::1]]",
    "[::1%evil.com]",
    "[localhost]",
    "[127.0.0.1]",
    "[]",
    "localhost@evil.com",
    "user@localhost",
    "user:pass@127.0.0.1",
    "evil.com@localhost",
    "localhost/evil.com",
    "localhost\\evil.com",
    "localhost#evil.com",
    "localhost?evil.com",
    "localhost evil.com",
    "localhost,evil.com",
    "localhost, localhost",
    "local\thost",
    "",
    " ",
    ":",
    ":80",
    "@",
    "localhost:123456",
    "localhost:-1",
    "localhost:８０",
    "ⓛocalhost",
    "localhost%2eevil.com",
    "%6cocalhost",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "127.0.0.256",
    "１２７.0.0.1",
    "null",
    "localhost\0",
]


@pytest.mark.parametrize("host", LOCAL)
def test_own_hosts(host):
    assert is_local(host)


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts(host):
    assert not is_local(host) and not is_own(f"http://{host}", ["localhost"])


ORIGINS = {
    "http://localhost:3000": True,
    "https://LOCALHOST": True,
    "http://127.0.0.1:8000": True,
    "http://[::1]:8000": True,
    "tauri://localhost": True,
    "http://10.1.2.3": False,  # another machine's page, while this one is asked
    "http://[2001:db8::1]": False,
    "null": False,
    "localhost": False,
    "http://": False,
    "://localhost": False,
    "http:localhost": False,
    "http://localhost/": False,
    "http://localhost http://evil.com": False,
    "http://evil.com": False,
    "chrome-extension://abcdefgh": False,
    "": False,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(origin):
    assert is_own(origin, ["localhost:8000"]) == ORIGINS[origin]
    assert is_own("http://10.1.2.3:8000", ["10.1.2.3:8000"])  # the page that this server has at that address


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with in_thread(PICO) as made:
        yield made


def status(
    url: str, *lines: str, method: str = "GET", target: str = "/health", body: Optional[str] = None
) -> tuple[int, str]:
    """The answer to a request of which every byte is given: its status, and the code of its error."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        length = [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body is not None else []
        head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, *length, "Connection: close", "", ""])
        made.sendall((head + (body or "")).encode("latin-1"))
        answer = http.client.HTTPResponse(made, method=method)
        answer.begin()
        content = json.loads(answer.read() or b"{}")
        return answer.status, content.get("error", {}).get("code", "")


HTTP: dict[str, tuple[tuple[str, ...], str, tuple[int, str]]] = {  # headers, target, status
    "own": (("Host: localhost:8000",), "/health", (200, "")),
    "a rebound name": (("Host: evil.com:8000",), "/health", (403, "forbidden_host")),
    "a port that is none": (("Host: localhost:x.evil.com",), "/health", (403, "forbidden_host")),
    "forwarded": (
        ("Host: evil.com", "X-Forwarded-Host: localhost", "Forwarded: host=localhost"),
        "/health",
        (403, "forbidden_host"),
    ),
    "forwarded from elsewhere": (
        ("Host: localhost", "X-Forwarded-Host: evil.com", "X-Forwarded-For: 6.6.6.6"),
        "/health",
        (200, ""),
    ),
    "two hosts": (("Host: localhost", "Host: evil.com"), "/health", (400, "invalid_http")),
    "two of the same": (("Host: localhost", "Host: localhost"), "/health", (400, "invalid_http")),
    "none": ((), "/health", (400, "invalid_http")),
    "empty": (("Host:",), "/health", (403, "forbidden_host")),
    "own URL": (("Host: localhost",), "http://localhost:8000/health", (200, "")),
    "own URL, other host": (("Host: evil.com",), "http://localhost/health", (403, "forbidden_host")),
    "another URL": (("Host: localhost",), "http://evil.com/health", (403, "forbidden_host")),
    "another URL, upper case": (("Host: localhost",), "HTTPS://EVIL.COM/health", (403, "forbidden_host")),
    "a user in the URL": (("Host: localhost",), "http://localhost@evil.com/health", (403, "forbidden_host")),
    "own origin": (("Host: localhost", "Origin: http://localhost:3000"), "/health", (200, "")),
    "another origin": (("Host: localhost", "Origin: http://evil.com"), "/health", (403, "forbidden_host")),
    "one of two origins": (
        ("Host: localhost", "Origin: http://localhost", "Origin: http://evil.com"),
        "/health",
        (403, "forbidden_host"),
    ),
    "no origin": (("Host: localhost", "Origin: null"), "/health", (403, "forbidden_host")),
    "the page itself": (("Host: evil.com",), "/", (403, "forbidden_host")),
    "an unknown path": (("Host: evil.com",), "/nothing", (403, "forbidden_host")),
}


@pytest.mark.parametrize("name", HTTP)
def test_requests(running, name):
    lines, target, expected = HTTP[name]
    assert status(running.url, *lines, target=target) == expected


def test_answers_are_refused_too(running):
    body = json.dumps({"prompt": "Hi", "max_tokens": 1})
    options: dict[str, Any] = {"method": "POST", "target": "/v1/completions", "body": body}
    assert status(running.url, "Host: localhost", **options) == (200, "")
    assert status(running.url, "Host: localhost:x.evil.com", **options) == (403, "forbidden_host")
    assert status(running.url, "Host: localhost", "Origin: http://evil.com", **options) == (403, "forbidden_host")


def test_who_has_a_key_may_come_from_anywhere():
    headers = {"Host": "evil.com", "Origin": "http://evil.com"}
    with in_thread(PICO, api_key="k") as running:
        assert httpx.get(running.url + "/v1/models", headers=headers).status_code == 401
        assert (
            httpx.get(running.url + "/v1/models", headers={**headers, "Authorization": "Bearer k"}).status_code == 200
        )
    with in_thread(PICO, allow_anonymous=True) as running:
        assert httpx.get(running.url + "/v1/models", headers=headers).status_code == 200


# pages of other sites may send what a form can send, without asking first
FORMS = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    None,
    "",
    "json",
    "text/json",
    "application/jsonp",
]


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_not_sent_as_json(running, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(running.url + "/v1/completions", content=b'{"prompt": "Hi", "max_tokens": 1}', headers=headers)
    assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_json(running, kind):
    answer = httpx.post(
        running.url + "/v1/completions", content=b'{"prompt": "Hi", "max_tokens": 1}', headers={"Content-Type": kind}
    )
    assert answer.status_code == 200


def test_answers_do_not_wait_for_acknowledgments():
    """Connections inherit the option. Without it each answer over an open connection takes 40 ms."""
    with bind("127.0.0.1", 0) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
