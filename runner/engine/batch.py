"""The rows of the batch: which sequence stands where, and what the next forward needs of it."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.engine.logits_processors import LogitsProcessors
from runner.engine.lora import Adapter
from runner.engine.model_runner import ModelRunner
from runner.engine.sampler import Sampler, Samples, SamplingTable, race_numbers
from runner.engine.sequence import Draw, Sequence
from runner.types import Logprob


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that is launched and not yet read: its samples, and whose they are."""

    samples: Samples
    rows: list[tuple[int, Sequence]]

    @property
    def num_positions(self) -> int:
        """Positions forwarded, those of empty slots included."""
        return len(self.samples.packed)

    def read(self) -> list[tuple[Sequence, Draw]]:
        """Waits for the step; what it drew for each of its rows."""
        packed = np.asarray(self.samples.packed)
        floats = packed.view(np.float32)
        return [(s, _draw(packed[row], floats[row], s)) for row, s in self.rows]


def _draw(row: np.ndarray, floats: np.ndarray, sequence: Sequence) -> Draw:
    """One row of `Samples.packed`, as integers and as floats."""
    token_id, raw = int(row[0]), float(floats[1])
    wanted = sequence.request.params.logprobs
    if wanted is None:
        return Draw(token_id, raw, float(floats[2]))
    num_top = (len(row) - 4) // 2
    logprobs = {token_id: Logprob(raw, int(row[3]))}
    for rank in range(min(wanted, num_top)):
        logprobs.setdefault(
            int(row[4 + rank]), Logprob(float(floats[4 + num_top + rank]), rank + 1)
        )
    return Draw(token_id, raw, float(floats[2]), logprobs)


class Batch:
    """A table of row slots; a slot is empty or holds one sequence."""

    def __init__(self, *, vocab_size: int, num_spare: int = 0) -> None:
        """`num_spare` columns behind each row's last are kept for what is drafted."""
        self.vocab_size, self.num_spare = vocab_size, num_spare
        self.rows: list[Sequence | None] = []
        self._token_ids = mx.zeros((0,), mx.int32)
        self._sampler = Sampler()
        self._table: SamplingTable | None = None
        self._processors: LogitsProcessors | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences in flight, in row order."""
        return [sequence for sequence in self.rows if sequence is not None]

    @property
    def wants_forward(self) -> bool:
        """Whether any row has a token left to sample."""
        return any(sequence.wants_forward for sequence in self.sequences)

    @property
    def extent(self) -> tuple[int, int, int]:
        """Slots, the columns that they need now, and the most that any of them comes to need."""
        live, spare = self.sequences, self.num_spare
        columns = max(sequence.position for sequence in live) + 1 + spare
        return len(self.rows), columns, max(sequence.num_columns for sequence in live) + spare

    def place(self, sequence: Sequence) -> None:
        """Puts a sequence into the first empty slot, or a new one."""
        if None not in self.rows:
            self.rows.append(None)
        sequence.row = self.rows.index(None)
        self.rows[sequence.row] = sequence
        self._table = None

    def release(self, sequence: Sequence) -> None:
        """Empties the slot of a finished sequence."""
        self.rows[sequence.row] = None
        self._table = None

    def compact(self) -> list[int]:
        """Closes the gaps; returns the old slot of each row that is left."""
        kept = [sequence.row for sequence in self.sequences]
        self._token_ids = self._sampled()
        self.rows = [self.rows[row] for row in kept]
        for row, sequence in enumerate(self.sequences):
            sequence.row = row
        self._token_ids = self._token_ids[mx.array(kept, mx.int32)]
        self._table = None
        return kept

    def positions(self) -> list[int]:
        """The column that each slot's next forward writes; 0 where nothing is wanted."""
        return [s.position if s is not None and s.wants_forward else 0 for s in self.rows]

    def adapters(self) -> list[Adapter | None]:
        """Each slot's adapter; an empty one has that of some row, so that it mixes no batch."""
        some = next((sequence.adapter for sequence in self.sequences), None)
        return [some if sequence is None else sequence.adapter for sequence in self.rows]

    def _sampled(self) -> mx.array:
        """The last sampled tokens, with a zero for each slot that has come since."""
        return mx.pad(self._token_ids, (0, len(self.rows) - self._token_ids.shape[0]))

    def input_token_ids(self) -> mx.array:
        """(B,) int32: the last sampled token of each row, or the last one of its prompt."""
        sampled = self._sampled()
        known = [s is not None and s.num_launched == len(s.token_ids) for s in self.rows]
        if not any(known):
            return sampled
        last = [s.last_token_id if s is not None else 0 for s in self.rows]
        return mx.where(mx.array(known), mx.array(last, mx.int32), sampled)

    def forget_device(self) -> None:
        """After a step that went past `sample`: the next one starts from what the host has read."""
        self._token_ids = mx.zeros((len(self.rows),), mx.int32)
        self._table = self._processors = None

    def sample(self, logits: mx.array) -> Samples:
        """Draws each row's next token from `logits`, (B, V), as its parameters say."""
        if self._table is None:
            params = [s.request.params if s is not None else None for s in self.rows]
            self._table = self._sampler.table(params, self.vocab_size)
            self._processors = LogitsProcessors.build(
                self.rows, self.vocab_size, before=self._processors
            )
        return self._sampler.sample(logits, self._table, self._numbers(), self._processors)

    def _numbers(self) -> npt.NDArray[np.float32]:
        """What each row's next draw takes, (B, N)."""
        streams = np.array([s.stream if s is not None else 0 for s in self.rows], np.uint64)
        counters = np.array([s.num_launched if s is not None else 0 for s in self.rows], np.uint64)
        return race_numbers(streams, counters, self.vocab_size)

    def launch(self, runner: ModelRunner) -> InFlight:
        """Sends the next token of every row on its way."""
        logits = runner.decode(self.input_token_ids(), self.positions(), self.adapters())
        return self.launched(self.sample(logits))

    def launched(self, samples: Samples) -> InFlight:
        """Notes that a step for the rows that wanted one is on its way."""
        rows = [(s.row, s) for s in self.sequences if s.wants_forward]
        for _, sequence in rows:
            sequence.num_launched += 1
        self._token_ids = samples.token_ids
        if self._processors is not None:
            self._processors.push(samples.token_ids)
        return InFlight(samples, rows)
