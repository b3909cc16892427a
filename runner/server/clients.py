"""Waiting for an answer no longer than its client does."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from runner.openai.errors import ApiError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection before its answer was there."""


class Deadline:
    """When a client's request has taken too long."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def of(self, coming: Awaitable[T]) -> T:
        """Waits for something; raises `ApiError` once it is too late."""
        try:
            async with asyncio.timeout_at(self._at):
                return await coming
        except TimeoutError:
            what = f"The answer took more than {self._seconds:g} seconds."
            raise ApiError(what, code="timeout", status=504) from None


async def unless_gone(http: Request, coming: Awaitable[T]) -> T:
    """Waits for something as long as the client is there; raises ClientGoneError.

    The body of the request has to be read before.
    """
    wanted = asyncio.ensure_future(coming)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ClientGoneError
        return wanted.result()
    finally:
        for task in (wanted, gone):
            task.cancel()
        await asyncio.gather(wanted, gone, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
