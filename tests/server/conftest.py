"""The tiny model behind HTTP, for the tests of one file."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from live_server import Live, live_server
from serving import tiny_engine, tiny_service

from runner.server.engine_thread import EngineThread
from runner.server.service import Service


@pytest.fixture(scope="module")
def live(tiny_directory: Path) -> Iterator[Live]:
    """A server on a socket; files that need options have their own."""
    with live_server(tiny_directory) as served:
        yield served


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of it."""
    with live.client() as made:
        yield made


@pytest.fixture(scope="module")
def engine(tiny_directory: Path) -> Iterator[EngineThread]:
    """An engine's thread without a socket."""
    with tiny_engine(tiny_directory) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: EngineThread) -> Service:
    """What is served by it, for everybody and without limits."""
    return tiny_service(engine)
