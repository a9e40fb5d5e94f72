"""Errors as OpenAI's interface reports them."""

from typing import Any, Optional

KINDS = {
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
AGAIN = {429: "1", 503: "5"}  # seconds, as Retry-After


class Failure(Exception):
    """A request that is not answered.

    Args:
        status: Of the response.
        message: For people, in one line.
        param: The field of the request that is to blame.
        code: For programs; by default that of the status.
    """

    def __init__(self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type, usual = KINDS.get(status, KINDS[400])
        self.code = code or usual

    @property
    def body(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 504:
            return {"x-should-retry": "false"}  # the same question would take as long again
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": AGAIN[self.status]} if self.status in AGAIN else {}
