"""The options of a server, checked."""

from dataclasses import dataclass
from typing import Optional

from litgpt.errors import UserError
from litgpt.generate.sampling import Sampling

TAKEN_PATHS = ("/health", "/metrics", "/style.css", "/script.js", "/openapi.json", "/v1")


@dataclass
class Settings:
    """Options of `litgpt serve`; see its help.

    Raises:
        UserError: Options are out of range. The message lists all of them.
    """

    temperature: float = 0.8
    top_k: Optional[int] = 50
    top_p: float = 1.0
    max_new_tokens: Optional[int] = None
    api_path: Optional[str] = "/predict"
    stream: bool = False
    timeout: float = 600.0
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 4_194_304
    api_key: Optional[str] = None
    local_only: bool = True

    def __post_init__(self) -> None:
        positive = ("max_new_tokens", "timeout", "max_batch", "max_body")
        values = {name: getattr(self, name) for name in positive}
        wrong = [
            f"--{name} {value} must be above 0" for name, value in values.items() if value is not None and value <= 0
        ]
        if self.max_queue < 0:
            wrong.append(f"--max_queue {self.max_queue} must not be negative")
        if self.api_path is not None:
            if problem := path_problem(self.api_path):
                wrong.append(f"--api_path {self.api_path!r} {problem}")
            self.api_path = self.api_path.rstrip("/")
        key = self.api_key
        if key is not None and not (key.strip() and key.isascii() and key == key.strip()):
            wrong.append("--api_key (or LITGPT_API_KEY) must be ASCII text without surrounding blanks")
        try:
            Sampling(self.temperature, self.top_k, self.top_p)
        except UserError as e:
            wrong.append(str(e).rstrip("."))
        if wrong:
            raise UserError("; ".join(wrong) + ".")

    @property
    def max_sequences(self) -> int:
        """How many sequences may be decoded or wait at the same time."""
        return self.max_batch + self.max_queue


def path_problem(path: str) -> Optional[str]:
    """Why requests would not reach a path; None if they do."""
    if not path.startswith("/") or path == "/":
        return "must begin with / and name a path, for example /predict"
    parts = path[1:].removesuffix("/").split("/")
    if not path.isprintable() or set(path) & set(" {}?#%\\") or {"", ".", ".."} & set(parts):
        return "has an empty part, a part . or .., or a character that is not allowed in the path of a URL"
    return "is in use; choose another" if path.rstrip("/") in TAKEN_PATHS or parts[0] == "v1" else None
