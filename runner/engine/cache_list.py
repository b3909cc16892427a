"""Layers that keep several things at once: a model finds them at `cache[0]`, `cache[1]`, ..."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.engine.layer_cache import LayerKind, Past, PromptCache, RowCache


@dataclass(frozen=True, slots=True)
class ListKind:
    """A layer that keeps what each of its parts keeps."""

    parts: tuple[LayerKind, ...]

    @property
    def num_arrays(self) -> int:
        """Arrays in a `Past` of this layer: those of the parts, one after another."""
        return sum(part.num_arrays for part in self.parts)

    @property
    def is_recurrent(self) -> bool:
        """Whether any part is."""
        return any(part.is_recurrent for part in self.parts)

    def nbytes(self, num_columns: int) -> int:
        """Bytes of one slot with that many columns."""
        return sum(part.nbytes(num_columns) for part in self.parts)

    def prompt_cache(self, num_prompts: int, max_length: int) -> "PromptCacheList":
        """Empty caches of prompts in prefill."""
        return PromptCacheList(self, num_prompts, max_length)

    def row_cache(self) -> "RowCacheList":
        """Caches with no slots yet."""
        return RowCacheList(self)

    def split(self, past: Past) -> Iterator[Past]:
        """Each part's share of a past."""
        arrays = iter(past)
        for part in self.parts:
            yield tuple(next(arrays) for _ in range(part.num_arrays))


def _joined(pasts: Iterable[Past]) -> Past:
    return tuple(array for past in pasts for array in past)


class PromptCacheList:
    """One layer's caches of prompts in prefill."""

    def __init__(self, kind: ListKind, num_prompts: int, max_length: int) -> None:
        self._kind = kind
        self._parts: list[PromptCache] = [
            part.prompt_cache(num_prompts, max_length) for part in kind.parts
        ]

    def __getitem__(self, index: int) -> PromptCache:
        return self._parts[index]

    @property
    def arrays(self) -> Past:
        """The arrays to evaluate."""
        return _joined(part.arrays for part in self._parts)

    def start_from(self, past: Past, num_columns: int) -> None:
        """Starts every prompt from a past of `num_columns` tokens."""
        for part, share in zip(self._parts, self._kind.split(past), strict=True):
            part.start_from(share, num_columns)

    def end_rows(self, rows: Sequence[int]) -> None:
        """Notes that the prompts in `rows` end at the common column."""
        for part in self._parts:
            part.end_rows(rows)

    def past(self, row: int, num_columns: int) -> Past:
        """What the parts keep of a prompt of `num_columns` tokens."""
        return _joined(part.past(row, num_columns) for part in self._parts)


class RowCacheList:
    """One layer's caches of the whole batch."""

    def __init__(self, kind: ListKind) -> None:
        self._kind = kind
        self._parts: list[RowCache] = [part.row_cache() for part in kind.parts]

    def __getitem__(self, index: int) -> RowCache:
        return self._parts[index]

    @property
    def arrays(self) -> Past:
        """The arrays of all slots."""
        return _joined(part.arrays for part in self._parts)

    def begin_step(self, offset: mx.array, num_columns: int) -> None:
        """Sets each slot's column, (B,) int32, for the next forward, and the columns in use."""
        for part in self._parts:
            part.begin_step(offset, num_columns)

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for rows and columns; what is there stays where it is."""
        for part in self._parts:
            part.reserve(num_rows, num_columns)

    def write_prefix(self, rows: Sequence[int], past: Past) -> None:
        """Starts the given slots from a prompt's past."""
        for part, share in zip(self._parts, self._kind.split(past), strict=True):
            part.write_prefix(rows, share)

    def clear_row(self, row: int) -> None:
        """Zeroes a slot."""
        for part in self._parts:
            part.clear_row(row)

    def clear_columns(self, row: int, positions: mx.array) -> None:
        """Zeroes what a slot holds at `positions`."""
        for part in self._parts:
            part.clear_columns(row, positions)

    def keep_rows(self, rows: mx.array) -> None:
        """Keeps the given slots, in that order, and drops the others."""
        for part in self._parts:
            part.keep_rows(rows)
