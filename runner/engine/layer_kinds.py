"""What each layer of a model keeps of the past; and the models that are refused."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from runner.engine.cache_list import ListKind
from runner.engine.kv_cache import KVKind
from runner.engine.layer_cache import LayerKind
from runner.engine.state_cache import StateKind
from runner.errors import ModelError

REFUSED = {
    "afm7": "its last layers take a row's position from the number of columns in use",
    "deepseek_v41": "its layers keep their past in a class of their own, LayerCache",
    "gpt_bigcode": "its positions are made from one offset for all rows",
    "llama4": "its chunked mask is made from one offset for all rows",
    "minimax_m3_vl": "its sparse layers take a query's block from the number of columns in use",
    "phi3small": "it adds the boolean mask to the scores, which hides nothing",
    "recurrent_gemma": "it treats the first token otherwise than one that follows a state of zeros",
}
"""Modules of mlx-lm whose rows would not be right in a padded batch, and why."""

_GROUP_QUERIES = {"gemma2"}
"""Modules that mask scores with an axis more where several queries share a key head."""

_LOOKS_FURTHER = {"plamo3": 1}
"""Modules whose sliding layers look at so many columns more than their cache is made for."""

_NUM_PROBED = 8
"""Tokens of the probe: more than the short history, of a convolution say, that a layer keeps."""


def layer_kinds(model: nn.Module) -> tuple[list[LayerKind], int]:
    """Reads off a forward of a few tokens what each layer keeps, and the size of the vocabulary.

    Raises:
        ModelError: a layer keeps its past in a way that is not covered, or the model is one of
            those that are wrong in a padded batch.
    """
    _refuse(model)
    probe = make_prompt_cache(model)
    for cache in probe:
        _check(cache)
    logits = model(mx.zeros((1, _NUM_PROBED), mx.int32), cache=probe)
    groups_queries = any(_groups_queries(part) for part in model.modules())
    further = max(_LOOKS_FURTHER.get(_module_name(part), 0) for part in model.modules())
    kinds = [_kind(cache, groups_queries=groups_queries, further=further) for cache in probe]
    return kinds, int(logits.shape[-1])


def _module_name(part: nn.Module) -> str:
    return type(part).__module__.rpartition(".")[2]


def _refuse(model: nn.Module) -> None:
    names = {_module_name(part) for part in model.modules()}
    for name in sorted(names & REFUSED.keys()):
        raise ModelError(f"mlx-lm's {name} cannot be run in a padded batch: {REFUSED[name]}")


def _groups_queries(part: nn.Module) -> bool:
    return _module_name(part) in _GROUP_QUERIES and getattr(part, "repeats", 1) > 1


def _check(cache: Any) -> None:
    if type(cache) is CacheList:
        for part in cache.caches:
            _check(part)
    elif type(cache) not in (KVCache, RotatingKVCache, ArraysCache) or getattr(
        cache, "keep", False
    ):
        raise ModelError(
            f"this model keeps its past in a {type(cache).__name__}, which the engine does not "
            "cover: covered are KVCache, RotatingKVCache without kept tokens, ArraysCache and "
            "CacheList"
        )


def _kind(cache: Any, *, groups_queries: bool, further: int) -> LayerKind:
    """The kind of a cache that the probe went through."""
    if type(cache) is CacheList:
        parts = (_kind(c, groups_queries=groups_queries, further=further) for c in cache.caches)
        return ListKind(tuple(parts))
    if type(cache) is ArraysCache:
        shapes = tuple(tuple(array.shape[1:]) for array in cache.cache)
        return StateKind(shapes, tuple(array.dtype for array in cache.cache))
    keys, values = cache.keys, cache.values
    if keys is None:  # A layer without attention may be given a cache and never write to it.
        return KVKind((0, 0), (0, 0), mx.float32)
    return KVKind(
        key_shape=(keys.shape[1], keys.shape[3]),
        value_shape=(values.shape[1], values.shape[3]),
        dtype=keys.dtype,
        window=int(cache.max_size) + further if type(cache) is RotatingKVCache else None,
        groups_queries=groups_queries,
    )
