"""Every failure in OpenAI's shape, and in the record of its request."""

import logging

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from runner.openai.errors import ApiError
from runner.server.clients import ClientGoneError
from runner.server.engine_thread import EngineFailure
from runner.server.records import record_of

REQUEST_ID = "x-request-id"
_CLIENT_GONE = 499
"""Nobody reads it; nginx's number, for the log."""
_log = logging.getLogger(__name__)


def told(connection: HTTPConnection, error: ApiError) -> Response:
    """The response that tells a client of an error."""
    record_of(connection).error = error.code
    soon = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, status_code=error.status, headers=soon | error.headers)


async def api_error(request: Request, error: Exception) -> Response:
    """What a route refuses."""
    assert isinstance(error, ApiError), "it is registered for these"
    return told(request, error)


async def http_error(request: Request, error: Exception) -> Response:
    """What routing refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException), "it is registered for these"
    what = f"{request.method} {request.url.path}: {error.detail}"
    code = str(error.detail).lower().replace(" ", "_")
    headers = dict(error.headers or {})
    return told(request, ApiError(what, code=code, status=error.status_code, headers=headers))


async def engine_failure(request: Request, error: Exception) -> Response:
    """What the engine could not do."""
    assert isinstance(error, EngineFailure), "it is registered for these"
    what = f"The engine failed: {error}."
    return told(request, ApiError(what, code="engine_failure", status=503))


async def client_gone(request: Request, error: Exception) -> Response:
    """What nobody waits for any more."""
    assert isinstance(error, ClientGoneError), "it is registered for these"
    record_of(request).error = "client_gone"
    return Response(status_code=_CLIENT_GONE)


async def bug(request: Request, error: Exception) -> Response:
    """What nobody has thought of; it goes on to whoever runs the application, which logs it."""
    what = "The server has made a mistake; its log says which."
    # Here the middleware that adds it to every response has been left already.
    headers = {REQUEST_ID: record_of(request).request_id}
    return told(request, ApiError(what, code="bug", status=500, headers=headers))
