"""What a client did wrong, or what the server cannot do now, in the form of OpenAI's API.

Every answer that is not a success has the body

    {"error": {"message": …, "type": …, "code": …, "param": …}}

where `message` says what to do, `code` is for programs, and `param` names the field that was wrong.
"""

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """Ends a request with a status and an error body.

    Attributes:
        status: of HTTP.
        message: for a person.
        code: for a program.
        param: the field of the request, or None.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object that a client gets.

        >>> ApiError(404, "there is no model 'x'", code="model_not_found").body()["error"]["type"]
        'invalid_request_error'
        """
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "code": self.code,
            "param": self.param,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer as a whole."""
        return JSONResponse(self.body(), self.status, headers=self.headers)
