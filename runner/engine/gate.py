"""Whether drafts pay, and how many tokens of them: policy over counters, without arrays."""

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt

_FORGOTTEN = 512
"""Steps after which a time is not believed any more: plain decoding is timed again, and a width
that looked bad may be tried again."""
_MARGIN = 1.05
"""How much faster drafts have to look: times are never exact."""
_MOST_LOSS = 0.01
"""Share of the time that trials may cost; what is sure to gain, one plain step more."""
_KEPT_GAIN = 0.05
"""Share of the time up to which gains make up for later losses."""
_NUM_LOOKS = 4
"""Steps without use after which steps are launched ahead again."""
_MOST_REST = 8
"""Steps between two looks where none was of use lately."""
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
        return self._chance(row, source, _PRIOR)

    def sure(self, row: Hashable, source: str) -> float:
        """The chance that can be counted on, by what has been accepted so far."""
        return self._chance(row, source, _TRUSTED.get(source, 0.0))

    def _chance(self, row: Hashable, source: str, prior: float) -> float:
        if (of_source := self._sources.get(source)) is not None:
            prior = of_source.chance(prior)
        of_row = self._rows.get(row)
        return prior if of_row is None else of_row.chance(prior)

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


def _least_beyond(plain: Mapping[int, float], num_positions: int) -> float:
    """What a size beyond the plain steps takes at least, by what more rows cost in those.

    On a processor that many rows keep busy, more positions cost as much. As if time grew evenly, up
    to twice the most rows; numbers of rows that are near to one another say nothing.
    """
    fewest, most = min(plain, default=0), max(plain, default=0)
    if most < max(2 * fewest, 2) or num_positions <= most:
        return 0.0
    slope = (plain[most] - plain[fewest]) / (most - fewest)
    return plain[most] + slope * (min(num_positions, 2 * most) - most)


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


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step may be made of."""

    num: int
    """Slots of the batch, empty ones included."""
    lengths: Sequence[int]
    """Tokens drafted for each live row."""
    chances: Sequence[float]
    """Of each row's drafted tokens to be accepted, one after another."""
    sure: Sequence[float]
    """Those chances that can be counted on."""
    ends: Sequence[tuple[int, float]] | None = None
    """Where nothing waits for a row's slot, the tokens that each row has left, and the share of the
    steps for which it has a draft."""


class Gate:
    """Chooses how many tokens are drafted, none where plain decoding is faster.

    It compares tokens per second, as measured on the machine at hand for the number of rows there
    are: those of plain steps with those that verify steps would have, by their own measured times
    and by the chances of the drafts. As the batch drains, a row's share of a step grows, and drafts
    begin to pay.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all times, and what drafts gained or lost."""
        self._plain, self._verify, self._prefill = _Times(), _Times(), _Times()
        self._step = self._num_live = self._num_idle = 0
        self._accounts: dict[int, _Account] = {}
        self._account = _Account()
        self._waits = False
        self._next_probe, self._rest = 0, 1

    @property
    def waits(self) -> bool:
        """Whether the next step may use drafts, and so waits for the draws before it.

        Where drafts are of no use, a step is launched while the one before it runs, and `probe`
        tells when to wait again.
        """
        return self._waits

    def probes(self, num_rows: int) -> bool:
        """Whether to `probe` before the next step of `num_rows` slots.

        Looking for drafts takes a moment, so that it is done less often where it is of no use.
        """
        is_due = not self._waits and self._step >= self._next_probe
        return is_due and self._plain_seconds(num_rows) is not None

    def probe(self, rows: Rows) -> None:
        """Looks at drafts that lack the draws of the step that runs: they tell whether to wait."""
        # What looked good and is not, once the draws are there, was one look too many.
        self._waits, self._num_idle = self._best(rows) > 1, _NUM_LOOKS - 1
        self._next_probe = self._step + self._rest
        self._rest = min(2 * self._rest, _MOST_REST)

    def width(self, rows: Rows) -> int:
        """Positions to forward per row: 1 decodes plainly."""
        self._num_live = len(rows.lengths)
        chosen = self._best(rows)
        self._num_idle = 0 if chosen > 1 else self._num_idle + 1
        self._rest = 1 if chosen > 1 else self._rest
        self._waits = self._num_idle < _NUM_LOOKS and self._plain_seconds(rows.num) is not None
        return chosen

    def _plain_seconds(self, num_rows: int) -> float | None:
        return self._plain.exact(num_rows, self._step, most_age=_FORGOTTEN)

    def _best(self, rows: Rows) -> int:
        plain, num_live = self._plain_seconds(rows.num), len(rows.lengths)
        drafted = [place for place, length in enumerate(rows.lengths) if length]
        if plain is None or not drafted:
            return 1
        lengths = [rows.lengths[place] for place in drafted]
        chances = [rows.chances[place] for place in drafted]
        sure = [rows.sure[place] for place in drafted]
        most, num_others = max(lengths) + 1, num_live - len(drafted)
        # Kernels are made for multiples of powers of two: eight positions may take less time than
        # seven, and nine a quarter more.
        widths = sorted({min(most, 2**i) for i in range(1, 6)} | {most})
        best, least = 1, _MARGIN * num_live / plain
        for width in widths:
            counts = [min(length, width - 1) for length in lengths]
            seconds = self._seconds(rows.num * width)
            speed = (num_others + sum(map(_expected, counts, chances))) / seconds
            if speed <= least:
                continue
            num_sure = num_others + sum(map(_expected, counts, sure))
            if not self._allows(rows.num, num_sure / num_live * plain - seconds, plain):
                continue
            if rows.ends is None or _steps_saved(rows, width) * plain > _MARGIN * seconds:
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
        # A machine's prefill is not forgotten: a long job may have none for thousands of steps.
        prefill = self._prefill.recent(0)
        plain, verify = self._plain.recent(self._step), self._verify.recent(self._step)
        if verify:
            # A verify step has a longer past than a prefill, and logits at each position.
            nearest = min(verify, key=lambda size: abs(log2(size / num_positions)))
            ratio = max(1.0, verify[nearest] / _estimated(prefill | plain, nearest))
            prefill = {size: ratio * seconds for size, seconds in prefill.items()}
        steps = plain | verify
        smaller = (seconds for size, seconds in steps.items() if size <= num_positions)
        estimated = _estimated(prefill | steps, num_positions)
        return max([estimated, _least_beyond(plain, num_positions), *smaller])

    def wants_prefill(self, num_positions: int) -> bool:
        """Whether the time of a prefill of that size is still to be taken, which costs a wait."""
        return self._prefill.count(num_positions) < _NUM_PREFILLS

    def record_prefill(self, num_positions: int, seconds: float) -> None:
        """Takes the time of a prefill, which says what a verify step of that size may take."""
        self._prefill.record(num_positions, seconds, step=0)

    def record(
        self, num_rows: int, width: int, seconds: float, *, num_tokens: int, waited: bool = True
    ) -> None:
        """Takes the time of a step of `num_rows` slots and `width` positions each, and its tokens.

        What drafts gained over plain steps, or lost, decides whether more may be tried. A step that
        `waited` for the draws before it may be slower than plain ones are: that was lost, too.
        """
        self._step += 1
        plain = self._plain_seconds(num_rows)
        gain = 0.0
        if waited and plain is not None:
            gain = num_tokens / self._num_live * plain - seconds
        for account in (self._account, self._account_of(num_rows)):
            account.add(seconds, gain)
        if width > 1:
            self._verify.record(num_rows * width, seconds, self._step)
        elif not (waited and self._waits):
            self._plain.record(num_rows, seconds, self._step)


def _steps_saved(rows: Rows, width: int) -> float:
    """Plain steps that one of `width` positions stands for, until the last of the rows is done.

    Rows that are done before the last one save nothing where nobody takes their slots, so what
    counts is not the tokens of a step but those of the row that has most left by its own pace.
    """
    ends = rows.ends or ()
    paces = [
        1 + share * (_expected(width - 1, chance) - 1)
        for (_, share), chance in zip(ends, rows.chances, strict=True)
    ]
    last = max(left / pace for (left, _), pace in zip(ends, paces, strict=True))
    return max(left for left, _ in ends) / last


def _expected(num_drafted: int, chance: float) -> float:
    """Tokens that a row gets of a step: its own draw, and one for each drafted token accepted."""
    if chance == 1.0:
        return 1.0 + num_drafted
    return float((1.0 - chance ** (num_drafted + 1)) / (1.0 - chance))
