"""What goes around every request: its name, its record, its line in the log, its metrics."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.server.failures import REQUEST_ID
from runner.server.metrics import Metrics
from runner.server.records import RequestRecord, attach
from runner.server.request_log import RequestLog

_SANE = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_UNMATCHED = "unmatched"
"""The route of what has none; paths that clients make up would never end."""


class Observing:
    """ASGI middleware around all that answers."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, log: RequestLog) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, and takes down how."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        record = RequestRecord(
            request_id=given if _SANE.fullmatch(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=scope["path"],
            on_gap=self._metrics.gap,
        )
        attach(HTTPConnection(scope), record)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            # Who answers it comes only afterwards.
            record.status, record.error = record.status or 500, "bug"
            raise
        finally:
            self._take_down(record, scope)

    def _take_down(self, record: RequestRecord, scope: Scope) -> None:
        if record.error is None and record.is_cut:
            record.error = "client_gone"
        record.settle()
        route = getattr(scope.get("route"), "path", None) or _UNMATCHED
        self._metrics.count(record, route)
        self._log.write(record)
