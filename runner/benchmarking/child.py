"""A process that runs workloads for this one: a line of JSON in, a line out."""

import json
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from typing import Any

from runner.errors import StoppedError


class Child:
    """A process that is ready once this is built; it waits for work without taking any time."""

    def __init__(self, name: str, command: list[str], *, env: dict[str, str]) -> None:
        """Starts `command`. Raises StoppedError, with the last line it wrote, where it ends."""
        self._name = name
        pipe = subprocess.PIPE
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._process = subprocess.Popen(
                command, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
            )
            stack.callback(self._end)
            self.hello = self._read()
            self._stack = stack.pop_all()

    def ask(self, work: dict[str, Any]) -> dict[str, Any]:
        """Has one piece of work done. Raises StoppedError where the process ends instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> StoppedError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return StoppedError(f"{self._name} ended with code {code}: {last[:300]}")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # What it did not take before it ended cannot be written any more.
            with suppress(BrokenPipeError):
                stream.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
