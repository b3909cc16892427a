"""Ratios of sums over documents, and the paired difference of two of them, with standard errors.

A ratio is Σ values / Σ weights: nats over bytes, rewards over groups. Its standard error takes the
documents, not their tokens, to be independent draws; it is that of the ratio estimator (Cochran,
Sampling Techniques, 3rd ed. 1977, section 6.4), which is the delta method on the two sums:

    n / (n - 1) · Σ (value_i - ratio · weight_i)² / (Σ weight_i)²

Over the same documents with the same weights, the difference of two ratios is the ratio of the
differences, so that what makes a document hard for both points cancels.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of sums over `documents`; the standard error is None for fewer than two."""

    value: float
    stderr: float | None
    documents: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two points say of the documents for which both have a number."""

    documents: int
    left_out: int
    """Documents for which one of them has none, or which are not the same in both."""
    value_a: float
    value_b: float
    difference: float
    """value_b - value_a."""
    stderr: float | None


def ratio(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Ratio | None:
    """Σ values / Σ weights, both of shape (documents,), float64; None where the weights are 0."""
    count, total = len(values), float(weights.sum())
    if total == 0:
        return None
    value = float(values.sum()) / total
    rest = values - value * weights
    spread = count / (count - 1) * float(np.square(rest).sum()) if count > 1 else None
    stderr = None if spread is None else math.sqrt(spread) / total
    return Ratio(value=value, stderr=stderr, documents=count)


def of_rows(rows: pl.DataFrame) -> Ratio | None:
    """The ratio of a point's rows (key, value, weight); those without a value are left out."""
    known = rows.drop_nulls("value")
    return ratio(known["value"].to_numpy(), known["weight"].to_numpy())


def pair(a: pl.DataFrame, b: pl.DataFrame) -> Pair | None:
    """Compares two points by their rows; None where no document has a number in both.

    Rows that have a `tokens` column are compared only where all that both have are made of the same
    tokens: a nat per token is not the same thing in two tokenizers.
    """
    both = a.join(b, on="key", how="full", coalesce=True, suffix="_b")
    known = both.drop_nulls(["value", "value_b"])
    if "tokens" in a.columns and not (known["tokens"] == known["tokens_b"]).all():
        return None
    same = known.filter(pl.col("weight") == pl.col("weight_b"))
    first, second, weights = (same[name].to_numpy() for name in ("value", "value_b", "weight"))
    difference = ratio(second - first, weights)
    if difference is None:
        return None
    return Pair(
        documents=same.height,
        left_out=both.height - same.height,
        value_a=float(first.sum() / weights.sum()),
        value_b=float(second.sum() / weights.sum()),
        difference=difference.value,
        stderr=difference.stderr,
    )
