"""What a client is told when a request cannot be answered: OpenAI's envelope, a status and one
sentence.

raise ApiError(400, "max_tokens is 9,000 and ...", param="max_tokens")
"""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is refused or failed, as its client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        """
        Args:
          status: of HTTP.
          message: one sentence.
          param: the field that is at fault, such as `messages[0].content`.
          code: for programs, such as `model_not_found`.
          retry_after: seconds after which the request may be sent again.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def envelope(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
