"""What the routes share: the model under its names, its engine's thread, and the limits."""

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from runner.answerer import Answerer, AnyRequest
from runner.errors import PromptError
from runner.models.token_bytes import TokenBytes
from runner.openai.errors import ApiError
from runner.openai.requests import ApiRequest
from runner.prompts import encode_prompts
from runner.server.engine_thread import EngineFailure, EngineThread, RequestFailure, Ticket
from runner.server.keys import ApiKeys
from runner.server.limits import Limits
from runner.server.metrics import Metrics
from runner.server.request_log import RequestLog
from runner.server.settings import ServerSettings
from runner.types import PromptRequest, RequestOutput

T = TypeVar("T")


class Service:
    """One model that is served."""

    def __init__(
        self,
        answerer: Answerer,
        engine: EngineThread,
        settings: ServerSettings,
        keys: ApiKeys | None = None,
    ) -> None:
        """Without `keys` everybody may ask. Raises ParameterError where there can be no log."""
        self.answerer, self.engine, self.settings = answerer, engine, settings
        self.keys = keys or ApiKeys()
        self.limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.metrics = Metrics(engine)
        self.log = RequestLog(settings.log_file, shows_prompts=settings.log_prompts)
        self.started = int(time.time())
        self.adapter_paths: dict[str, str] = {}
        """Where each adapter was read, by its name."""
        # One thread, and a tokenizer of its own: encoding a long prompt holds up nobody's stream.
        self.tokenizer: Any = copy.deepcopy(answerer.llm.tokenizer)
        self.token_bytes = TokenBytes(self.tokenizer)
        self._num_encoding = 0
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together."""
        return self.answerer.llm.loaded.max_model_len

    async def with_tokenizer(self, action: Callable[[Any], T]) -> T:
        """Does something with the tokenizer, on the tokenizer's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, action, self.tokenizer)

    async def encoded(self, request: AnyRequest, name: str) -> list[PromptRequest]:
        """The requests for the engine, their prompts in token ids.

        Raises `ApiError` for a prompt that has none or too many, and where too many wait already.
        """
        self._check_room()
        asked = request.prompt_requests(
            name, key=uuid.uuid4().hex, adapter=self.answerer.adapter_of(request)
        )
        self._num_encoding += len(asked)
        try:
            encoded = await self.with_tokenizer(
                lambda tokenizer: encode_prompts([it.prompt for it in asked], tokenizer)
            )
        finally:
            self._num_encoding -= len(asked)
        if failed := next((it for it in encoded if isinstance(it, PromptError)), None):
            field = request.endpoint.prompt_field
            raise ApiError(str(failed), code="invalid_value", param=field) from failed
        self._check_lengths(request, [it[1] for it in encoded if not isinstance(it, PromptError)])
        return [replace(it, encoded=pair) for it, pair in zip(asked, encoded, strict=True)]

    @asynccontextmanager
    async def in_flight(
        self, requests: Sequence[PromptRequest], *, watched: bool
    ) -> AsyncIterator[Ticket]:
        """Requests that the engine works on until the context is left, whole or not.

        Raises `ApiError` where too many wait already, or the engine fails meanwhile.
        """
        self._check_room()
        try:
            ticket = self.engine.submit(requests, watched=watched)
            try:
                yield ticket
            finally:
                self.engine.close(ticket)
        except EngineFailure as error:
            is_back = self.engine.status in ("ready", "restarting")
            what = f"The engine failed: {error}." + " It starts over; try again." * is_back
            raise ApiError(what, code="engine_failure", status=503) from error
        except RequestFailure as error:
            what = f"The server could not take this request: {error}."
            raise ApiError(what, code="bug", status=500) from error

    async def outputs(self, requests: Sequence[PromptRequest]) -> list[RequestOutput]:
        """What the engine makes of requests, in their order; raises `ApiError`."""
        done: dict[int, RequestOutput] = {}
        async with self.in_flight(requests, watched=False) as ticket:
            async for event in ticket.events():
                assert isinstance(event, RequestOutput), "it is not watched"
                done[ticket.places[event.request_id]] = event
        return [done[place] for place in sorted(done)]

    def _check_room(self) -> None:
        """Raises `ApiError` where too many wait, for the tokenizer or for the engine."""
        size = self.answerer.llm.engine.max_batch_size
        if self.engine.num_open + self._num_encoding >= size + self.settings.max_waiting:
            what = f"{self.settings.max_waiting} requests wait already; try again later."
            raise ApiError(what, code="server_busy", status=429)

    def _check_lengths(self, request: AnyRequest, prompts: Sequence[Sequence[int]]) -> None:
        most = self.settings.max_prompt_tokens
        longest = max(map(len, prompts))
        if most is not None and longest > most:
            what = f"The prompt has {longest} tokens; this server takes {most} at most."
            code, field = "context_length_exceeded", request.endpoint.prompt_field
            raise ApiError(what, code=code, param=field)
        if isinstance(request, ApiRequest) and request.params.n > self.settings.max_n:
            what = f"'n' is too large: this server gives {self.settings.max_n} at most."
            raise ApiError(what, code="invalid_value", param="n")
