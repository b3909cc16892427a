"""Keys and values in padded row slots: every row starts at column 0 of its slot and grows right.

Both caches follow the protocol that mlx-lm's models expect of a cache (`offset`, `make_mask`,
`update_and_fetch`, `keys_and_values`), so those models run unchanged. Which column a position has,
and in what form, is up to the segments of the layer's kind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx

from runner.engine.kv_segments import Quantization, Segment
from runner.engine.layer_cache import Past


@dataclass(frozen=True, slots=True)
class KVKind:
    """A layer that keeps a key and a value of each past token; they may differ in heads and dim.

    With a `window`, a row slot holds the columns in reach alone, in a ring. A prompt in prefill
    holds all of its columns, and so does its `Past`, which can be cut at any of them.
    """

    key_shape: tuple[int, int]
    """(heads, dim)"""
    value_shape: tuple[int, int]
    dtype: mx.Dtype
    window: int | None = None
    """Columns that a query may look at, its own included; None for all."""
    groups_queries: bool = False
    """Whether the layer masks scores (B, key heads, queries per key head, N, columns)."""
    kept: int = 0
    """First columns of a row that a query may look at outside the window as well."""
    quantization: Quantization | None = None
    """How the columns are stored; None for as they are."""
    num_spare: int = 0
    """Columns of the ring beyond the window, so that as many drafted tokens may be written after
    the next one and be rejected again, and nothing in reach is lost."""

    @property
    def num_arrays(self) -> int:
        """Arrays in a `Past` of this layer."""
        return sum(2 * segment.num_arrays for segment in self.segments)

    @property
    def is_recurrent(self) -> bool:
        """False: a token's key and value do not change with what comes after it."""
        return False

    @property
    def segments(self) -> list[Segment]:
        """How a row slot is laid out, from its first position on."""
        start = self.quantization.start if self.quantization else 0
        kept = max(self.kept - start, 0)
        ring = None if self.window is None else self.window + self.num_spare
        rest = Segment(start, None, kept, ring, self.quantization)
        return [Segment(0, start), rest] if start else [rest]

    def prompt_cache(self, num_prompts: int, max_length: int) -> "PromptKVCache":
        """An empty cache of prompts in prefill."""
        return PromptKVCache(self, num_prompts, max_length)

    def row_cache(self) -> "RowKVCache":
        """A cache with no slots yet."""
        return RowKVCache(self)

    def nbytes(self, num_columns: int) -> int:
        """Bytes of one slot with that many columns."""
        stored = [self.zeros(segment, 1, num_columns) for segment in self.segments]
        return sum(array.nbytes for arrays in stored for array in arrays)

    def zeros(self, segment: Segment, num_rows: int, num_columns: int) -> list[mx.array]:
        """What stores the keys, then the values, of a segment of empty slots."""
        size = {"num_rows": num_rows, "num_positions": num_columns}
        keys = segment.zeros(self.key_shape, self.dtype, **size)
        return keys + segment.zeros(self.value_shape, self.dtype, **size)

    def mask(
        self, held: mx.array, positions: mx.array, *, window_size: int | None = None
    ) -> mx.array:
        """True where a query at `positions` may look at the position that a column holds.

        The two broadcast; `window_size` is what the model itself says of the window.
        """
        mask = held <= positions
        if self.window is not None:
            mask = mask & ((held > positions - self.window) | (held < self.kept))
        return mask if window_size is None else mask & (held > positions - window_size)


class _Stored:
    """One layer's keys and values, in the arrays of its segments, each (R, H, columns, ...)."""

    def __init__(
        self, kind: KVKind, segments: list[Segment], *, num_rows: int, num_columns: int
    ) -> None:
        self._kind = kind
        self._parts = [(s, kind.zeros(s, num_rows, num_columns)) for s in segments]
        self.num_columns = 0

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        return tuple(array for _, arrays in self._parts for array in arrays)

    @property
    def keys(self) -> mx.array:
        """The keys of a layer that stores them as they are; some models reach for them."""
        return self._parts[0][1][0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._parts[0][1][0] = keys

    @property
    def values(self) -> mx.array:
        """The values of a layer that stores them as they are."""
        return self._parts[0][1][1]

    @values.setter
    def values(self, values: mx.array) -> None:
        self._parts[0][1][1] = values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The columns in use, as attention sees them; another layer may attend to them as well.

        What is quantised comes back from there also for the tokens just written, so that a token is
        the same to those forwarded together with it and to those that come later.
        """
        found = []
        for segment, arrays in self._parts:
            if size := segment.num_columns(self.num_columns):
                used, half = [array[:, :, :size] for array in arrays], segment.num_arrays
                found.append((segment.decode(used[:half]), segment.decode(used[half:])))
        if len(found) == 1:
            return found[0]
        keys, values = ([pair[i] for pair in found] for i in (0, 1))
        return mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)


def _encoded(segment: Segment, keys: mx.array, values: mx.array) -> Past:
    return segment.encode(keys) + segment.encode(values)


class PromptKVCache(_Stored):
    """One layer's keys and values of prompts in prefill, (P, H, L, D), right padded.

    All prompts stand at the same column, so pads come only after a prompt's last token: a causal
    mask hides them from every real token, and nothing past a prompt's length is ever copied out.
    """

    def __init__(self, kind: KVKind, num_prompts: int, max_length: int) -> None:
        segments = [replace(segment, window=None) for segment in kind.segments]
        super().__init__(kind, segments, num_rows=num_prompts, num_columns=max_length)

    @property
    def offset(self) -> int:
        """The column of the next token."""
        return self.num_columns

    def start_from(self, past: Past, num_columns: int) -> None:
        """Takes the first columns of every prompt from (H, L, ...) that are known already."""
        shares = iter(past)
        for segment, arrays in self._parts:
            size = segment.num_columns(num_columns)
            for array in arrays:
                array[:, :, :size] = next(shares)[:, :size]
        self.num_columns = num_columns

    def end_rows(self, rows: Sequence[int]) -> None:
        """Nothing to note: columns past a prompt's end are not looked at."""

    def past(self, row: int, num_columns: int) -> Past:
        """The first columns of one prompt, each (H, L, ...)."""
        return tuple(
            array[row, :, : segment.num_columns(num_columns)]
            for segment, arrays in self._parts
            for array in arrays
        )

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (P, H, N, D) at the common column; returns all columns so far."""
        start, self.num_columns = self.offset, self.offset + keys.shape[2]
        for segment, arrays in self._parts:
            first, end = (segment.num_columns(n) for n in (start, self.num_columns))
            if first == end:
                continue
            new = slice(first + segment.first - start, end + segment.first - start)
            encoded = _encoded(segment, keys[:, :, new], values[:, :, new])
            for array, columns in zip(arrays, encoded, strict=True):
                array[:, :, first:end] = columns
        return self.keys_and_values()

    def make_mask(
        self, num_positions: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Mask of the next `num_positions` queries, (N, offset + N), "causal" or None."""
        end = self.offset + num_positions
        reach = end if self._kind.window is None else self._kind.window + self._kind.kept
        sees_all = end <= min(reach, window_size or end)
        # As mlx-lm's caches: deepseek_v32 takes no array for a single query.
        if sees_all and (num_positions == 1 or not return_array):
            return "causal" if num_positions > 1 else None
        positions = mx.arange(self.offset, end)[:, None]
        return self._kind.mask(mx.arange(end), positions, window_size=window_size)


class RowKVCache(_Stored):
    """One layer's keys and values of the whole batch, (B, H, C, D): a slot per row."""

    def __init__(self, kind: KVKind) -> None:
        super().__init__(kind, kind.segments, num_rows=0, num_columns=0)
        self.offset = mx.zeros((0,), mx.int32)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes (B, H, N, D) at each row's own column; returns the columns in use."""
        # One column more may take the place of one that the first query looks at.
        fits = self._kind.window is None or keys.shape[2] <= 1 + self._kind.num_spare
        assert fits, "a ring takes as many columns at a time as it can spare"
        rows = mx.arange(keys.shape[0])[:, None]
        positions = self.offset[:, None] + mx.arange(keys.shape[2])  # (B, N)
        for segment, arrays in self._parts:
            if arrays[0].shape[2] == 0:
                continue
            columns = segment.columns(positions)
            for array, new in zip(arrays, _encoded(segment, keys, values), strict=True):
                new = new.swapaxes(1, 2)  # (B, N, H, ...)
                if segment.first == 0:
                    array[rows, :, columns] = new
                    continue
                # Positions before the segment share a column with its first: the last one stays.
                for i in range(new.shape[1]):
                    array[rows, :, columns[:, i : i + 1]] = new[:, i : i + 1]
        return self.keys_and_values()

    def make_mask(
        self, num_positions: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """Mask of each row's next `num_positions` queries, (B, 1, N, columns).

        With one more axis of 1 where the layer groups its queries.
        """
        positions = self.offset[:, None] + mx.arange(num_positions)  # (B, N)
        positions = positions[:, None, :, None]
        latest = positions[:, :, -1:]
        held = [s.held(latest, s.num_columns(self.num_columns)) for s, _ in self._parts]
        masks = [self._kind.mask(h, positions, window_size=window_size) for h in held]
        mask = mx.concatenate(masks, axis=-1) if len(masks) > 1 else masks[0]
        return mask[:, None] if self._kind.groups_queries else mask

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows and columns; what is there stays where it is."""
        for segment, arrays in self._parts:
            old, arrays[:] = list(arrays), self._kind.zeros(segment, num_rows, num_columns)
            rows, kept = old[0].shape[0], min(old[0].shape[2], arrays[0].shape[2])
            if rows and kept:
                for array, before in zip(arrays, old, strict=True):
                    array[:rows, :, :kept] = before[:, :, :kept]

    def begin_step(self, offset: mx.array, num_columns: int) -> None:
        """Sets each slot's column, (B,) int32, for the next forward, and the columns in use."""
        self.offset, self.num_columns = offset, num_columns

    def write_prefix(self, rows: Sequence[int], past: Past) -> None:
        """Copies one prompt's columns, (H, L, ...), to where `rows` hold them."""
        shares = iter(past)
        for segment, arrays in self._parts:
            for array in arrays:
                columns = segment.arranged(next(shares))
                if columns.shape[1] == 0:
                    continue
                for first, last in _runs(rows):
                    array[first:last, :, : columns.shape[1]] = columns

    def clear_row(self, row: int) -> None:
        """Zeroes a slot: a weight of zero on a NaN would still be a NaN for the next row."""
        for array in self.arrays:
            array[row] = 0

    def clear_columns(self, row: int, positions: mx.array) -> None:
        """Zeroes what a slot holds at `positions`, (N,) int32, which come after its last token."""
        for segment, arrays in self._parts:
            for array in arrays:
                if array.shape[2]:
                    array[row, :, segment.columns(positions)] = 0

    def keep_rows(self, rows: mx.array) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        for _, arrays in self._parts:
            arrays[:] = [array[rows] for array in arrays]


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive row numbers as (first, last + 1), so that each run is one copy."""
    ordered = sorted(rows)
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    for start, end in pairwise([0, *breaks, len(ordered)]):
        yield ordered[start], ordered[end - 1] + 1
