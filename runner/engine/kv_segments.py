"""How keys and values lie in a row slot: which column holds which position, and in what form."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.engine.layer_cache import Past


@dataclass(frozen=True, slots=True)
class Quantization:
    """Affine quantisation of a key or value, in groups of `group_size` of its entries."""

    bits: int
    group_size: int
    start: int = 0
    """Positions of each row, from its first, that stay in full precision."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions `first` to `last` of a row, all stored in one form.

    A position's column is its own for good, or, with a `window`, only for the first `kept` of them:
    the others go round a ring of `window` columns, each written over by the one `window` later.
    """

    first: int = 0
    last: int | None = None
    """One past the end; None where the segment is the last."""
    kept: int = 0
    window: int | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        assert self.last is None or self.window is None, "only the last segment can be a ring"

    @property
    def num_arrays(self) -> int:
        """Arrays in which the segment's keys, or its values, are stored."""
        return 1 if self.quantization is None else 3

    def num_columns(self, num_positions: int) -> int:
        """Columns in use once a row has `num_positions`."""
        end = num_positions if self.last is None else min(num_positions, self.last)
        unbounded = max(end - self.first, 0)
        return unbounded if self.window is None else min(unbounded, self.kept + self.window)

    def columns(self, positions: mx.array) -> mx.array:
        """The column that each position is written to.

        A batch writes every row to every segment. A row that has left a segment writes to the spare
        column at its end; one that has not reached it, to a first column that it will write anew.
        """
        inside = mx.maximum(positions - self.first, 0)
        if self.last is not None:
            return mx.minimum(inside, self.last - self.first)
        if self.window is None:
            return inside
        ring = self.kept + (inside - self.kept) % self.window
        return mx.where(inside < self.kept, inside, ring)

    def held(self, positions: mx.array, num_columns: int) -> mx.array:
        """The position that each of the first columns holds, (columns,) or (..., columns).

        That is for rows whose last position is in `positions`, (..., 1); a column that a row has
        not reached counts as the position to come.
        """
        own = self.first + mx.arange(num_columns)
        if self.window is None:
            return own
        latest = positions - (positions - own) % self.window
        return mx.where(own < self.first + self.kept, own, mx.maximum(latest, own))

    def arranged(self, columns: mx.array) -> mx.array:
        """The columns of a slot that hold a prompt's, (H, positions, ...), from `first` on."""
        size = columns.shape[1]
        in_use = self.num_columns(self.first + size)
        if in_use == size:
            return columns
        held = self.held(mx.array([self.first + size - 1]), in_use)
        return columns[:, held - self.first]

    def zeros(
        self, shape: tuple[int, int], dtype: mx.Dtype, *, num_rows: int, num_positions: int
    ) -> list[mx.array]:
        """What stores (rows, heads, columns, dim) of empty slots; `shape` is (heads, dim)."""
        spare = 0 if self.last is None else 1
        heads, dim = shape
        slots = (num_rows, heads, self.num_columns(num_positions) + spare)
        if self.quantization is None:
            return [mx.zeros((*slots, dim), dtype)]
        groups = dim // self.quantization.group_size
        packed = mx.zeros((*slots, dim * self.quantization.bits // 32), mx.uint32)
        return [packed, mx.zeros((*slots, groups), dtype), mx.zeros((*slots, groups), dtype)]

    def encode(self, array: mx.array) -> Past:
        """The arrays that store keys or values (..., dim)."""
        how = self.quantization
        if how is None:
            return (array,)
        return tuple(mx.quantize(array, group_size=how.group_size, bits=how.bits))

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        """The keys or values (..., dim) that `arrays` store."""
        how = self.quantization
        if how is None:
            return arrays[0]
        packed, scales, biases = arrays
        return mx.dequantize(packed, scales, biases, group_size=how.group_size, bits=how.bits)
