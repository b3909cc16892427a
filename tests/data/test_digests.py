"""Sets and counts of digests hold what a dict would, in memory that the kernel may take."""

import random
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import digests
from runner.data.digests import DigestCounts, DigestTable, RowIds, digest


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that grow after a few additions, and are copied a few places at a time."""
    monkeypatch.setattr(digests, "_FIRST_BITS", 2)
    monkeypatch.setattr(digests, "_SPARE", 4)
    monkeypatch.setattr(digests, "_COPIED", 3)


def near(place: int, number: int) -> bytes:
    """A digest that begins among the first or the last of all places, beside others."""
    return bytes([place, 0, 0, number]) + bytes(12)


KEYS = st.sampled_from(
    [digest(bytes([i])) for i in range(12)]
    + [near(place, number) for place in (0, 1, 128, 255) for number in range(4)]
)


@given(st.lists(KEYS, max_size=60))
def test_it_counts_as_a_dict_does(keys: list[bytes]) -> None:
    counts, wanted = DigestCounts(), Counter[bytes]()
    for key in keys:
        assert counts.add(key) == wanted[key]
        wanted[key] += 1
        assert len(counts) == len(wanted)
    assert all(counts.get(key) == wanted[key] for key in [*keys, digest(b"never")])


def test_many_stay_where_they_are_found_while_the_table_grows() -> None:
    table = DigestTable(2)
    keys = [digest(str(number).encode()) for number in range(5000)]
    for number, key in enumerate(keys):
        assert table.set(key, (number + 1).to_bytes(2, "big")) == b"\0\0"
    assert len(table) == 5000
    assert [table.get(key) for key in keys] == [(i + 1).to_bytes(2, "big") for i in range(5000)]
    assert table.set(keys[7], b"zz") == b"\0\x08" and table.get(keys[7]) == b"zz"
    assert len(table) == 5000, "one that is there is not added"


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    counts = DigestCounts()
    keys = [b"a" * n + b"\0" * (16 - n) for n in range(17)]
    for _ in range(2):
        for key in keys:
            counts.add(key)
    assert [counts.get(key) for key in keys] == [2] * 17


def test_digests_that_crowd_at_the_last_place_make_the_table_larger() -> None:
    counts = DigestCounts()
    keys = [bytes([255, 4 * number]) + bytes(14) for number in range(40)]
    for key in keys:
        counts.add(key)
    assert [counts.get(key) for key in keys] == [1] * 40
    assert counts.get(b"\xff" * 16) == 0


def test_a_set_of_row_ids() -> None:
    ids = RowIds(f"r{i}" for i in range(0, 100, 2))
    ids.update(["r0", "r2", "new"])
    assert len(ids) == 51 and "new" in ids
    assert [f"r{i}" in ids for i in range(100)] == [i % 2 == 0 for i in range(100)]


def test_it_takes_a_few_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_COPIED", 4096)
    ids = RowIds(str(number) for number in range(50_000))
    assert len(ids._digests._table[0]) < 17 * 3.01 * 50_000


def test_a_digest_that_comes_while_another_is_asked_for_is_not_taken_for_it() -> None:
    table = DigestTable(1)
    asked, comes = bytes(15) + b"\1", bytes(15) + b"\2"  # Both begin in the first place.
    find = table._find

    def found(*arguments: Any) -> Any:
        there = find(*arguments)
        if arguments[-1] == asked:
            table.set(comes, b"\1")
        return there

    table._find = found  # type: ignore[method-assign]
    assert table.get(asked) == b"\0"
    assert table.get(comes) == b"\1"


def test_another_thread_may_ask_while_it_grows() -> None:
    ids = RowIds(f"old {i}" for i in range(200))
    asked, wrong = threading.Event(), []

    def ask() -> None:
        while not asked.is_set():
            name = f"old {random.randrange(200)}"
            if name not in ids or f"never {name}" in ids:
                wrong.append(name)

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(20_000):
        ids.update([f"new {number}"])
    asked.set()
    thread.join()
    assert wrong == []
