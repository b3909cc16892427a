"""Keys and values in padded row slots: every row starts at column 0 of its slot and grows right.

Both caches follow the protocol that mlx-lm's models expect of a cache (`offset`, `make_mask`,
`update_and_fetch`, `keys_and_values`), so those models run unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx

from runner.engine.layer_cache import Past


@dataclass(frozen=True, slots=True)
class KVKind:
    """A layer that keeps a key and a value of each past token; they may differ in heads and dim."""

    key_shape: tuple[int, int]
    """(heads, dim)"""
    value_shape: tuple[int, int]
    dtype: mx.Dtype
    window: int | None = None
    """Columns that a query may look at, its own included; None for all."""
    groups_queries: bool = False
    """Whether the layer masks scores (B, key heads, queries per key head, N, columns)."""

    @property
    def num_arrays(self) -> int:
        """Arrays in a `Past` of this layer."""
        return 2

    @property
    def is_recurrent(self) -> bool:
        """False: a token's key and value do not change with what comes after it."""
        return False

    def nbytes(self, num_columns: int) -> int:
        """Bytes of one slot with that many columns."""
        (key_heads, key_dim), (value_heads, value_dim) = self.key_shape, self.value_shape
        return num_columns * (key_heads * key_dim + value_heads * value_dim) * self.dtype.size

    def prompt_cache(self, num_prompts: int, max_length: int) -> "PromptKVCache":
        """An empty cache of prompts in prefill."""
        return PromptKVCache(self, num_prompts, max_length)

    def row_cache(self) -> "RowKVCache":
        """A cache with no slots yet."""
        return RowKVCache(self)

    def zeros(self, num_rows: int, num_columns: int) -> tuple[mx.array, mx.array]:
        """Keys and values of empty slots, (rows, heads, columns, dim)."""
        (key_heads, key_dim), (value_heads, value_dim) = self.key_shape, self.value_shape
        return (
            mx.zeros((num_rows, key_heads, num_columns, key_dim), self.dtype),
            mx.zeros((num_rows, value_heads, num_columns, value_dim), self.dtype),
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

    def __init__(self, kind: KVKind, num_prompts: int, max_length: int) -> None:
        self._window = kind.window
        self.offset = 0
        self.keys, self.values = kind.zeros(num_prompts, max_length)

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        return self.keys, self.values

    def start_from(self, past: Past, num_columns: int) -> None:
        """Takes the first columns of every prompt from (H, L, D) that are known already."""
        keys, values = past
        self.keys[:, :, :num_columns] = keys[:, :num_columns]
        self.values[:, :, :num_columns] = values[:, :num_columns]
        self.offset = num_columns

    def end_rows(self, rows: Sequence[int]) -> None:
        """Nothing to note: columns past a prompt's end are not looked at."""

    def past(self, row: int, num_columns: int) -> Past:
        """The first columns of one prompt, each (H, L, D)."""
        return self.keys[row, :, :num_columns], self.values[row, :, :num_columns]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (P, H, N, D) at the common column; returns all columns so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All columns so far, which another layer may attend to as well."""
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

    def __init__(self, kind: KVKind) -> None:
        self._kind = kind
        self.offset = mx.zeros((0,), mx.int32)
        self.num_columns = 0
        self.keys, self.values = kind.zeros(0, 0)

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        return self.keys, self.values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes (B, H, N, D) at each row's own column; returns the columns in use."""
        rows = mx.arange(keys.shape[0])[:, None]
        columns = self.offset[:, None] + mx.arange(keys.shape[2])  # (B, N)
        self.keys[rows, :, columns] = keys.swapaxes(1, 2)  # (B, N, H, D)
        self.values[rows, :, columns] = values.swapaxes(1, 2)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The columns in use, which another layer may attend to as well."""
        return self.keys[:, :, : self.num_columns], self.values[:, :, : self.num_columns]

    def make_mask(
        self, num_positions: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """Mask of each row's next `num_positions` queries, (B, 1, N, columns).

        With one more axis of 1 where the layer groups its queries.
        """
        window = window_size or self._kind.window
        positions = self.offset[:, None] + mx.arange(num_positions)  # (B, N)
        mask = _causal_mask(mx.arange(self.num_columns), positions[:, None, :, None], window)
        return mask[:, None] if self._kind.groups_queries else mask

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows and columns; what is there stays where it is."""
        (keys, values), (rows, _, columns, _) = self.arrays, self.keys.shape
        kept = min(columns, num_columns)
        self.keys, self.values = self._kind.zeros(num_rows, num_columns)
        if rows:
            self.keys[:rows, :, :kept] = keys[:, :, :kept]
            self.values[:rows, :, :kept] = values[:, :, :kept]

    def begin_step(self, offset: mx.array, num_columns: int) -> None:
        """Sets each slot's column, (B,) int32, for the next forward, and the columns in use."""
        self.offset, self.num_columns = offset, num_columns

    def write_prefix(self, rows: Sequence[int], past: Past) -> None:
        """Copies one prompt's columns, (H, L, D), to the start of each of `rows`."""
        keys, values = past
        if keys.shape[1] == 0:
            return
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
