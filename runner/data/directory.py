"""An output directory: what it holds for good, and how that grows without a moment of doubt."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from runner.data.batch_results import BATCH_FILE
from runner.data.digests import RowIds
from runner.data.durable import remove_file, rename, stopping
from runner.data.lock import DirectoryLock
from runner.data.manifest import OLD_MANIFEST_FILE, Manifest, Part, part_name
from runner.data.merge import remove_merged
from runner.data.parts import PART_PATTERN, damage, reading, write_part
from runner.data.retries import Retries
from runner.data.summary import Totals
from runner.errors import OutputError, StoppedError


class OutputDirectory:
    """The parts of a directory that its manifest lists, and their row ids.

    Opening reads every part and checks it against the manifest: `done_rows` holds the row ids of
    those that are as they were written, without the rows with errors where they are to be done
    again. Raises OutputError for results of another identity or schema, or where another process
    writes there.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: pa.Schema,
        identity: Mapping[str, Any],
        overwrite: bool = False,
        retry_errors: bool = False,
    ) -> None:
        self.path = path
        self.schema = schema
        self.totals = Totals()
        """The counts over what is committed."""
        self.has_failed = False
        """Whether the disk refused a write: the run is over."""
        self._identity = dict(identity)
        self._overwrite = overwrite
        self._retry_errors = retry_errors
        self._lock = DirectoryLock(path)
        self._lock.check()
        self._open()

    @property
    def complete(self) -> bool:
        """Whether it holds every row of its job, and none that is to be done again."""
        return self.manifest.complete and not self._damaged and not self._retries

    def lock(self) -> None:
        """Makes the directory and keeps other processes out; OutputError where one is in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def unlock(self) -> None:
        """Lets other processes in again."""
        self._lock.release()

    def start(self) -> None:
        """Makes the directory one that can be added to.

        The manifest comes before the first part: a part without one would be taken for someone
        else's.
        """
        self.lock()
        with self._failing():
            if self._has_changed():
                self._open()
            if self.manifest.size == 0:
                self.manifest.create(self.path)
                remove_file(self.path / OLD_MANIFEST_FILE)
                remove_merged(self.path)
            self._give_up_damaged()
            self._remove_uncommitted()

    def add(self, table: pa.Table) -> None:
        """Writes rows as a part that counts from here on, in place of their errors of before.

        One line of the manifest does both. Raises StoppedError where the disk refuses.
        """
        row_ids = dict.fromkeys(table["row_id"].to_pylist())
        with self._failing():
            self._commit(table, set(row_ids))
        self.done_rows.update(row_ids)

    def finish(self, *, complete: bool, input: Any) -> None:
        """Notes whether every row of the job is there, and what its input looked like."""
        if self.has_failed or (complete, input) == (self.manifest.complete, self.manifest.input):
            return
        with self._failing():
            self.manifest.finish(self.path, complete=complete, input=input)

    def _commit(self, table: pa.Table, row_ids: set[str]) -> None:
        number = self.manifest.next_number
        parts = [write_part(self.path, part_name(number), table)]
        replaced = self._retries.replaced_by(row_ids)
        for file in replaced:
            with reading(self.path, self.manifest.by_file[file]) as old:
                rest = self._retries.without(old, row_ids)
                if rest.num_rows:
                    name = part_name(number + len(parts))
                    parts.append(write_part(self.path, name, rest))
                    self._retries.moved(file, name)
        self.manifest.commit(self.path, parts, replaced)
        self._retries.forget(row_ids)
        # A new object, because another thread may be reading the old one.
        new = Totals.from_json(parts[0].totals)
        self.totals = self._counted() if replaced else self.totals + new
        for file in replaced:
            remove_file(self.path / file)

    def _open(self) -> None:
        self.done_rows = RowIds()
        self._retries = Retries()
        self._damaged: dict[str, str] = {}
        self.manifest = self._opened()
        for part in self.manifest.parts:
            if reason := damage(self.path, part):
                self._damaged[part.file] = reason
            else:
                self._read(part)
        self.totals = self._counted()

    def _opened(self) -> Manifest:
        """The manifest that is there if it can be continued, else a new one."""
        if (self.path / BATCH_FILE).exists():
            raise OutputError(
                f"{self.path}: holds answers to a batch file; choose another directory"
            )
        new = Manifest(identity=self._identity)
        is_ours = (self.path / OLD_MANIFEST_FILE).exists() and self._overwrite
        manifest = None if is_ours else Manifest.load(self.path, tolerant=self._overwrite)
        if manifest is None and not is_ours and any(self.path.glob(PART_PATTERN)):
            raise OutputError(
                f"{self.path}: holds {PART_PATTERN} files without a manifest; "
                "choose another directory"
            )
        if manifest is None or self._overwrite:
            return new
        differences = manifest.differences(self._identity)
        if differences and manifest.by_file:
            raise OutputError(
                f"{self.path}: holds results of other options ({'; '.join(differences)}); "
                "choose another directory or the same options, or output.overwrite=true"
            )
        return new if differences else manifest

    def _read(self, part: Part) -> None:
        errors: set[str] = set()
        with reading(self.path, part) as table:
            self._check_schema(table.schema)
            if self._retry_errors and part.totals["errors"]:
                errors = self._retries.add(part.file, table)
            row_ids = dict.fromkeys(table["row_id"].to_pylist())
        self.done_rows.update(row_id for row_id in row_ids if row_id not in errors)

    def _counted(self) -> Totals:
        each = (Totals.from_json(part.totals) for part in self.manifest.parts)
        return sum(each, Totals())

    def _has_changed(self) -> bool:
        """Whether another process wrote here between the first look and the lock."""
        if self._overwrite:
            return False
        there = Manifest.load(self.path)
        return self.manifest.size > 0 if there is None else there != self.manifest

    def _give_up_damaged(self) -> None:
        """Takes damaged parts out of the manifest and out of the way of whoever reads all parts."""
        for file, reason in self._damaged.items():
            rows = self.manifest.by_file[file].rows
            warnings.warn(
                f"{self.path / file}: {reason}; its {rows} result rows are made again",
                stacklevel=3,
            )
        if self._damaged:
            self.manifest.commit(self.path, [], list(self._damaged))
            self.totals = self._counted()
        for file in self._damaged:
            if (self.path / file).exists():
                rename(self.path / file, self.path / f"{file}.damaged")
        self._damaged = {}

    def _remove_uncommitted(self) -> None:
        """Removes parts that the manifest does not list, and files that were being written.

        Their rows are made again, and whoever reads all parts would meet them twice.
        """
        for path in [*self.path.glob(PART_PATTERN), *self.path.glob(".*.tmp")]:
            if path.name not in self.manifest.by_file and path.is_file():
                remove_file(path)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Notes that the disk refused, which ends the run."""
        try:
            with stopping(self.path):
                yield
        except StoppedError:
            self.has_failed = True
            raise

    def _check_schema(self, there: pa.Schema) -> None:
        if there.equals(self.schema):
            return
        old, new = (dict(zip(s.names, s.types, strict=True)) for s in (there, self.schema))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
        raise OutputError(
            f"{self.path}: holds results with other columns ({shown or 'in another order'}); "
            "choose another directory or the same input"
        )
