"""The errors of the HTTP API, as OpenAI's JSON objects."""

import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bitdance_jax.errors import UserError


FIELDS = {
    "subject": "prompt",
    "prompts": "prompt",
    "labels": "prompt",
    "images": "n",
    "images_per_input": "n",
}
"""The API's field for the name of an argument in an error; others have the same name."""


class ApiError(Exception):
    """An answer that is an error, as OpenAI's JSON object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, headers=self.headers)


def refusal(status: int, reason: str) -> tuple[str, str]:
    """The content type and body of the answer to a request that `Guard` refuses."""
    return "application/json", json.dumps(ApiError(status, reason).content)


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(http: Request, error: Exception) -> Response:
    field = getattr(error, "field", None) or ""
    return ApiError(400, str(error), param=FIELDS.get(field, field) or None).response()


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


HANDLERS = {ApiError: _api_error, UserError: _user_error, HTTPException: _http_error}
"""Of Starlette's, by the type of the exception."""
