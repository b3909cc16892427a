"""Where drafts come from: guesses at a row's next tokens, which a verify forward then tries."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

from runner.engine.model_runner import ModelRunner
from runner.engine.ngrams import NgramIndex, RecentTexts, add_to, find_in
from runner.engine.sequence import Sequence as Row
from runner.errors import ParameterError
from runner.types import Request

Scope: TypeAlias = Literal["row", "group", "job"]
"""Whose tokens an n-gram is looked up in: the row's own, those of its group, or of its job."""

_JOB_TOKENS = 50_000
"""Latest tokens of a job that are looked up at least; each takes about half a kilobyte."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess at the next tokens of a row."""

    token_ids: Sequence[int] = ()
    source: str = ""
    """What made it, as the statistics and the gate tell its chances from those of others."""

    def __len__(self) -> int:
        return len(self.token_ids)


class Proposer(Protocol):
    """Drafts the next tokens of rows; a wrong draft costs time and changes nothing else.

    A row that it has not met is new, and one that it has met has grown since, perhaps by other
    tokens than it proposed.
    """

    @property
    def is_free(self) -> bool:
        """Whether a draft costs next to nothing, so that it is made before it is known to pay."""
        ...

    def bind(self, vocab_size: int) -> ModelRunner | None:
        """Tells how many tokens the target has logits for, before anything else.

        Returns what forwards here, of whose weights and caches the memory budget has to know.
        """
        ...

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """A draft for each row, empty or of up to its count of tokens."""
        ...

    def end(self, row: Row) -> None:
        """Forgets a row that has left the batch; it need not have met it."""
        ...

    def clear(self) -> None:
        """Forgets all rows, those also that have ended."""
        ...


class InOrder:
    """Asks proposers in turn; a row takes the draft of the first that has one."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        assert all(one.is_free for one in proposers), "what costs time is asked on its own"
        self._proposers = list(proposers)
        self.is_free = True

    def bind(self, vocab_size: int) -> None:
        """Nothing to know: each of them is told by itself."""

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """A draft for each row."""
        drafts = [Draft()] * len(rows)
        for proposer in self._proposers:
            left = [place for place, draft in enumerate(drafts) if not draft]
            found = proposer.propose([rows[i] for i in left], [counts[i] for i in left])
            for place, draft in zip(left, found, strict=True):
                drafts[place] = draft
        return drafts

    def end(self, row: Row) -> None:
        """Forgets a row."""
        for proposer in self._proposers:
            proposer.end(row)

    def clear(self) -> None:
        """Nothing to forget: each of them is told by itself."""


@dataclass(slots=True)
class _Text:
    """A row's own text from shortly before its completion on, and the n-grams of it."""

    token_ids: list[int]
    index: NgramIndex
    num_read: int = 0

    def grow(self, token_ids: Sequence[int], others: Sequence[NgramIndex]) -> None:
        """Takes the completion so far."""
        start = len(self.token_ids)
        self.token_ids += token_ids[self.num_read :]
        self.num_read = len(token_ids)
        add_to([self.index, *others], self.token_ids, start)


class NgramProposer:
    """Looks the last tokens of a row up in what precedes them (prompt lookup decoding).

    Apoorv Saxena, "Prompt Lookup Decoding", 2023. Further than the row itself, `scope` takes in
    the rows of the same request, or all rows of the job, those in flight and those before them.
    """

    def __init__(self, *, least: int = 2, most: int = 4, scope: Scope = "row") -> None:
        if scope not in get_args(Scope):
            raise ParameterError(
                f"ngram_scope={scope!r} is not allowed: {', '.join(get_args(Scope))}"
            )
        self.is_free = True
        self._sizes, self._scope = (least, most), scope
        self.clear()

    def clear(self) -> None:
        """Forgets all texts."""
        self._texts: dict[Row, _Text] = {}
        self._groups: dict[str, NgramIndex] = {}
        self._num_rows: Counter[str] = Counter()
        self._job = RecentTexts(*self._sizes, num_tokens=_JOB_TOKENS)

    def bind(self, vocab_size: int) -> None:
        """Nothing to know: every token comes from a row."""

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """A draft for each row whose last tokens came before."""
        for row in rows:
            self._grow(row)
        return [self._draft(row, count) for row, count in zip(rows, counts, strict=True)]

    def end(self, row: Row) -> None:
        """Forgets a row; what the scope shares of its text stays."""
        if row not in self._texts:
            return
        self._grow(row)
        del self._texts[row]
        request_id = row.request.request_id
        self._num_rows[request_id] -= 1
        if not self._num_rows[request_id]:
            del self._num_rows[request_id], self._groups[request_id]

    def _grow(self, row: Row) -> None:
        text = self._text(row)
        shared: list[NgramIndex] = []
        if self._scope != "row":
            shared.append(self._group(row.request))
        if self._scope == "job":
            shared.append(self._job.taking(len(row.token_ids) - text.num_read))
        text.grow(row.token_ids, shared)

    def _group(self, request: Request) -> NgramIndex:
        """What the rows of a request share: the n-grams of their prompt at least."""
        if request.request_id not in self._groups:
            index = self._groups[request.request_id] = NgramIndex(*self._sizes)
            index.add(request.prompt_token_ids)
        return self._groups[request.request_id]

    def _text(self, row: Row) -> _Text:
        if row not in self._texts:
            self._group(row.request)
            self._num_rows[row.request.request_id] += 1
            tail = list(row.request.prompt_token_ids[-self._sizes[1] :])
            self._texts[row] = _Text(tail, NgramIndex(*self._sizes))
        return self._texts[row]

    def _draft(self, row: Row, count: int) -> Draft:
        text = self._texts[row]
        indices = [text.index, self._group(row.request)]
        if self._scope == "job":
            indices += self._job.indices
        match = find_in(indices, text.token_ids)
        if match is None:
            return Draft()
        is_own = match.text is text.token_ids
        found = match.repeated(count) if is_own else match.continuation(count)
        return Draft(found, f"ngram {match.size}")


Lookup: TypeAlias = Callable[[Request, int], Sequence[int] | None]
"""The tokens that a sample of a request had in an earlier run; None where it was not in it."""


@dataclass(slots=True)
class _Earlier:
    """What a row had in an earlier run, and where it is in that now."""

    token_ids: list[int]
    place: int | None = 0
    """Of the token that is to come; None where the row has left the earlier one behind."""
    num_read: int = 0
    index: NgramIndex | None = field(default=None)

    def follow(self, token_ids: Sequence[int], sizes: tuple[int, int]) -> None:
        """Goes along with the completion so far, and finds back after a token that differs."""
        for token_id in token_ids[self.num_read :]:
            place = self.place
            if place is not None:
                is_same = self.token_ids[place : place + 1] == [token_id]
                self.place = place + 1 if is_same else None
        self.num_read = len(token_ids)
        if self.place is None:
            if self.index is None:
                self.index = NgramIndex(*sizes)
                self.index.add(self.token_ids)
            found = self.index.find(token_ids)
            self.place = None if found is None else found.end


class PreviousProposer:
    """Drafts what the same row had in an earlier run, by the same weights or slightly others."""

    def __init__(self, lookup: Lookup, *, least: int = 2, most: int = 4) -> None:
        """`lookup` has the earlier run; `least` to `most` tokens alike find back into it."""
        self.is_free = True
        self._lookup, self._sizes = lookup, (least, most)
        self._rows: dict[Row, _Earlier] = {}

    def bind(self, vocab_size: int) -> None:
        """Nothing to know: a token that is not there is not drafted."""

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """A draft for each row that was in the earlier run."""
        return [self._draft(row, count) for row, count in zip(rows, counts, strict=True)]

    def end(self, row: Row) -> None:
        """Forgets a row."""
        self._rows.pop(row, None)

    def clear(self) -> None:
        """Forgets where the rows are; the earlier run stays known."""
        self._rows = {}

    def _draft(self, row: Row, count: int) -> Draft:
        if row not in self._rows:
            found = self._lookup(row.request, row.index)
            self._rows[row] = _Earlier([] if found is None else list(found))
        earlier = self._rows[row]
        earlier.follow(row.token_ids, self._sizes)
        if earlier.place is None:
            return Draft()
        source = "previous" if earlier.index is None else "previous, found again"
        return Draft(earlier.token_ids[earlier.place : earlier.place + count], source)
