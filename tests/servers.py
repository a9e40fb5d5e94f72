"""Servers for tests: the real one, on a free port of 127.0.0.1."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import httpx

from litgpt.serve.app import App
from litgpt.serve.models import ModelRegistry
from litgpt.serve.server import Server, bind
from litgpt.serve.service import Service
from litgpt.serve.settings import Settings


@dataclass
class Running:
    url: str
    app: App
    server: Server

    @property
    def service(self) -> Service:
        return self.app.service

    def figure(self, name: str) -> float:
        """One line of /metrics."""
        rows = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(row.split()[-1]) for row in rows if row.split("{")[0].split(" ")[0] == name)

    def wait_idle(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.service.worker.n_sequences or self.service.worker.running:
            assert time.monotonic() < end, "texts are still decoded"
            time.sleep(0.01)


@contextlib.contextmanager
def in_thread(
    folder: Path,
    adapters: Optional[Mapping[str, Path]] = None,
    registry: Optional[ModelRegistry] = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server in this process."""
    registry = registry or ModelRegistry.open(folder, adapters or {}, precision="32-true")
    app = App(registry, Settings(**settings))
    listening = bind("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(url, app, server)
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def in_process(*words: object, log: Optional[Path] = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """`litgpt serve ...` as a process of its own: its address, and the process.

    Args:
        log: Where its stderr goes; by default to a pipe, which must not get full.
    """
    command = [sys.executable, "-m", "litgpt", "serve", *map(str, words), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    errors = log.open("w") if log else subprocess.PIPE
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(2)]
        assert "chat    http://" in lines[1], lines
        url = lines[1].split()[1]
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url + "/health")
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.communicate()


def resident(pid: int, what: str = "VmRSS") -> float:
    """The memory of a process, or its peak (VmHWM), in megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 1024


def n_files(pid: int) -> int:
    """Open file descriptors."""
    return len(os.listdir(f"/proc/{pid}/fd"))
