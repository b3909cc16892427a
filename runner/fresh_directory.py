"""A directory that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.data.durable import rename, stopping
from runner.data.lock import LOCK_FILE, DirectoryLock
from runner.errors import OutputError


def check_fresh(target: Path) -> None:
    """Raises OutputError where a directory holds something already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is there already: remove it, or choose another output.dir")


@contextmanager
def fresh_directory(target: Path, *, resumes: bool = False) -> Iterator[Path]:
    """Yields a directory beside `target` that becomes it at the end, once it is on disk.

    What an interrupted run left is used with `resumes`, and otherwise removed. Raises OutputError
    where `target` holds something or another process fills it, StoppedError where the disk is full.
    """
    target = target.absolute()
    check_fresh(target)
    partial = target.with_name(f".{target.name}.partial")
    made = [parent for parent in target.parents if not parent.exists()]
    with stopping(target):
        partial.mkdir(parents=True, exist_ok=True)
        with DirectoryLock(partial):
            try:
                if not resumes:
                    _empty(partial)
                yield partial
                _flush(partial)
                check_fresh(target)
            except BaseException:
                if not resumes or not any(it.name != LOCK_FILE for it in partial.iterdir()):
                    shutil.rmtree(partial)
                for path in (target, *made):
                    with suppress(OSError):  # Where it holds something it stays.
                        path.rmdir()
                raise
        rename(partial, target)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _flush(directory: Path) -> None:
    """Has the disk hold every file: a rename may be there before what it names."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
