"""`/v1/completions`, `/v1/chat/completions` and `/v1/embeddings`: whole answers, and in pieces."""

import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runner.answerer import AnyRequest
from runner.openai.requests import EMBEDDINGS_URL, ENDPOINTS
from runner.server.bodies import read_object
from runner.server.clients import Deadline, unless_gone
from runner.server.records import record_of
from runner.server.service import Service
from runner.server.streaming import EventStream, events_of
from runner.types import PromptRequest, RequestOutput


def generation_routes(service: Service) -> APIRouter:
    """The routes of everything that the engine works on."""
    router = APIRouter()

    async def answer(http: Request) -> Response:
        body = await read_object(http, max_bytes=service.settings.max_body_bytes)
        return await _answer(service, http, body)

    async def embed(http: Request) -> Response:
        body = await read_object(http, max_bytes=service.settings.max_body_bytes)
        request = service.answerer.understand_embedding(body)
        asked = await _Asked.of(service, http, request)
        return JSONResponse(service.answerer.embedding_body(request, await asked.outputs()))

    for url in ENDPOINTS:
        router.add_api_route(url, answer, methods=["POST"])
    router.add_api_route(EMBEDDINGS_URL, embed, methods=["POST"])
    return router


async def _answer(service: Service, http: Request, body: dict[str, Any]) -> Response:
    request = service.answerer.understand(http.url.path, body, is_online=True)
    asked = await _Asked.of(service, http, request, stream=request.stream)
    if not request.stream:
        outputs = await asked.outputs()
        return JSONResponse(service.answerer.body(request, outputs, name=asked.name))
    events = events_of(
        service,
        request,
        asked.requests,
        name=asked.name,
        deadline=asked.deadline,
        record=record_of(http),
    )
    # What fails before the first piece has a status of its own.
    first = await unless_gone(http, anext(events))
    return EventStream(first, events)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A client's request, as the engine is to have it."""

    service: Service
    http: Request
    name: str
    deadline: Deadline
    requests: list[PromptRequest]

    @classmethod
    async def of(
        cls, service: Service, http: Request, request: AnyRequest, *, stream: bool = False
    ) -> "_Asked":
        """Encodes the prompts and takes down what is asked; raises `ApiError`."""
        deadline, name = Deadline(service.settings.request_timeout), uuid.uuid4().hex
        requests = await deadline.of(service.encoded(request, name))
        model = service.answerer.model_of(request)
        record_of(http).admit(requests, model=model, stream=stream)
        return cls(service=service, http=http, name=name, deadline=deadline, requests=requests)

    async def outputs(self) -> list[RequestOutput]:
        """All of what the engine makes of it; raises `ApiError` and ClientGoneError."""
        coming = unless_gone(self.http, self.service.outputs(self.requests))
        outputs = await self.deadline.of(coming)
        for output in outputs:
            record_of(self.http).note(output)
        return outputs
