"""Speculative decoding inside the batch: drafts, the step that tries them, what came of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner.engine.batch import Batch, InFlight
from runner.engine.gate import Acceptance, Gate, Rows
from runner.engine.model_runner import ModelRunner, Prefill
from runner.engine.proposers import Draft, InOrder, Proposer
from runner.engine.rewind import check_rewind
from runner.engine.sampler import Sampler
from runner.engine.sequence import Draw
from runner.engine.sequence import Sequence as Row
from runner.engine.verify import Verified, verify
from runner.errors import ParameterError

MOST_DRAFTED = 32
"""Tokens that may be drafted for a row at once."""


@dataclass(slots=True)
class _Steps:
    """Steps of one kind at one number of rows."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        speed = self.tokens / self.seconds if self.seconds else None
        return {"steps": self.steps, "tokens": self.tokens, "tokens_per_second": speed}


@dataclass(slots=True)
class SpeculationStats:
    """What drafts were made and what came of them."""

    drafted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTED)
    """Tokens drafted in each place of a draft."""
    accepted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTED)
    steps: dict[tuple[int, bool], _Steps] = field(default_factory=dict)
    """By the most rows of a power of two, and whether drafts were tried."""

    def record(self, num_rows: int, *, drafted: bool, tokens: int, seconds: float) -> None:
        """Counts a step."""
        key = (1 << max(0, num_rows - 1).bit_length(), drafted)
        steps = self.steps.setdefault(key, _Steps())
        steps.steps += 1
        steps.tokens += tokens
        steps.seconds += seconds

    def record_draft(self, *, num_drafted: int, num_accepted: int) -> None:
        """Counts a draft."""
        for place in range(num_drafted):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < num_accepted

    @property
    def speedup(self) -> float | None:
        """Decode tokens per second to those of plain steps of as many rows.

        None where no plain step was timed to compare with.
        """
        spent = would_be = 0.0
        for (rows, drafted), steps in self.steps.items():
            plain = self.steps.get((rows, False))
            if not drafted or plain is None or not plain.tokens:
                continue
            spent += steps.seconds
            would_be += steps.tokens * plain.seconds / plain.tokens
        rest = sum(steps.seconds for (_, drafted), steps in self.steps.items() if not drafted)
        return (rest + would_be) / (rest + spent) if spent else None

    def report(self) -> dict[str, Any]:
        """The numbers as `summary.json` has them."""
        drafted, accepted = sum(self.drafted_at), sum(self.accepted_at)
        places = [(d, a) for d, a in zip(self.drafted_at, self.accepted_at, strict=True) if d]
        rows = sorted({rows for rows, _ in self.steps})
        return {
            "num_drafted": drafted,
            "num_accepted": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "acceptance_rate_by_position": [a / d for d, a in places],
            "speedup_estimate": self.speedup,
            "steps_by_rows": {
                str(most): {
                    name: self.steps.get((most, drafted), _Steps()).report()
                    for name, drafted in (("plain", False), ("drafted", True))
                }
                for most in rows
            },
        }


@dataclass(slots=True)
class Launched:
    """A step on its way, plain or with drafts, and its time so far."""

    speculation: "Speculation"
    inner: InFlight | Verified
    num_rows: int
    seconds: float
    waited: bool
    """Whether it was launched only after the one before it was read."""

    @property
    def num_positions(self) -> int:
        """Positions forwarded, pads included."""
        return self.num_rows * self.width

    @property
    def width(self) -> int:
        """Positions that it forwards per row."""
        return self.inner.width if isinstance(self.inner, Verified) else 1

    def read(self) -> Iterator[tuple[Row, Draw]]:
        """Waits for the step; the draws of each row, in order."""
        started, count = time.perf_counter(), 0
        for found in self.inner.read():
            count += 1
            yield found
        self.seconds += time.perf_counter() - started
        self.speculation.read(self, num_tokens=count)


@dataclass(frozen=True, slots=True)
class _Look:
    """What could be drafted for the rows of a step."""

    rows: list[Row]
    counts: list[int]
    """Tokens that a row may be drafted at most."""
    drafts: list[Draft]
    """Those that cost nothing."""
    lengths: list[int]
    """Tokens of each draft, also of those that would cost something."""
    sources: list[str]
    left: list[int] | None
    """Tokens that each row has left, where nothing waits for its slot."""


class Speculation:
    """What an engine with drafts keeps beside its batch."""

    def __init__(
        self,
        proposers: Sequence[Proposer],
        *,
        num_draft_tokens: int = 15,
        gate: Gate | None = None,
    ) -> None:
        """Takes where drafts come from, in order; without a `gate`, all of them are tried."""
        if not 1 <= num_draft_tokens <= MOST_DRAFTED:
            allowed = f"1 to {MOST_DRAFTED}"
            raise ParameterError(f"num_draft_tokens={num_draft_tokens} is not allowed: {allowed}")
        self.num_draft_tokens = num_draft_tokens
        self.stats = SpeculationStats()
        self.proposers = list(proposers)
        self._free = InOrder([one for one in proposers if one.is_free])
        self._costly = [one for one in proposers if not one.is_free]
        self._gate = gate
        self._chances = Acceptance()
        self._sampler = Sampler()
        self._runner: ModelRunner | None = None
        self._rows: set[Row] = set()
        self._broken: set[Row] = set()
        self._running: Launched | None = None

    def bind(self, runner: ModelRunner, max_model_len: int | None) -> list[ModelRunner]:
        """Takes the model whose draws decide; returns those that draft.

        Raises:
            ParameterError: its rows cannot go back from a rejected token.
        """
        assert runner.num_spare >= self.num_draft_tokens, "a draft has columns of its own"
        check_rewind(runner)
        self._runner, self._max_model_len = runner, max_model_len
        found = [proposer.bind(runner.vocab_size) for proposer in self.proposers]
        return [it for it in found if it is not None]

    def needs_draws(self, batch: Batch, *, drains: bool) -> bool:
        """Whether the next step is launched only after the one before it is read.

        Where drafts were of no use lately, that is asked now and then of the texts without the
        draws of the step that runs meanwhile.
        """
        if self._gate is None:
            return True
        if batch.wants_forward and self._gate.probes(len(batch.rows)):
            self._gate.probe(self._promise(batch, self._look(batch, drains=drains)))
        return self._gate.waits

    def report(self) -> dict[str, Any]:
        """The numbers as `summary.json` has them."""
        return {
            "num_draft_tokens": self.num_draft_tokens,
            "gate": self._gate is not None,
            **self.stats.report(),
        }

    def clear(self) -> None:
        """Forgets the texts that it has seen and all that it measured; no row may be in flight."""
        self.stats, self._chances, self._rows = SpeculationStats(), Acceptance(), set()
        for proposer in self.proposers:
            proposer.clear()
        if self._gate is not None:
            self._gate.clear()

    def _end(self, row: Row) -> None:
        self._chances.end(row)
        for proposer in (self._free, *self._costly):
            proposer.end(row)

    def prefill_chunk(self, prefill: Prefill) -> int:
        """Like the model's own; its time tells the gate what a step with drafts may take."""
        assert self._runner is not None, "bound when the engine was made"
        started = time.perf_counter()
        num_positions, gate = self._runner.prefill_chunk(prefill), self._gate
        # The time of one beside a step that runs is not its own.
        is_timed = num_positions > 0 and self._running is None
        if is_timed and gate is not None and gate.wants_prefill(num_positions):
            self._runner.settle()
            gate.record_prefill(num_positions, time.perf_counter() - started)
        return num_positions

    def launch(self, batch: Batch, *, drains: bool = False) -> Launched:
        """Sends a step on its way, with drafts where they look worth it.

        Where the batch `drains`, a row that is done makes room for nobody.
        """
        assert self._runner is not None, "bound when the engine was made"
        waits = self._gate is None or self._gate.waits
        if waits:
            # A step is not slower because new rows were written into their slots before it.
            self._runner.settle()
        started = time.perf_counter()
        for row in self._rows.difference(batch.sequences):
            self._end(row)
        self._rows = set(batch.sequences)
        self._broken &= self._rows
        self._chances.fade()
        inner: InFlight | Verified
        if waits and (drafts := self._drafts(batch, drains=drains)):
            inner = verify(self._runner, self._sampler, batch, drafts)
            batch.forget_device()
        else:
            inner = batch.launch(self._runner)
        seconds = time.perf_counter() - started
        self._running = Launched(self, inner, len(batch.rows), seconds, waits)
        return self._running

    def _look(self, batch: Batch, *, drains: bool) -> _Look:
        """Drafts that cost nothing, and how many tokens those that do could have."""
        rows = [row for row in batch.sequences if row.wants_forward]
        most = self.num_draft_tokens
        if self._max_model_len is not None:
            # A pad stands where a draft of another row is long: positions past the context do not
            # exist for every model.
            most = min(most, self._max_model_len - 1 - max(row.position for row in rows))
        left = [row.max_tokens - len(row.token_ids) for row in rows]
        counts = [max(0, min(most, count - 1)) for count in left]
        counts = [0 if row in self._broken else n for row, n in zip(rows, counts, strict=True)]
        drafts = self._asked(self._free, rows, counts)
        lengths = [len(draft) for draft in drafts]
        sources = [draft.source for draft in drafts]
        for proposer in self._costly:
            lengths = [n or count for n, count in zip(lengths, counts, strict=True)]
            sources = [source or _name(proposer) for source in sources]
        for row, length in zip(rows, lengths, strict=True):
            self._chances.look(row, has_draft=length > 0)
        return _Look(rows, counts, drafts, lengths, sources, left if drains else None)

    def _promise(self, batch: Batch, look: _Look) -> Rows:
        """What the gate goes by."""
        pairs = list(zip(look.rows, look.sources, strict=True))
        chances = [self._chances.chance(row, source) for row, source in pairs]
        sure = [self._chances.sure(row, source) for row, source in pairs]
        ends = None
        if look.left is not None:
            shares = [self._chances.share(row) for row in look.rows]
            ends = list(zip(look.left, shares, strict=True))
        return Rows(len(batch.rows), look.lengths, chances, sure, ends)

    def _drafts(self, batch: Batch, *, drains: bool) -> dict[Row, Draft]:
        """Drafts for the rows that are worth it; none where plain decoding is faster."""
        look = self._look(batch, drains=drains)
        width = 1 + max(look.lengths)
        if self._gate is not None:
            width = self._gate.width(self._promise(batch, look))
        if width == 1:
            return {}
        drafts = list(look.drafts)
        for proposer in self._costly:
            missing = [place for place, draft in enumerate(drafts) if not draft]
            limits = [min(look.counts[i], width - 1) for i in missing]
            found = self._asked(proposer, [look.rows[i] for i in missing], limits)
            for place, draft in zip(missing, found, strict=True):
                drafts[place] = draft
        pairs = zip(look.rows, drafts, strict=True)
        return {row: replace(it, token_ids=it.token_ids[: width - 1]) for row, it in pairs if it}

    def _asked(self, proposer: Proposer, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """Drafts of tokens that there are, and none behind one that ends the row."""
        assert self._runner is not None
        size = self._runner.vocab_size
        drafts = zip(rows, proposer.propose(rows, counts), counts, strict=True)
        return [_cut(row, draft, count, size) for row, draft, count in drafts]

    def read(self, step: Launched, *, num_tokens: int) -> None:
        """Takes what a step came to."""
        if step is self._running:
            self._running = None
        is_drafted = isinstance(step.inner, Verified)
        self.stats.record(
            step.num_rows, drafted=is_drafted, tokens=num_tokens, seconds=step.seconds
        )
        if self._gate is not None:
            self._gate.record(
                step.num_rows, step.width, step.seconds, num_tokens=num_tokens, waited=step.waited
            )
        if isinstance(step.inner, Verified):
            self._read_drafts(step.inner)

    def _read_drafts(self, verified: Verified) -> None:
        assert self._runner is not None
        for row in verified.broken:
            slot, column = verified.starts[row]
            self._runner.caches.clear_columns(slot, column + 1, column + verified.width)
            self._broken.add(row)
        for row, draft in verified.rows:
            if draft:
                counts = {"num_drafted": len(draft), "num_accepted": verified.num_accepted[row]}
                self._chances.record(row, draft.source, **counts)
                self.stats.record_draft(**counts)


def _name(proposer: Proposer) -> str:
    return type(proposer).__name__


def _cut(row: Row, draft: Draft, most: int, vocab_size: int) -> Draft:
    kept: list[int] = []
    for token_id in draft.token_ids[:most]:
        if not 0 <= token_id < vocab_size:
            break
        kept.append(token_id)
        if token_id in row.stop_token_ids:
            break
    return Draft(kept, draft.source)
