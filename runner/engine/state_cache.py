"""Recurrent and convolutional states: arrays of a fixed size that every token overwrites.

Both caches are an `ArraysCache` to the model: some models ask for that very class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from runner.engine.layer_cache import Past


@dataclass(frozen=True, slots=True)
class StateKind:
    """A layer that keeps a few arrays of what it has seen so far."""

    shapes: tuple[tuple[int, ...], ...]
    """Of each array, without its row axis."""
    dtypes: tuple[mx.Dtype, ...]

    @property
    def num_arrays(self) -> int:
        """Arrays in a `Past` of this layer."""
        return len(self.shapes)

    @property
    def is_recurrent(self) -> bool:
        """True: a pad that is forwarded enters the state for good."""
        return True

    def nbytes(self, num_columns: int) -> int:
        """Bytes of one slot, however many tokens it has seen."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return sum(prod(shape) * dtype.size for shape, dtype in pairs)

    def prompt_cache(self, num_prompts: int, max_length: int) -> "PromptStateCache":
        """A cache of prompts of which nothing is prefilled."""
        return PromptStateCache(self, num_prompts)

    def row_cache(self) -> "RowStateCache":
        """A cache with no slots yet."""
        return RowStateCache(self)

    def zeros(self, *num_rows: int) -> list[mx.array]:
        """The states before the first token, with a leading row axis where one is given."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [mx.zeros((*num_rows, *shape), dtype) for shape, dtype in pairs]


class PromptStateCache(ArraysCache):  # type: ignore[misc]
    """One layer's states of prompts in prefill, each (P, ...).

    mlx-lm's own way to keep pads out, `lengths`, is followed by half of its models only. Here a
    prompt's state is set aside at the column where the prompt ends, whatever the model then does
    with the pads behind it.
    """

    def __init__(self, kind: StateKind, num_prompts: int) -> None:
        super().__init__(kind.num_arrays)
        self._num_prompts = num_prompts
        self._ended: dict[int, Past] = {}
        self.cache = kind.zeros(num_prompts)

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        ended = [array for past in self._ended.values() for array in past]
        return (*self.cache, *ended)

    def start_from(self, past: Past, num_columns: int) -> None:
        """Starts every prompt from the states after its first `num_columns` tokens."""
        self.cache = [mx.repeat(array[None], self._num_prompts, axis=0) for array in past]

    def end_rows(self, rows: Sequence[int]) -> None:
        """Sets the states of the prompts in `rows` aside, before a pad enters them."""
        for row in rows:
            self._ended[row] = tuple(array[row] for array in self.cache)

    def past(self, row: int, num_columns: int) -> Past:
        """The states after a prompt's last token, as they were set aside."""
        return self._ended[row]


class RowStateCache(ArraysCache):  # type: ignore[misc]
    """One layer's states of the whole batch, each (B, ...): a slot per row.

    An empty slot is forwarded like any other and its state goes astray; that harms nobody, because
    `write_prefix` overwrites all of it, with zeros for a prompt of which nothing is prefilled.
    """

    def __init__(self, kind: StateKind) -> None:
        super().__init__(kind.num_arrays)
        self._kind = kind
        self.cache = kind.zeros(0)

    @property
    def arrays(self) -> Past:
        """The arrays of all slots."""
        return tuple(self.cache)

    def begin_step(self, offset: mx.array, num_columns: int) -> None:
        """A state knows no columns."""

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows; what is there stays where it is."""
        added = self._kind.zeros(num_rows - self.cache[0].shape[0])
        pairs = zip(self.cache, added, strict=True)
        self.cache = [mx.concatenate([old, new]) for old, new in pairs]

    def write_prefix(self, rows: Sequence[int], past: Past) -> None:
        """Overwrites the states of each of `rows` with one prompt's."""
        for array, value in zip(self.cache, past, strict=True):
            array[mx.array(list(rows))] = value

    def clear_row(self, row: int) -> None:
        """Takes a slot back to before the first token."""
        self.write_prefix([row], tuple(self._kind.zeros()))

    def clear_columns(self, row: int, positions: mx.array) -> None:
        """A state knows no columns; nothing is drafted beside one."""

    def keep_rows(self, rows: mx.array) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        self.cache = [array[rows] for array in self.cache]
