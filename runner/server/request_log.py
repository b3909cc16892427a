"""One line of JSON for each request, written aside so that no reader of it holds up an answer."""

import json
import queue
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from runner.errors import ParameterError
from runner.server.records import RequestRecord
from runner.types import Prompt

_MOST_WAITING = 10_000
"""Lines that wait for a pipe that nobody reads; more are dropped, and counted in the next."""
_LONGEST_PATH = 200


class RequestLog:
    """Writes what became of each request; `close` it."""

    def __init__(self, path: str | None, *, shows_prompts: bool) -> None:
        """Appends to a file, or writes on stderr. Raises ParameterError where it cannot."""
        self._shows_prompts = shows_prompts
        self._file = _opened(path) if path is not None else None
        self._stream = self._file or sys.stderr
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._num_dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, record: RequestRecord) -> None:
        """Writes the line of a request that is done."""
        shown = line_of(record, shows_prompts=self._shows_prompts)
        if self._num_dropped:
            shown["dropped_lines"] = self._num_dropped
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(json.dumps(shown) + "\n")
            self._num_dropped = 0
        except queue.Full:
            self._num_dropped += 1

    def close(self, timeout: float = 2.0) -> None:
        """Writes what waits, for as many seconds at most."""
        if self._thread is not None:
            try:
                self._lines.put(None, timeout=timeout)
            except queue.Full:
                return
            self._thread.join(timeout)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._file is not None:
            self._file.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            # All that waits at one go: a write for each line costs more than the line.
            lines = [self._lines.get()]
            while lines[-1] is not None and not self._lines.empty():
                lines.append(self._lines.get())
            is_open = lines[-1] is not None
            self._put([line for line in lines if line is not None])

    def _put(self, lines: list[str]) -> None:
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):  # A full disk, or whoever read it has gone.
            self._num_dropped += len(lines)


def line_of(record: RequestRecord, *, shows_prompts: bool) -> dict[str, Any]:
    """What the log shows of a request."""
    asked = record.model is not None
    shown: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:_LONGEST_PATH],
        "status": record.status,
        "seconds": round(record.seconds, 6),
        "key": record.key,
        "error": record.error,
        "model": record.model,
        "stream": record.stream,
        "prompt_tokens": record.num_prompt_tokens if asked else None,
        "completion_tokens": record.num_completion_tokens if asked else None,
        "first_token_seconds": None if record.first_token is None else round(record.first_token, 6),
        "finish_reasons": dict(record.finish_reasons) if asked else None,
    }
    if shows_prompts:
        shown["prompts"] = [_shown(prompt) for prompt in record.prompts]
    return shown


def _shown(prompt: Prompt) -> Any:
    given = (prompt.text, prompt.messages, prompt.token_ids)
    return next(it for it in given if it is not None)


def _opened(path: str) -> TextIO:
    try:
        return Path(path).expanduser().open("a", encoding="utf-8")
    except OSError as error:
        what = f"server.log_file={path} cannot be written: {error.strerror}"
        raise ParameterError(what) from error
