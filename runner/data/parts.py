"""Part files of result rows: written whole, checked against the manifest, read without a copy."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from runner.data.digests import DIGEST_BYTES
from runner.data.durable import replace_file
from runner.data.manifest import Part
from runner.data.summary import Totals
from runner.errors import OutputError

PART_PATTERN = "part-*.arrow"


def write_part(directory: Path, name: str, table: pa.Table) -> Part:
    """Writes rows as an Arrow IPC file of one record batch; raises OSError where that fails."""
    content = arrow_bytes(table)
    replace_file(directory / name, lambda file: _write(file, content))
    totals = Totals.of(table)
    return Part(
        file=name,
        rows=table.num_rows,
        groups=totals.rows,
        bytes=content.size,
        digest=hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest(),
        totals=totals.as_json(),
    )


def arrow_bytes(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow IPC file of one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def damage(directory: Path, part: Part) -> str | None:
    """What is wrong with a part that the manifest lists; None where it is as it was written.

    Reads the whole file: a change in its middle leaves its size as it was.
    """
    path = directory / part.file
    try:
        size = path.stat().st_size
        if size != part.bytes:
            return f"it has {size} bytes and not {part.bytes}"
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES))
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if found.hexdigest() == part.digest else "its content has changed"


@contextmanager
def reading(directory: Path, part: Part) -> Iterator[pa.Table]:
    """The rows of a part, memory-mapped: a column that is not looked at is not read."""
    path = directory / part.file
    try:
        with pa.memory_map(str(path)) as file:
            yield pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{path}: cannot be read ({error}); choose another directory") from error


def _write(file: Any, content: pa.Buffer) -> None:
    file.write(content)
