"""The columns of results, what becomes of the input's, and which types have a common one."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.schemas import (
    RESULT_COLUMNS,
    common_type,
    conform,
    passthrough_names,
    plain_schema,
    result_schema,
)

COLUMN_NAMES = st.lists(
    st.sampled_from(["prompt", "input_prompt", "input_input_prompt", "text", "a", "b"]),
    unique=True,
)


def test_the_result_columns_and_their_types() -> None:
    schema = result_schema(pa.schema([]))
    assert {field.name: str(field.type) for field in schema} == {
        "row_id": "string",
        "group_id": "string",
        "sample_index": "int32",
        "prompt": "string",
        "prompt_token_ids": "list<item: int32>",
        "completion_token_ids": "list<item: int32>",
        "text": "string",
        "logprobs": "list<item: float>",
        "raw_logprobs": "list<item: float>",
        "prompt_logprobs": "list<item: float>",
        "finish_reason": "string",
        "stop_reason": "string",
        "num_drafted": "int32",
        "num_accepted": "int32",
        "temperature": "double",
        "seed": "int64",
        "model": "string",
        "adapter": "string",
        "adapter_digest": "string",
        "weight_versions": "list<item: struct<version: int64, start: int32, end: int32>>",
        "reward": "double",
        "advantage": "double",
        "error": "struct<type: string, message: string>",
    }


def test_each_logprobs_column_says_which_distribution_it_is_from() -> None:
    schema = result_schema(pa.schema([]))
    assert b"processed" in schema.field("logprobs").metadata[b"distribution"]
    assert b"model" in schema.field("raw_logprobs").metadata[b"distribution"]
    assert b"model" in schema.field("prompt_logprobs").metadata[b"distribution"]


def test_input_columns_follow_with_their_types() -> None:
    given_fields = [
        pa.field("prompt", pa.large_string()),
        pa.field("ids", pa.large_list(pa.int64())),
        pa.field("none", pa.null(), metadata={"PARQUET:field_id": "3"}),
    ]
    schema = result_schema(pa.schema(given_fields, metadata={"huggingface": "{}"}))
    assert schema.metadata is None
    assert list(schema)[-3:] == [
        pa.field("input_prompt", pa.large_string()),
        pa.field("ids", pa.large_list(pa.int64())),
        pa.field("none", pa.null()),
    ]


def test_names_that_collide_are_prefixed_until_they_are_free() -> None:
    assert passthrough_names(["answer", "prompt", "input_prompt", "text"]) == {
        "answer": "answer",
        "prompt": "input_input_prompt",
        "input_prompt": "input_prompt",
        "text": "input_text",
    }


@given(columns=COLUMN_NAMES)
def test_every_input_column_keeps_a_name_of_its_own(columns: list[str]) -> None:
    names = passthrough_names(columns)
    assert list(names) == columns
    assert len(set(names.values())) == len(columns)
    assert RESULT_COLUMNS.isdisjoint(names.values())
    assert all(names[column] == column for column in columns if column not in RESULT_COLUMNS)


def test_a_plain_schema_has_no_metadata_and_no_dictionaries() -> None:
    fields = [
        pa.field("a", pa.dictionary(pa.int8(), pa.string()), nullable=False, metadata={"x": "y"}),
        pa.field("b", pa.int64()),
    ]
    plain = plain_schema(pa.schema(fields, metadata={"pandas": "{}"}))
    expected = pa.schema([("a", pa.string()), ("b", pa.int64())])
    assert plain.equals(expected, check_metadata=True)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.null(), pa.list_(pa.string()), pa.list_(pa.string())),
        (pa.list_(pa.null()), pa.list_(pa.int64()), pa.list_(pa.int64())),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.int64(), None),
        (pa.bool_(), pa.int64(), None),
        (pa.list_(pa.int64()), pa.int64(), None),
    ],
)
def test_common_types_go_both_ways(
    one: pa.DataType, other: pa.DataType, expected: pa.DataType | None
) -> None:
    assert common_type(one, other) == expected
    assert common_type(other, one) == expected


def test_conform_adds_columns_and_widens_types() -> None:
    batch = pa.RecordBatch.from_pylist([{"b": [{"r": "x"}], "a": 1}, {"b": None, "a": 2}])
    inner = pa.list_(pa.struct([("r", pa.string()), ("name", pa.string())]))
    schema = pa.schema([("a", pa.float64()), ("b", inner), ("c", pa.list_(pa.int64()))])
    assert conform(batch, schema).schema == schema
    assert conform(batch, schema).to_pylist() == [
        {"a": 1.0, "b": [{"r": "x", "name": None}], "c": None},
        {"a": 2.0, "b": None, "c": None},
    ]
    assert conform(batch, batch.schema) is batch
