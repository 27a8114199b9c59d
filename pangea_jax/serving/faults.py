"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` and a status."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse


class Fault(Exception):
    """A request that gets no answer, or no whole one.

    Attributes:
      status: of HTTP: 4xx if the request must change, 429 or 5xx if the same one may succeed later.
      message: a sentence for the caller. It holds no text of the request.
      param: the field at fault, such as `messages[0].content`.
      code: a word that programs compare, such as `context_length_exceeded`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": _kind(self.status)}
        return {"error": error | {"param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def _kind(status: int) -> str:
    """OpenAI's word for the kind of an error."""
    known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    known |= {429: "rate_limit_error", 504: "timeout_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> Fault:
    """The fault of a body that does not fit, from the errors of pydantic.

    Args:
      errors: of them the first is told.
      body: what was sent, to tell its keys from pydantic's names of types.
    """
    first = errors[0]
    kind, place = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return Fault(400, "the body is not JSON", code="invalid_json")
    path, value = "", body
    for i, key in enumerate(place):
        is_last = i == len(place) - 1
        if isinstance(value, Mapping) and (
            key in value or (is_last and kind in ("missing", "extra_forbidden"))
        ):
            path, value = f"{path}.{key}" if path else str(key), value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            path, value = f"{path}[{key}]", value[key]
    path = path[:200]
    if kind == "extra_forbidden":
        message = f"{path}: this server does not know the field"
        return Fault(400, message, param=path, code="unknown_parameter")
    if not path:
        return Fault(400, "the body is not a JSON object with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return Fault(400, f"{path}: {message[:500]}", param=path, code="invalid_value")


def event(data: Any) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")
