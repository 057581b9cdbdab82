"""The form of errors in OpenAI's API, and what every engine's request must be before it is looked at further.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

``type`` and ``code`` are those that OpenAI's clients know (its error reference). Engines differ in theirs, so they are
brought into this form by :func:`engine_error`.
"""

from __future__ import annotations

import json
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOO_LONG = "context_length_exceeded"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """In the API's form."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse(raw: bytes) -> dict[str, Any]:
    """A request's body, as an object.

    Raises:
        ApiError: it is not JSON, or another kind of value.
    """
    try:
        found = json.loads(raw)
    except json.JSONDecodeError as e:
        raise ApiError(
            400, f"The body is not valid JSON: {e.msg} at line {e.lineno}, column {e.colno}.", code="invalid_json"
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as e:
        raise ApiError(400, f"The body is not valid JSON: {type(e).__name__}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "The body has to be a JSON object.", code="invalid_json")
    return found


def check(path: str, body: dict[str, Any], model: str) -> None:
    """What holds for all engines: the model's name, and that there is something to answer.

    Raises:
        ApiError: 404 for another model, 400 for the rest.
    """
    wanted = body.get("model", model)
    if not isinstance(wanted, str):
        raise ApiError(400, "'model' has to be a string.", param="model")
    if wanted != model:
        raise ApiError(
            404, f"The model {wanted!r} does not exist here; this is {model!r}.", param="model", code="model_not_found"
        )
    if not isinstance(body.get("stream", False), bool | None):
        raise ApiError(400, "'stream' has to be true or false.", param="stream")
    if not isinstance(body.get("stream_options"), dict | None):
        raise ApiError(400, "'stream_options' has to be an object.", param="stream_options")
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ApiError(400, "'messages' has to be a list with at least one message.", param="messages")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ApiError(400, f"messages[{i}] has to be an object with a 'role'.", param=f"messages[{i}]")
    elif path == TEXT and not isinstance(body.get("prompt"), str | list):
        raise ApiError(400, "'prompt' has to be a string, or a list of strings or tokens.", param="prompt")


def engine_error(status: int, raw: bytes) -> ApiError:
    """An engine's error in the API's form.

    llama.cpp has numbers as codes and types of its own; vLLM the names of Python exceptions.
    """
    message, kind = raw.decode("utf-8", "replace").strip()[:2000], ""
    param: Any = None
    code: Any = None
    try:
        error = json.loads(raw)
        error = error.get("error", error) if isinstance(error, dict) else {}
        if isinstance(error, dict):
            message = str(error.get("message") or error.get("detail") or message)
            kind, param, code = str(error.get("type") or ""), error.get("param"), error.get("code")
        elif isinstance(error, str):
            message = error
    except ValueError:
        pass
    message = message or f"The engine answered with status {status}."
    if kind == "exceed_context_size_error" or "maximum context length" in message or "context size" in message:
        return ApiError(400, message, param=str(param) if param else None, code=TOO_LONG)
    if status >= 500 and "not supported" in message:  # llama.cpp's answer to a picture that the model cannot see
        return ApiError(400, message, code="unsupported")
    if status >= 500 and "Jinja Exception" in message:  # and to a conversation that the chat template refuses
        return ApiError(400, message, param="messages")
    return ApiError(status, message, param=str(param) if param else None, code=code if isinstance(code, str) else None)
