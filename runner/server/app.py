"""The application: every route with what it needs, and what goes around them all."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from runner import __version__
from runner.openai.errors import ApiError
from runner.server import failures
from runner.server.adapters import adapter_routes
from runner.server.clients import ClientGoneError
from runner.server.control import health_routes, model_routes
from runner.server.documentation import documentation_routes
from runner.server.engine_thread import EngineFailure
from runner.server.generation import generation_routes
from runner.server.guarding import Guarding
from runner.server.monitoring import metrics_routes
from runner.server.observing import Observing
from runner.server.openapi import document
from runner.server.service import Service
from runner.server.tokenization import tokenizer_routes


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service."""
    # The document that FastAPI would make knows nothing of bodies that this program reads itself.
    app = FastAPI(title="runner", version=__version__, openapi_url=None)
    app.openapi = lambda: document(service)  # type: ignore[method-assign]
    for routes in (health_routes, metrics_routes, documentation_routes):
        app.include_router(routes(service))
    for routes in (generation_routes, model_routes, adapter_routes, tokenizer_routes):
        app.include_router(routes(service))
    app.add_exception_handler(ApiError, failures.api_error)
    app.add_exception_handler(HTTPException, failures.http_error)
    app.add_exception_handler(EngineFailure, failures.engine_failure)
    app.add_exception_handler(ClientGoneError, failures.client_gone)
    app.add_exception_handler(Exception, failures.bug)
    need_key = service.settings.metrics_need_key
    app.add_middleware(
        Guarding, keys=service.keys, limits=service.limits, metrics_need_key=need_key
    )
    # Added last, it is the outer one.
    app.add_middleware(Observing, metrics=service.metrics, log=service.log)
    return app
