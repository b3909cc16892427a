"""One process on one output directory: a lock that ends with the process that holds it."""

import errno
import fcntl
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from runner.errors import OutputError

LOCK_FILE = ".lock"


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
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(
                    f"{self._path.parent} cannot be locked ({error.strerror}); "
                    "let one process at a time write there",
                    stacklevel=2,
                )
                return
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise OutputError(
                f"{self._path.parent}: another process writes there (pid {holder}); "
                "wait for its end or choose another directory"
            ) from error

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False
