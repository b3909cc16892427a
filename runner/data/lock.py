"""One process on one output directory: a lock that ends with the process that holds it."""

import errno
import fcntl
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from runner.errors import OutputError

LOCK_FILE = ".lock"
_GRACE = 2.0
"""Seconds for which the lock of a process that has ended is waited for: what it was starting when
it was killed has its open files until it runs."""


class DirectoryLock:
    """An `flock` on `.lock` in a directory; the file holds the process id for others to name.

    The kernel lets it go however the process ends. It guards the processes of one machine, and
    over NFS those of several where the server keeps locks; a file system without locks is warned
    about.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_FILE
        self._file: BinaryIO | None = None

    def check(self) -> None:
        """Raises OutputError where another process holds the lock; takes nothing, makes no file."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except OSError:
            return
        with file:
            self._lock(file, fcntl.LOCK_SH)

    @property
    def is_held(self) -> bool:
        """Whether another process holds it; takes nothing, makes no file."""
        try:
            self.check()
        except OutputError:
            return True
        return False

    def acquire(self) -> None:
        """Takes the lock; raises OutputError where another process holds it."""
        while self._file is None:
            file = open(self._path, "a+b")  # noqa: SIM115
            try:
                self._lock(file, fcntl.LOCK_EX)
            except OutputError:
                file.close()
                raise
            # Its last holder may have removed the file between the two lines above.
            if self._is_current(file):
                # A full disk takes no process id, and the lock holds all the same.
                with suppress(OSError):
                    os.ftruncate(file.fileno(), 0)
                    os.write(file.fileno(), f"{os.getpid()}\n".encode())
                self._file = file
            else:
                file.close()

    def release(self) -> None:
        """Lets the lock go, and removes its file while it is still held."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __enter__(self) -> "DirectoryLock":
        self.acquire()
        return self

    def __exit__(self, *of: object) -> None:
        self.release()

    def _lock(self, file: BinaryIO, kind: int) -> None:
        """Locks or warns; raises OutputError, at once where the holder is known to run."""
        deadline = time.monotonic() + _GRACE
        while (error := self._refusal(file, kind)) is not None:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            if _runs(holder) or time.monotonic() >= deadline:
                raise OutputError(
                    f"{self._path.parent}: another process writes there (pid {holder or 'unknown'})"
                    "; wait for its end or choose another directory"
                ) from error
            time.sleep(0.01)

    def _refusal(self, file: BinaryIO, kind: int) -> OSError | None:
        """Tries to lock; returns the error where another holds it."""
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return error
            warnings.warn(
                f"{self._path.parent} cannot be locked ({error.strerror}); "
                "let one process at a time write there",
                stacklevel=2,
            )
        return None

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False


def _runs(holder: str) -> bool:
    """Whether a process has this number, on this machine."""
    try:
        os.kill(int(holder), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
