"""What `kv_bits` and `max_kv_size` mean, spelled out: the caches of one forward of one row."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from runner.types import Completion, Request


class NaiveKVCache:
    """Hands a layer its keys and values back, rounded, and says which of them a query may see."""

    offset = 0

    def __init__(
        self,
        window: int | None = None,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        max_kv_size: int | None = None,
    ) -> None:
        self._bits, self.group_size, self.start = kv_bits, kv_group_size, quantized_kv_start
        self.window = window
        self.kept = 0
        if max_kv_size is not None:
            self.kept = 4 if window is None else 0
            self.window = min(window or max_kv_size - 4, max_kv_size)

    def sees(self, query: int, key: int, window_size: int | None) -> bool:
        """Whether the token at `query` attends to the one at `key`."""
        far = self.window is not None and query - key >= self.window and key >= self.kept
        return key <= query and not far and (window_size is None or query - key < window_size)

    def make_mask(
        self, count: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """(N, N) bool."""
        pairs = [[self.sees(q, k, window_size) for k in range(count)] for q in range(count)]
        return mx.array(np.array(pairs))

    def _rounded(self, array: mx.array) -> mx.array:
        if self._bits is None or array.shape[2] <= self.start:
            return array
        how = {"bits": self._bits, "group_size": self.group_size}
        coarse = mx.dequantize(*mx.quantize(array[:, :, self.start :], **how), **how)
        return mx.concatenate([array[:, :, : self.start], coarse], axis=2)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Every token but the first few rounded by itself."""
        self.keys, self.values = self._rounded(keys), self._rounded(values)
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """For a layer that attends to another's."""
        return self.keys, self.values


def naive_caches(model: nn.Module, **options: Any) -> list[Any]:
    """Caches for one forward of whole rows; states are mlx-lm's own."""
    return [_naive(cache, options) for cache in make_prompt_cache(model)]


def _naive(cache: Any, options: dict[str, Any]) -> Any:
    if type(cache) is CacheList:
        return CacheList(*(_naive(part, options) for part in cache.caches))
    if type(cache) is RotatingKVCache:
        return NaiveKVCache(cache.max_size, **options)
    return NaiveKVCache(**options) if type(cache) is KVCache else cache


def naive_logprobs(
    model: nn.Module, request: Request, token_ids: list[int], **options: Any
) -> np.ndarray:
    """(N,) float64: the raw logprobs of a completion by one forward of the whole row."""
    ids = [*request.prompt_token_ids, *token_ids[:-1]]
    found = model(mx.array([ids]), cache=naive_caches(model, **options))[0, -len(token_ids) :]
    logits = np.array(found.astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked: np.ndarray = logprobs[np.arange(len(token_ids)), token_ids]
    return picked


def errors(
    model: nn.Module,
    requests: Iterable[Request],
    done: dict[tuple[str, int], Completion],
    **options: Any,
) -> np.ndarray:
    """(completions,): how far the raw logprobs of each are from the naive ones, at most."""
    return np.array(
        [
            np.abs(naive_logprobs(model, r, c.token_ids, **options) - c.raw_logprobs).max()
            for r in requests
            for c in (done[r.request_id, index] for index in range(r.params.n))
        ]
    )
