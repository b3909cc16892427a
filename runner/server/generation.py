"""`/v1/completions` and `/v1/chat/completions`: whole answers, and answers that come in pieces."""

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runner.openai.requests import ENDPOINTS
from runner.server.bodies import read_object
from runner.server.clients import Deadline, unless_gone
from runner.server.records import record_of
from runner.server.service import Service
from runner.server.streaming import EventStream, events_of
from runner.types import PromptRequest


def generation_routes(service: Service) -> APIRouter:
    """The routes of everything that samples."""
    router = APIRouter()

    async def answer(http: Request) -> Response:
        body = await read_object(http, max_bytes=service.settings.max_body_bytes)
        return await _answer(service, http, body)

    for url in ENDPOINTS:
        router.add_api_route(url, answer, methods=["POST"])
    return router


async def _answer(service: Service, http: Request, body: dict[str, Any]) -> Response:
    request = service.answerer.understand(http.url.path, body, is_online=True)
    deadline, name = Deadline(service.settings.request_timeout), uuid.uuid4().hex
    asked: Sequence[PromptRequest] = await deadline.of(service.encoded(request, name))
    record = record_of(http)
    record.admit(request, asked, service.model_of(request))
    if not request.stream:
        outputs = await deadline.of(unless_gone(http, service.outputs(asked)))
        for output in outputs:
            record.note(output)
        return JSONResponse(service.answerer.body(request, outputs, name=name))
    events = events_of(service, request, asked, name=name, deadline=deadline, record=record)
    # What fails before the first piece has a status of its own.
    first = await unless_gone(http, anext(events))
    return EventStream(first, events)
