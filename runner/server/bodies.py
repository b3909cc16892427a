"""Bytes from a client -> the JSON object that they are, or an error that says why not."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from runner.openai.errors import ApiError
from runner.server.clients import ClientGoneError

_MOST_NESTED = 64
"""Lists and objects within each other; what goes through a body must not run out of stack."""
_MOST_DROPPED = 8
"""Times the bytes that are taken; a client that still sends does not read why it is refused."""
_SECONDS_TO_SEND = 60.0
"""A client that stops in the middle of its body must not hold a connection for ever."""


async def read_object(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Raises `ApiError` for another type of content, for more bytes than `max_bytes`, none of which
    are kept, for what is not JSON, or not an object, and for a body that does not come; and
    ClientGoneError.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":
        what = f"The body has the type {kind[:60]!r}; send application/json."
        raise ApiError(what, code="unsupported_media_type", status=415)
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        what = f"The body took more than {_SECONDS_TO_SEND:g} seconds to come."
        raise ApiError(what, code="timeout", status=408) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that some bytes are; raises `ApiError`."""
    try:
        found = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError as error:  # Of JSON, of UTF-8, and of an integer with too many digits.
        raise _invalid(str(error).partition("\n")[0]) from error
    if not isinstance(found, dict):
        raise _invalid("it is not an object")
    if raw.count(b"[") + raw.count(b"{") > _MOST_NESTED and _is_deep(found):
        raise _invalid("it is nested too deeply")
    try:
        # Half a surrogate pair can be written in JSON, and is no text.
        json.dumps(found, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise _invalid("it holds what is no Unicode text") from error
    return found


def _is_deep(found: dict[str, Any]) -> bool:
    level: list[Any] = [found]
    for _ in range(_MOST_NESTED):
        inner = (it.values() if isinstance(it, dict) else it for it in level)
        level = [it for items in inner for it in items if isinstance(it, dict | list)]
    return bool(level)


async def _read(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
        elif size > _MOST_DROPPED * max_bytes:
            break
        else:
            parts.clear()
    if size > max_bytes:
        what = f"The body has more than {max_bytes} bytes."
        raise ApiError(what, code="body_too_large", status=413)
    return b"".join(parts)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _invalid(why: str) -> ApiError:
    return ApiError(f"The body is not a JSON object: {why}.", code="invalid_json")
