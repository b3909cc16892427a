"""The same rows give the same dicts from every format, lazily, and errors say what to do."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.data import Dataset
from runner.errors import DataError, ParameterError

Row = dict[str, Any]
Write = Callable[[Path, list[Row]], Path]

ROWS: list[Row] = [
    {"id": f"row-{i}", "prompt": f"What is {i} plus {i}?", "answer": i * 2, "when": "2024-01-01"}
    for i in range(10)
]


def write_jsonl(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_gzip(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def write_parquet(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def write_arrow_file(folder: Path, rows: list[Row]) -> Path:
    path = folder / "file.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_arrow_stream(folder: Path, rows: list[Row]) -> Path:
    path = folder / "stream.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


WRITERS = (write_jsonl, write_gzip, write_parquet, write_arrow_file, write_arrow_stream)
every_format = pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__[6:])


def dataset(path: Path | str, **options: Any) -> Dataset:
    return Dataset(path=str(path), **options)


@every_format
def test_all_formats_give_equal_rows_again_and_again(tmp_path: Path, write: Write) -> None:
    rows = dataset(write(tmp_path, ROWS))
    assert list(rows) == ROWS
    assert list(rows) == ROWS
    assert rows.num_rows == 10
    assert rows.columns == ["id", "prompt", "answer", "when"]
    assert rows.schema.field("when").type == pa.string()


@every_format
def test_missing_keys_are_null_also_inside_messages(tmp_path: Path, write: Write) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "score": 1.0, "more": None},
        {"messages": [{"role": "user", "content": "b", "name": "Ann"}], "score": None, "more": "x"},
        {"messages": [], "score": 2.5, "more": None},
    ]
    given = [{k: v for k, v in row.items() if v is not None} for row in rows]
    table_rows = rows if write in (write_parquet, write_arrow_file, write_arrow_stream) else given
    read = list(dataset(write(tmp_path, table_rows)))
    assert read[0]["messages"] == [{"role": "user", "content": "a", "name": None}]
    assert read[1]["messages"] == [{"role": "user", "content": "b", "name": "Ann"}]
    assert [row["score"] for row in read] == [1.0, None, 2.5]
    assert [row["more"] for row in read] == [None, "x", None]


SCALARS = st.one_of(st.text(max_size=5), st.none())
NUMBERS = st.integers(-(2**53), 2**53)
HYPOTHETICAL_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.text(min_size=1, max_size=8),
            "ids": st.lists(NUMBERS, max_size=3),
            "number": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
            "flag": st.booleans(),
            "nested": st.fixed_dictionaries({"a": SCALARS, "b": st.lists(SCALARS, max_size=2)}),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=HYPOTHETICAL_ROWS)
def test_any_rows_are_equal_as_parquet_and_json_lines(tmp_path: Path, rows: list[Row]) -> None:
    try:
        pa.Table.from_pylist(rows)
    except UnicodeEncodeError:
        return
    parquet = list(dataset(write_parquet(tmp_path, rows)))
    assert parquet == list(dataset(write_jsonl(tmp_path, rows)))
    assert parquet == list(dataset(write_gzip(tmp_path, rows)))


@every_format
@pytest.mark.parametrize(
    ("offset", "limit"), [(0, None), (0, 3), (4, None), (4, 3), (9, 5), (3, 0), (2, 100)]
)
def test_offset_and_limit_are_a_slice(
    tmp_path: Path, write: Write, offset: int, limit: int | None
) -> None:
    expected = ROWS[offset:] if limit is None else ROWS[offset : offset + limit]
    rows = dataset(write(tmp_path, ROWS), offset=offset, limit=limit)
    assert list(rows) == expected
    assert rows.num_rows == len(expected)


@every_format
def test_shuffling_is_a_permutation_that_the_seed_decides(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, ROWS)
    order = [row["id"] for row in dataset(path, shuffle_seed=7)]
    assert sorted(order) == [row["id"] for row in ROWS]
    assert order == [row["id"] for row in dataset(path, shuffle_seed=7)]
    assert order != [row["id"] for row in dataset(path, shuffle_seed=8)]
    # By numpy.random.Generator(numpy.random.PCG64(7)).permutation(10).
    assert order == [f"row-{i}" for i in (8, 0, 7, 1, 3, 6, 2, 4, 5, 9)]


@every_format
def test_offset_and_limit_apply_after_shuffling(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, ROWS)
    everything = list(dataset(path, shuffle_seed=1))
    assert list(dataset(path, shuffle_seed=1, offset=3, limit=4)) == everything[3:7]


@pytest.mark.parametrize("window", [1, 3, 10, 64])
def test_the_shuffle_window_does_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    path = write_parquet(tmp_path, ROWS)
    expected = list(dataset(path, shuffle_seed=3))
    monkeypatch.setattr("runner.data.sources.SHUFFLE_WINDOW", window)
    assert list(dataset(path, shuffle_seed=3)) == expected


def test_more_rows_than_one_batch(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "n": i} for i in range(3000)]
    for write in WRITERS:
        path = write(tmp_path, rows)
        assert list(dataset(path)) == rows
        assert list(dataset(path, offset=1020, limit=1010)) == rows[1020:2030]
        shuffled = list(dataset(path, shuffle_seed=0))
        assert shuffled != rows
        assert sorted(shuffled, key=lambda row: row["n"]) == rows


def test_rows_are_read_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.jsonl.BATCH_ROWS", 2)
    path = write_jsonl(tmp_path, ROWS)
    rows = iter(dataset(path))
    assert next(rows) == ROWS[0]
    # Broken after it was opened: only what was read ahead is still right.
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]) + "{broken\n")
    with pytest.raises(DataError, match="line 5: not valid JSON"):
        list(dataset(path))
    rows.close()


def test_input_that_is_larger_than_memory_may_grow_as_it_likes(tmp_path: Path) -> None:
    path = tmp_path / "big.arrow"
    schema = pa.schema([("prompt", pa.string())])
    batch = pa.RecordBatch.from_pylist([{"prompt": "x" * 1000}] * 1000, schema=schema)
    with pa.ipc.new_file(path, schema) as writer:
        for _ in range(50):
            writer.write_batch(batch)
    before = pa.total_allocated_bytes()
    most = 0
    for count, _ in enumerate(dataset(path), start=1):
        most = max(most, pa.total_allocated_bytes() - before) if count % 500 == 0 else most
    assert count == 50_000
    assert most < 5_000_000


def test_a_directory_is_its_files_in_order_and_ignores_the_rest(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), tmp_path / "b.parquet")
    write_jsonl(tmp_path, ROWS[:5]).rename(tmp_path / "a.jsonl")
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / ".part.jsonl").write_text("{broken")
    assert list(dataset(tmp_path)) == ROWS
    assert list(dataset(tmp_path / "*.parquet")) == ROWS[5:]
    assert list(dataset(tmp_path, offset=4, limit=2)) == ROWS[4:6]
    assert sorted(row["answer"] for row in dataset(tmp_path, shuffle_seed=0)) == [
        row["answer"] for row in ROWS
    ]


def test_files_with_other_columns_are_unified(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"prompt": "a", "x": 1}]).rename(tmp_path / "1.jsonl")
    write_jsonl(tmp_path, [{"prompt": "b", "x": 0.5, "y": [1]}]).rename(tmp_path / "2.jsonl")
    rows = dataset(tmp_path)
    assert rows.schema.field("x").type == pa.float64()
    assert list(rows) == [
        {"prompt": "a", "x": 1.0, "y": None},
        {"prompt": "b", "x": 0.5, "y": [1]},
    ]


def test_files_that_disagree_are_named_with_the_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"prompt": "a", "x": 1}]).rename(tmp_path / "1.jsonl")
    write_jsonl(tmp_path, [{"prompt": "b", "x": "one"}]).rename(tmp_path / "2.jsonl")
    with pytest.raises(DataError, match=r"2\.jsonl: column 'x' is string, .* int64"):
        dataset(tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.arrow"
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="two columns have one name"):
        dataset(path)


def test_dictionary_columns_are_read_as_their_values(tmp_path: Path) -> None:
    path = tmp_path / "categories.arrow"
    table = pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode()})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    rows = dataset(path)
    assert rows.schema.field("prompt").type == pa.string()
    assert [row["prompt"] for row in rows] == ["a", "b", "a"]


def test_large_types_are_kept(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.large_string()), ("ids", pa.large_list(pa.int64()))])
    table = pa.Table.from_pylist([{"prompt": "a", "ids": [1]}], schema=schema)
    pq.write_table(table, tmp_path / "large.parquet")
    rows = dataset(tmp_path / "large.parquet", token_ids_column="ids")
    assert rows.schema == schema


def test_all_options_are_public_attributes(tmp_path: Path) -> None:
    options = {
        "id_column": "id",
        "prompt_column": "prompt",
        "chat": True,
        "system_prompt": "Be brief.",
        "chat_template_kwargs": {"enable_thinking": False},
        "tools_column": "prompt",
        "limit": 4,
        "offset": 1,
        "shuffle_seed": 3,
    }
    rows = dataset(write_jsonl(tmp_path, ROWS), **options)
    assert {name: getattr(rows, name) for name in options} == options
    assert rows.name is None and rows.split is None


@pytest.mark.parametrize("option", ["limit", "offset", "shuffle_seed"])
def test_negative_numbers_are_not_allowed(tmp_path: Path, option: str) -> None:
    with pytest.raises(ParameterError, match=f"{option}=-1"):
        dataset(write_jsonl(tmp_path, ROWS), **{option: -1})


def test_an_offset_past_the_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="offset=10 skips all of its 10 rows"):
        dataset(write_jsonl(tmp_path, ROWS), offset=10)


@pytest.mark.parametrize("write", [write_jsonl, write_gzip])
def test_data_without_rows_is_an_error(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="has no rows"):
        dataset(write(tmp_path, []))


@pytest.mark.parametrize("option", ["id_column", "prompt_column", "messages_column"])
def test_a_column_that_is_not_there_lists_those_that_are(tmp_path: Path, option: str) -> None:
    options = {"prompt_column": "prompt"} if option == "id_column" else {}
    message = f"{option}='nope' is not a column; there are id, prompt, answer, when"
    with pytest.raises(DataError, match=message):
        dataset(write_jsonl(tmp_path, ROWS), **{**options, option: "nope"})


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"prompt_column": "answer"}, "int64, not text"),
        ({"messages_column": "prompt"}, "string, not a list of {role, content}"),
        ({"token_ids_column": "prompt"}, "string, not a list of integers"),
        ({"token_ids_column": "floats"}, r"list<.*: double>, not a list of integers"),
        ({"prompt_column": "prompt", "id_column": "floats"}, "not text or an integer"),
    ],
)
def test_a_column_of_the_wrong_type_names_it(
    tmp_path: Path, options: dict[str, str], kind: str
) -> None:
    rows = [{"prompt": "a", "answer": 1, "floats": [0.5]}]
    with pytest.raises(DataError, match=kind):
        dataset(write_jsonl(tmp_path, rows), **options)


def test_only_one_prompt_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, ROWS)
    with pytest.raises(ParameterError, match="prompt_column and prompt_template exclude"):
        dataset(path, prompt_column="prompt", prompt_template="{{ prompt }}")


def test_without_a_prompt_source_prompt_or_messages_is_taken(tmp_path: Path) -> None:
    assert dataset(write_jsonl(tmp_path, ROWS)).prompt_column == "prompt"
    chats = [{"messages": [{"role": "user", "content": "a"}]}]
    assert dataset(write_jsonl(tmp_path, chats)).messages_column == "messages"
    with pytest.raises(DataError, match=r"token_ids_column, prompt_template \(columns: question"):
        dataset(write_jsonl(tmp_path, [{"question": "a"}]))
    template = dataset(write_jsonl(tmp_path, ROWS), prompt_template="{{ id }}")
    assert template.prompt_column is None


def test_a_prompt_column_that_holds_messages_is_a_messages_column(tmp_path: Path) -> None:
    rows = dataset(write_parquet(tmp_path, [{"prompt": [{"role": "user", "content": "a"}]}]))
    assert (rows.prompt_column, rows.messages_column) == (None, "prompt")
