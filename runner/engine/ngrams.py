"""Runs of tokens in texts, and what came after them."""

from collections.abc import Sequence
from dataclasses import dataclass

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class Match:
    """Where some last tokens were seen before."""

    size: int
    """How many tokens are alike."""
    text: TokenIds
    end: int
    """The place in `text` of what followed."""

    def continuation(self, count: int) -> list[int]:
        """The next `count` tokens, as far as the text goes."""
        return list(self.text[self.end : self.end + count])

    def repeated(self, count: int) -> list[int]:
        """The next `count` tokens where `text` is what they continue: it goes round once more."""
        period = len(self.text) - self.end
        return [self.text[self.end + i % period] for i in range(count)]


class NgramIndex:
    """Where each run of tokens in some texts, which may grow, came last."""

    def __init__(self, least: int, most: int) -> None:
        """Runs of `least` to `most` tokens."""
        assert 1 <= least <= most
        self.least, self.most = least, most
        self._places: dict[tuple[int, ...], tuple[TokenIds, int]] = {}

    def add(self, text: TokenIds, start: int = 0) -> None:
        """Takes the tokens of a text from `start` on; those before it are known already."""
        for end in range(max(start, self.least), len(text)):
            for size in range(self.least, min(self.most, end) + 1):
                self._places[tuple(text[end - size : end])] = (text, end)

    def find(self, text: TokenIds) -> Match | None:
        """Where the last tokens of `text` came last before, the longest run of them."""
        for size in range(min(self.most, len(text)), self.least - 1, -1):
            place = self._places.get(tuple(text[len(text) - size :]))
            if place is not None:
                return Match(size, *place)
        return None


class RecentTexts:
    """The runs of the latest texts, those of many texts ago being forgotten."""

    def __init__(self, least: int, most: int, *, num_tokens: int) -> None:
        """Keeps at least the latest `num_tokens` tokens, and at most about twice as many."""
        self._sizes = (least, most)
        self._num_tokens = num_tokens
        self._num_newest = 0
        self._newest, self._older = NgramIndex(least, most), NgramIndex(least, most)

    def add(self, text: TokenIds, start: int = 0) -> None:
        """Takes the tokens of a text from `start` on; those before it are known already."""
        if self._num_newest >= self._num_tokens:
            self._newest, self._older = NgramIndex(*self._sizes), self._newest
            self._num_newest = 0
        self._newest.add(text, start)
        self._num_newest += len(text) - start

    def find(self, text: TokenIds) -> Match | None:
        """Where the last tokens of `text` came last before, the longest run of them."""
        return longest([self._newest.find(text), self._older.find(text)])


def longest(matches: Sequence[Match | None]) -> Match | None:
    """The match of most tokens; the first of equals."""
    found = [match for match in matches if match is not None]
    return max(found, key=lambda match: match.size, default=None)
