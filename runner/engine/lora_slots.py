"""Slots of stacked factors: the adapters that rows of one forward use beside each other."""

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

import mlx.core as mx

from runner.engine.lora import Adapter, LowRank
from runner.engine.lora_products import Stack

_RANKS = 8
"""Ranks are padded to a multiple of this, so that kernels have whole tiles."""


class AdapterSlots:
    """Copies of adapters, stacked module by module; slot 0 is none, and adds zeros.

    An adapter gets a slot when it is first needed beside another. The number of slots doubles up
    to `max_adapters`; then the adapter that was used least recently gives up its own. A forward
    that needs more has them.
    """

    def __init__(self, *, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._slots: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()
        self._last_used: dict[int, int] = {}
        self._num_uses = 0
        self._num_slots = 1
        self.stacks: dict[str, Stack] = {}
        """By the path of the module."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked arrays."""
        return sum(array.nbytes for stack in self.stacks.values() for array in _arrays(stack))

    def take(self, rows: Sequence[Adapter | None]) -> list[int]:
        """The slot of each row's adapter; 0 for none."""
        needed = {adapter: None for adapter in rows if adapter is not None}
        self._num_uses += 1
        for adapter in needed:
            if adapter in self._slots:
                self._last_used[self._slots[adapter]] = self._num_uses
        for adapter in needed:
            if adapter not in self._slots:
                slot = self._free_slot(len(needed))
                self._write(slot, adapter)
                self._slots[adapter] = slot
                self._last_used[slot] = self._num_uses
        return [0 if adapter is None else self._slots[adapter] for adapter in rows]

    def forget(self, adapters: Collection[Adapter]) -> None:
        """Gives up slots, such as those of adapters whose arrays have changed."""
        for adapter in adapters:
            self._slots.pop(adapter, None)

    def _free_slot(self, num_needed: int) -> int:
        taken = set(self._slots.values())
        free = [slot for slot in range(1, self._num_slots) if slot not in taken]
        if free:
            return free[0]
        most = 1 + max(self._max_adapters, num_needed)
        if self._num_slots < most:
            self._grow(min(most, max(4, 2 * self._num_slots)))
            return self._free_slot(num_needed)
        oldest = min(self._slots, key=lambda adapter: self._last_used[self._slots[adapter]])
        return self._slots.pop(oldest)

    def _grow(self, num_slots: int) -> None:
        for path, stack in self.stacks.items():
            self.stacks[path] = Stack(
                _grown(stack.a, num_slots),
                _grown(stack.b, num_slots),
                None if stack.gain is None else _grown(stack.gain, num_slots),
                None if stack.offset is None else _grown(stack.offset, num_slots),
            )
            mx.eval(_arrays(self.stacks[path]))
        self._num_slots = num_slots

    def _write(self, slot: int, adapter: Adapter) -> None:
        """Writes an adapter's factors, and zeros where it has none, into a slot of each stack."""
        for path, low in adapter.targets.items():
            self._make_room(path, low)
        for path, stack in self.stacks.items():
            _write(stack, slot, adapter.targets.get(path))
        mx.eval([_arrays(stack) for stack in self.stacks.values()])

    def _make_room(self, path: str, low: LowRank) -> None:
        """Makes a module's stack, or widens it to the rank, or gives it gains."""
        is_experts = low.a.ndim == 3
        rank = low.a.shape[-2 if is_experts else -1]
        rank += -rank % _RANKS
        stack = self.stacks.get(path)
        if stack is None:
            a, b = list(low.a.shape), list(low.b.shape)
            a[-2 if is_experts else -1] = b[-1 if is_experts else -2] = rank
            stack = Stack(mx.zeros((self._num_slots, *a)), mx.zeros((self._num_slots, *b)))
            self.stacks[path] = stack
        stack.a = _widened(stack.a, -2 if is_experts else -1, rank)
        stack.b = _widened(stack.b, -1 if is_experts else -2, rank)
        if low.gain is not None and stack.gain is None:
            stack.gain = mx.ones((self._num_slots, *low.gain.shape))
        if low.offset is not None and stack.offset is None:
            stack.offset = mx.zeros((self._num_slots, *low.offset.shape))


def _arrays(stack: Stack) -> list[mx.array]:
    found = (stack.a, stack.b, stack.gain, stack.offset)
    return [array for array in found if array is not None]


def _grown(array: mx.array, num_slots: int) -> mx.array:
    """More slots; what they hold is written before they are used."""
    more = mx.zeros((num_slots - array.shape[0], *array.shape[1:]))
    return mx.concatenate([array, more])


def _widened(array: mx.array, axis: int, size: int) -> mx.array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, max(0, size - array.shape[axis]))
    return mx.pad(array, widths) if widths[axis][1] else array


def _write(stack: Stack, slot: int, low: LowRank | None) -> None:
    """Overwrites a slot, in place where nothing else holds the stack."""
    empty = mx.array(0.0)
    for name in ("a", "b", "gain", "offset"):
        array = getattr(stack, name)
        given = None if low is None else getattr(low, name)
        if array is None:
            continue
        if given is None:
            array[slot] = mx.array(1.0) if name == "gain" else empty
            continue
        places = tuple(slice(size) for size in given.shape)
        if given.shape != array.shape[1:]:
            array[slot] = empty
        array[(slot, *places)] = given
