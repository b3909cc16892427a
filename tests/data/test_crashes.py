"""The process ends before, in or after every write, flush, rename and removal; nothing is lost."""

import os
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from runner.data import ResultWriter, durable
from runner.data.manifest import MANIFEST_FILE, Manifest
from runner.data.merge import MergeFormat, merge
from runner.data.schemas import result_schema

SCHEMA = result_schema(pa.schema([("answer", pa.string())]))
NAMES = [f"r{number}" for number in range(12)]
STEPS = ("open", "write", "fsync", "ftruncate", "replace", "unlink")


class DiedError(BaseException):
    """Stands for the end of the process."""


class FaultyOs:
    """The module `os` for `durable`, which ends the process at the step of a number.

    `when` says whether that is before the step, in its middle or after it. In the middle of a
    write, and before a flush, only a part of what was written reaches the disk.
    """

    def __init__(self, last: int, when: str, seed: int = 0) -> None:
        self.num_steps = 0
        self._last, self._when = last, when
        self._random = random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        step = getattr(os, name)
        return (lambda *given: self._do(name, step, *given)) if name in STEPS else step

    def fdopen(self, descriptor: int, mode: str) -> "FaultyFile":
        """A file whose writes are steps as well."""
        return FaultyFile(self, descriptor)

    def _do(self, name: str, step: Any, *given: Any) -> Any:
        self.num_steps += 1
        if self.num_steps > self._last:
            raise DiedError
        if self.num_steps < self._last or self._when == "after":
            done = step(*given)
            if self.num_steps == self._last:
                raise DiedError
            return done
        if name == "write" and self._when == "middle":
            os.write(given[0], given[1][: len(given[1]) // 2])
        if name == "fsync" and self._when == "middle":
            self._lose_tail(given[0])
        raise DiedError

    def _lose_tail(self, descriptor: int) -> None:
        """The machine goes down: what was not flushed is cut, or is there as zeros."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            size = path.stat().st_size
            kept = self._random.randrange(max(size - 200, 0), size + 1)
            if path.name == MANIFEST_FILE:  # What an earlier line says was flushed with it.
                kept = max(kept, path.read_bytes()[: size - 1].rfind(b"\n") + 1)
            os.truncate(path, kept)
            if self._random.random() < 0.5:
                os.truncate(path, size)


class FaultyFile:
    """What `replace_file` writes to."""

    def __init__(self, faulty: FaultyOs, descriptor: int) -> None:
        self._faulty, self._descriptor = faulty, descriptor

    def write(self, content: Any) -> None:
        """A step, like every write of `durable` itself."""
        self._faulty.write(self._descriptor, memoryview(content))

    def flush(self) -> None:
        """Nothing is buffered here."""

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._descriptor

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *of: object) -> None:
        os.close(self._descriptor)


def group(name: str, *, failed: bool = False) -> list[dict[str, Any]]:
    error = {"type": "RewardError", "message": "no"} if failed else None
    return [
        {"row_id": name, "sample_index": i, "text": name * i, "answer": name, "error": error}
        for i in range(2)
    ]


def attempt(folder: Path, **options: Any) -> None:
    """One run of a job that does the rows which are not done; a shard is filled by three rows."""
    results = ResultWriter(dir=folder, shard_rows=6, schema=SCHEMA, identity={}, **options)
    try:
        results.start()
        for name in NAMES:
            if name not in results.done_rows:
                results.write(group(name))
        results.close(complete=True)
    finally:
        # The kernel would do this; nothing that the process itself does at its end is done.
        if results._output._lock._file is not None:
            results._output._lock._file.close()


def check(folder: Path) -> None:
    """Every part that counts is whole, and no row is there twice."""
    manifest = Manifest.load(folder)
    rows: list[str] = []
    for part in manifest.parts if manifest else []:
        table = pa.ipc.open_file((folder / part.file).read_bytes()).read_all()
        assert table.num_rows == part.rows
        rows += table["row_id"].to_pylist()
    assert all(rows.count(name) == 2 for name in set(rows))


def crash(monkeypatch: pytest.MonkeyPatch, folder: Path, faulty: FaultyOs, **options: Any) -> bool:
    """Runs the job until the step at which it dies; False if it came to its end before that."""
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", faulty)
        try:
            attempt(folder, **options)
        except DiedError:
            check(folder)
            return True
    return False


def crashed_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    when: str,
    prepare: Callable[[Path], None] = lambda out: None,
    **options: Any,
) -> Iterator[tuple[int, Path]]:
    """The directories of a run that died at its first step, of one at its second, and so on."""
    for step in count(1):
        out = place / str(step)
        prepare(out)
        if not crash(monkeypatch, out, FaultyOs(step, when, seed=step), **options):
            return
        yield step, out


def merged(folder: Path) -> bytes:
    return merge(folder, NAMES, MergeFormat()).paths[0].read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """What an uninterrupted run gives."""
    attempt(tmp_path / "whole")
    return merged(tmp_path / "whole")


WHEN = ("before", "middle", "after")


@pytest.mark.parametrize("when", WHEN)
def test_a_crash_at_any_step_loses_nothing(tmp_path, monkeypatch, whole, when) -> None:
    step = 0
    for step, out in crashed_at_each_step(monkeypatch, tmp_path, when):
        attempt(out)
        assert merged(out) == whole, step
    assert step >= 40, "there are that many steps, and each was one to die at"


@pytest.mark.parametrize("seed", range(12))
def test_crashes_in_the_run_that_goes_on_lose_nothing_either(
    tmp_path, monkeypatch, whole, seed
) -> None:
    choose = random.Random(seed)
    deaths = 0
    while crash(
        monkeypatch, tmp_path / "out", FaultyOs(choose.randrange(1, 25), choose.choice(WHEN), seed)
    ):
        deaths += 1
        assert deaths < 200, "some run comes to its end"
    assert merged(tmp_path / "out") == whole


@pytest.mark.parametrize("when", WHEN)
def test_a_crash_while_errors_are_done_again_leaves_each_row_once(
    tmp_path, monkeypatch, whole, when
) -> None:
    def with_errors(out: Path) -> None:
        results = ResultWriter(dir=out, shard_rows=6, schema=SCHEMA, identity={})
        results.start()
        for number, name in enumerate(NAMES):
            results.write(group(name, failed=number % 4 == 1))
        results.close(complete=True)

    step = 0
    again = crashed_at_each_step(monkeypatch, tmp_path, when, with_errors, retry_errors=True)
    for step, out in again:
        # All rows are there at this moment, the failed ones or their replacement.
        found = [part.groups for part in Manifest.load(out).parts]
        assert sum(found) == len(NAMES)
        attempt(out, retry_errors=True)
        assert merged(out) == whole, step
    assert step >= 20


@pytest.mark.parametrize("when", WHEN)
def test_a_crash_while_starting_again_leaves_a_directory_that_goes_on(
    tmp_path, monkeypatch, whole, when
) -> None:
    step = 0
    for step, out in crashed_at_each_step(monkeypatch, tmp_path, when, attempt, overwrite=True):
        attempt(out)
        assert merged(out) == whole, step
    assert step >= 40
