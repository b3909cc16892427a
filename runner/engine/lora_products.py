"""The low-rank products of one module, for rows that share an adapter or have one each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from runner.engine.lora import LowRank

GROUP = 4
"""Rows that are multiplied together where rows have different adapters."""


class Products(Protocol):
    """What is added to the output of a module, float32 and cast to the output's type."""

    def linear(self, x: mx.array, y: mx.array) -> mx.array:
        """Adapts y (..., out), the output of a linear layer for x (..., in)."""
        ...

    def lookup(self, ids: mx.array, y: mx.array) -> mx.array:
        """Adapts y (..., width), the embeddings of ids (...)."""
        ...

    def experts(self, x: mx.array, indices: mx.array, y: mx.array, *, is_sorted: bool) -> mx.array:
        """Adapts y, the output of a layer of experts chosen by `indices`."""
        ...


class OneAdapter:
    """The same adapter for all rows: two plain products."""

    def __init__(self, low: LowRank) -> None:
        self._low = low

    def linear(self, x: mx.array, y: mx.array) -> mx.array:
        """As in `Products`."""
        low = self._low
        y = y + ((x @ low.a) @ low.b).astype(y.dtype)
        if low.gain is not None:
            y = y * low.gain.astype(y.dtype)
        return y if low.offset is None else y + low.offset.astype(y.dtype)

    def lookup(self, ids: mx.array, y: mx.array) -> mx.array:
        """As in `Products`."""
        low = self._low
        y = y + (low.a[ids] @ low.b).astype(y.dtype)
        return y if low.gain is None else y * low.gain[ids][..., None].astype(y.dtype)

    def experts(self, x: mx.array, indices: mx.array, y: mx.array, *, is_sorted: bool) -> mx.array:
        """As in `Products`."""
        z = x.astype(mx.float32)
        for factor in (self._low.a, self._low.b):
            z = mx.gather_mm(
                z, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted
            )
        return y + z.astype(y.dtype)


@dataclass(slots=True, eq=False)
class Stack:
    """One module's arrays of several adapters, by slot; an adapter without them has zeros."""

    a: mx.array
    """(S, in, R), of an embedding (S, V, R), of experts (S, E, R, in)."""
    b: mx.array
    """(S, R, out), of experts (S, E, out, R)."""
    gain: mx.array | None = None
    """(S, out); ones where there is no gain."""
    offset: mx.array | None = None
    """(S, out)."""


class RowSlots:
    """Which slot each row of a forward uses.

    In decode the rows of one slot are multiplied `GROUP` at a time, padded by repeating one of
    them, so that no factor is copied for a row and a row's product does not depend on the others.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        order = sorted(range(len(slots)), key=lambda row: slots[row])
        groups: list[list[int]] = []
        for row in order:
            if not groups or len(groups[-1]) == GROUP or slots[groups[-1][0]] != slots[row]:
                groups.append([])
            groups[-1].append(row)
        padded = [group + [group[0]] * (GROUP - len(group)) for group in groups]
        places = np.zeros(len(slots), np.uint32)
        for number, group in enumerate(groups):
            places[group] = number * GROUP + np.arange(len(group), dtype=np.uint32)
        self.num_rows = len(slots)
        self.slots = mx.array(list(slots), mx.uint32)
        self.entries = mx.array(np.array(padded, np.uint32))
        """(G, GROUP): the rows of each group."""
        self.group_slots = mx.array([slots[group[0]] for group in groups], mx.uint32)
        self.places = mx.array(places)
        """Where in the groups, flat, each row stands."""
        self.sorted_slots: mx.array | None = None
        """The slot of each entry that the layers of experts at hand take sorted by expert."""

    def product(self, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        """x (..., in) times each row's own a (S, in, R) and b (S, R, out)."""
        rows = self.by_row(x)  # (B, T, in)
        if rows.shape[1] > 1:
            z = mx.gather_mm(rows, a, rhs_indices=self.slots)
            z = mx.gather_mm(z, b, rhs_indices=self.slots)
        else:
            z = mx.gather_mm(rows[:, 0][self.entries], a, rhs_indices=self.group_slots)
            z = mx.gather_mm(z, b, rhs_indices=self.group_slots)  # (G, GROUP, out)
            z = z.reshape(-1, z.shape[-1])[self.places]
        return z.reshape(*x.shape[:-1], -1)

    def by_row(self, x: mx.array) -> mx.array:
        """x (..., D), whose leading axes together are row by row, as (B, T, D)."""
        return x.reshape(self.num_rows, -1, x.shape[-1])

    def sort(self, x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """mlx-lm's `_gather_sort` of what experts take, which notes the slots in that order."""
        num_chosen = indices.shape[-1]
        flat = indices.flatten()
        order = mx.argsort(flat)
        tokens = order // num_chosen
        self.sorted_slots = self.of_tokens(flat.size // num_chosen)[tokens]
        return x.flatten(0, -3)[tokens], flat[order], mx.argsort(order)

    def of_tokens(self, num_tokens: int) -> mx.array:
        """The slot of each of the tokens, row by row, (N,)."""
        return mx.repeat(self.slots, num_tokens // self.num_rows)


class ManyAdapters:
    """An adapter, or none, for each row."""

    def __init__(self, stack: Stack, rows: RowSlots) -> None:
        self._stack = stack
        self._rows = rows

    def linear(self, x: mx.array, y: mx.array) -> mx.array:
        """As in `Products`."""
        stack = self._stack
        z = self._rows.product(x.astype(mx.float32), stack.a, stack.b)
        y = y + z.astype(y.dtype)
        if stack.gain is None:
            return y
        rows = self._rows.by_row(y)
        rows = rows * stack.gain[self._rows.slots][:, None].astype(y.dtype)
        if stack.offset is not None:
            rows = rows + stack.offset[self._rows.slots][:, None].astype(y.dtype)
        return rows.reshape(y.shape)

    def lookup(self, ids: mx.array, y: mx.array) -> mx.array:
        """As in `Products`."""
        stack, slots = self._stack, self._rows.slots
        rows = ids.reshape(self._rows.num_rows, -1)
        z = mx.gather_mm(stack.a[slots[:, None], rows], stack.b, rhs_indices=slots)
        y = y + z.reshape(y.shape).astype(y.dtype)
        if stack.gain is None:
            return y
        return y * stack.gain[slots[:, None], rows].reshape(*ids.shape, 1).astype(y.dtype)

    def experts(self, x: mx.array, indices: mx.array, y: mx.array, *, is_sorted: bool) -> mx.array:
        """As in `Products`."""
        stack, num_experts = self._stack, self._stack.a.shape[1]
        chosen = indices.astype(mx.uint32) + num_experts * self._entry_slots(indices, is_sorted)
        z = x.astype(mx.float32)
        for factor in (stack.a, stack.b):
            each = factor.reshape(-1, *factor.shape[2:]).swapaxes(-1, -2)  # (S * E, ...)
            z = mx.gather_mm(z, each, rhs_indices=chosen)
        return y + z.astype(y.dtype)

    def _entry_slots(self, indices: mx.array, is_sorted: bool) -> mx.array:
        """The slot of each entry of `indices`, in a shape that goes with it."""
        if is_sorted:
            assert self._rows.sorted_slots is not None, "sorting is noted while adapters are bound"
            return self._rows.sorted_slots
        slots = self._rows.of_tokens(indices.size // indices.shape[-1])
        return slots.reshape(*indices.shape[:-1], 1)
