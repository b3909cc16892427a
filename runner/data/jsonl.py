"""JSON lines as record batches, with the types that the values have in JSON.

Arrow's own JSON reader is not used: it turns text that looks like a date into a timestamp.
"""

import codecs
import gzip
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, cast

import pyarrow as pa

from runner.data.formats import BATCH_ROWS, reading
from runner.data.schemas import common_type
from runner.errors import DataError

Row = dict[str, Any]

_SCALARS = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


class MixedTypesError(Exception):
    """Values of one column have no common type; becomes a `DataError` with file and line."""


class JsonlRows:
    """A .jsonl or .jsonl.gz file; opening reads it once, in chunks, for types and row count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        types: dict[str, pa.DataType] = {}
        for lines in self._chunks():
            self.num_rows += len(lines)
            self._widen(types, lines)
        self.schema = pa.schema(list(types.items()))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order; a key that a line lacks is null."""
        for lines in self._chunks():
            rows = [row for _, row in lines]
            try:
                yield pa.RecordBatch.from_pylist(rows, schema=self.schema)
            except (pa.ArrowException, UnicodeError) as error:
                where = f"{self.path}, lines {lines[0][0]} to {lines[-1][0]}"
                raise DataError(f"{where}: {_first_line(error)}") from error

    def _chunks(self) -> Iterator[list[tuple[int, Row]]]:
        chunk: list[tuple[int, Row]] = []
        for line in self._lines():
            chunk.append(line)
            if len(chunk) == BATCH_ROWS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _lines(self) -> Iterator[tuple[int, Row]]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        with reading(self.path), cast(BinaryIO, opener(self.path, "rb")) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, self._parsed(number, line)

    def _parsed(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.path}, line {number}: a {type(row).__name__}, where every line "
                "has to be an object of columns"
            )
        return row

    def _widen(self, types: dict[str, pa.DataType], lines: list[tuple[int, Row]]) -> None:
        for name in dict.fromkeys(chain.from_iterable(row for _, row in lines)):
            known = types.get(name, pa.null())
            try:
                found = common_type(known, json_type([row.get(name) for _, row in lines]))
            except MixedTypesError:
                found = None
            if found is None:
                raise self._mixed(name, known, lines)
            types[name] = found

    def _mixed(self, name: str, known: pa.DataType, lines: list[tuple[int, Row]]) -> DataError:
        """Finds the first line of a chunk whose value does not fit those before it."""
        for number, row in lines:
            where = f"{self.path}, line {number}: column {name!r}"
            try:
                found = json_type([row.get(name)])
            except MixedTypesError as error:
                return DataError(f"{where} {error}; give it one type")
            common = common_type(known, found)
            if common is None:
                return DataError(f"{where} is {found}, before it {known}; give it one type")
            known = common
        raise AssertionError("a chunk has no common type, but each of its lines fits")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def json_type(values: list[Any]) -> pa.DataType:
    """Returns the Arrow type that holds values parsed from JSON, nested ones included.

    Unlike Arrow's inference it does not depend on the order of the values and never takes a
    boolean for a number. Raises `MixedTypesError`.
    """
    kinds = set(map(type, values)) - {NoneType}
    if not kinds:
        return pa.null()
    if kinds == {int, float}:
        return pa.float64()
    if len(kinds) > 1:
        raise MixedTypesError(f"mixes {' and '.join(sorted(k.__name__ for k in kinds))}")
    kind = kinds.pop()
    present = [value for value in values if value is not None]
    if kind is list:
        return pa.list_(json_type(list(chain.from_iterable(present))))
    if kind is dict:
        names = dict.fromkeys(chain.from_iterable(present))
        return pa.struct([(name, json_type([v.get(name) for v in present])) for name in names])
    if kind is int and not -(2**63) <= min(present) <= max(present) < 2**63:
        raise MixedTypesError("has an integer outside of 64 bits")
    return _SCALARS[kind]
