"""Rows are prepared ahead, in a thread with a tokenizer of its own."""

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from runner import LLM
from runner.encoding import MOST_CHARACTERS
from runner.errors import PromptError
from runner.reading import prepared_rows
from runner.rows import NamedRow, encode_rows
from runner.types import Prompt


def rows(count: int, text: str = "row {}") -> Iterator[NamedRow]:
    for number in range(count):
        name = str(number)
        prompt = Prompt(text=text.format(name))
        yield NamedRow(row={}, row_id=name, key=name, prompt=prompt)


class Copied:
    """A tokenizer that counts its copies."""

    def __init__(self) -> None:
        self.copies: list[Copied] = []

    def __deepcopy__(self, memo: Any) -> "Copied":
        self.copies.append(Copied())
        return self.copies[-1]


def test_what_is_wanted_is_prepared_in_another_thread_with_another_tokenizer() -> None:
    tokenizer, seen = Copied(), []

    def prepare(chunk: list[NamedRow], own: Any) -> list[str]:
        assert own is not tokenizer and [own] == tokenizer.copies
        assert threading.current_thread() is not threading.main_thread()
        seen.append(len(chunk))
        return [row.row_id for row in chunk]

    found = prepared_rows(
        rows(200), prepare, tokenizer, is_wanted=lambda row: int(row.row_id) % 2 == 1
    )
    assert list(found) == [str(number) for number in range(1, 200, 2)]
    assert sum(seen) == 100


def test_where_nothing_is_wanted_nothing_is_prepared_or_copied() -> None:
    tokenizer = Copied()

    def prepare(chunk: list[NamedRow], own: Any) -> list[NamedRow]:
        raise AssertionError("nothing is wanted")

    assert list(prepared_rows(rows(2000), prepare, tokenizer, is_wanted=lambda row: False)) == []
    assert not tokenizer.copies


def test_long_texts_are_not_prepared_by_the_dozen() -> None:
    read: list[int] = []

    def prepare(chunk: list[NamedRow], own: Any) -> list[NamedRow]:
        read.append(len(chunk))
        return chunk

    long = "{} " + "x" * (MOST_CHARACTERS // 2)
    list(prepared_rows(rows(6, long), prepare, None, is_wanted=lambda row: True))
    assert read == [2, 2, 2]


def test_a_row_without_a_usable_prompt_leaves_its_neighbours(llm: LLM) -> None:
    none = NamedRow(row={}, row_id="n", key="n", prompt=None, error=PromptError("none"))
    given = [*rows(2), none, *rows(1, "half \ud83d"), *rows(1)]
    found = encode_rows(given, llm.tokenizer)
    assert [isinstance(row.encoded, tuple) for row in found] == [True, True, False, False, True]
    assert found[2] is none and isinstance(found[3].encoded, PromptError)
    assert found[4].encoded == ("row 0", llm.tokenizer.encode("row 0"))


def test_decoding_and_encoding_at_once_disturb_each_other_in_nothing(llm: LLM) -> None:
    """The main thread sets how its tokenizer truncates, which fails while another one uses it."""
    ids = llm.tokenizer.encode("some text")
    with closing(
        prepared_rows(rows(3000), encode_rows, llm.tokenizer, is_wanted=lambda row: True)
    ) as found:
        for number, row in enumerate(found):
            assert llm.tokenizer.decode(ids) == "some text"
            short = llm.tokenizer.encode("some text", truncation=True, max_length=1 + number % 5)
            assert short == ids[: 1 + number % 5]
            assert isinstance(row.encoded, tuple) and len(row.encoded[1]) == 4 + len(str(number))


def test_what_a_tokenizer_raises_is_raised_to_who_reads() -> None:
    class Broken:
        def encode(self, text: str, **options: Any) -> list[int]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(prepared_rows(rows(5), encode_rows, Broken(), is_wanted=lambda row: True))
