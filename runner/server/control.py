"""What operators and clients ask of the server itself: its health, and the models it has."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from runner import __version__
from runner.openai.errors import ApiError
from runner.server.service import Service


def health_routes(service: Service) -> APIRouter:
    """Routes that need no key: whether the server lives, and takes requests."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine's thread lives, also while it starts over."""
        status = service.engine.status
        is_well = status in ("ready", "restarting")
        return JSONResponse({"status": status}, status_code=200 if is_well else 503)

    @router.get("/ready")
    async def ready() -> Response:
        """200 while the engine takes requests."""
        status = service.engine.status
        return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

    @router.get("/version")
    async def version() -> Response:
        """The version of this program."""
        return JSONResponse({"version": __version__})

    return router


def model_routes(service: Service) -> APIRouter:
    """`/v1/models`: the model, its other names, and the adapters that are loaded."""
    router = APIRouter()

    def listed() -> list[dict[str, Any]]:
        loaded, names = service.answerer.llm.loaded, service.answerer.names
        adapters = {name: service.adapter_paths.get(name) for name in service.answerer.llm.adapters}
        models: list[tuple[str, str | None, str | None]]
        models = [(name, loaded.path, None) for name in names]
        models += [(name, path, names[0]) for name, path in adapters.items()]
        return [
            {
                "id": name,
                "object": "model",
                "created": service.started,
                "owned_by": "runner",
                "root": path,
                "parent": parent,
                "max_model_len": service.max_model_len,
            }
            for name, path, parent in models
        ]

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": listed()})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for it in listed():
            if it["id"] == name:
                return JSONResponse(it)
        what = f"The model {name!r} does not exist."
        raise ApiError(what, code="model_not_found", param="model", status=404)

    return router
