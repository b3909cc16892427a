"""Attention of a decode step on a CPU: a few small matrix products instead of many vector ones.

`mx.fast.scaled_dot_product_attention` has no CPU kernel: it multiplies one vector for every row and
query head. The query heads that share a key head share its matrix, so here they are the rows of one
product, a third of the products for a model with three query heads to a key head.
"""

import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from runner.engine.kv_cache import RowKVCache

_NAME = "scaled_dot_product_attention"
_original = base.scaled_dot_product_attention


def fold_decode_attention(model: nn.Module) -> None:
    """Lets a model's attention use `attention` for row slots, on a CPU; elsewhere does nothing.

    mlx-lm's model files import the function by name, so it is their name that is bound anew; with
    any cache but ours they get the one of mlx-lm.
    """
    if mx.default_device() != mx.cpu:
        return
    for module in _modules(model):
        if getattr(module, _NAME, None) is _original:
            setattr(module, _NAME, attention)


def _modules(model: nn.Module) -> set[ModuleType]:
    return {sys.modules[type(part).__module__] for part in model.modules()}


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention as mlx-lm's models call it, (B, heads, N, D); folded for one query to a row."""
    one_query = isinstance(cache, RowKVCache) and queries.shape[2] == 1 and sinks is None
    if not one_query or mask is None or mask.dtype != mx.bool_ or mask.shape[1:-1] != (1, 1):
        plain: mx.array = _original(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return plain
    rows, heads, _, dim = queries.shape
    key_heads = keys.shape[1]
    folded = queries.reshape(rows, key_heads, heads // key_heads, dim) * scale
    scores = folded @ keys.swapaxes(-1, -2)  # (B, key heads, queries to a key, columns)
    weights = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1, precise=True)
    return (weights @ values).reshape(rows, heads, 1, values.shape[-1])
