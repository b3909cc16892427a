"""What the engine asks of a layer's cache, whatever the layer keeps of the past.

A layer's kind makes two caches: one for prompts in prefill, one for the row slots of the batch. To
the model both look like the cache of mlx-lm that it asked for.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

Past = tuple[mx.array, ...]
"""What one layer keeps of one prompt: keys and values (H, L, D), or states without a row axis."""


class PromptCache(Protocol):
    """One layer's past of prompts in prefill, right padded, all at one common column."""

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        ...

    def start_from(self, past: Past, num_columns: int) -> None:
        """Starts every prompt from a past of `num_columns` tokens."""
        ...

    def end_rows(self, rows: Sequence[int]) -> None:
        """Notes that the prompts in `rows` end at the common column: what follows is padding."""
        ...

    def past(self, row: int, num_columns: int) -> Past:
        """What the layer keeps of a prompt that has `num_columns` tokens and is wholly done."""
        ...


class RowCache(Protocol):
    """One layer's past of the whole batch: a slot per row."""

    @property
    def arrays(self) -> Past:
        """The arrays of all slots."""
        ...

    def begin_step(self, offset: mx.array, num_columns: int) -> None:
        """Sets each slot's column, (B,) int32, for the next forward, and the columns in use."""
        ...

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows and columns; what is there stays where it is.

        Rows never become fewer; columns do, and those dropped hold nothing that is needed.
        """
        ...

    def write_prefix(self, rows: Sequence[int], past: Past) -> None:
        """Starts the given slots from a prompt's past; nothing of theirs may be left."""
        ...

    def clear_row(self, row: int) -> None:
        """Zeroes a slot."""
        ...

    def clear_columns(self, row: int, positions: mx.array) -> None:
        """Zeroes what a slot holds at `positions`, (N,) int32, which come after its last token."""
        ...

    def keep_rows(self, rows: mx.array) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        ...


class LayerKind(Protocol):
    """What one layer of the model keeps of the past."""

    @property
    def num_arrays(self) -> int:
        """Arrays in a `Past` of this layer."""
        ...

    @property
    def is_recurrent(self) -> bool:
        """Whether the past is a state that can be neither cut nor padded."""
        ...

    def nbytes(self, num_columns: int) -> int:
        """Bytes of one slot with that many columns."""
        ...

    def prompt_cache(self, num_prompts: int, max_length: int) -> PromptCache:
        """An empty cache of prompts in prefill."""
        ...

    def row_cache(self) -> RowCache:
        """A cache with no slots yet."""
        ...
