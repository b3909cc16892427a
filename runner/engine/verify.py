"""One forward over a row's last token and what is drafted behind it; the target's own draws there.

A drafted token is accepted where it equals the draw, and the numbers of a draw depend on its
position alone (`race_numbers`), so a row gets exactly the tokens that it would get without drafts,
at any temperature.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan

import mlx.core as mx
import numpy as np

from runner.engine.batch import Batch, InFlight
from runner.engine.logits_processors import LogitsProcessors
from runner.engine.model_runner import ModelRunner
from runner.engine.proposers import Draft
from runner.engine.sampler import Sampler, Samples, race_numbers
from runner.engine.sequence import Draw
from runner.engine.sequence import Sequence as RowState
from runner.types import Request


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """A row as it stands once its first drafted tokens are accepted."""

    sequence: RowState
    row: int
    """Where the logits of its next token are."""
    drafted: Sequence[int] = ()
    """The drafted tokens before it."""

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.sequence.request

    @property
    def num_launched(self) -> int:
        """Tokens that precede the draw."""
        return len(self.sequence.token_ids) + len(self.drafted)

    @property
    def token_ids(self) -> list[int]:
        """These tokens."""
        return [*self.sequence.token_ids, *self.drafted]

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """What min_tokens holds back."""
        return self.sequence.ending_token_ids


def draw(sampler: Sampler, logits: mx.array, positions: Sequence[Position]) -> Samples:
    """Draws the token of each position from `logits`, (M, V), as its row's parameters say."""
    vocab_size = int(logits.shape[-1])
    table = sampler.table([position.request.params for position in positions], vocab_size)
    streams = np.array([position.sequence.stream for position in positions], np.uint64)
    counters = np.array([position.num_launched for position in positions], np.uint64)
    numbers = race_numbers(streams, counters, vocab_size)
    process = LogitsProcessors.build(positions, vocab_size)
    return sampler.sample(logits, table, numbers, process)


@dataclass(slots=True)
class Verified:
    """A verify step that is launched and not yet read."""

    in_flight: InFlight
    """The draws of every position, row by row."""
    rows: list[tuple[RowState, Draft]]
    starts: dict[RowState, tuple[int, int]]
    """The slot of each row, and the column of its last token."""
    width: int
    num_accepted: dict[RowState, int] = field(default_factory=dict)
    broken: list[RowState] = field(default_factory=list)
    """Rows that got a NaN, be it from a drafted token: they are to draw again, without drafts."""

    def read(self) -> Iterator[tuple[RowState, Draw]]:
        """Waits for the step; each row's draws up to the first that was drafted otherwise.

        A row that ends at one of them is to be told so before the next is asked for.
        """
        draws = iter(self.in_flight.read())
        for sequence, draft in self.rows:
            own = [next(draws)[1] for _ in range(len(draft) + 1)]
            num_accepted = 0
            # Hidden columns have a weight of zero, and that on a NaN is a NaN.
            if draft and any(isnan(drawn.raw_logprob) for drawn in own):
                self.broken.append(sequence)
                own = []
            for place, drawn in enumerate(own):
                yield sequence, drawn
                is_same = place < len(draft) and draft.token_ids[place] == drawn.token_id
                num_accepted += is_same
                if not is_same or sequence.finish_reason is not None:
                    break
            self.num_accepted[sequence] = num_accepted
            sequence.num_launched = len(sequence.token_ids)
            sequence.num_drafted += len(draft)
            sequence.num_accepted += num_accepted


def verify(
    runner: ModelRunner,
    sampler: Sampler,
    batch: Batch,
    drafts: Mapping[RowState, Draft],
) -> Verified:
    """Launches a step of a batch, all of whose tokens are read, with these drafts."""
    rows = batch.rows
    live = [row for row in batch.sequences if row.wants_forward]
    width = 1 + max(len(drafts.get(row, ())) for row in live)
    token_ids = np.zeros((len(rows), width), np.int32)
    positions = [0] * len(rows)
    draws: list[Position] = []
    places: list[int] = []
    for row in live:
        draft = drafts.get(row, Draft())
        # A pad is the row's own last token: one that the model is known to have a number for.
        token_ids[row.row] = row.last_token_id
        token_ids[row.row, 1 : 1 + len(draft)] = draft.token_ids
        positions[row.row] = row.position
        for count in range(len(draft) + 1):
            draws.append(Position(row, len(draws), draft.token_ids[:count]))
            places.append(row.row * width + count)
    logits = runner.forward_rows(mx.array(token_ids), positions, batch.adapters())  # (B, N, V)
    logits = logits.reshape(-1, logits.shape[-1])
    if len(places) < logits.shape[0]:
        logits = logits[mx.array(places)]
    samples = draw(sampler, logits, draws)
    starts = {row: (row.row, row.position) for row in live}
    for row in live:
        row.num_launched += 1
    return Verified(
        in_flight=InFlight(samples, [(it.row, it.sequence) for it in draws]),
        rows=[(row, drafts.get(row, Draft())) for row in live],
        starts=starts,
        width=width,
    )
