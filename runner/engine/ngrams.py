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
        self.places: dict[tuple[int, ...], tuple[TokenIds, int]] = {}
        """The text in which a run came last, and where it went on."""

    def add(self, text: TokenIds, start: int = 0) -> None:
        """Takes the tokens of a text from `start` on; those before it are known already."""
        add_to([self], text, start)

    def find(self, text: TokenIds) -> Match | None:
        """Where the last tokens of `text` came last before, the longest run of them."""
        return find_in([self], text)


class RecentTexts:
    """The runs of the latest texts, those of many texts ago being forgotten."""

    def __init__(self, least: int, most: int, *, num_tokens: int) -> None:
        """Keeps at least the latest `num_tokens` tokens, and at most about twice as many."""
        self._sizes = (least, most)
        self._num_tokens = num_tokens
        self._num_newest = 0
        self._newest, self._older = NgramIndex(least, most), NgramIndex(least, most)

    @property
    def indices(self) -> list[NgramIndex]:
        """Those to look runs up in, the latest first."""
        return [self._newest, self._older]

    def taking(self, num_tokens: int) -> NgramIndex:
        """The index that so many tokens more are to be added to."""
        if self._num_newest >= self._num_tokens:
            self._newest, self._older = NgramIndex(*self._sizes), self._newest
            self._num_newest = 0
        self._num_newest += num_tokens
        return self._newest


def add_to(indices: Sequence[NgramIndex], text: TokenIds, start: int = 0) -> None:
    """Like `NgramIndex.add`, to several of the same sizes, which share what they keep of a run."""
    least, most = indices[0].least, indices[0].most
    for end in range(max(start, least), len(text)):
        place = (text, end)
        for size in range(least, min(most, end) + 1):
            run = tuple(text[end - size : end])
            for index in indices:
                index.places[run] = place


def find_in(indices: Sequence[NgramIndex], text: TokenIds) -> Match | None:
    """Like `NgramIndex.find`, in several of the same sizes; of equals, that of the first."""
    for size in range(min(indices[0].most, len(text)), indices[0].least - 1, -1):
        run = tuple(text[len(text) - size :])
        for index in indices:
            if (place := index.places.get(run)) is not None:
                return Match(size, *place)
    return None
