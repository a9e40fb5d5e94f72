"""Errors as OpenAI's API reports them."""

from typing import Any, Optional

from starlette.responses import JSONResponse

KINDS = {  # by status: the type, and the default code
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden_host"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "body_too_slow"),
    413: ("invalid_request_error", "body_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", None),
    503: ("server_error", "stopping"),
    504: ("server_error", "timeout"),
}
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
    504: {"x-should-retry": "false"},  # the same request would take as long again
}


class Failure(Exception):
    """A request that is refused or fails. `param` is the field that caused it, `code` by default that of the status."""

    def __init__(self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type, default_code = KINDS.get(status, KINDS[400])
        self.code = code or default_code
        self.headers = HEADERS.get(status, {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)
