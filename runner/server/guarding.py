"""Who may come in: keys, and how much each of those who have one may ask for."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.openai.errors import ApiError
from runner.server.failures import told
from runner.server.keys import ApiKeys
from runner.server.limits import Limits
from runner.server.records import record_of

OPEN_PATHS = ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs")
"""Paths that need no key and are not limited."""


class Guarding:
    """ASGI middleware before all routes but the open ones."""

    def __init__(
        self, app: ASGIApp, *, keys: ApiKeys, limits: Limits, metrics_need_key: bool
    ) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._open = {it for it in OPEN_PATHS if it != "/metrics" or not metrics_need_key}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        record = record_of(connection)

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(record.allowance.headers)
            await send(message)

        try:
            record.key = self._key(Headers(scope=scope))
            record.allowance = self._limits.of(record.key or _address(scope))
            record.allowance.take_request()
        except ApiError as error:
            await told(connection, error)(scope, receive, send_limits)
            return
        await self._app(scope, receive, send_limits)

    def _key(self, headers: Headers) -> str | None:
        """What may be shown of the client's key; raises `ApiError` where it is none of them."""
        if not len(self._keys):
            return None
        given = headers.get("authorization", "")
        key = self._keys.find(given.encode("latin-1"))
        if key is None:
            why = "Incorrect API key provided." if given else "No API key provided."
            what = f"{why} Send one as 'Authorization: Bearer KEY'."
            wanted = {"WWW-Authenticate": "Bearer"}
            raise ApiError(what, code="invalid_api_key", status=401, headers=wanted)
        return key


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""
