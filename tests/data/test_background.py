"""Threads that read ahead and write behind lose nothing and pass on what goes wrong."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from runner.data import ResultWriter, WriteBehind, prepare_ahead, read_ahead
from runner.data.schemas import result_schema
from runner.errors import DataError, StoppedError

SCHEMA = result_schema(pa.schema([]))


def numbers(end: int, pulled: list[int], failure: Exception | None = None) -> Iterator[int]:
    for number in range(end):
        pulled.append(number)
        yield number
    if failure is not None:
        raise failure


@pytest.mark.parametrize("end", [0, 1, 31, 32, 33, 1000])
def test_everything_comes_in_order(end: int) -> None:
    assert list(read_ahead(numbers(end, []))) == list(range(end))


def test_it_reads_ahead_and_no_further_than_it_may() -> None:
    pulled: list[int] = []
    with closing(read_ahead(numbers(10_000, pulled), depth=2)) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(pulled) < 4 * 32 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(pulled) == 4 * 32, "one in use, two waiting, one that finds no room"
    before = threading.active_count()
    time.sleep(0.2)
    assert threading.active_count() <= before and len(pulled) == 4 * 32


def test_what_fails_comes_after_what_came_before() -> None:
    items = read_ahead(numbers(40, [], DataError("row 41")))
    found = []
    with pytest.raises(DataError, match="row 41"):
        for item in items:
            found.append(item)
    assert found == list(range(40))


def opened(folder: Path, **options: object) -> WriteBehind:
    behind = WriteBehind(ResultWriter(dir=folder, schema=SCHEMA, identity={}, **options))
    behind.start()
    return behind


def rows(folder: Path) -> list[str]:
    parts = sorted(folder.glob("part-*.arrow"))
    return [it for part in parts for it in pa.ipc.open_file(part).read_all()["row_id"].to_pylist()]


def test_everything_is_written_in_order(tmp_path: Path) -> None:
    behind = opened(tmp_path, shard_rows=7)
    for number in range(100):
        behind.write([{"row_id": str(number)}, {"row_id": str(number)}])
    behind.close(complete=True)
    assert rows(tmp_path) == [str(number // 2) for number in range(200)]


def test_a_row_is_committed_in_time_though_no_other_comes(tmp_path: Path) -> None:
    behind = opened(tmp_path, commit_seconds=0.1)
    behind.write([{"row_id": "a"}])
    deadline = time.monotonic() + 5
    while not rows(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rows(tmp_path) == ["a"]
    behind.close(complete=True)


def test_every_commit_of_the_thread_is_told_and_a_failure_of_the_telling_ends_the_run(
    tmp_path: Path,
) -> None:
    seen: list[int] = []

    def tell() -> None:
        seen.append(writer.num_rows)
        if len(seen) == 3:
            raise StoppedError("no space")

    writer = ResultWriter(dir=tmp_path, schema=SCHEMA, identity={}, shard_rows=5)
    behind = WriteBehind(writer, committed=tell)
    behind.start()
    with pytest.raises(StoppedError, match="no space"):
        for number in range(10_000):
            behind.write([{"row_id": str(number)}])
    behind.close(complete=True)
    assert seen[:3] == [5, 10, 15] and not writer.complete
    assert len(rows(tmp_path)) == writer.num_rows >= 15


def test_what_the_thread_cannot_write_ends_the_run_once(tmp_path: Path) -> None:
    behind = opened(tmp_path, max_error_rate=0.0)
    error = {"type": "PromptError", "message": "no"}
    with pytest.raises(StoppedError):
        for number in range(10_000):
            behind.write([{"row_id": str(number), "error": error}])
    behind.close(complete=True)
    assert len(rows(tmp_path)) >= 100
    again = ResultWriter(dir=tmp_path, schema=SCHEMA, identity={})
    assert not again.complete and len(again.done_rows) == len(rows(tmp_path))


def test_a_failure_that_no_write_met_is_raised_at_the_end(tmp_path: Path) -> None:
    behind = opened(tmp_path)
    behind.write([{"row_id": "a", "sample_index": "first"}])
    with pytest.raises(pa.ArrowInvalid):
        behind.close(complete=True)
    assert not ResultWriter(dir=tmp_path, schema=SCHEMA, identity={}).complete


def doubled(chunk: list[int]) -> list[int]:
    assert threading.current_thread() is not threading.main_thread()
    assert len(chunk) <= 32
    return [2 * number for number in chunk]


@pytest.mark.parametrize("end", [0, 1, 32, 33, 1000])
def test_what_is_prepared_comes_in_order(end: int) -> None:
    assert list(prepare_ahead(numbers(end, []), doubled)) == list(range(0, 2 * end, 2))


def test_a_chunk_of_which_nothing_is_left_is_not_the_end() -> None:
    items = prepare_ahead(numbers(1000, []), lambda chunk: [n for n in chunk if n > 900])
    assert list(items) == list(range(901, 1000))


def test_long_items_come_in_short_chunks() -> None:
    sizes: list[int] = []

    def prepare(chunk: list[int]) -> list[int]:
        sizes.append(len(chunk))
        return chunk

    given = [1, 1, 8, 20, 3, 3, 3, 3, *[0] * 40]
    assert list(prepare_ahead(given, prepare, length=lambda it: it, most=10)) == given
    assert sizes == [3, 1, 4, 32, 8]


@pytest.mark.parametrize("place", [0, 40])
def test_what_preparing_raises_comes_after_what_came_before(place: int) -> None:
    def prepare(chunk: list[int]) -> list[int]:
        if place in chunk:
            raise DataError("a bug")
        return chunk

    found = []
    with pytest.raises(DataError, match="a bug"):
        for item in prepare_ahead(numbers(100, []), prepare):
            found.append(item)
    assert found == list(range(32 * (place // 32)))


def test_what_came_before_a_failure_is_prepared() -> None:
    found = []
    with pytest.raises(DataError, match="row 41"):
        for item in prepare_ahead(numbers(40, [], DataError("row 41")), doubled):
            found.append(item)
    assert found == list(range(0, 80, 2))


def test_closing_ends_the_thread_also_where_nothing_is_left_of_what_it_reads() -> None:
    before = threading.active_count()
    endless = (0 if number == 0 else -number for number in itertools.count())
    with closing(prepare_ahead(endless, lambda chunk: [n for n in chunk if n == 0])) as items:
        assert next(items) == 0
    assert threading.active_count() == before
