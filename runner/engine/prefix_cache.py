"""What layers keep of prompts that were prefilled before, for those that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runner.engine.layer_cache import Past

MIN_TOKENS = 16
"""A shorter match costs more to copy than to forward."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixEntry:
    """A prefilled prompt: its tokens and what each layer keeps of them."""

    token_ids: npt.NDArray[np.int32]
    pasts: list[Past]
    content: str = ""
    """Names the content of the adapter that it was prefilled with; empty for none."""

    @property
    def nbytes(self) -> int:
        """Bytes of what the layers keep."""
        return sum(array.nbytes for past in self.pasts for array in past)

    def num_shared(self, token_ids: Sequence[int]) -> int:
        """Tokens that this prompt and another begin with alike."""
        return num_shared(self.token_ids, token_ids)


def num_shared(one: Sequence[int] | npt.NDArray[np.int32], other: Sequence[int]) -> int:
    """Tokens that two prompts begin with alike."""
    size = min(len(one), len(other))
    differs = np.asarray(one[:size], np.int32) != np.asarray(other[:size], np.int32)
    return int(differs.argmax()) if differs.any() else size


class PrefixCache:
    """The most recently used prompts, up to `max_bytes` of what the layers keep.

    Keys and values can be cut at any column. A recurrent state cannot: with `whole_entries` an
    entry serves only prompts that begin with all of its tokens.
    """

    def __init__(self, *, max_bytes: int, whole_entries: bool = False) -> None:
        self._max_bytes = max_bytes
        self._whole_entries = whole_entries
        self._entries: OrderedDict[tuple[str, bytes], PrefixEntry] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, prompts: Sequence[Sequence[int]], *, content: str = ""
    ) -> tuple[PrefixEntry, int] | None:
        """The entry that all of `prompts` share the most tokens with, and how many.

        Only entries that were prefilled with an adapter of this content. None where the prompts
        share too few with any to be worth a copy.
        """
        best_key, best = ("", b""), 0
        for key, entry in self._entries.items():
            if entry.content != content:
                continue
            shared = min(entry.num_shared(prompt) for prompt in prompts)
            if self._whole_entries and shared < len(entry.token_ids):
                continue
            if shared > best:
                best_key, best = key, shared
        if best < MIN_TOKENS:
            return None
        self._entries.move_to_end(best_key)
        return self._entries[best_key], best

    def add(self, token_ids: Sequence[int], pasts: list[Past], *, content: str = "") -> None:
        """Keeps a prompt's pasts; drops the least recently used beyond `max_bytes`."""
        entry = PrefixEntry(np.asarray(token_ids, np.int32), pasts, content)
        key = content, entry.token_ids.tobytes()
        if len(token_ids) < MIN_TOKENS or key in self._entries or entry.nbytes > self._max_bytes:
            return
        self._entries[key] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.nbytes = 0
