"""A small hub on this machine: the requests of `huggingface_hub`, with redirects to a second host for large files."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional
from urllib.parse import unquote, urlparse

LARGE = (".safetensors", ".bin", ".model", ".gguf", ".pth")  # kept as LFS does


@dataclass
class Repo:
    """A repository: its files, who may read it, and what goes wrong with its files.

    Args:
        files: By path.
        commit: Of the main branch.
        token: What opens a private repository.
        gated: Whether its files want an accepted licence, of this token.
        private: Whether the hub shows it as private.
    """

    files: dict[str, bytes]
    commit: str = "a" * 40
    token: Optional[str] = None
    gated: Optional[str] = None
    private: bool = False


Fault = Callable[["Answer", bytes, int], bool]


@dataclass
class Hub:
    """What the servers know and saw.

    Attributes:
        repos: By id.
        faults: For a path of a file, or `api`, what goes wrong next; one is taken for each request, None for all well.
        seen: Method, path and whether a token came, of each request.
        writer: The token that may write; None if no one may.
        stored: The large files that were uploaded, by hash, also those of no repository.
        sent: The hash of each large file whose content began to come, in order.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: dict[str, list[Optional[Fault]]] = field(default_factory=dict)
    seen: list[tuple[str, str, bool]] = field(default_factory=list)
    endpoint: str = ""
    store: str = ""  # the second host
    agents: set[str] = field(default_factory=set)
    writer: Optional[str] = None
    stored: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, since the last time."""
        names = [path.rpartition("/")[2] for method, path, _ in self.seen if method == "GET" and "/api/" not in path]
        names = [name for name in names if not name.startswith("redirected")]
        self.seen.clear()
        return sorted(names)


class Answer(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        self.hub.seen.append((self.command, path, "Authorization" in self.headers))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self.api(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-write-token/main", path):
            self.send_json(
                {"accessToken": "for xet", "exp": int(time.time()) + 3600, "casUrl": f"{self.hub.store}/xet"}
            )
        elif match := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", path):
            self.content(self.hub.repos[match[1]].files[match[2]], match[2], {"ETag": '"of the store"'})
        else:
            self.refuse(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlparse(self.path).path)
        self.hub.seen.append(("POST", path, "Authorization" in self.headers))
        if path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path.startswith("/xet/"):
            self.xet(path)
        elif self.token != self.hub.writer:
            self.refuse(401 if self.token in ("", "wrong") else 403, message="You have no rights here")
        elif path == "/api/repos/create":
            fields = json.loads(body)
            repo_id = f"{fields['organization']}/{fields['name']}"
            self.hub.repos[repo_id] = Repo({}, private=fields.get("visibility") == "private")
            self.send_json({"url": f"{self.hub.endpoint}/{repo_id}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.preupload(self.hub.repos[match[1]], json.loads(body)["files"])
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse(404)

    def xet(self, path: str) -> None:
        """Take chunks of large files, as hf_xet sends them, and forget them."""
        if "/v1/xorbs/" in path:
            self.hub.sent.append(path.rpartition("/")[2])
            self.send_json({"was_inserted": True})
        elif path.endswith("/v1/shards"):
            self.send_json({"result": 1})
        else:
            self.refuse(404)  # the client can do without

    def preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        modes = ["lfs" if file["path"].endswith(LARGE) else "regular" for file in files]
        fields = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            for file, mode in zip(files, modes)
        ]
        self.send_json({"files": fields})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        """Where to send large files: nowhere if they are there."""
        answers = [{"oid": o["oid"], "size": o["size"]} for o in objects]
        for answer in answers:
            if answer["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": {"href": f"{self.hub.store}/upload/{answer['oid']}"}}
        self.send_json({"transfer": "basic", "objects": answers})

    def do_PUT(self) -> None:
        oid, size = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        self.hub.sent.append(oid)
        if self.fault("upload"):
            return
        self.hub.stored[oid] = self.rfile.read(size)
        assert hashlib.sha256(self.hub.stored[oid]).hexdigest() == oid
        self.send_json({})

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        if self.fault("commit"):
            return
        repo = self.hub.repos[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored.get(value["oid"], b"sent by hf_xet")
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        self.send_json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{'b' * 40}", "commitOid": "b" * 40})

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refuse(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def may_read(self, repo_id: str) -> Optional[Repo]:
        repo = self.hub.repos.get(repo_id)
        if self.token == "wrong":
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.token and self.token != repo.token):
            self.refuse(404 if self.token else 401, "RepoNotFound" if self.token else "", "Repository not found")
        else:
            return repo
        return None

    def fault(self, name: str, data: bytes = b"", start: int = 0) -> bool:
        waiting = self.hub.faults.get(name) or [None]
        fault = waiting.pop(0)
        return fault is not None and fault(self, data, start)

    def api(self, repo_id: str, revision: Optional[str]) -> None:
        if self.fault("api") or (repo := self.may_read(repo_id)) is None:
            return
        if revision not in (None, "main", repo.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings = [{"rfilename": name, **described(name, data)} for name, data in repo.files.items()]
        about = {"id": repo_id, "modelId": repo_id, "sha": repo.commit, "private": repo.private}
        self.send_json({**about, "siblings": siblings})

    def send_json(self, fields: Any) -> None:
        body = json.dumps(fields).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (repo := self.may_read(repo_id)) is None:
            return
        if repo.gated and self.token != repo.gated:
            self.refuse(403 if self.token else 401, "GatedRepo", "Access to this model is restricted")
        elif revision not in ("main", repo.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif name not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif name.endswith(LARGE):
            data = repo.files[name]
            if self.command == "GET":
                self.hub.seen[-1] = ("GET", f"/redirected {name}", self.hub.seen[-1][2])
            self.send_response(302)
            self.send_header("Location", f"{self.hub.store}/store/{repo_id}/{name}")
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            data = repo.files[name]
            self.content(data, name, {"X-Repo-Commit": repo.commit, "ETag": f'"{blob_id(data)}"'})

    def content(self, data: bytes, name: str, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if self.command == "GET" and self.fault(name, data, start):
            return
        self.send_start(len(data), start, headers)
        if self.command == "GET":
            self.wfile.write(data[start:])

    def send_start(self, size: int, start: int, headers: Optional[dict[str, str]] = None) -> None:
        self.send_response(206 if start else 200)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()


def described(name: str, data: bytes) -> dict[str, Any]:
    if not name.endswith(LARGE):
        return {"size": len(data), "blobId": blob_id(data)}
    sha = hashlib.sha256(data).hexdigest()
    return {"size": len(data), "blobId": "0" * 40, "lfs": {"size": len(data), "sha256": sha, "pointerSize": 134}}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def refused(status: int, **headers: str) -> Fault:
    """An answer without content."""
    return lambda answer, data, start: (answer.refuse(status, **headers), True)[1]


def cut(after: int) -> Fault:
    """The connection ends in the middle."""

    def fault(answer: Answer, data: bytes, start: int) -> bool:
        answer.send_start(len(data), start)
        answer.wfile.write(data[start : start + after])
        answer.close_connection = True
        return True

    return fault


def changed(answer: Answer, data: bytes, start: int) -> bool:
    """Another content of the same size."""
    answer.send_start(len(data), start)
    answer.wfile.write(bytes(len(data) - start))
    return True


def held(release: threading.Event, after: int) -> Fault:
    """The rest comes when it is released, or never."""

    def fault(answer: Answer, data: bytes, start: int) -> bool:
        answer.send_start(len(data), start)
        answer.wfile.write(data[:after])
        answer.wfile.flush()
        release.wait(60)
        with suppress(OSError):
            answer.wfile.write(data[after:])
        return True

    return fault


def slowly(seconds: float) -> Fault:
    def fault(answer: Answer, data: bytes, start: int) -> bool:
        time.sleep(seconds)
        return False

    return fault


@contextmanager
def serve() -> Iterator[Hub]:
    """The hub and its store, each on a port of its own."""
    hub = Hub()
    handler = type("Handler", (Answer,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.endpoint, hub.store = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
