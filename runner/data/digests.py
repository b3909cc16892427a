"""Sets and counts of very many row ids, in memory that the kernel may put on disk."""

import hashlib
from collections.abc import Iterable
from mmap import mmap
from typing import Any

import numpy as np

from runner.data.scratch import scratch_memory

DIGEST_BYTES = 16
"""At this size two of a thousand million rows share a digest with probability 1e-21."""

_FIRST_BITS = 12
"""Of a new table, which has 4096 places then."""
_SPARE = 1024
"""Places after the last that a digest may begin at, so that none wraps around."""
_COPIED = 65536
_COUNT_BYTES = 4


def digest(content: bytes) -> bytes:
    """The first 16 bytes of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class DigestTable:
    """A few bytes for each digest: never only zeros, which is what stands for none.

    Open addressing with linear probing (Knuth, The Art of Computer Programming 6.4, algorithm L)
    over scratch memory, at most two thirds full. A digest's first bits are its place: so the table
    is as good as in order, and twice its size is made in one pass over both. Another thread may ask
    while one writes.
    """

    def __init__(self, value_bytes: int) -> None:
        self._width = DIGEST_BYTES + value_bytes
        self._empty = bytes(self._width)
        self._none = bytes(value_bytes)
        self._bits = _FIRST_BITS
        self._num_digests = 0
        # Memory and how far a digest is shifted change together, because another thread may ask.
        self._table = self._new(self._bits)

    def __len__(self) -> int:
        return self._num_digests

    def get(self, key: bytes) -> bytes:
        """What was set for a digest; zeros for none."""
        _, entry = self._find(*self._table, key)
        return entry[DIGEST_BYTES:]

    def set(self, key: bytes, value: bytes) -> bytes:
        """Sets the value of a digest; returns the one before."""
        assert len(value) == len(self._none) and value != self._none, "zeros stand for none"
        memory, shift = self._table
        at, entry = self._find(memory, shift, key)
        before = entry[DIGEST_BYTES:]
        if before == self._none:
            while self._is_full(memory, at):
                self._grow()
                memory, shift = self._table
                at, _ = self._find(memory, shift, key)
            self._num_digests += 1
        memory[at : at + self._width] = key + value
        return before

    def _find(self, memory: mmap, shift: int, key: bytes) -> tuple[int, bytes]:
        """Where a digest is, or else belongs, and what is there: the last place is always empty.

        Who asks has to look at this and not once more: another digest may have come meanwhile.
        """
        width, empty = self._width, self._empty
        at = (int.from_bytes(key[:8], "big") >> shift) * width
        while not (entry := memory[at : at + width]).startswith(key) and entry != empty:
            at += width
        return at, entry

    def _is_full(self, memory: mmap, at: int) -> bool:
        is_dense = 3 * (self._num_digests + 1) > 2 << self._bits
        return is_dense or at + self._width >= len(memory)

    def _new(self, bits: int) -> tuple[mmap, int]:
        return scratch_memory(((1 << bits) + _SPARE) * self._width), 64 - bits

    def _grow(self) -> None:
        old = self._entries(self._table[0])
        while True:
            self._bits += 1
            table = self._new(self._bits)
            if self._copy(old, self._entries(table[0]), table[1]):
                break
        self._table = table

    def _entries(self, memory: mmap) -> Any:
        return np.frombuffer(memory, np.uint8).reshape(-1, self._width)

    @staticmethod
    def _copy(old: Any, new: Any, shift: int) -> bool:
        """Copies entries to their places, run by run; False where they reach the last place."""
        start = next_free = 0
        while start < len(old):
            end = min(start + _COPIED, len(old))
            # What lies together is put in order together, so that no gap comes before a digest.
            while end < len(old) and old[end, DIGEST_BYTES:].any():
                end += 1
            entries = old[start:end]
            entries = entries[entries[:, DIGEST_BYTES:].any(axis=1)]
            homes = (entries[:, :8].copy().view(">u8")[:, 0] >> np.uint64(shift)).astype(np.int64)
            order = np.argsort(homes, kind="stable")
            counted = np.arange(len(order))
            starts = np.maximum(homes[order] - counted, next_free)
            places = np.maximum.accumulate(starts) + counted
            if len(places):
                next_free = int(places[-1]) + 1
            if next_free >= len(new):
                return False
            new[places] = entries[order]
            start = end
        return True


class DigestCounts:
    """How often each digest was added."""

    def __init__(self) -> None:
        self._table = DigestTable(_COUNT_BYTES)

    def __len__(self) -> int:
        """Different digests."""
        return len(self._table)

    def get(self, key: bytes) -> int:
        """How often a digest was added."""
        return int.from_bytes(self._table.get(key), "little")

    def add(self, key: bytes) -> int:
        """Adds a digest; returns how often it had been added before."""
        before = self.get(key)
        self._table.set(key, (before + 1).to_bytes(_COUNT_BYTES, "little"))
        return before


class RowIds:
    """A set of row ids that can be asked and grown; it keeps their digests alone."""

    def __init__(self, row_ids: Iterable[str] = ()) -> None:
        self._digests = DigestTable(1)
        self.update(row_ids)

    def update(self, row_ids: Iterable[str]) -> None:
        """Adds row ids; one that is there already changes nothing."""
        for row_id in row_ids:
            self._digests.set(digest(row_id.encode()), b"\1")

    def __contains__(self, row_id: str) -> bool:
        return self._digests.get(digest(row_id.encode())) != b"\0"

    def __len__(self) -> int:
        return len(self._digests)
