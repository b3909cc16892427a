"""Rows of several files as one table: one schema, in order or shuffled, in bounded memory."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from runner.data.formats import BATCH_ROWS, RowFile, reading
from runner.data.schemas import common_type, conform
from runner.data.scratch import scratch_memory
from runner.errors import DataError

SHUFFLE_WINDOW = 65536
"""Rows that are held, as Arrow, while shuffled rows are read."""

Row = dict[str, Any]


class Source(Protocol):
    """Rows that can be read any number of times, in the same order."""

    schema: pa.Schema
    num_rows: int | None

    def rows(self, *, offset: int, limit: int | None, shuffle_seed: int | None) -> Iterator[Row]:
        """Yields rows, shuffled first, then from `offset`, at most `limit`."""
        ...


class FileSource:
    """The rows of local files, one file after the other.

    Shuffling is a permutation of all rows by numpy's PCG64. It holds `SHUFFLE_WINDOW` rows, the
    permutation in a temporary file, and reads the files once per window.
    """

    def __init__(self, files: Sequence[RowFile]) -> None:
        self._files = files
        self.schema = _unified(files)
        self.num_rows: int | None = sum(file.num_rows for file in files)
        stats = [(file.path.name, file.path.stat()) for file in files]
        self.fingerprint = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def rows(self, *, offset: int, limit: int | None, shuffle_seed: int | None) -> Iterator[Row]:
        """Yields rows, shuffled first, then from `offset`, at most `limit`."""
        total = self.num_rows or 0
        stop = total if limit is None else min(total, offset + limit)
        if shuffle_seed is None:
            batches = self._ordered(offset, stop)
        else:
            batches = self._picked(_permutation(total, shuffle_seed)[offset:stop])
        for batch in batches:
            yield from batch.to_pylist()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            for batch in file.batches():
                with reading(file.path):
                    whole = conform(batch, self.schema)
                # An Arrow file may hold all its rows in one batch, too many to be Python objects.
                for start in range(0, whole.num_rows, BATCH_ROWS):
                    yield whole.slice(start, BATCH_ROWS)

    def _ordered(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        position = 0
        for batch in self._batches():
            if position >= stop:
                return
            low, high = max(start - position, 0), min(stop - position, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)
            position += batch.num_rows

    def _picked(self, positions: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(positions), SHUFFLE_WINDOW):
            window = positions[start : start + SHUFFLE_WINDOW]
            order = np.argsort(window)
            table = self._gathered(window[order])
            yield from table.take(np.argsort(order)).to_batches(max_chunksize=BATCH_ROWS)

    def _gathered(self, ascending: npt.NDArray[np.int64]) -> pa.Table:
        pieces = []
        position = 0
        for batch in self._batches():
            low, high = np.searchsorted(ascending, (position, position + batch.num_rows))
            pieces.append(batch.take(pa.array(ascending[low:high] - position)))
            position += batch.num_rows
            if high == len(ascending):
                break
        return pa.Table.from_batches(pieces, schema=self.schema)


def _permutation(total: int, seed: int) -> npt.NDArray[np.int64]:
    """What `Generator.permutation` makes of a number."""
    numbers = np.frombuffer(scratch_memory(8 * total), np.int64)
    for start in range(0, total, SHUFFLE_WINDOW):
        end = min(start + SHUFFLE_WINDOW, total)
        numbers[start:end] = np.arange(start, end)
    np.random.Generator(np.random.PCG64(seed)).shuffle(numbers)
    return numbers


def _unified(files: Sequence[RowFile]) -> pa.Schema:
    types: dict[str, pa.DataType] = {}
    for file in files:
        if len(set(file.schema.names)) < len(file.schema.names):
            raise DataError(f"{file.path}: two columns have one name: {file.schema.names}")
        for field in file.schema:
            known = types.get(field.name, pa.null())
            common = common_type(known, field.type)
            if common is None:
                raise DataError(
                    f"{file.path}: column {field.name!r} is {field.type}, "
                    f"in the files before it {known}; give it one type"
                )
            types[field.name] = common
    return pa.schema(list(types.items()))
