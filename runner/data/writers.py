"""Result rows to Arrow files: none is lost, none is there twice, whenever the process ends."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from runner.data.digests import RowIds
from runner.data.directory import OutputDirectory
from runner.data.error_rate import ErrorRate
from runner.data.merge import MergeFormat
from runner.data.summary import Totals
from runner.errors import ParameterError

_CONVERTED_ROWS = 128
"""Rows that are held as Python objects, which take several times the memory of Arrow's."""


class ResultWriter:
    """Appends groups of rows to `dir` as Arrow IPC files `part-00000.arrow`, ….

    A group is the rows of one input row, all with its `row_id`; it is never split. `shard_rows` is
    how many rows fill a part, `commit_seconds` how long a row waits for that at most. `schema` is
    that of the rows, `identity` the flat options that decide results.

    A directory with results of the same identity is continued: `done_rows` holds the row ids it
    has, and `complete` says whether it has all. Rows of a part that is damaged or gone are not
    among them; with `retry_errors`, nor are those with an error, which stay until their
    replacement is committed. Any other results raise `OutputError`, unless `overwrite` says that
    they go. More than `max_error_rate` of a run's rows with errors raise `StoppedError`.
    `merge`, `merge_format` and `merge_rows` are for the job, which merges at its end.
    """

    def __init__(
        self,
        *,
        dir: str | Path,
        shard_rows: int = 4096,
        commit_seconds: float = 60.0,
        overwrite: bool = False,
        retry_errors: bool = False,
        max_error_rate: float = 0.01,
        merge: bool = False,
        merge_format: str = "arrow",
        merge_rows: int | None = None,
        schema: pa.Schema,
        identity: Mapping[str, Any],
    ) -> None:
        if shard_rows < 1:
            raise ParameterError(f"shard_rows={shard_rows!r} is not allowed: at least 1")
        if not commit_seconds > 0:
            raise ParameterError(f"commit_seconds={commit_seconds!r} is not allowed: above 0")
        self.directory = Path(dir)
        self.shard_rows = shard_rows
        self.commit_seconds = commit_seconds
        self.schema = schema
        self.merge = merge
        self.merge_format = MergeFormat(merge_format, rows=merge_rows)
        self._error_rate = ErrorRate(max_error_rate, can_retry=True)
        self._output = OutputDirectory(
            self.directory,
            schema=schema,
            identity=identity,
            overwrite=overwrite,
            retry_errors=retry_errors,
        )
        self._rows: list[Mapping[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._num_buffered = 0
        self._oldest = 0.0
        self._is_open = False

    @property
    def complete(self) -> bool:
        """Whether the directory holds every row of its job, and none that is to be done again."""
        return self._output.complete

    @property
    def input(self) -> Any:
        """What `close` was told about the input when the directory became complete."""
        return self._output.manifest.input

    @property
    def done_rows(self) -> RowIds:
        """The row ids that are committed, and are not to be done again."""
        return self._output.done_rows

    @property
    def totals(self) -> Totals:
        """The counts over what is committed, for `summary.json`."""
        return self._output.totals

    @property
    def num_rows(self) -> int:
        """Result rows committed so far."""
        return self.totals.samples

    @property
    def part_paths(self) -> list[Path]:
        """The committed files, in the order they were written."""
        return [self.directory / part.file for part in self._output.manifest.parts]

    @property
    def seconds_left(self) -> float:
        """Seconds until what is buffered is due to be committed; `commit_seconds` for nothing."""
        waited = time.monotonic() - self._oldest if self._num_buffered else 0.0
        return max(self.commit_seconds - waited, 0.0)

    def lock(self) -> None:
        """Makes the directory and keeps other processes out of it until `close`.

        Raises OutputError where one is in it.
        """
        self._output.lock()

    def start(self) -> None:
        """Claims the directory; until then nothing is written but the lock."""
        self._output.start()
        self._is_open = True

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the rows of one group; commits what is due.

        A row that does not fit the schema is a bug of the caller and raises what Arrow raises.
        """
        assert self._is_open, "writing comes after start() and before close()"
        unknown = {key for row in rows for key in row} - set(self.schema.names)
        assert not unknown, f"not in the schema of the results: {sorted(unknown)}"
        if self._output.has_failed or not rows:
            return
        if not self._num_buffered:
            self._oldest = time.monotonic()
        self._rows += rows
        self._num_buffered += len(rows)
        if len(self._rows) >= _CONVERTED_ROWS:
            self._convert()
        if self._num_buffered >= self.shard_rows:
            self.commit()
        self.commit_if_due()
        self._error_rate.add(next((row["error"] for row in rows if row.get("error")), None))

    def commit_if_due(self) -> None:
        """Commits what has been buffered for `commit_seconds`."""
        if self._num_buffered and not self.seconds_left:
            self.commit()

    def commit(self) -> None:
        """Makes what is buffered a part of its own: on disk, and in the manifest, for good.

        Raises StoppedError where the directory cannot be written.
        """
        if not self._num_buffered or self._output.has_failed:
            return
        self._convert()
        self._output.add(pa.Table.from_batches(self._batches, schema=self.schema))
        self._batches, self._num_buffered = [], 0

    def close(self, *, complete: bool, input: Any = None) -> None:
        """Commits what is buffered; `complete` says that no row of the job is missing.

        input: what the input looked like, as JSON values; a later run may compare it.
        """
        try:
            if self._is_open:
                self.commit()
                self._output.finish(complete=complete, input=input)
        finally:
            self._is_open = False
            self._output.unlock()

    def _convert(self) -> None:
        """Frees the Python objects of the buffered rows."""
        rows, self._rows = self._rows, []
        self._batches.append(pa.RecordBatch.from_pylist(rows, schema=self.schema))
