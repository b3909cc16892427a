"""The row slots of all layers."""

from collections.abc import Sequence

import mlx.core as mx

from runner.engine.layer_cache import LayerKind, RowCache

_COLUMN_STEP = 32
"""Attended columns are rounded up to this, so that few shapes occur."""
_MIN_CAPACITY = 256


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
            layer.begin_step(columns, used)

    def clear_row(self, row: int) -> None:
        """Zeroes a slot whose sequence left a NaN behind."""
        for layer in self.layers:
            layer.clear_row(row)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        self.num_rows = len(rows)
        for layer in self.layers:
            layer.keep_rows(mx.array(list(rows)))
