"""Memory that the kernel may put on disk: what a job notes about each of its rows, however many."""

import mmap
import os
import tempfile
import warnings

_SMALL = 1 << 20
"""Bytes below which a file is not worth its while."""
_WRITTEN = 1 << 20


def scratch_memory(num_bytes: int) -> mmap.mmap:
    """Zeros to write over, in a file without a name that goes when nobody holds it, or is killed.

    The file is in `TMPDIR`, else in /var/tmp. Where the disk refuses, it is plain memory, and a
    warning says so.
    """
    if num_bytes < _SMALL:
        return mmap.mmap(-1, num_bytes)
    try:
        with tempfile.TemporaryFile(dir=_directory()) as file:
            # Written and not only sized: a page without a place on a full disk would be a SIGBUS.
            for start in range(0, num_bytes, _WRITTEN):
                file.write(bytes(min(_WRITTEN, num_bytes - start)))
            file.flush()
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        warnings.warn(
            f"{_directory()}: cannot hold a temporary file of {num_bytes} bytes "
            f"({error.strerror}); it stays in memory",
            stacklevel=2,
        )
        return mmap.mmap(-1, num_bytes)


def _directory() -> str:
    """/var/tmp before /tmp, which may itself be memory."""
    given = os.environ.get("TMPDIR")
    return given or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
