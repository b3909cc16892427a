"""JSON lines: types are found whatever the order of the values, and errors name the line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.jsonl import JsonlRows, MixedTypesError, json_type
from runner.errors import DataError


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for batch in JsonlRows(path).batches() for row in batch.to_pylist()]


def written(folder: Path, *lines: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([None], pa.null()),
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        (["2024-01-01", None], pa.string()),
        ([True, False], pa.bool_()),
        ([[]], pa.list_(pa.null())),
        ([[], [1], [2.5]], pa.list_(pa.float64())),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([[{"a": None}], [{"a": 1}]], pa.list_(pa.struct([("a", pa.int64())]))),
    ],
)
def test_types(values: list[Any], expected: pa.DataType) -> None:
    assert json_type(values) == expected
    if not isinstance(values[0], dict):
        assert json_type(values[::-1]) == expected


@pytest.mark.parametrize(
    "values",
    [[1, "a"], [1.5, True], [True, 1], [[1], 1], [{"a": 1}, {"a": "x"}], [[1, "a"]], [2**63]],
)
def test_mixed_types_have_none_in_any_order(values: list[Any]) -> None:
    for order in (values, values[::-1]):
        with pytest.raises(MixedTypesError):
            json_type(order)


JSON_VALUES = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=3).filter(lambda t: t.isprintable()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=6,
)


@given(value=JSON_VALUES)
def test_a_type_holds_the_value_it_was_found_for(value: Any) -> None:
    try:
        kind = json_type([value])
    except MixedTypesError:
        return
    assert pa.array([value], kind).type == kind


def test_blank_lines_byte_order_mark_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}'.encode())
    assert rows_of(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert JsonlRows(path).num_rows == 3


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path, {"a": "2024-01-01 00:00:00"})) == [
        {"a": "2024-01-01 00:00:00"}
    ]


def test_a_column_that_appears_late_is_found(tmp_path: Path) -> None:
    lines = [{"a": 1}] * 2000 + [{"a": 0.5, "b": {"c": [1]}}]
    rows = rows_of(written(tmp_path, *lines))
    assert rows[0] == {"a": 1.0, "b": None}
    assert isinstance(rows[0]["a"], float)
    assert rows[-1] == {"a": 0.5, "b": {"c": [1]}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"a": 1}, "{broken"], "line 2: not valid JSON"),
        ([{"a": 1}, "", [1, 2]], "line 3: a list, where every line has to be an object"),
        ([{"a": 1}, "null"], "line 2: a NoneType"),
        ([{"a": 1}, {"a": None}, {"a": "x"}], "line 3: column 'a' is string, before it int64"),
        ([{"a": 0.5}, {"a": True}], "line 2: column 'a' is bool, before it double"),
        ([{"a": [1, "x"]}], "line 1: column 'a' mixes int and str"),
        ([{"a": 2**70}], "line 1: column 'a' has an integer outside of 64 bits"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, {message}"):
        JsonlRows(written(tmp_path, *lines))


def test_mixed_types_are_found_across_chunks(tmp_path: Path) -> None:
    path = written(tmp_path, *([{"a": 1}] * 1500), {"a": "x"})
    with pytest.raises(DataError, match="line 1501: column 'a' is string, before it int64"):
        JsonlRows(path)


def test_bytes_that_are_no_text_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        JsonlRows(path)


@pytest.mark.parametrize("value", ['"\\ud800"', "9007199254740993"])
def test_a_value_that_arrow_cannot_hold_names_the_lines(tmp_path: Path, value: str) -> None:
    other = '"x"' if value.startswith('"') else "0.5"
    path = written(tmp_path, f'{{"a": {other}}}', f'{{"a": {value}}}')
    with pytest.raises(DataError, match="lines 1 to 2"):
        rows_of(path)


@pytest.mark.parametrize("keep", [5, -6])
def test_a_damaged_gzip_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:keep])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
        JsonlRows(path)


def test_what_is_no_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="cannot be read"):
        JsonlRows(path)
