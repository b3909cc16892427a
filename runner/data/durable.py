"""Files that are there whole or not at all, also after the machine goes down.

Everything that changes an output directory goes through here, so that a test can end the process
before, in and after every write, flush, rename and removal.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from runner.errors import StoppedError


@contextmanager
def stopping(directory: Path) -> Iterator[None]:
    """Turns what a full or broken disk raises into the end of the run, a StoppedError."""
    try:
        yield
    except OSError as error:
        raise StoppedError(
            f"{directory}: cannot be written: {error.strerror}; what is committed stays, "
            "and the same command goes on once that is mended"
        ) from error


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file beside `path` under a dot-name, flushes it to disk and renames it to `path`.

    Raises OSError where that fails; the file that was there before is then still whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with os.fdopen(os.open(temporary, _NEW_FILE, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        # On a full disk, half a file is what the next attempt lacks.
        remove_file(temporary)
        raise
    sync_directory(path.parent)


def append_line(path: Path, line: bytes, *, size: int) -> None:
    """Writes `line` after the first `size` bytes of a file, in place of what follows them.

    It is on disk on return. Raises OSError where it is not; a part of it may then be in the file.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        os.lseek(descriptor, size, os.SEEK_SET)
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Renames a file or a directory, for good."""
    os.replace(path, target)
    sync_directory(target.parent)


def remove_file(path: Path) -> None:
    """Removes a file that nothing counts on; one that is gone already is no error."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync_directory(directory: Path) -> None:
    """Makes a rename itself survive: fsync of a file does not cover its directory entry."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
