"""Attention on a CPU: a few small matrix products, and the softmax by NumPy in place.

`mx.fast.scaled_dot_product_attention` has no CPU kernel: it multiplies one vector for every row and
query head, and takes exp one element at a time. Here the query heads that share a key head are the
rows of one product, and a long prefill is cut into blocks of queries, each of which meets only the
columns that it may look at.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base

from runner.engine.cpu_math import softmax_in_place, view

plain_attention = base.scaled_dot_product_attention
_BLOCK = 128
"""Queries of one product; bounds the scores that exist at once."""
_COLUMN_BLOCK = 256
"""Columns that are summed in one product: fewer than any BLAS cuts in parts."""


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention as mlx-lm's models call it: (B, heads, N, D) with (B, key heads, C, D).

    What is not plain float32 (quantised keys, other dtypes, a mask with more axes) goes to mlx-lm.
    """
    if not _is_covered(queries, keys, mask):
        plain: mx.array = plain_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return plain
    num_queries, num_columns = queries.shape[2], keys.shape[2]
    blocks = []
    for start in range(0, num_queries, _BLOCK):
        end = min(start + _BLOCK, num_queries)
        # A causal query sees the columns up to its own, counted from the end.
        seen = num_columns - num_queries + end if mask == "causal" else num_columns
        hidden = _hidden(mask, start, end, seen)
        block = queries[:, :, start:end] * scale
        blocks.append(_attend(block, keys[:, :, :seen], values[:, :, :seen], hidden, sinks))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _is_covered(queries: mx.array, keys: mx.array, mask: mx.array | str | None) -> bool:
    if isinstance(keys, tuple) or not queries.dtype == keys.dtype == mx.float32:
        return False
    return not isinstance(mask, mx.array) or mask.ndim <= 4


def _hidden(
    mask: mx.array | str | None, start: int, end: int, num_columns: int
) -> np.ndarray | None:
    """What is added to the scores, or True where a column is hidden; broadcasts to 4 axes."""
    if mask is None:
        return None
    if isinstance(mask, str):
        columns = np.arange(num_columns)
        return columns > columns[num_columns - (end - start) :, None]
    whole = view(mask)
    part = whole[..., start:end, :] if whole.shape[-2] > 1 else whole
    return ~part if part.dtype == np.bool_ else part


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    hidden: np.ndarray | None,
    sinks: mx.array | None,
) -> mx.array:
    rows, heads, num_queries, dim = queries.shape
    key_heads, num_columns = keys.shape[1], keys.shape[2]
    folded = queries.reshape(rows, key_heads, -1, dim)  # (B, key heads, queries to a key, D)
    scores = folded @ keys.swapaxes(-1, -2)
    weights = view(scores).reshape(rows, heads, num_queries, num_columns)
    if hidden is not None and hidden.dtype == np.bool_:
        np.copyto(weights, -np.inf, where=hidden)
    elif hidden is not None:
        weights += hidden
    softmax_in_place(weights, None if sinks is None else view(sinks).reshape(-1, 1, 1))
    return _weighted_sum(scores, values).reshape(rows, heads, num_queries, values.shape[-1])


def _weighted_sum(weights: mx.array, values: mx.array) -> mx.array:
    """(B, H, M, C) @ (B, H, C, D), summed over blocks of columns that begin at fixed places.

    A BLAS cuts a long sum in parts by its length, so that columns of weight zero behind it would
    change the last bits.
    """
    num_columns = weights.shape[-1]
    total = weights[..., :_COLUMN_BLOCK] @ values[:, :, :_COLUMN_BLOCK]
    for start in range(_COLUMN_BLOCK, num_columns, _COLUMN_BLOCK):
        end = start + _COLUMN_BLOCK
        total = total + weights[..., start:end] @ values[:, :, start:end]
    return total
