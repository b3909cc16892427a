"""The application on a real socket, served by a thread of the test's own process."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from runner import LLM, SamplingParams
from runner.answerer import Answerer
from runner.server.app import create_app
from runner.server.engine_thread import EngineThread
from runner.server.service import Service
from runner.server.settings import ServerSettings

NAME = "tiny"


@dataclass(frozen=True)
class Live:
    """A server that listens, and what it is made of."""

    url: str
    service: Service

    @property
    def llm(self) -> LLM:
        """The model; touch it while nothing is in flight."""
        return self.service.answerer.llm

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        """The client of OpenAI's package, which tries once only."""
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """What a POST is answered; `options` are those of httpx."""
        with httpx.Client(trust_env=False, timeout=60) as client:
            given = {} if body is None else {"json": body}
            return client.post(self.url + path, **given, **options)

    def get(self, path: str) -> httpx.Response:
        """What a GET is answered."""
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.get(self.url + path)

    def is_idle(self) -> bool:
        """Whether nothing of any request is left."""
        engine = self.service.engine
        left = engine.num_open or self.llm.engine.has_unfinished or self.llm.text_engine.request_ids
        return not left and not engine._by_request

    def becomes_idle(self, seconds: float = 10.0) -> bool:
        """Waits until nothing is left; False where that takes too long."""
        return wait_until(self.is_idle, seconds)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Waits until something holds; False where that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.002)
    return holds()


@contextlib.contextmanager
def live_server(
    model: Path, *, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Live]:
    """Serves a model on a free port of this machine until the context is left.

    `engine` are options of `LLM`, `settings` those of the group `server`.
    """
    options = {"order": "fcfs", "prefill_step_size": 64, "max_batch_size": 32} | (engine or {})
    thread = EngineThread(lambda: LLM(model, **options))
    answerer = Answerer(thread.llm, SamplingParams(max_tokens=None), [NAME])
    service = Service(answerer, thread, ServerSettings(**{"log_file": os.devnull} | settings))
    config = uvicorn.Config(create_app(service), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    runs = threading.Thread(target=lambda: asyncio.run(server.serve()), name="uvicorn")
    runs.start()
    try:
        assert wait_until(lambda: server.started), "it does not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = server.force_exit = True
        runs.join()
        thread.stop()
        service.log.close()
