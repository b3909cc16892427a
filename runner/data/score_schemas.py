"""What a result row of a job that scores or embeds looks like, and which columns are added up."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

SUMMED = b"summed"
"""Key of the metadata of a field whose count, mean and spread `summary.Totals` keeps."""

BY_ADAPTER = b"by_adapter"
"""Key of the metadata of the field `adapter`: they are kept for each adapter as well."""


def _summed(name: str, kind: pa.DataType, **metadata: str) -> pa.Field:
    return pa.field(name, kind, metadata={SUMMED.decode(): "true"} | metadata)


_MODEL = "model: before temperature and truncation; null for a token that nothing precedes"

_TOKENS = (
    pa.field("token_ids", pa.list_(pa.int32())),
    _summed("logprobs", pa.list_(pa.float32()), distribution=_MODEL),
    pa.field("sum_logprob", pa.float64()),
    pa.field("num_scored", pa.int64()),
)

_ROW = (pa.field("model", pa.string()), pa.field("adapter", pa.string()), pa.field(
    "adapter_digest", pa.string()
), pa.field("error", pa.struct(
    [("type", pa.string()), ("message", pa.string())]
)))  # fmt: skip

PERPLEXITY_FIELDS: tuple[pa.Field, ...] = (
    pa.field("row_id", pa.string()),
    *_TOKENS,
    _summed("num_tokens", pa.int64()),
    _summed("num_words", pa.int64()),
    _summed("num_bytes", pa.int64()),
    *_ROW,
)
"""The columns of `runner perplexity`, a row per document; the input's own columns follow."""

SCORE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("row_id", pa.string()),
    pa.field("choice", pa.int32()),
    pa.field("text", pa.string()),
    *_TOKENS,
    pa.field("is_greedy", pa.bool_()),
    pa.field("logprob_per_token", pa.float64()),
    pa.field("logprob_per_byte", pa.float64()),
    pa.field("is_chosen", pa.bool_()),
    pa.field("is_chosen_per_token", pa.bool_()),
    pa.field("is_chosen_per_byte", pa.bool_()),
    _summed("is_correct", pa.bool_()),
    _summed("is_correct_per_token", pa.bool_()),
    _summed("is_correct_per_byte", pa.bool_()),
    *_ROW,
)
"""The columns of `runner score`, a row per continuation; the input's own columns follow."""


def embedding_fields(made: Mapping[str, Any]) -> list[pa.Field]:
    """The columns of `runner embed`, a row per text; the input's own columns follow.

    `made` says how the vectors came to be, for whoever reads the file.
    """
    metadata = {name: json.dumps(value) for name, value in made.items()}
    return [
        pa.field("row_id", pa.string()),
        pa.field("embedding", pa.list_(pa.float32()), metadata=metadata),
        _summed("num_tokens", pa.int64()),
        *_ROW,
    ]


def by_adapter(fields: Sequence[pa.Field]) -> list[pa.Field]:
    """The same columns, of which those that are added up are for each adapter as well."""
    metadata = {BY_ADAPTER.decode(): "true"}
    return [it.with_metadata(metadata) if it.name == "adapter" else it for it in fields]
