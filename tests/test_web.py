"""What is fetched has limits, and no message, file or command that is shown has a password or a token."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from litgpt.data.download import fetch
from litgpt.errors import UserError, without_secrets
from litgpt.storage import http as web
from litgpt.train.args import run_words
from litgpt.train.resume.command import again
from tests.mutations import run
from tests.runs import words

CONFIG = b"lora_r: 5\n"
SECRET = "s3cr3t-of-mine"


class Server(ThreadingHTTPServer):
    """Answers each path as a test says."""

    daemon_threads = True
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]]
    seen: list[tuple[str, str | None]]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.seen.append((self.path, self.headers.get("Authorization")))
            with suppress(OSError):
                made.answers.get(self.path, status(404))(self)

        def log_message(self, *args: object) -> None:
            pass

    made = Server(("127.0.0.1", 0), Handler)
    made.answers, made.seen = {}, []
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def status(code: int, data: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def drops(first: bytes, drop: bytes, seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that does not end."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(first)
        while True:
            request.wfile.write(drop)
            request.wfile.flush()
            time.sleep(seconds)

    return answer


def silence(request: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


START = b"HTTP/1.0 200 OK\r\n\r\n"
ENDLESS = {
    "silent": silence,
    "slow": drops(START, b"#", 0.02),
    "slow headers": drops(b"HTTP/1.0 200 OK\r\n", b"A: a\r\n", 0.02),
    "endless line": drops(b"HTTP/1.0 200 OK\r\nA: ", b"a", 0.02),
    "large": drops(START, b"#" * 2**16, 0),
    "nonsense": lambda request: request.wfile.write(b"\0\xff" * 100),
    "no answer": lambda request: None,
    "cut": status(200, b"lora", Content_Length="100"),
    "UTF-16": status(200, CONFIG.decode().encode("utf-16")),
    "deep": status(200, b"train: " + b"[" * 100_000),
    "file": status(302, Location="file:///etc/passwd"),
    "ftp": status(302, Location="ftp://127.0.0.1/a"),
    "data": status(302, Location="data:text/plain,lora_r: 5"),
    "no place": status(302, Location="http://"),
    "around": status(302, Location="/around"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_config_has_limits(kind, server, capsys, monkeypatch):
    monkeypatch.setattr(web, "SECONDS", 0.5)
    server.answers["/" + kind.replace(" ", "")] = ENDLESS[kind]
    url = f"http://{server.address}/{kind.replace(' ', '')}"
    began = time.monotonic()
    code, err = run(["finetune", "lora", "pico", "--config", url, "--print_config"], capsys)
    assert code == 2 and err.count("\n") == 1 and url in err and time.monotonic() - began < 3, err
    assert "root:" not in err


def test_a_config_behind_a_password(server, tmp_path, capsys):
    """The password is sent to its own server and shown nowhere."""
    server.answers["/a.yaml"] = status(302, Location="/b.yaml")
    server.answers["/b.yaml"] = status(302, Location=f"http://localhost:{server.server_port}/c.yaml")
    server.answers["/c.yaml"] = status(200, CONFIG)
    url = f"http://me:{SECRET}@{server.address}/a.yaml"
    code, err = run(["finetune", "lora", "pico", "--config", url, "--print_config"], capsys)
    assert code == 0, err
    mine = "Basic bWU6czNjcjN0LW9mLW1pbmU="  # of RFC 7617: base64 of me:s3cr3t-of-mine
    assert server.seen == [("/a.yaml", mine), ("/b.yaml", mine), ("/c.yaml", None)]


@pytest.mark.parametrize(
    "address",
    [
        *("http://me:{}@ADDRESS/none.yaml", "http://{}@ADDRESS/none.yaml"),
        *("http://me:{}@ADDRESS:x/none.yaml", "http://me:{}@[bad/none.yaml", "http://me:{}@nowhere.invalid/none.yaml"),
        "http://ADDRESS/none.yaml?ref=a&private_token={}",
    ],
)
def test_no_message_shows_a_password(address, server, capsys):
    server.answers["/bad.yaml"] = status(200, b"a: [")
    for name in ("none.yaml", "bad.yaml"):
        url = address.replace("ADDRESS", server.address).replace("none.yaml", name).format(SECRET)
        code, err = run(["finetune", "lora", "pico", "--config", url], capsys)
        assert code == 2 and err.count("\n") == 1 and SECRET not in err, err


def test_a_run_does_not_show_or_keep_secrets(server, base, rows_file, tmp_path, capsys):
    """In what it prints, in the command that goes on, and in its files."""
    lima = {"class_path": "LIMA", "init_args": {"access_token": SECRET, "download_dir": str(tmp_path / "lima")}}
    text = yaml.safe_dump({"data": lima, "seed": 3})
    server.answers["/a.yaml"] = status(200, text.encode())
    (tmp_path / "lima").mkdir()
    rows = [json.dumps({"conversations": ["a", "b"]}) for _ in range(12)]
    (tmp_path / "lima" / "train.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    command = words("lora", base, rows_file, out, "--train.pause_after", 1, "--train.max_steps", 2)
    i = command.index("--data")
    command[i : i + 6] = ["--config", f"http://me:{SECRET}@{server.address}/a.yaml", "--data.access_token", SECRET]
    code, err = run(command, capsys)
    assert code == 75, err
    kept = [p for p in out.rglob("*") if p.is_file()]
    assert len(kept) > 5 and not [p for p in kept if SECRET.encode() in p.read_bytes()]
    assert SECRET not in err
    run_words.set(("litgpt", *command))
    assert SECRET not in again(True) and f"***@{server.address}/a.yaml" in again(True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://me:pa:ss@host/a?b=c#d", "see https://***@host/a?b=c#d"),
        ("'https://token@host'", "'https://***@host'"),
        ("https://host/a@b/c?x=@", "https://host/a@b/c?x=@"),
        ("https://h/a?X-Amz-Signature=ab%20c&b=1", "https://h/a?X-Amz-Signature=***&b=1"),
        ("https://h/a?b=1&access_token=ab", "https://h/a?b=1&access_token=***"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        (f"the token hf_{'aB3' * 8}.", "the token hf_***."),
        ('{"access_token": "abc", "a": 1}', '{"access_token": "***", "a": 1}'),
        ("pass it with --access_token or in HF_TOKEN", "pass it with --access_token or in HF_TOKEN"),
        ("me@host.org: hf_hub_download, hf_config", "me@host.org: hf_hub_download, hf_config"),
    ],
)
def test_without_secrets(text, shown):
    assert without_secrets(text) == str(UserError(text)) == shown


# data sets


@pytest.mark.parametrize("kind", ["silent", "odd length", "nonsense", "no answer", "file", "around"])
def test_a_data_set_that_does_not_come(kind, server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SILENCE", 0.3)
    answers = ENDLESS | {"odd length": status(200, CONFIG, Content_Length="many")}
    server.answers["/" + kind.replace(" ", "")] = answers[kind]
    url = f"http://me:{SECRET}@{server.address}/{kind.replace(' ', '')}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"Cannot download .*{server.address}") as e:
        fetch(url, tmp_path / "rows.json", hint="")
    assert SECRET not in str(e.value) and time.monotonic() - began < 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [f"{SECRET}\n", f"{SECRET} x", f"{SECRET}\u00e9", f"a\r\nB: {SECRET}"])
def test_a_token_that_no_header_can_hold(token, server, tmp_path):
    """A line break behind it is left out."""
    server.answers["/a"] = status(200, b"[]")
    if token == f"{SECRET}\n":
        fetch(f"http://{server.address}/a", tmp_path / "a", token)
        assert server.seen == [("/a", f"Bearer {SECRET}")]
        return
    with pytest.raises(UserError) as e:
        fetch(f"http://{server.address}/a", tmp_path / "a", token)
    assert SECRET not in str(e.value) and not server.seen
