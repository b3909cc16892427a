"""`/openapi.json`, and `/docs` for people."""

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import JSONResponse, Response

from runner.server.openapi import document
from runner.server.service import Service


def documentation_routes(service: Service) -> APIRouter:
    """The routes that say what all the others take and answer."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document(service))

    @router.get("/docs")
    async def docs() -> Response:
        """A page that shows the document; its script comes from the network."""
        return get_swagger_ui_html(openapi_url="openapi.json", title="runner")

    return router
