"""Rows -> what the model's thread is to find done, made of them in the thread that reads ahead."""

import copy
from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import Any, TypeVar

from runner.data import prepare_ahead
from runner.encoding import MOST_CHARACTERS
from runner.rows import NamedRow

Item = TypeVar("Item")


def prepared_rows(
    rows: Iterable[NamedRow],
    prepare: Callable[[list[NamedRow], Any], list[Item]],
    tokenizer: Any,
    *,
    is_wanted: Callable[[NamedRow], bool],
) -> Generator[Item]:
    """Yields what `prepare` makes of the rows that are wanted, read and prepared ahead.

    A thread calls `prepare` with some rows at a time and a tokenizer of its own: one that is used
    in two threads may fail, since each call sets how it truncates and pads.
    """
    own_tokenizer = cache(lambda: copy.deepcopy(tokenizer))

    def prepare_wanted(chunk: list[NamedRow]) -> list[Item]:
        wanted = [row for row in chunk if is_wanted(row)]
        # Where nothing is left to do, copying a large vocabulary would take most of the time.
        return prepare(wanted, own_tokenizer()) if wanted else []

    return prepare_ahead(rows, prepare_wanted, length=_length, most=MOST_CHARACTERS)


def _length(row: NamedRow) -> int:
    return 0 if row.prompt is None else row.prompt.length
