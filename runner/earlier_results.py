"""The completions of an earlier run, found again by row or by prompt."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from runner.data.locations import open_source
from runner.errors import DataError, ParameterError
from runner.types import Request

_COLUMNS: dict[str, str] = {
    "row_id": "text",
    "sample_index": "an integer",
    "prompt_token_ids": "a list of integers",
    "completion_token_ids": "a list of integers",
}


def _fits(kind: pa.DataType, what: str) -> bool:
    if what == "text":
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if what == "an integer":
        return bool(pa.types.is_integer(kind))
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


class EarlierResults:
    """Token ids of result rows; four bytes each, and some 300 for the row."""

    def __init__(self, path: str) -> None:
        """Reads the results of a job: its directory, or a merged file.

        Raises:
            ParameterError: there are none, or they are not those of a job that samples.
        """
        try:
            source = open_source(path, name=None, split=None)
        except DataError as error:
            raise ParameterError(f"speculative.from={path} is not allowed: {error}") from error
        _check(path, source.schema)
        self._by_row: dict[tuple[str, int], array[int]] = {}
        self._by_prompt: dict[tuple[bytes, int], array[int]] = {}
        for row in source.rows(offset=0, limit=None, shuffle_seed=None):
            self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        if row["completion_token_ids"] is None:
            return
        token_ids, index = array("i", row["completion_token_ids"]), row["sample_index"]
        self._by_row[row["row_id"], index] = token_ids
        self._by_prompt[_digest(row["prompt_token_ids"]), index] = token_ids

    def __len__(self) -> int:
        return len(self._by_row)

    def __call__(self, request: Request, index: int) -> Sequence[int] | None:
        """What sample `index` of the row had, or of one with its prompt; None where it was not."""
        found = self._by_row.get((request.request_id, index))
        if found is None:
            found = self._by_prompt.get((_digest(request.prompt_token_ids), index))
        return found


def _digest(token_ids: Sequence[int]) -> bytes:
    return blake2b(array("i", token_ids).tobytes(), digest_size=16).digest()


def _check(path: str, schema: pa.Schema) -> None:
    for name, what in _COLUMNS.items():
        given = f"speculative.from={path} is not allowed"
        if name not in schema.names:
            there = ", ".join(schema.names[:8])
            raise ParameterError(
                f"{given}: it has no column {name}, as the results of generate and rollout have; "
                f"there are {there}"
            )
        kind = schema.field(name).type
        if not _fits(kind, what):
            raise ParameterError(f"{given}: its column {name} is {kind}, not {what}")
