"""The results of a directory in the order of the input: the same bytes however they were made.

The order comes from reading the input again, not from what was noted while the job ran: rows may
have been inserted since, and then two runs number the same row differently.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runner.data.digests import DigestCounts, DigestTable, digest
from runner.data.durable import remove_file, rename, replace_file, stopping
from runner.data.lock import DirectoryLock
from runner.data.manifest import Manifest
from runner.data.parts import damage, reading
from runner.data.scratch import scratch_memory
from runner.errors import OutputError, ParameterError

MERGED_DIRECTORY = "merged"
_TEMPORARY = ".merged.tmp"
_CHUNK_ROWS = 4096
"""Result rows in one record batch or row group, and about what is in memory at once."""
_OPEN_PARTS = 64
_PLACE = np.dtype(np.int32)


@dataclass(frozen=True)
class MergeFormat:
    """What the merged files are: arrow, parquet or jsonl, with `rows` result rows in each.

    None for `rows` makes one file; a group is never split, so a file may hold more.
    """

    name: str = "arrow"
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _WRITERS:
            allowed = ", ".join(_WRITERS)
            raise ParameterError(f"merge_format={self.name!r} is not allowed: {allowed}")
        if self.rows is not None and self.rows < 1:
            raise ParameterError(f"merge_rows={self.rows!r} is not allowed: at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge wrote."""

    paths: list[Path]
    rows: int
    """Input rows with results."""
    missing: int
    """Input rows that have none yet."""
    left_out: int
    """Rows with results that the input no longer has."""


def merge(directory: Path, row_ids: Iterable[str], format: MergeFormat) -> Merged:
    """Writes the results of `row_ids`, in that order, to `merged` in their directory.

    It holds about `_CHUNK_ROWS` result rows, and where each row lies in temporary files. Raises
    OutputError where the directory has no manifest or parts that are not what it says, or is being
    written; StoppedError where the disk is full.
    """
    if not directory.is_dir():
        raise OutputError(f"{directory}: is not a directory of results")
    with stopping(directory), DirectoryLock(directory):
        return _merge(directory, row_ids, format)


def _merge(directory: Path, row_ids: Iterable[str], format: MergeFormat) -> Merged:
    index = _Index(directory)
    missing = index.order(row_ids)
    target = directory / _TEMPORARY
    _clear(target)
    target.mkdir()
    counts = index.counts
    cuts = _cut(counts, format.rows or int(counts.sum())) if len(counts) else [(0, 0)]
    for number, (start, end) in enumerate(cuts):
        chunks = partial(_chunks, index, start, end)
        path = target / f"part-{number:05d}.{format.name}"
        replace_file(path, partial(_WRITERS[format.name], index.schema, chunks))
    _clear(directory / MERGED_DIRECTORY)
    try:
        rename(target, directory / MERGED_DIRECTORY)
    except OSError as error:
        reason = f"holds other files ({error.strerror}); move them away"
        raise OutputError(f"{directory / MERGED_DIRECTORY}: {reason}") from error
    paths = sorted((directory / MERGED_DIRECTORY).iterdir())
    left_out = index.num_groups - len(counts)
    return Merged(paths=paths, rows=len(counts), missing=missing, left_out=left_out)


def remove_merged(directory: Path) -> None:
    """Removes what an earlier merge made; it can be made again."""
    _clear(directory / MERGED_DIRECTORY)
    _clear(directory / _TEMPORARY)


def _clear(directory: Path) -> None:
    for suffix in _WRITERS:
        for pattern in (f"part-*.{suffix}", f".part-*.{suffix}.tmp"):
            for path in directory.glob(pattern):
                remove_file(path)
    with suppress(OSError):
        directory.rmdir()


class _Index:
    """Where the groups of a directory lie: the part, the first row in it and the number of rows.

    Both by their row ids and, once they have an order, in that order, as (groups, 3) of int32.
    """

    def __init__(self, directory: Path) -> None:
        manifest = Manifest.load(directory)
        if manifest is None:
            raise OutputError(f"{directory}: holds no results: there is no manifest")
        if not manifest.by_file:
            raise OutputError(f"{directory}: holds no results yet")
        self._directory = directory
        self._parts = manifest.parts
        self._open: OrderedDict[int, pa.Table] = OrderedDict()
        self._by_id = DigestTable(3 * _PLACE.itemsize)
        self._places: Any = np.empty((0, 3), _PLACE)
        for number, part in enumerate(self._parts):
            if reason := damage(directory, part):
                mend = "the job's own command makes its rows again"
                raise OutputError(f"{directory / part.file}: {reason}; {mend}")
            names, starts, counts = _groups(self._table(number))
            places = np.stack([np.full(len(starts), number), starts, counts], axis=1)
            for name, place in zip(names, places.astype(_PLACE), strict=True):
                self._by_id.set(digest(name.encode()), place.tobytes())
        self.schema: pa.Schema = self._table(0).schema
        self.num_groups = len(self._by_id)

    @property
    def counts(self) -> Any:
        """Result rows of each group in order, int32 (groups,)."""
        return self._places[:, 2]

    def order(self, row_ids: Iterable[str]) -> int:
        """Puts the groups in the order of `row_ids`; returns how many of these have no group."""
        missing, num_found, seen = 0, 0, DigestCounts()
        places = np.frombuffer(scratch_memory(self.num_groups * 3 * _PLACE.itemsize), _PLACE)
        places = places.reshape(-1, 3)
        for name in row_ids:
            key = digest(name.encode())
            if seen.add(key):
                what = f"{name!r} names two rows of the input; give each its own"
                raise OutputError(f"{self._directory}: {what}")
            place = self._by_id.get(key)
            if any(place):
                places[num_found] = np.frombuffer(place, _PLACE)
                num_found += 1
            else:
                missing += 1
        self._places = places[:num_found]
        return missing

    def rows(self, start: int, end: int) -> pa.Table:
        """The result rows of the groups from `start` to `end`, in order."""
        parts, starts, counts = self._places[start:end].T
        by_part = np.argsort(parts, kind="stable")
        pieces = []
        for number in np.unique(parts):
            here = by_part[parts[by_part] == number]
            pieces.append(self._table(int(number)).take(_ranges(starts[here], counts[here])))
        # The pieces hold the groups part by part: where each begins among them, by its own place.
        ends = np.cumsum(counts[by_part])
        places = np.empty(end - start, np.int64)
        places[by_part] = ends - counts[by_part]
        return pa.concat_tables(pieces).combine_chunks().take(_ranges(places, counts))

    def _table(self, number: int) -> pa.Table:
        if number not in self._open:
            with reading(self._directory, self._parts[number]) as table:
                self._open[number] = table
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _groups(table: pa.Table) -> tuple[list[str], Any, Any]:
    """The row ids of a part, where the rows of each begin, and how many there are."""
    names = table["row_id"].to_pylist()
    firsts = [at for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
    starts = np.array(firsts, np.int64)
    return [names[at] for at in firsts], starts, np.diff(starts, append=len(names))


def _ranges(starts: Any, counts: Any) -> Any:
    """`counts[i]` numbers from `starts[i]` on, one range after the other."""
    ends = np.cumsum(counts)
    offsets = np.repeat(starts - (ends - counts), counts)
    return offsets + np.arange(ends[-1] if len(ends) else 0)


def _cut(counts: Any, rows: int) -> Iterator[tuple[int, int]]:
    """Cuts groups into stretches of at least `rows` rows each, but for the last."""
    start = 0
    while start < len(counts):
        # A group has a row at least.
        ends = np.cumsum(counts[start : start + rows])
        end = start + min(int(ends.searchsorted(rows)) + 1, len(ends))
        yield start, end
        start = end


def _chunks(index: _Index, start: int, end: int) -> Iterator[pa.Table]:
    for first, last in _cut(index.counts[start:end], _CHUNK_ROWS):
        yield index.rows(start + first, start + last).combine_chunks()


_Chunks = Callable[[], Iterator[pa.Table]]


def _write_arrow(schema: pa.Schema, chunks: _Chunks, file: BinaryIO) -> None:
    with pa.ipc.new_file(file, schema) as writer:
        for table in chunks():
            writer.write_table(table)


def _write_parquet(schema: pa.Schema, chunks: _Chunks, file: BinaryIO) -> None:
    with pq.ParquetWriter(file, schema) as writer:
        for table in chunks():
            writer.write_table(table, row_group_size=table.num_rows)


def _write_jsonl(schema: pa.Schema, chunks: _Chunks, file: BinaryIO) -> None:
    for table in chunks():
        for row in table.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")


_WRITERS: dict[str, Callable[[pa.Schema, _Chunks, BinaryIO], None]] = {
    "arrow": _write_arrow,
    "parquet": _write_parquet,
    "jsonl": _write_jsonl,
}
