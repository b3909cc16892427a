"""A row's identity is what it holds and how it is sampled, and nothing about where it stands."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from runner.data import Dataset
from runner.data.digests import RowIds
from runner.errors import DataError
from runner.rows import NamedRow, RowNamer, are_done, check_ids
from runner.types import SamplingParams

ROWS = [
    {"prompt": f"row {i % 5}", "answer": str(i % 7), "tags": [{"name": None, "n": i % 2}]}
    for i in range(40)
]


def named(
    path: Path, rows: list[dict[str, Any]], *, params: Any = None, **data: Any
) -> list[NamedRow]:
    dataset = Dataset(path=str(write_jsonl(path / "rows.jsonl", rows)), **data)
    return list(RowNamer(dataset, SamplingParams(**(params or {})), are_unique=False))


def ids(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    return [it.row_id for it in named(path, rows, **options)]


@given(seed=st.integers(0, 10**6), keep=st.integers(1, 40))
def test_rows_inserted_removed_and_reordered_change_no_other_row(
    tmp_path_factory: pytest.TempPathFactory, seed: int, keep: int
) -> None:
    place = tmp_path_factory.mktemp("rows")
    before = {it.row_id: it.row for it in named(place, ROWS)}
    assert len(before) == len(ROWS)
    changed = random.Random(seed).sample(ROWS, keep)
    changed.insert(keep // 2, {"prompt": "new", "answer": "row", "tags": []})
    after = {it.row_id: it.row for it in named(place, changed)}
    assert len(after) == keep + 1
    shared = before.keys() & after.keys()
    assert len(shared) == keep
    assert all(before[name] == after[name] for name in shared), "what was done is what is there"


def test_rows_that_are_alike_in_everything_are_told_apart_by_their_occurrence(
    tmp_path: Path,
) -> None:
    twice = named(tmp_path, [ROWS[0], ROWS[1], ROWS[0]])
    assert [it.row_id[-2:] for it in twice] == ["-0", "-0", "-1"]
    assert len({it.key for it in twice}) == 3


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.5}, {"n": 2}, {"seed": 1}, {"stop": ("x",)}, {"logit_bias": {1: 2.0}}],
)
def test_what_samples_otherwise_has_another_name_and_the_same_draws(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    one, other = named(tmp_path, ROWS), named(tmp_path, ROWS, params=params)
    assert not {it.row_id for it in one} & {it.row_id for it in other}
    assert [it.key for it in one] == [it.key for it in other]
    assert ids(tmp_path, ROWS, params={"logprobs": 3}) == [it.row_id for it in one]


def test_another_template_system_prompt_or_column_is_another_row(tmp_path: Path) -> None:
    ways = [
        {},
        {"prompt_template": "{{ prompt }}!"},
        {"prompt_column": "answer"},
        {"chat": True},
        {"chat": True, "system_prompt": "be kind"},
    ]
    assert len({ids(tmp_path, ROWS[:1], **way)[0] for way in ways}) == len(ways)
    other = [ROWS[0] | {"answer": "another"}]
    assert ids(tmp_path, ROWS[:1]) != ids(tmp_path, other), "its results would have the old column"


def test_the_same_rows_in_another_format_have_the_same_names(tmp_path: Path) -> None:
    one = ids(tmp_path, ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    dataset = Dataset(path=str(tmp_path / "rows.parquet"))
    assert one == [it.row_id for it in RowNamer(dataset, SamplingParams(), are_unique=False)]


def test_a_row_without_a_prompt_has_a_name_and_a_reason(tmp_path: Path) -> None:
    good, bad = named(tmp_path, [ROWS[0], ROWS[1] | {"prompt": None}])
    assert good.prompt is not None and good.error is None
    assert bad.prompt is None and "null" in str(bad.error) and bad.row_id


def test_an_id_column_names_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "id": 3}, {"prompt": "a", "id": 4}]
    found = named(tmp_path, rows, id_column="id", params={"temperature": 0.3})
    assert [(it.row_id, it.key) for it in found] == [("3", "3"), ("4", "4")]


IDS = ["a", "b", "c", "a", "d", "b", "a", "e", "e", "f", "f", "a"]


def test_ids_that_repeat_are_shown_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "id": it} for it in IDS]
    dataset = Dataset(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), id_column="id")
    with pytest.raises(DataError) as raised:
        check_ids(dataset)
    assert str(raised.value) == (
        "id_column=id: 'a' names rows 1, 4, 7 and 1 more; 'b' names rows 2, 6; "
        "'e' names rows 8, 9; and 1 more; give each row its own"
    )
    with pytest.raises(DataError, match="row 4 is 'a', as an earlier one is"):
        list(RowNamer(dataset, SamplingParams(), are_unique=False))


def test_ids_that_are_null_are_shown_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "id": it} for it in ["a", None, "b", None]]
    dataset = Dataset(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), id_column="id")
    with pytest.raises(DataError, match="id_column=id: null in rows 2, 4; give"):
        check_ids(dataset)
    with pytest.raises(DataError, match="row 2 is null"):
        list(RowNamer(dataset, SamplingParams(), are_unique=True))
    whole = [{"prompt": "p", "id": it} for it in "abc"]
    check_ids(Dataset(path=str(write_jsonl(tmp_path / "whole.jsonl", whole)), id_column="id"))


def test_whether_all_are_done(tmp_path: Path) -> None:
    rows = named(tmp_path, ROWS)
    assert are_done(rows, RowIds(it.row_id for it in rows))
    assert not are_done(rows, RowIds(it.row_id for it in rows[1:]))
