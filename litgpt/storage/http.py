"""HTTP requests with time limits, size limits and credentials that stay with their server."""

import base64
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Optional
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

from litgpt.errors import UserError

SECONDS, MOST = 30, 2**20  # limits of a small file: total time, bytes
SILENCE = 60  # seconds without data


def fetch_text(url: str) -> str:
    """Fetch a small text file. Raises `UserError` if that fails or takes too long, or it is too large or not UTF-8."""

    def fetch() -> bytes:
        with open_url(url, timeout=SECONDS) as response:
            return response.read(MOST + 1)

    try:
        data = within(SECONDS, fetch)
    except Exception as e:  # the network and the server can cause any kind
        raise UserError(f"Cannot fetch {url}: {reason_of(e)}.") from e
    if len(data) > MOST:
        raise UserError(f"{url} has more than {MOST:,} bytes.")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{url} is not UTF-8 text (byte {e.start}).") from e


def open_url(url: str, token: Optional[str] = None, timeout: Optional[float] = None) -> Any:
    """Open a URL. A user and password in it, or the token, are sent in a header and to this server only. `timeout` is
    the maximum of seconds without data."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    headers = {}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    elif token:
        headers["Authorization"] = f"Bearer {checked_token(token)}"
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    return urllib.request.build_opener(_Redirects).open(request, timeout=timeout or SILENCE)


def checked_token(token: str) -> str:
    """Strip a token. Raises `UserError` if a header cannot hold it; the library's own error would show it."""
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("The access token contains characters that are not allowed. Copy it again.")
    return token


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise URLError(f"the server redirects to {newurl}, which is not http")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (request.type, request.host) != (req.type, req.host):
            request.remove_header("Authorization")  # only for the first server
        return request


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`. Raises `TimeoutError` if it takes longer, whatever it waits for."""
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(f"it took more than {seconds:g} seconds")
    return result.result()


def reason_of(error: BaseException) -> str:
    """Why a request failed, for messages."""
    reason: Any = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
    return " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__
