"""Sets and counts of digests hold what a dict would, in a fraction of its memory."""

import random
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import digests
from runner.data.digests import DigestCounts, RowIds, digest


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges after a few additions, not after 65536."""
    monkeypatch.setattr(digests, "_RECENT", 5)


KEYS = st.sampled_from([digest(bytes([i])) for i in range(12)] + [bytes(16), b"\0" * 15 + b"a"])


@given(st.lists(KEYS, max_size=60))
def test_it_counts_as_a_dict_does(keys: list[bytes]) -> None:
    counts, wanted = DigestCounts(), Counter[bytes]()
    for key in keys:
        assert counts.add(key) == wanted[key]
        wanted[key] += 1
        assert len(counts) == len(wanted)
    assert all(counts.get(key) == wanted[key] for key in [*keys, digest(b"never")])


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    counts = DigestCounts()
    keys = [b"a" * n + b"\0" * (16 - n) for n in range(17)]
    for _ in range(2):
        for key in keys:
            counts.add(key)
    assert [counts.get(key) for key in keys] == [2] * 17


def test_a_set_of_row_ids() -> None:
    ids = RowIds(f"r{i}" for i in range(0, 100, 2))
    ids.update(["r0", "r2", "new"])
    assert len(ids) == 51 and "new" in ids
    assert [f"r{i}" in ids for i in range(100)] == [i % 2 == 0 for i in range(100)]


def test_it_takes_a_few_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_RECENT", 1000)
    counts = DigestCounts()
    for number in range(50_000):
        counts.add(digest(str(number).encode()))
    recent = sys.getsizeof(counts._recent) + 80 * len(counts._recent)
    assert sum(array.nbytes for array in counts._arrays) + recent < 40 * 50_000


def test_another_thread_may_ask_while_it_grows() -> None:
    ids = RowIds(f"old {i}" for i in range(200))
    asked, wrong = threading.Event(), []

    def ask() -> None:
        while not asked.is_set():
            name = f"old {random.randrange(200)}"
            if name not in ids:
                wrong.append(name)

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(20_000):
        ids.update([f"new {number}"])
    asked.set()
    thread.join()
    assert wrong == []
