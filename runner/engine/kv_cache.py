"""Keys and values in padded row slots: every row starts at column 0 of its slot and grows right.

Both caches follow the protocol that mlx-lm's models expect of a cache (`offset`, `make_mask`,
`update_and_fetch`, `state`), so those models run unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from runner.errors import ModelError

_COLUMN_STEP = 32
"""Attended columns are rounded up to this, so that few shapes occur."""
_MIN_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer of the model keeps of each past token, and of how many tokens."""

    key_shape: tuple[int, int]
    """(heads, dim)"""
    value_shape: tuple[int, int]
    dtype: mx.Dtype
    window: int | None = None
    """Columns that a query may look at, its own included; None for all."""

    def zeros(self, num_rows: int, num_columns: int) -> tuple[mx.array, mx.array]:
        """Keys and values of empty slots, (rows, heads, columns, dim)."""
        (key_heads, key_dim), (value_heads, value_dim) = self.key_shape, self.value_shape
        return (
            mx.zeros((num_rows, key_heads, num_columns, key_dim), self.dtype),
            mx.zeros((num_rows, value_heads, num_columns, value_dim), self.dtype),
        )


def layer_kinds(model: nn.Module) -> tuple[list[LayerKind], int]:
    """Reads off a forward of one token what each layer keeps, and the size of the vocabulary.

    Raises:
        ModelError: a layer keeps something else than keys and values of past tokens.
    """
    probe = make_prompt_cache(model)
    windows = [_window(cache) for cache in probe]
    logits = model(mx.zeros((1, 1), mx.int32), cache=probe)
    kinds = [
        LayerKind(
            key_shape=(cache.keys.shape[1], cache.keys.shape[3]),
            value_shape=(cache.values.shape[1], cache.values.shape[3]),
            dtype=cache.keys.dtype,
            window=window,
        )
        for cache, window in zip(probe, windows, strict=True)
    ]
    return kinds, int(logits.shape[-1])


def _window(cache: Any) -> int | None:
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise ModelError(
        f"this model keeps its past in a {type(cache).__name__}, which the engine does not cover: "
        "covered are KVCache and RotatingKVCache"
    )


def _causal_mask(columns: mx.array, positions: mx.array, window: int | None) -> mx.array:
    """True where a query at `positions` may look at `columns`; the two broadcast."""
    mask = columns <= positions
    return mask if window is None else mask & (columns > positions - window)


class PromptKVCache:
    """One layer's keys and values of prompts in prefill, (P, H, L, D), right padded.

    All prompts stand at the same column, so pads come only after a prompt's last token: a causal
    mask hides them from every real token, and nothing past a prompt's length is ever copied out.
    """

    def __init__(self, kind: LayerKind, num_prompts: int, max_length: int) -> None:
        self._window = kind.window
        self.offset = 0
        self.keys, self.values = kind.zeros(num_prompts, max_length)

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """The arrays to evaluate."""
        return self.keys, self.values

    def start_from(self, keys: mx.array, values: mx.array, num_columns: int) -> None:
        """Takes the first columns of every prompt from (H, L, D) that are known already."""
        self.keys[:, :, :num_columns] = keys[:, :num_columns]
        self.values[:, :, :num_columns] = values[:, :num_columns]
        self.offset = num_columns

    def columns(self, row: int, num_columns: int) -> tuple[mx.array, mx.array]:
        """The first columns of one prompt, each (H, L, D)."""
        return self.keys[row, :, :num_columns], self.values[row, :, :num_columns]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (P, H, N, D) at the common column; returns all columns so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def make_mask(
        self, num_positions: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Mask of the next `num_positions` queries, (N, offset + N), "causal" or None."""
        window = window_size or self._window
        end = self.offset + num_positions
        if not return_array and (window is None or end <= window):
            return "causal" if num_positions > 1 else None
        positions = mx.arange(self.offset, end)[:, None]
        return _causal_mask(mx.arange(end), positions, window)


class RowKVCache:
    """One layer's keys and values of the whole batch, (B, H, C, D): a slot per row."""

    def __init__(self, kind: LayerKind) -> None:
        self._kind = kind
        self.offset = mx.zeros((0,), mx.int32)
        self.num_columns = 0
        self.keys, self.values = kind.zeros(0, 0)

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """The arrays to evaluate."""
        return self.keys, self.values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes (B, H, N, D) at each row's own column; returns the columns in use."""
        rows = mx.arange(keys.shape[0])[:, None]
        columns = self.offset[:, None] + mx.arange(keys.shape[2])  # (B, N)
        self.keys[rows, :, columns] = keys.swapaxes(1, 2)  # (B, N, H, D)
        self.values[rows, :, columns] = values.swapaxes(1, 2)
        return self.keys[:, :, : self.num_columns], self.values[:, :, : self.num_columns]

    def make_mask(
        self, num_positions: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """Mask of each row's next `num_positions` queries, (B, 1, N, columns)."""
        window = window_size or self._kind.window
        positions = self.offset[:, None] + mx.arange(num_positions)  # (B, N)
        return _causal_mask(mx.arange(self.num_columns), positions[:, None, :, None], window)

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows and columns; what is there stays where it is."""
        old, (self.keys, self.values) = self.state, self._kind.zeros(num_rows, num_columns)
        rows, _, columns, _ = old[0].shape
        if rows:
            self.keys[:rows, :, :columns], self.values[:rows, :, :columns] = old

    def write_prefix(self, rows: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Copies one prompt's columns, (H, L, D), to the start of each of `rows`."""
        for first, last in _runs(rows):
            self.keys[first:last, :, : keys.shape[1]] = keys
            self.values[first:last, :, : values.shape[1]] = values

    def clear_row(self, row: int) -> None:
        """Zeroes a slot: a weight of zero on a NaN would still be a NaN for the next row."""
        self.keys[row] = 0
        self.values[row] = 0

    def keep_rows(self, rows: mx.array) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive row numbers as (first, last + 1), so that each run is one copy."""
    ordered = sorted(rows)
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    for start, end in pairwise([0, *breaks, len(ordered)]):
        yield ordered[start], ordered[end - 1] + 1


class RowKVCaches:
    """The row slots of all layers, kept at one common size."""

    def __init__(self, kinds: Sequence[LayerKind]) -> None:
        self.layers = [RowKVCache(kind) for kind in kinds]
        self.num_rows = 0
        self.capacity = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the slots take."""
        return sum(array.nbytes for layer in self.layers for array in layer.state)

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for `num_rows` slots of `num_columns`.

        Columns grow by half of what is there, so that a long row copies the batch rarely.
        """
        if num_rows <= self.num_rows and num_columns <= self.capacity:
            return
        if num_columns > self.capacity:
            grown = max(num_columns, self.capacity + self.capacity // 2, _MIN_CAPACITY)
            self.capacity = -(-grown // _COLUMN_STEP) * _COLUMN_STEP
        self.num_rows = max(num_rows, self.num_rows)
        for layer in self.layers:
            layer.reserve(self.num_rows, self.capacity)

    def begin_step(self, positions: Sequence[int]) -> None:
        """Sets the column, one per slot, at which the next forward writes."""
        columns = mx.array(list(positions), mx.int32)
        used = min(-(-(max(positions) + 1) // _COLUMN_STEP) * _COLUMN_STEP, self.capacity)
        for layer in self.layers:
            layer.offset, layer.num_columns = columns, used

    def clear_row(self, row: int) -> None:
        """Zeroes a slot whose sequence left a NaN behind."""
        for layer in self.layers:
            layer.clear_row(row)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        self.num_rows = len(rows)
        for layer in self.layers:
            layer.keep_rows(mx.array(list(rows)))
