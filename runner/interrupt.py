"""Ctrl-C and SIGTERM: the first asks the run to end cleanly, the second ends it at once."""

import signal
import sys
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While it is entered, remembers a signal instead of letting it cut a write in half."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def is_requested(self) -> bool:
        """Whether the run should end after the current step."""
        return self._received is not None

    def exit_if_requested(self) -> None:
        """Leaves with the shell's code for the signal, 128 and its number."""
        if self._received is not None:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._restore()
