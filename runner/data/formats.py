"""One local file as record batches: Parquet and Arrow here, JSON lines in `jsonl`."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from runner.data.schemas import plain_schema
from runner.errors import DataError

BATCH_ROWS = 1024
"""Rows that are decoded at once."""

_ARROW_FILE_MAGIC = b"ARROW1"


class RowFile(Protocol):
    """A file of rows that can be read any number of times."""

    path: Path
    schema: pa.Schema
    num_rows: int

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order; raises `DataError` where the file is damaged."""
        ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what an unreadable file raises into a `DataError` that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as {path.suffix}: {reason}") from error


class ParquetRows:
    """A Parquet file; holds about one row group at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), pq.ParquetFile(path) as file:
            self.schema = plain_schema(file.schema_arrow)
            self.num_rows: int = file.metadata.num_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order."""
        with reading(self.path), pq.ParquetFile(self.path, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)


class ArrowRows:
    """An Arrow IPC file or stream, memory-mapped; holds one record batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), pa.memory_map(str(path)) as source:
            self.schema = plain_schema(_arrow_reader(source).schema)
        self.num_rows = sum(batch.num_rows for batch in self.batches())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order."""
        with reading(self.path), pa.memory_map(str(self.path)) as source:
            reader = _arrow_reader(source)
            if isinstance(reader, pa.RecordBatchFileReader):
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader


def _arrow_reader(source: Any) -> Any:
    is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
