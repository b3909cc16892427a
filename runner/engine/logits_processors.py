"""What changes a row's logits before temperature: penalties, biases, bad words, allowed tokens.

Histories live on the device and take each token from the step that samples it, so that a step can
be launched before the host has read the one before. Definitions and order are vLLM's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from runner.types import Request

_NEVER = 2**31 - 1
_ANY_TOKEN = -1
_NO_TOKEN = -2


class Row(Protocol):
    """What the next draw of a row depends on besides its logits."""

    @property
    def request(self) -> Request:
        """What was asked."""
        ...

    @property
    def row(self) -> int:
        """Where its logits are."""
        ...

    @property
    def num_launched(self) -> int:
        """Tokens that precede the draw."""
        ...

    @property
    def token_ids(self) -> Sequence[int]:
        """These tokens, where the host has read them all."""
        ...

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """What min_tokens holds back."""
        ...


def _is_penalised(row: Row) -> bool:
    p = row.request.params
    return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)


def _is_restricted(row: Row) -> bool:
    return row.request.params.allowed_token_ids is not None


def _longest_prefix(rows: Iterable[Row]) -> int:
    words = (word for row in rows for word in row.request.bad_words_token_ids)
    return max((len(word) for word in words), default=1) - 1


class _Entry(NamedTuple):
    """Something that is added to the logit of one token of one row."""

    token_id: int
    bias: float
    num_steps: int = _NEVER
    """For how many steps from now."""
    prefix: tuple[int, ...] = ()
    """The tokens that have to be the last ones for it."""


_STRONGEST = 2.0**64
"""A repetition penalty beyond it forbids a token, or leaves no other, all the same."""
_MOST_STEPS = 2**30
"""More than a row has; int32 holds it."""


def _entries(row: Row) -> Iterator[_Entry]:
    params = row.request.params
    yield from (_Entry(token_id, bias) for token_id, bias in (params.logit_bias or {}).items())
    for word in row.request.bad_words_token_ids:
        yield _Entry(word[-1], -mx.inf, prefix=tuple(word[:-1]))
    num_steps = min(params.min_tokens - row.num_launched, _MOST_STEPS)
    if num_steps > 0:
        yield from (_Entry(token_id, -mx.inf, num_steps) for token_id in row.ending_token_ids)


def _carried(
    old: mx.array | None,
    old_rows: list[Row],
    rows: list[Row],
    start: Callable[[list[Row]], mx.array],
) -> mx.array:
    """(R, ...): each row's own slice of `old` if it has one; the others' come from `start`."""
    known = set(old_rows)
    new = [row for row in rows if row not in known]
    started = [start(new)] if new else []
    if old is None:
        return started[0]
    places = {row: place for place, row in enumerate([*old_rows, *new])}
    return mx.concatenate([old, *started])[mx.array([places[row] for row in rows])]


class _Rows:
    """Some rows of the batch, and their logits out of it and back in."""

    def __init__(self, rows: list[Row], num_rows: int) -> None:
        self._all = [row.row for row in rows] == list(range(num_rows))
        self.index = mx.array([row.row for row in rows], mx.int32)

    def take(self, logits: mx.array) -> mx.array:
        return logits if self._all else logits[self.index]

    def put(self, logits: mx.array, values: mx.array) -> mx.array:
        if self._all:
            return values
        logits = logits[:]  # An array of its own: the assignment must not reach the caller's.
        logits[self.index] = values
        return logits


class _AllowedTokens:
    """Leaves the rows that list their tokens nothing but these."""

    def __init__(self, rows: list[Row], num_rows: int, vocab_size: int) -> None:
        self._rows = _Rows(rows, num_rows)
        # A job's rows share one tuple, which may be long: by identity, no hash reads it.
        lists = [row.request.params.allowed_token_ids or () for row in rows]
        distinct = {id(token_ids): token_ids for token_ids in lists}
        places = {key: place for place, key in enumerate(distinct)}
        self._masks = mx.stack([_mask(ids, vocab_size) for ids in distinct.values()])
        self._mask_of_row = mx.array([places[id(token_ids)] for token_ids in lists])

    def __call__(self, logits: mx.array) -> mx.array:
        allowed = self._masks[self._mask_of_row]  # (R, V)
        kept = mx.where(allowed, self._rows.take(logits), -mx.inf)
        return self._rows.put(logits, kept)


def _mask(token_ids: Iterable[int], vocab_size: int) -> mx.array:
    """(V,) bool: true for these tokens."""
    mask = np.zeros(vocab_size, np.bool_)
    mask[np.fromiter(token_ids, np.int64)] = True
    return mx.array(mask)


class _RecentTokens:
    """The last tokens that each watched row generated, (R, W) int32, the latest on the right."""

    def __init__(self, rows: list[Row], num_rows: int, old: "_RecentTokens | None") -> None:
        self.sequences = rows
        self._index = _Rows(rows, num_rows).index
        width = _longest_prefix(rows)
        self.token_ids = _carried(
            old._resized(width) if old else None,
            old.sequences if old else [],
            rows,
            lambda new: mx.array([_last(row.token_ids, width) for row in new], mx.int32),
        )

    def _resized(self, width: int) -> mx.array:
        missing = max(0, width - self.token_ids.shape[1])
        padded = mx.pad(self.token_ids, [(0, 0), (missing, 0)], constant_values=_NO_TOKEN)
        return padded[:, padded.shape[1] - width :]

    def push(self, token_ids: mx.array) -> None:
        self.token_ids = mx.concatenate(
            [self.token_ids[:, 1:], token_ids[self._index][:, None]], axis=1
        )


def _last(token_ids: Sequence[int], width: int) -> list[int]:
    """The last tokens, as many as there are, on the right."""
    last = list(token_ids[max(0, len(token_ids) - width) :])
    return [_NO_TOKEN] * (width - len(last)) + last


class _Biases:
    """Adds to single logits, some of them for a number of steps or after certain tokens alone.

    One scatter for logit_bias, min_tokens and bad_words: minus infinity is a bias like another.
    """

    def __init__(self, entries: list[tuple[Row, _Entry]], recent: _RecentTokens | None) -> None:
        self._recent = recent
        self._rows = mx.array([row.row for row, _ in entries])
        self._token_ids = mx.array([entry.token_id for _, entry in entries])
        self._biases = mx.array([entry.bias for _, entry in entries], mx.float32)
        self._num_steps = mx.array([entry.num_steps for _, entry in entries])
        self._step = 0
        if recent is not None:
            width = recent.token_ids.shape[1]
            places = {row: place for place, row in enumerate(recent.sequences)}
            self._places = mx.array([places.get(row, 0) for row, _ in entries])
            self._prefixes = mx.array([_padded(e.prefix, width) for _, e in entries], mx.int32)

    def __call__(self, logits: mx.array) -> mx.array:
        holds = self._num_steps > self._step  # (E,)
        if self._recent is not None:
            last = self._recent.token_ids[self._places]  # (E, W)
            free = self._prefixes == _ANY_TOKEN
            holds = holds & mx.all(free | (last == self._prefixes), axis=1)
        added = mx.where(holds, self._biases, 0.0)
        return logits.at[self._rows, self._token_ids].add(added)

    def push(self) -> None:
        self._step += 1


def _padded(prefix: tuple[int, ...], width: int) -> list[int]:
    return [_ANY_TOKEN] * (width - len(prefix)) + list(prefix)


class _Penalties:
    """Repetition, presence and frequency penalties over counts of tokens, (R, V)."""

    def __init__(
        self, rows: list[Row], num_rows: int, vocab_size: int, old: "_Penalties | None"
    ) -> None:
        self._rows = _Rows(rows, num_rows)
        self._sequences = rows
        params = [row.request.params for row in rows]
        self._repetition = _column(
            [min(max(p.repetition_penalty, 1 / _STRONGEST), _STRONGEST) for p in params]
        )
        self._presence = _column([p.presence_penalty for p in params])
        self._frequency = _column([p.frequency_penalty for p in params])
        self._repeats = any(p.repetition_penalty != 1.0 for p in params)
        self._counted = any(p.presence_penalty or p.frequency_penalty for p in params)
        before = old._sequences if old else []
        self._counts: mx.array = _carried(
            old._counts if old else None,
            before,
            rows,
            lambda new: mx.stack([_counted(row.token_ids, vocab_size) for row in new]),
        )
        self._in_prompt: mx.array = _carried(
            old._in_prompt if old else None,
            before,
            rows,
            lambda new: mx.stack([_prompt_mask(row, vocab_size) for row in new]),
        )

    def __call__(self, logits: mx.array) -> mx.array:
        mine = self._rows.take(logits)
        present = self._counts > 0
        # A value that changes nothing changes no bit, so what no row asks for can be left out.
        if self._repeats:
            repeated = mx.where(mine > 0, mine / self._repetition, mine * self._repetition)
            mine = mx.where(present | self._in_prompt, repeated, mine)
        if self._counted:
            mine = mine - self._frequency * self._counts - self._presence * present
        return self._rows.put(logits, mine)

    def push(self, token_ids: mx.array) -> None:
        places = mx.arange(len(self._sequences))
        self._counts = self._counts.at[places, token_ids[self._rows.index]].add(1)


def _counted(token_ids: Sequence[int], vocab_size: int) -> mx.array:
    """(V,) int32: how often each token is there."""
    return mx.array(np.bincount(token_ids, minlength=vocab_size).astype(np.int32))


def _column(values: list[float]) -> mx.array:
    return mx.array(values, mx.float32)[:, None]


def _prompt_mask(row: Row, vocab_size: int) -> mx.array:
    """(V,) bool: the tokens of the prompt, where a penalty counts them."""
    counted = row.request.params.repetition_penalty != 1.0
    return _mask(row.request.prompt_token_ids if counted else (), vocab_size)


@dataclass(frozen=True, slots=True)
class LogitsProcessors:
    """Everything that the rows of a batch do to their logits; built when a row joins or leaves."""

    allowed: _AllowedTokens | None
    recent: _RecentTokens | None
    biases: _Biases | None
    penalties: _Penalties | None

    @classmethod
    def build(
        cls, rows: Sequence[Row | None], vocab_size: int, before: "LogitsProcessors | None" = None
    ) -> "LogitsProcessors | None":
        """Arrays for the rows of a batch, None where no row asks for any.

        Args:
            rows: the sequence in each slot; None stands for an empty one.
            vocab_size: V, the width of the logits.
            before: what was built last; rows that it held keep their history. The others start
                from the tokens that the host has read.
        """
        present, size = [row for row in rows if row is not None], len(rows)
        restricted = [row for row in present if _is_restricted(row)]
        penalised = [row for row in present if _is_penalised(row)]
        watched = [row for row in present if _longest_prefix([row]) > 0]
        entries = [(row, entry) for row in present for entry in _entries(row)]
        if not (restricted or penalised or entries):
            return None
        recent, penalties = (before.recent, before.penalties) if before else (None, None)
        recent = _RecentTokens(watched, size, recent) if watched else None
        return cls(
            allowed=_AllowedTokens(restricted, size, vocab_size) if restricted else None,
            recent=recent,
            biases=_Biases(entries, recent) if entries else None,
            penalties=_Penalties(penalised, size, vocab_size, penalties) if penalised else None,
        )

    def __call__(self, logits: mx.array) -> mx.array:
        """The logits to sample from, (B, V) float32, of the model's own; those stay as they are."""
        for process in (self.allowed, self.biases, self.penalties):
            if process is not None:
                logits = process(logits)
        return logits

    def push(self, token_ids: mx.array) -> None:
        """Adds a step's tokens, (B,) int32, which need not be known yet, to the histories."""
        if self.biases is not None:
            self.biases.push()
        for history in (self.recent, self.penalties):
            if history is not None:
                history.push(token_ids)
