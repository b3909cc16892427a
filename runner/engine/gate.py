"""Whether drafts pay, and how many tokens of them: policy over counters, without arrays."""

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt

_STALE = 64
"""Steps after which plain decoding is timed again."""
_FORGOTTEN = 512
"""Steps after which a time that looked bad is not believed any more."""
_MARGIN = 1.05
"""How much faster drafts have to look: times are never exact."""
_MOST_LOSS = 0.01
"""Share of the time that trials may cost; what is sure to gain, one plain step more."""
_KEPT_GAIN = 0.05
"""Share of the time up to which gains make up for later losses."""
_NUM_LOOKS = 4
"""Steps without use after which the gate rests, where looking costs something."""
_MOST_REST = 128
_NUM_PREFILLS = 3
"""Prefills of a size that are timed."""
_PRIOR = 0.6
"""Chance of a drafted token of which nothing is known."""
_PRIOR_WEIGHT = 2.0
_FADING = 0.97
_LATEST = 0.1
"""Weight of the latest look at a row in the share of those that found a draft."""
_TRUSTED = {"previous": 0.9, "DraftModelProposer": 0.6}
"""Chances that are counted on before anything is known, by what drafts; elsewhere none."""


@dataclass(slots=True)
class _Score:
    """Hits and misses, the older ones counting less."""

    hits: float = 0.0
    misses: float = 0.0

    def add(self, hits: float, misses: float, *, kept: float) -> None:
        self.hits, self.misses = self.hits * kept + hits, self.misses * kept + misses

    def chance(self, prior: float) -> float:
        total = self.hits + self.misses + _PRIOR_WEIGHT
        return (self.hits + prior * _PRIOR_WEIGHT) / total


class Acceptance:
    """The chances of drafted tokens, by the row that they are for and by what drafted them.

    What is known fades while it is not tried, so that a row that missed is left alone for some
    steps and tried again later.
    """

    def __init__(self) -> None:
        self._sources: dict[str, _Score] = {}
        self._rows: dict[Hashable, _Score] = {}
        self._shares: dict[Hashable, float] = {}

    def chance(self, row: Hashable, source: str) -> float:
        """That the next drafted token is accepted, where those before it are."""
        known = self._sources.get(source, _Score()).chance(_PRIOR)
        return self._rows.get(row, _Score()).chance(known)

    def sure(self, row: Hashable, source: str) -> float:
        """The chance that can be counted on, by what has been accepted so far."""
        known = self._sources.get(source, _Score()).chance(_TRUSTED.get(source, 0.0))
        return self._rows.get(row, _Score()).chance(known)

    def look(self, row: Hashable, *, has_draft: bool) -> None:
        """Notes whether a row has a draft."""
        before = self._shares.get(row, float(has_draft))
        self._shares[row] = before + _LATEST * (has_draft - before)

    def share(self, row: Hashable) -> float:
        """Of the steps looked at lately, those for which a row had a draft; 0 to 1."""
        return self._shares[row]

    def record(self, row: Hashable, source: str, *, num_drafted: int, num_accepted: int) -> None:
        """Takes how one draft did; what comes behind a wrong token says nothing."""
        missed = num_accepted < num_drafted
        self._rows.setdefault(row, _Score()).add(num_accepted, missed, kept=0.8)
        self._sources.setdefault(source, _Score()).add(num_accepted, missed, kept=0.98)

    def fade(self) -> None:
        """Lets a step pass."""
        for score in (*self._rows.values(), *self._sources.values()):
            score.add(0.0, 0.0, kept=_FADING)

    def end(self, row: Hashable) -> None:
        """Forgets a row."""
        self._rows.pop(row, None)
        self._shares.pop(row, None)


@dataclass(slots=True)
class _Time:
    num_positions: int
    seconds: float
    step: int
    count: int = 1


class _Times:
    """Seconds of a step by the positions that it forwards, as measured lately."""

    def __init__(self) -> None:
        self.known: dict[int, _Time] = {}

    @staticmethod
    def _bucket(num_positions: int) -> int:
        return round(4 * log2(num_positions))

    def record(self, num_positions: int, seconds: float, step: int) -> None:
        """The first step of a kind pays for its memory, so that the faster of two counts."""
        bucket = self._bucket(num_positions)
        time = self.known.get(bucket)
        if time is None or step - time.step > _FORGOTTEN:
            self.known[bucket] = _Time(num_positions, seconds, step)
            return
        new = min(seconds, 2 * time.seconds)  # A step that was held up says little.
        mean = min(time.seconds, new) if time.count == 1 else 0.7 * time.seconds + 0.3 * new
        self.known[bucket] = _Time(num_positions, mean, step, time.count + 1)

    def count(self, num_positions: int) -> int:
        """How many times of that size were taken."""
        time = self.known.get(self._bucket(num_positions))
        return 0 if time is None else time.count

    def exact(self, num_positions: int, step: int, *, most_age: int) -> float | None:
        """The seconds that were measured, not longer ago than `most_age` steps."""
        time = self.known.get(self._bucket(num_positions))
        return None if time is None or step - time.step > most_age else time.seconds

    def recent(self, step: int) -> dict[int, float]:
        """Seconds by positions, of what was measured lately."""
        times = self.known.values()
        return {it.num_positions: it.seconds for it in times if step - it.step <= _FORGOTTEN}


def _estimated(known: Mapping[int, float], num_positions: int) -> float:
    """What the nearest measured times say of a size that was not measured.

    Beyond the largest as if time grew by the root, so that a size looks somewhat better than it may
    be and is tried, the smaller ones first.
    """
    sizes = sorted(known)
    place = bisect_left(sizes, num_positions)
    if place == len(sizes):
        return known[sizes[-1]] * sqrt(num_positions / sizes[-1])
    above = sizes[place]
    if place == 0 or above == num_positions:
        return known[above]
    below = sizes[place - 1]
    share = (num_positions - below) / (above - below)
    return known[below] * (1 - share) + known[above] * share


@dataclass(slots=True)
class _Account:
    """What drafts gained over plain steps, or lost."""

    spent: float = 0.0
    gained: float = 0.0

    def add(self, seconds: float, gain: float) -> None:
        self.spent += seconds
        self.gained = min(self.gained + gain, _KEPT_GAIN * self.spent)

    def allows(self, loss: float) -> bool:
        """Whether so much more may be lost."""
        return self.gained - loss >= -_MOST_LOSS * self.spent


class Gate:
    """Chooses how many tokens are drafted, none where plain decoding is faster.

    It compares tokens per second, as measured on the machine at hand for the number of rows there
    are: those of plain steps with those that verify steps would have, by their own measured times
    and by the chances of the drafts. As the batch drains, a row's share of a step grows, and drafts
    begin to pay.
    """

    def __init__(self, *, rests: bool = False) -> None:
        """With `rests`, does without looking for a while where looking was of no use.

        That is where a step can be launched before the one before it is read, unless drafts are to
        be made of what was read.
        """
        self._rests = rests
        self.clear()

    def clear(self) -> None:
        """Forgets all times, and what drafts gained or lost."""
        self._plain, self._verify, self._prefill = _Times(), _Times(), _Times()
        self._step = self._num_live = 0
        self._accounts: dict[int, _Account] = {}
        self._account = _Account()
        self._num_idle = 0
        self._resting = 4 if self._rests else 0  # Plain steps to compare with.
        self._next_rest = _NUM_LOOKS

    @property
    def looks(self) -> bool:
        """Whether the next step may use drafts, and so needs the draws before it."""
        return self._resting == 0

    def pass_step(self) -> None:
        """Counts a step that is launched without looking."""
        self._step += 1
        self._resting = max(0, self._resting - 1)

    def width(
        self,
        num_rows: int,
        lengths: Sequence[int],
        chances: Sequence[float],
        sure: Sequence[float] | None = None,
        ends: Sequence[tuple[int, float]] | None = None,
    ) -> int:
        """Positions to forward per row: 1 decodes plainly.

        Args:
            num_rows: slots of the batch, empty ones included.
            lengths: tokens drafted for each live row.
            chances: of each row's drafted tokens to be accepted, one after another.
            sure: those chances that can be counted on; the same where none are given.
            ends: where nothing waits for a row's slot, the tokens that each row has left, and the
                share of the steps for which it has a draft.
        """
        sure = chances if sure is None else sure
        self._step, self._num_live = self._step + 1, len(lengths)
        chosen = self._best(num_rows, lengths, chances, sure, ends) if any(lengths) else 1
        self._num_idle = 0 if chosen > 1 else self._num_idle + 1
        if chosen > 1:
            self._next_rest = _NUM_LOOKS
        elif self._rests and self._num_idle >= _NUM_LOOKS:
            self._resting, self._num_idle = self._next_rest, _NUM_LOOKS // 2
            self._next_rest = min(2 * self._next_rest, _MOST_REST)
        return chosen

    def _best(
        self,
        num_rows: int,
        lengths: Sequence[int],
        chances: Sequence[float],
        sure: Sequence[float],
        ends: Sequence[tuple[int, float]] | None,
    ) -> int:
        # Where steps overlap, a plain one is timed while the gate rests.
        most_age = _FORGOTTEN if self._rests else _STALE
        plain = self._plain.exact(num_rows, self._step, most_age=most_age)
        if plain is None:
            return 1
        most = max(lengths) + 1
        # Kernels are made for multiples of powers of two: eight positions may take less time than
        # seven, and nine a quarter more.
        widths = sorted({min(most, 2**i) for i in range(1, 6)} | {most})
        best, least = 1, _MARGIN * len(lengths) / plain
        for width in widths:
            counts = [min(length, width - 1) for length in lengths]
            seconds = self._seconds(num_rows * width)
            speed = sum(map(_expected, counts, chances)) / seconds
            least_gain = sum(map(_expected, counts, sure)) / len(counts) * plain - seconds
            if speed <= least or not self._allows(num_rows, least_gain, plain):
                continue
            if ends is None or _steps_saved(ends, chances, width) * plain > _MARGIN * seconds:
                best, least = width, speed
        return best

    def _account_of(self, num_rows: int) -> _Account:
        return self._accounts.setdefault(num_rows.bit_length(), _Account())

    def _allows(self, num_rows: int, least_gain: float, plain: float) -> bool:
        """Whether a step may be tried that gains at least so much, or loses it if below zero."""
        is_sure = least_gain >= 0 or self._account.allows(-least_gain)
        return is_sure and self._account_of(num_rows).allows(-plain)

    def _seconds(self, num_positions: int) -> float:
        found = self._verify.exact(num_positions, self._step, most_age=_FORGOTTEN)
        if found is not None:
            return found
        recent = self._plain.recent(self._step) | self._verify.recent(self._step)
        # A machine's prefill is not forgotten: a long job may have none for thousands of steps.
        return _estimated(self._prefill.recent(0) | recent, num_positions)

    def wants_prefill(self, num_positions: int) -> bool:
        """Whether the time of a prefill of that size is still to be taken, which costs a wait."""
        return self._prefill.count(num_positions) < _NUM_PREFILLS

    def record_prefill(self, num_positions: int, seconds: float) -> None:
        """Takes the time of a prefill, which says what a verify step of that size may take."""
        self._prefill.record(num_positions, seconds, step=0)

    def record(
        self, num_rows: int, width: int, seconds: float, *, num_tokens: int, looked: bool = True
    ) -> None:
        """Takes the time of a step of `num_rows` slots and `width` positions each, and its tokens.

        What drafts gained over plain steps, or lost, decides whether more may be tried.
        """
        plain = self._plain.exact(num_rows, self._step, most_age=_FORGOTTEN)
        gain = 0.0
        if width > 1 and plain is not None:
            gain = num_tokens / self._num_live * plain - seconds
        for account in (self._account, self._account_of(num_rows)):
            account.add(seconds, gain)
        if width > 1:
            self._verify.record(num_rows * width, seconds, self._step)
        elif looked != self._rests:
            self._plain.record(num_rows, seconds, self._step)


def _steps_saved(ends: Sequence[tuple[int, float]], chances: Sequence[float], width: int) -> float:
    """Plain steps that one of `width` positions stands for, until the last of the rows is done.

    Rows that are done before the last one save nothing where nobody takes their slots, so what
    counts is not the tokens of a step but those of the row that has most left by its own pace.
    """
    paces = [
        1 + share * (_expected(width - 1, chance) - 1)
        for (_, share), chance in zip(ends, chances, strict=True)
    ]
    last = max(left / pace for (left, _), pace in zip(ends, paces, strict=True))
    return max(left for left, _ in ends) / last


def _expected(num_drafted: int, chance: float) -> float:
    """Tokens that a row gets of a step: its own draw, and one for each drafted token accepted."""
    return sum(chance**place for place in range(num_drafted + 1))
