"""`/metrics`, for Prometheus."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from runner.server.service import Service


def metrics_routes(service: Service) -> APIRouter:
    """The route that tells what the server counts."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
