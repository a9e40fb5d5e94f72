"""The options of a server, checked."""

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Optional

from litgpt.errors import UserError
from litgpt.generate.sampling import Sampling

TAKEN_PATHS = ("/health", "/metrics", "/openapi.json")
TAKEN_FOLDERS = ("v1", "page")


@dataclass
class Settings:
    """Who may send requests, and how they are answered.

    Args:
        host: Address to listen on. Other addresses than this machine's own require --api_key.
        api_key: Key that clients have to send. By default the value of LITGPT_API_KEY, which, unlike a flag, other
            users of the machine cannot see.
        allow_anonymous: Allow requests without a key, also from other machines.
        max_new_tokens: Default limit of the answer for requests that set none. By default the model answers until it
            stops, or its context is full.
        stream: Answer requests to --api_path as lines of JSON while the tokens are generated.
        openai_spec: Disable --api_path. /v1 is always available.
        api_path: Path of LitGPT's own API, from {"prompt": ...} to {"output": ...}.
        timeout: Time limit of a request in seconds, including its time in the queue. LitGPT's 30 are too short for
            long answers on a CPU.
        max_batch: Number of answers that are generated at once.
        max_queue: Number of answers that may wait. More are refused with 429.
        max_body: Size limit of a request in bytes. Larger ones are refused with 413.

    Raises:
        UserError: Options are out of range. The message lists all of them. Or a key is missing.
    """

    host: str = "127.0.0.1"
    api_key: Optional[str] = None
    allow_anonymous: bool = False
    max_new_tokens: Optional[int] = None
    stream: bool = False
    openai_spec: bool = False
    api_path: str = "/predict"
    timeout: float = 600.0
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 4_194_304
    sampling: Sampling = field(default_factory=Sampling)  # for requests that set no other

    def __post_init__(self) -> None:
        if self.api_key is None:
            self.api_key = os.environ.get("LITGPT_API_KEY")
        wrong = [
            f"--{name} {value} must be above 0"
            for name in ("max_new_tokens", "timeout", "max_batch", "max_body")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if self.max_queue < 0:
            wrong.append(f"--max_queue {self.max_queue} must not be negative")
        if self.openai_spec:
            self.api_path = ""
        elif problem := path_problem(self.api_path):
            wrong.append(f"--api_path {self.api_path!r} {problem}")
        self.api_path = self.api_path.rstrip("/")
        key = self.api_key
        if key is not None and not (key.strip() and key.isascii() and key == key.strip()):
            wrong.append("--api_key (or LITGPT_API_KEY) must be ASCII text without surrounding blanks")
        if wrong:
            raise UserError("; ".join(wrong) + ".")
        if key is None and not is_loopback(self.host) and not self.allow_anonymous:
            raise UserError(
                f"--host {self.host} accepts requests from other machines. Set --api_key (or LITGPT_API_KEY), or pass "
                "--allow_anonymous true to let anyone use this server."
            )

    @property
    def local_only(self) -> bool:
        """Whether only pages and programs of this machine may send requests."""
        return self.api_key is None and not self.allow_anonymous

    @property
    def max_sequences(self) -> int:
        """How many sequences may be decoded or wait at the same time."""
        return self.max_batch + self.max_queue


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def path_problem(path: str) -> Optional[str]:
    """Why requests would not reach a path; None if they do."""
    if not path.startswith("/") or path == "/":
        return "must begin with / and name a path, for example /predict"
    parts = path[1:].removesuffix("/").split("/")
    if not path.isprintable() or set(path) & set(" {}?#%\\") or {"", ".", ".."} & set(parts):
        return "has an empty part, a part . or .., or a character that is not allowed in the path of a URL"
    return "is in use; choose another" if path.rstrip("/") in TAKEN_PATHS or parts[0] in TAKEN_FOLDERS else None
