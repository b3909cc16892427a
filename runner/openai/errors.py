"""What a client is told that sent a request which cannot be answered."""

from collections.abc import Mapping
from typing import Any

from runner.errors import RowError


class ApiError(RowError):
    """One request cannot be answered; `body` is what OpenAI's servers say in such a case."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` is the field of the body that is at fault, `status` an HTTP status code, and
        `headers` go with it."""
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}
