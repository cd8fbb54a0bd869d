"""Requests that cannot be answered, in the shape that OpenAI's clients understand."""

from typing import Any

from starlette.responses import JSONResponse

TOO_LARGE, UNAUTHORIZED, NOT_FOUND, BUSY, FAILED, STOPPING = 413, 401, 404, 429, 500, 503


class RequestError(Exception):
    """Answered with `status` and a message that says what is wrong and what would be right."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        """`param`: the field of the request that is wrong; `code`: a short name for programs."""
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= FAILED else "invalid_request_error"
        if self.status == BUSY:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {UNAUTHORIZED: {"WWW-Authenticate": "Bearer"}, BUSY: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)
