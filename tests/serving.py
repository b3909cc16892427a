"""A service in this process: the tiny model, its engine's thread, clients without a socket."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from runner import LLM, SamplingParams
from runner.answerer import Answerer
from runner.server.app import create_app
from runner.server.engine_thread import EngineThread
from runner.server.keys import ApiKeys
from runner.server.request_log import RequestLog
from runner.server.service import Service
from runner.server.settings import ServerSettings

T = TypeVar("T")
LLM_OPTIONS: dict[str, Any] = {"max_batch_size": 4, "order": "fcfs"}


@contextmanager
def tiny_engine(directory: Path, **options: Any) -> Iterator[EngineThread]:
    """The engine's thread; `options` are the LLM's. Several services may take turns with it."""
    engine = EngineThread(lambda: LLM(directory, **LLM_OPTIONS | options))
    try:
        yield engine
    finally:
        engine.stop()


def tiny_service(engine: EngineThread, *, keys: Iterable[str] = (), **settings: Any) -> Service:
    """A service over it; `settings` are the options of the group `server`."""
    defaults = SamplingParams(max_tokens=None, seed=0)
    answerer = Answerer(engine.llm, defaults, [engine.llm.loaded.name])
    service = Service(answerer, engine, ServerSettings(**settings), ApiKeys(keys))
    if service.settings.log_file is None:
        service.log._stream = io.StringIO()  # What tests print is for their failures.
    return service


@asynccontextmanager
async def client_of(
    service: Service, key: str | None = None, address: str = "10.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, of some address and with some key."""
    app = create_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 1234))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://runner", headers=headers
    ) as client:
        yield client


def with_client(
    service: Service,
    talk: Callable[[httpx.AsyncClient], Awaitable[T]],
    *,
    key: str | None = None,
    address: str = "10.0.0.1",
) -> T:
    """Lets a client talk to a service."""

    async def whole() -> T:
        async with client_of(service, key, address) as client:
            return await talk(client)

    return asyncio.run(whole())


def ask(
    service: Service, method: str, path: str, *, key: str | None = None, **request: Any
) -> httpx.Response:
    """One request."""
    return with_client(service, lambda client: client.request(method, path, **request), key=key)


def complete(service: Service, *, key: str | None = None, **body: Any) -> httpx.Response:
    """One completion of a few tokens."""
    asked = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True} | body
    return ask(service, "POST", "/v1/completions", key=key, json=asked)


def log_lines(service: Service, directory: Path, talk: Callable[[], Any]) -> list[Any]:
    """The lines that a service logs while something is done."""
    path = directory / "requests.jsonl"
    service.log = RequestLog(str(path), shows_prompts=service.settings.log_prompts)
    talk()
    service.log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]
