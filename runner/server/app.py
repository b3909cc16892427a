"""The application: every route with what it needs, and every failure in OpenAI's shape."""

import logging

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runner import __version__
from runner.openai.errors import ApiError
from runner.server.adapters import adapter_routes
from runner.server.clients import ClientGoneError
from runner.server.control import health_routes, model_routes
from runner.server.engine_thread import EngineFailure
from runner.server.generation import generation_routes
from runner.server.service import Service
from runner.server.tokenization import tokenizer_routes

_log = logging.getLogger(__name__)
_CLIENT_GONE = 499
"""Nobody reads it; nginx's number, for the log."""


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="runner", version=__version__)
    app.include_router(health_routes(service))
    for routes in (generation_routes, model_routes, adapter_routes, tokenizer_routes):
        app.include_router(routes(service))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(EngineFailure, _engine_failure)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(Exception, _bug)
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "it is registered for these"
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What routing refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException), "it is registered for these"
    what = f"{request.method} {request.url.path}: {error.detail}"
    told = ApiError(what, code=str(error.detail).lower().replace(" ", "_"))
    return JSONResponse(told.body, status_code=error.status_code, headers=error.headers)


async def _engine_failure(request: Request, error: Exception) -> Response:
    told = ApiError(f"The engine failed: {error}.", code="engine_failure", status=503)
    return JSONResponse(told.body, status_code=told.status)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _bug(request: Request, error: Exception) -> Response:
    told = ApiError("The server has made a mistake; its log says which.", code="bug", status=500)
    return JSONResponse(told.body, status_code=told.status)
