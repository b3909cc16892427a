"""Rows of options and numbers -> a Parquet file with a type for each column."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from runner.data.durable import replace_file

Row: TypeAlias = dict[str, Any]


def typed_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A column for every key, null where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Sequence[Any]) -> pa.Array:
    """Values of one type, or else as they are written on a command line."""
    is_flag = [isinstance(value, bool) for value in values if value is not None]
    try:
        if any(is_flag) == all(is_flag):
            return pa.array(values)
    except pa.ArrowException:
        pass
    return pa.array([None if it is None else _written(it) for it in values], pa.string())


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a file that is there whole or not at all; raises OSError where that fails."""

    def write(file: BinaryIO) -> None:
        pq.write_table(table, file)

    replace_file(path, write)
