"""The row slots of all layers."""

from collections.abc import Sequence

import mlx.core as mx

from runner.engine.layer_cache import LayerKind, RowCache

_COLUMN_STEP = 32
"""Attended columns are rounded up to this, so that few shapes occur."""
_MIN_CAPACITY = 256
_NO_LIMIT = 2**62


def rounded_up(num_columns: int) -> int:
    """The columns of a slot that has room for `num_columns`."""
    return -(-num_columns // _COLUMN_STEP) * _COLUMN_STEP


class RowCaches:
    """The row slots of all layers, kept at one common size."""

    def __init__(self, kinds: Sequence[LayerKind]) -> None:
        self.layers: list[RowCache] = [kind.row_cache() for kind in kinds]
        self.num_rows = 0
        self.capacity = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the slots take."""
        return sum(array.nbytes for layer in self.layers for array in layer.arrays)

    def reserve(self, num_rows: int, num_columns: int, most_columns: int | None = None) -> None:
        """Makes room for `num_rows` slots of `num_columns`, which come to `most_columns` at most.

        Columns grow by half of what is there, so that a long row copies the batch rarely, and
        shrink once twice of what the rows can still need is there.
        """
        most = _NO_LIMIT if most_columns is None else rounded_up(most_columns)
        capacity = self.capacity
        if num_columns > capacity:
            grown = max(num_columns, capacity + capacity // 2, _MIN_CAPACITY)
            capacity = min(rounded_up(grown), most)
        elif num_rows > self.num_rows or capacity >= 2 * max(most, _MIN_CAPACITY):
            capacity = min(capacity, most)
        if num_rows > self.num_rows or capacity != self.capacity:
            self._resize(max(num_rows, self.num_rows), capacity)

    def _resize(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity = num_rows, capacity
        for layer in self.layers:
            layer.reserve(num_rows, capacity)
            # One by one, so that at no time two whole caches are held.
            mx.eval(layer.arrays)

    def begin_step(self, positions: Sequence[int], num_positions: int = 1) -> None:
        """Sets the column, one per slot, from which the next forward writes, and how many."""
        columns = mx.array(list(positions), mx.int32)
        needed = max(positions) + num_positions
        assert needed <= self.capacity, "a column that is written has to be there"
        used = min(rounded_up(needed), self.capacity)
        for layer in self.layers:
            layer.begin_step(columns, used)

    def clear_row(self, row: int) -> None:
        """Zeroes a slot whose sequence left a NaN behind."""
        for layer in self.layers:
            layer.clear_row(row)

    def clear_columns(self, row: int, first: int, end: int) -> None:
        """Zeroes what a slot holds from position `first` on, to before `end`."""
        for layer in self.layers:
            layer.clear_columns(row, mx.arange(first, end))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        self.num_rows = len(rows)
        for layer in self.layers:
            layer.keep_rows(mx.array(list(rows), mx.int32))
            mx.eval(layer.arrays)
