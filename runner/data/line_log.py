"""A file of lines that is only ever appended to, by one process at a time."""

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from runner.errors import OutputError, StoppedError


class LineLog:
    """Lines of which every committed one stays, whatever happens to the process or the machine.

    A line counts once it is whole. What a killed process left of a line, or a machine that went
    down left of lines that were not committed, is not read and is cut off before the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._num_whole = 0
        """Bytes of the whole lines that `read` saw, and of those appended since."""
        self._size = 0
        """Bytes of the file when it was read."""

    def read(self) -> Iterator[bytes]:
        """Yields the whole lines, without the newline; none where there is no file."""
        self._num_whole = self._size = 0
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            for line in file:
                # A file system that lost unsynced pages shows zeros in their place.
                if not line.endswith(b"\n") or b"\0" in line:
                    return
                self._num_whole += len(line)
                yield line[:-1]

    def open(self) -> None:
        """Begins to append, after what `read` saw.

        The caller keeps other processes out; raises `OutputError` where one has written since, and
        `StoppedError` where the disk refuses.
        """
        try:
            file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._stopped(error) from error
        if os.fstat(file.fileno()).st_size != self._size:
            file.close()
            raise OutputError(f"{self.path}: another process has written it; start again")
        file.truncate(self._num_whole)
        self._file = file

    def append(self, line: bytes) -> None:
        """Adds a line, which counts for good from the next `commit` on.

        Raises `StoppedError` where the disk refuses it; the file is then as it was before.
        """
        assert self._file is not None, "appending comes after open() and before close()"
        assert b"\n" not in line and b"\0" not in line, "one line, and text"
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._num_whole)
            raise self._stopped(error) from error
        self._num_whole += len(line) + 1

    def commit(self) -> None:
        """Makes what was appended survive whatever comes; `StoppedError` where that fails."""
        assert self._file is not None, "committing comes after open() and before close()"
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._stopped(error) from error

    def close(self) -> None:
        """Commits, and lets go of the file."""
        if self._file is not None:
            with self._file:
                self.commit()
            self._file = None

    def _stopped(self, error: OSError) -> StoppedError:
        advice = "once that is mended, the same command goes on from here"
        return StoppedError(f"{self.path}: {error.strerror}; {advice}")
