"""Result rows to Arrow files, so that a killed job loses at most the part it was filling."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from runner.data.durable import replace_file
from runner.data.manifest import Manifest, Part
from runner.errors import OutputError, ParameterError

PART_PATTERN = "part-*.arrow"


class ResultWriter:
    """Appends groups of rows to `dir` as Arrow IPC files `part-00000.arrow`, ….

    `shard_rows` is how many rows fill a part; a group is never split, so a part may hold more.
    `schema` is that of the rows, `identity` the flat options that decide results. A directory
    with results of the same identity is continued: `done_rows` holds the row ids it has, and
    `complete` says whether it has all. Any other results raise `OutputError`.
    """

    def __init__(
        self,
        *,
        dir: str | Path,
        shard_rows: int = 4096,
        schema: pa.Schema,
        identity: Mapping[str, Any],
    ) -> None:
        if shard_rows < 1:
            raise ParameterError(f"shard_rows={shard_rows!r} is not allowed: at least 1")
        self.directory = Path(dir)
        self.shard_rows = shard_rows
        self.schema = schema
        self._manifest = self._opened(identity)
        self._buffer: list[pa.RecordBatch] = []
        self._is_open = False
        self.done_rows: set[str] = set()
        for part in self._manifest.parts:
            self._check_schema(part)
            self.done_rows.update(self._row_ids(part))

    @property
    def complete(self) -> bool:
        """Whether the directory holds every row of its job."""
        return self._manifest.complete

    @property
    def num_rows(self) -> int:
        """Rows committed so far."""
        return sum(part.rows for part in self._manifest.parts)

    @property
    def part_paths(self) -> list[Path]:
        """The committed files, in the order they were written."""
        return [self.directory / part.file for part in self._manifest.parts]

    def start(self) -> None:
        """Claims the directory; until then nothing is written.

        Before the first part: a part without a manifest would be taken for someone else's.
        """
        if not self._manifest.parts:
            self._manifest.save(self.directory)
        self._is_open = True

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the rows of one group; commits once `shard_rows` are buffered.

        A row that does not fit the schema is a bug of the caller and raises what Arrow raises.
        """
        assert self._is_open, "writing comes after start() and before close()"
        unknown = {key for row in rows for key in row} - set(self.schema.names)
        assert not unknown, f"not in the schema of the results: {sorted(unknown)}"
        if rows:
            self._buffer.append(pa.RecordBatch.from_pylist(list(rows), schema=self.schema))
        if sum(batch.num_rows for batch in self._buffer) >= self.shard_rows:
            self.commit()

    def commit(self) -> None:
        """Makes what is buffered a part of its own: on disk, and in the manifest, for good."""
        if not self._buffer:
            return
        table = pa.Table.from_batches(self._buffer, schema=self.schema).combine_chunks()
        part = Part(file=f"part-{len(self._manifest.parts):05d}.arrow", rows=table.num_rows)
        replace_file(self.directory / part.file, lambda file: _write_table(file, table))
        self._manifest.parts.append(part)
        self._manifest.complete = False
        self._manifest.save(self.directory)
        self.done_rows.update(table["row_id"].to_pylist())
        self._buffer = []

    def close(self, *, complete: bool) -> None:
        """Commits what is buffered; `complete` says that no row of the job is missing."""
        self.commit()
        self._is_open = False
        if self._manifest.complete != complete:
            self._manifest.complete = complete
            self._manifest.save(self.directory)

    def _opened(self, identity: Mapping[str, Any]) -> Manifest:
        manifest = Manifest.load(self.directory)
        if manifest is None:
            return self._started(identity)
        differences = manifest.differences(identity)
        if differences and not manifest.parts:
            return self._started(identity)
        if differences:
            raise OutputError(
                f"{self.directory}: holds results of other options ({'; '.join(differences)}); "
                "choose another directory or the same options"
            )
        return manifest

    def _started(self, identity: Mapping[str, Any]) -> Manifest:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.directory}: cannot be made a directory: {error}") from error
        if any(self.directory.glob(PART_PATTERN)):
            raise OutputError(
                f"{self.directory}: holds {PART_PATTERN} files without a manifest; "
                "choose another directory"
            )
        return Manifest(identity=dict(identity))

    def _check_schema(self, part: Part) -> None:
        with self._reading(part) as file:
            there = pa.ipc.open_file(file).schema
        if there.equals(self.schema):
            return
        old, new = (dict(zip(s.names, s.types, strict=True)) for s in (there, self.schema))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
        raise OutputError(
            f"{self.directory}: holds results with other columns ({shown or 'in another order'}); "
            "choose another directory or the same input"
        )

    def _row_ids(self, part: Part) -> list[str]:
        only = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index("row_id")])
        with self._reading(part) as file:
            table = pa.ipc.open_file(file, options=only).read_all()
            row_ids: list[str] = table["row_id"].to_pylist()
        if len(row_ids) != part.rows:
            raise OutputError(
                f"{self.directory / part.file}: holds {len(row_ids)} rows, its manifest says "
                f"{part.rows}; choose another directory"
            )
        return row_ids

    @contextmanager
    def _reading(self, part: Part) -> Iterator[Any]:
        path = self.directory / part.file
        try:
            with pa.memory_map(str(path)) as file:
                yield file
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                f"{path}: its manifest lists it, but it cannot be read ({error}); "
                "choose another directory"
            ) from error


def _write_table(file: BinaryIO, table: pa.Table) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
