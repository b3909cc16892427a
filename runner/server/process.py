"""The process: a socket, uvicorn on it, and a clean end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from runner.errors import UsageError
from runner.server.app import create_app
from runner.server.service import Service


def run_server(service: Service) -> None:
    """Serves until SIGINT or SIGTERM, then lets the requests in flight end.

    Raises UsageError where the address cannot be had.
    """
    settings = service.settings
    listening = _bound(settings.host, settings.port)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Serving {service.answerer.names[0]} at http://{shown}:{port} (docs at /docs)", flush=True
    )
    config = uvicorn.Config(
        create_app(service),
        log_level="error",
        access_log=False,
        # Anybody may send X-Forwarded-For; limits go by the address that is really there.
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=round(settings.shutdown_timeout),
        server_header=False,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_farewell)
    with _signals_end_well():
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            service.engine.stop()


@contextmanager
def _signals_end_well() -> Iterator[None]:
    """Lets the signal that ended the server end no more than that.

    uvicorn raises it once again, for the handlers that were there before it.
    """
    handlers = {it: signal.signal(it, _ignore) for it in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_no_farewell(record: logging.LogRecord) -> bool:
    """False for the traceback of a request that the end of the server has cut off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # From here on clients wait instead of being refused.
        listening.listen()
    except OSError as error:
        listening.close()
        what = f"server.host={host} server.port={port}: {error.strerror or error}"
        raise UsageError(what) from error
    return listening
