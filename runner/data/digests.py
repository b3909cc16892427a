"""Sets and counts of very many row ids, in 16 to 20 bytes each instead of a Python string."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

DIGEST_BYTES = 16
"""At this size two of a thousand million rows share a digest with probability 1e-21."""

_RECENT = 65536


def digest(content: bytes) -> bytes:
    """The first 16 bytes of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class DigestCounts:
    """How often each digest was added: sorted arrays, and a dict of what came last.

    The dict is merged into the arrays when it has a sixteenth of their size, so n additions copy
    each entry a few dozen times at most.
    """

    def __init__(self) -> None:
        # Keys and counts change together, and before the dict, so that another thread may ask.
        self._arrays: tuple[Any, Any] = (np.empty(0, f"S{DIGEST_BYTES}"), np.empty(0, np.uint32))
        self._recent: dict[bytes, int] = {}
        self._num_new = 0

    def __len__(self) -> int:
        """Different digests."""
        return len(self._arrays[0]) + self._num_new

    def get(self, key: bytes) -> int:
        """How often a digest was added."""
        found = self._recent.get(key)
        return self._settled(key) if found is None else found

    def add(self, key: bytes) -> int:
        """Adds a digest; returns how often it had been added before."""
        before = self.get(key)
        self._num_new += before == 0
        self._recent[key] = before + 1
        if len(self._recent) > max(_RECENT, len(self._arrays[0]) // 16):
            self._merge()
        return before

    def _settled(self, key: bytes) -> int:
        keys, counts = self._arrays
        place = int(keys.searchsorted(key))
        # numpy takes zeros at the end of a value off, and compares as if they were there.
        is_there = place < len(keys) and keys[place] == key.rstrip(b"\0")
        return int(counts[place]) if is_there else 0

    def _merge(self) -> None:
        keys, counts = self._arrays
        recent = sorted(self._recent)
        new = np.array(recent, keys.dtype)
        new_counts = np.array([self._recent[key] for key in recent], np.uint32)
        places = keys.searchsorted(new)
        known = np.zeros(len(new), bool)
        inside = places < len(keys)
        known[inside] = keys[places[inside]] == new[inside]
        counts = counts.copy()
        counts[places[known]] = new_counts[known]
        fresh = places[~known]
        self._arrays = (
            np.insert(keys, fresh, new[~known]),
            np.insert(counts, fresh, new_counts[~known]),
        )
        self._recent, self._num_new = {}, 0


class RowIds:
    """A set of row ids that can be asked and grown; it keeps their digests alone."""

    def __init__(self, row_ids: Iterable[str] = ()) -> None:
        self._digests = DigestCounts()
        self.update(row_ids)

    def update(self, row_ids: Iterable[str]) -> None:
        """Adds row ids; one that is there already changes nothing."""
        for row_id in row_ids:
            self._digests.add(digest(row_id.encode()))

    def __contains__(self, row_id: str) -> bool:
        return self._digests.get(digest(row_id.encode())) > 0

    def __len__(self) -> int:
        return len(self._digests)
