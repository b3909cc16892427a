"""Arrow schemas: how input columns are read, and what a result row looks like."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

RESULT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("row_id", pa.string()),
    pa.field("group_id", pa.string()),
    pa.field("sample_index", pa.int32()),
    pa.field("prompt", pa.string()),
    pa.field("prompt_token_ids", pa.list_(pa.int32())),
    pa.field("completion_token_ids", pa.list_(pa.int32())),
    pa.field("text", pa.string()),
    pa.field(
        "logprobs",
        pa.list_(pa.float32()),
        metadata={"distribution": "processed: what was sampled from"},
    ),
    pa.field(
        "raw_logprobs",
        pa.list_(pa.float32()),
        metadata={"distribution": "model: before temperature and truncation"},
    ),
    pa.field(
        "prompt_logprobs",
        pa.list_(pa.float32()),
        metadata={"distribution": "model: of each prompt token, null for the first"},
    ),
    pa.field("finish_reason", pa.string()),
    pa.field("stop_reason", pa.string()),
    pa.field("num_drafted", pa.int32()),
    pa.field("num_accepted", pa.int32()),
    pa.field("temperature", pa.float64()),
    pa.field("seed", pa.int64()),
    pa.field("model", pa.string()),
    pa.field("adapter", pa.string()),
    pa.field("adapter_digest", pa.string()),
    pa.field(
        "weight_versions",
        pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int32()), ("end", pa.int32())])),
        metadata={"spans": "tokens of the completion, and the version of the weights they are of"},
    ),
    pa.field("reward", pa.float64()),
    pa.field("advantage", pa.float64()),
    pa.field("error", pa.struct([("type", pa.string()), ("message", pa.string())])),
)
"""The columns of every result; the input's own columns follow them."""

ECHO_FIELDS: tuple[pa.Field, ...] = (
    *RESULT_FIELDS,
    pa.field(
        "text_offsets",
        pa.list_(pa.int32()),
        metadata={"unit": "characters of text, for each token of the prompt and the completion"},
    ),
)
"""The columns of results whose text has the prompt in it."""

RESULT_COLUMNS = frozenset(field.name for field in RESULT_FIELDS)


def passthrough_names(
    columns: Iterable[str], fields: Sequence[pa.Field] = RESULT_FIELDS
) -> dict[str, str]:
    """Maps input columns to result columns: one that `fields` has becomes `input_<name>`."""
    columns, ours = list(columns), {field.name for field in fields}
    taken = ours.union(columns)
    names = {}
    for column in columns:
        name = column
        while name in ours or (name != column and name in taken):
            name = f"input_{name}"
        names[column] = name
        taken |= {name}
    return names


def result_schema(passthrough: pa.Schema, fields: Sequence[pa.Field] = RESULT_FIELDS) -> pa.Schema:
    """Returns the schema of the results of rows with the schema `passthrough`."""
    names = passthrough_names(passthrough.names, fields)
    return pa.schema([*fields, *(pa.field(names[f.name], f.type) for f in passthrough)])


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Drops what belongs to the file and not to its rows: metadata and dictionary encoding."""
    return pa.schema([pa.field(field.name, _decoded(field.type)) for field in schema])


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Returns the type that holds both, such as double for int64 and double; None without one."""
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Gives a batch the columns and types of `schema`; a column it lacks is null."""
    if batch.schema.equals(schema):
        return batch
    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
