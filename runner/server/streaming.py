"""Answers in pieces, as server-sent events."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from runner.openai.errors import ApiError
from runner.openai.requests import ApiRequest
from runner.openai.responses import check_outputs, check_piece
from runner.server.clients import Deadline
from runner.server.records import RequestRecord
from runner.server.service import Service
from runner.types import PromptRequest, RequestOutput

_END = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends events; whatever ends it, also a client that goes, ends what makes them."""

    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        super().__init__(_after(first, events), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Sends; the requests behind the events are closed without another wait."""
        try:
            await super().stream_response(send)
        finally:
            await self._events.aclose()


async def events_of(
    service: Service,
    request: ApiRequest,
    asked: Sequence[PromptRequest],
    *,
    name: str,
    deadline: Deadline,
    record: RequestRecord,
) -> AsyncGenerator[str, None]:
    """The events of an answer, the last of which says that it is whole.

    Raises `ApiError` before the first; after it an event tells the error.
    """
    chunks = service.answerer.chunks(request, name=name)
    done: dict[int, RequestOutput] = {}
    is_begun = False
    try:
        async with service.in_flight(asked, watched=True) as ticket:
            events = ticket.events()
            while (event := await deadline.of(anext(events, None))) is not None:
                record.note(event)
                if isinstance(event, RequestOutput):
                    done[ticket.places[event.request_id]] = event
                    check_outputs(request, [event], max_model_len=service.max_model_len)
                    continue
                check_piece(event)
                for chunk in chunks.of(ticket.places[event.output.request_id], event):
                    yield _event(chunk)
                    is_begun = True
        for chunk in chunks.last([done[place] for place in sorted(done)]):
            yield _event(chunk)
    except ApiError as error:
        if not is_begun:
            raise
        record.error = error.code
        yield _event(error.body)
    yield _END


async def _after(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    yield first
    async for event in events:
        yield event


def _event(content: dict[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"
