"""A directory of results -> what it says of each document, in the form that can be paired."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import polars as pl
import pyarrow as pa

from runner.data.manifest import Manifest
from runner.data.parts import reading
from runner.data.result_kinds import result_kind
from runner.data.schemas import RESULT_COLUMNS

Measures: TypeAlias = dict[str, pl.DataFrame]
"""By the name of the measure: rows of key, value and weight; the value is null where a document
has none. The number of a point is Σ value / Σ weight."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a number means."""

    title: str
    better: Literal["lower", "higher"] | None = None
    unit: str = "documents"
    """What is paired."""


MEASURES: dict[str, Measure] = {
    "bits_per_byte": Measure(title="bits per byte", better="lower"),
    "nats_per_byte": Measure(title="nats per byte", better="lower"),
    "nats_per_token": Measure(title="nats per token", better="lower"),
    "accuracy": Measure(title="accuracy", better="higher", unit="rows"),
    "accuracy_per_token": Measure(title="accuracy, per token", better="higher", unit="rows"),
    "accuracy_per_byte": Measure(title="accuracy, per byte", better="higher", unit="rows"),
    "mean_sum_logprob": Measure(title="logprob of a text", better="higher", unit="rows"),
    "mean_reward": Measure(title="mean reward", better="higher", unit="prompts"),
    "mean_completion_tokens": Measure(title="tokens per completion", unit="prompts"),
}
"""In the order of preference, where one is shown."""


def read_measures(directory: Path) -> Measures:
    """The measures of a directory's committed rows; none where it holds no such results."""
    manifest = Manifest.load(directory)
    if manifest is None or not manifest.parts:
        return {}
    with ExitStack() as stack:
        parts = [stack.enter_context(reading(directory, part)) for part in manifest.parts]
        return _measured(pa.concat_tables(parts))


def _measured(rows: pa.Table) -> Measures:
    kind = result_kind(rows.schema)
    if kind is None:
        return {}
    return {"samples": _sampled, "scores": _scored, "texts": _perplexity}[kind](rows)


def _perplexity(rows: pa.Table) -> Measures:
    """Per byte, for any tokenizer; per token, for documents that are made of the same ones."""
    table = pl.DataFrame(rows.select(["row_id", "sum_logprob", "num_scored", "num_bytes"]))
    nats = (
        pl.when(pl.col("sum_logprob").is_finite())
        .then(-pl.col("sum_logprob"))
        .cast(pl.Float64)
        .alias("value")
    )
    keyed = table.with_columns(nats).rename({"row_id": "key"})
    by_token = keyed.select(
        "key",
        "value",
        pl.col("num_scored").cast(pl.Float64).alias("weight"),
        pl.Series("tokens", _digests(rows["token_ids"])),
    )
    definition = json.loads((rows.schema.metadata or {}).get(b"perplexity", b"{}"))
    is_whole = definition.get("last_window") != "dropped"
    if not is_whole or keyed.filter(pl.col("value").is_not_null())["num_bytes"].has_nulls():
        return {"nats_per_token": by_token}
    by_byte = keyed.select("key", "value", pl.col("num_bytes").cast(pl.Float64).alias("weight"))
    in_bits = by_byte.with_columns(pl.col("value") / math.log(2))
    return {"bits_per_byte": in_bits, "nats_per_byte": by_byte, "nats_per_token": by_token}


def _scored(rows: pa.Table) -> Measures:
    """Per input row: the sum over its continuations, and whether the right one was chosen."""
    table = pl.DataFrame(rows.drop_columns(_lists(rows.schema)))
    groups = table.group_by(pl.col("row_id").alias("key"), maintain_order=True)
    is_whole = pl.col("sum_logprob").is_finite().fill_null(False).all()
    total = pl.when(is_whole).then(pl.col("sum_logprob").sum())
    count = pl.len().cast(pl.Float64).alias("weight")
    found = {"mean_sum_logprob": groups.agg(total.alias("value"), count)}
    for suffix in ("", "_per_token", "_per_byte"):
        right = pl.col(f"is_correct{suffix}").cast(pl.Float64).max().alias("value")
        chosen = groups.agg(right, pl.lit(1.0).alias("weight"))
        if not chosen["value"].is_null().all():
            found[f"accuracy{suffix}"] = chosen
    return found


def _sampled(rows: pa.Table) -> Measures:
    """Per prompt: the means over its group of the rewards and of the completions' lengths."""
    table = pl.DataFrame(rows.select(["reward", "completion_token_ids", "error"]))
    length = pl.when(pl.col("error").is_null()).then(pl.col("completion_token_ids").list.len())
    named = table.select("reward", length.alias("length"), pl.Series("key", _prompt_keys(rows)))
    groups = named.group_by("key", maintain_order=True)
    found = {}
    for name, column in (("mean_reward", "reward"), ("mean_completion_tokens", "length")):
        means = groups.agg(pl.col(column).mean().alias("value"), pl.lit(1.0).alias("weight"))
        if not means["value"].is_null().all():
            found[name] = means
    return found


def _lists(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_nested(field.type)]


def _prompt_keys(rows: pa.Table) -> list[str]:
    """A name for the input row of each result row that does not depend on how it is sampled.

    `row_id` does, so this is a digest of the input's columns; of rows that are alike in all of them
    the first is paired with the first.
    """
    columns = [name for name in rows.schema.names if name not in RESULT_COLUMNS]
    contents = _digests_of_rows(rows.select(columns)) if columns else [b""] * rows.num_rows
    row_ids = rows["row_id"].to_pylist()
    alike: dict[bytes, dict[str, int]] = {}
    for row_id, content in sorted(set(zip(row_ids, contents, strict=True))):
        alike.setdefault(content, {}).setdefault(row_id, len(alike.get(content, {})))
    return [
        f"{content.hex()}-{alike[content][row_id]}"
        for row_id, content in zip(row_ids, contents, strict=True)
    ]


def _digests_of_rows(rows: pa.Table) -> list[bytes]:
    return [
        _digest(json.dumps(row, sort_keys=True, default=str).encode())
        for batch in rows.to_batches()
        for row in batch.to_pylist()
    ]


def _digests(lists: pa.ChunkedArray) -> list[bytes | None]:
    """A digest of each list of token ids."""
    return [None if it is None else _digest(it) for it in _bytes_of_lists(lists)]


def _bytes_of_lists(lists: pa.ChunkedArray) -> Iterator[bytes | None]:
    for chunk in lists.chunks:
        for scalar in chunk:
            yield scalar.values.to_numpy().tobytes() if scalar.is_valid else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
