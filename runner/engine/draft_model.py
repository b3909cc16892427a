"""Drafts from a smaller model, whose rows are kept in step with those of the target."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.engine.kv_options import KVOptions
from runner.engine.model_runner import ModelRunner
from runner.engine.proposers import Draft
from runner.engine.rewind import check_rewind
from runner.engine.sampler import Sampler
from runner.engine.sequence import Sequence as Row
from runner.engine.verify import Position, draw
from runner.types import Request

_CHUNK = 64
"""Tokens of each row that are forwarded at once where a row has run ahead of the draft model."""
_SPARE = 2 * _CHUNK
"""Columns behind a row's last token that a forward of other rows may write over."""
_LOGIT_OF_NONE = -1e9
"""Of a token of the target's vocabulary that the draft model has no logit for."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A row of the draft model."""

    row: Row
    num_cached: int
    """Columns that hold the row's own tokens, as far as is known."""
    drafted: list[int] = field(default_factory=list)
    """The tokens in the columns behind them, which the row may have drawn since."""

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion so far."""
        return [*self.row.request.prompt_token_ids, *self.row.token_ids]

    @property
    def missing(self) -> list[int]:
        """The tokens that are not cached; the last one at least never is."""
        return self.token_ids[self.num_cached :]

    @property
    def end(self) -> int:
        """The first column that nothing of the row is in, nor a guess at it."""
        return max(len(self.token_ids), self.num_cached + len(self.drafted))

    def catch_up(self) -> None:
        """Counts the drafted columns that turned out right."""
        for drafted, token_id in zip(self.drafted, self.missing[:-1], strict=False):
            if drafted != token_id:
                break
            self.num_cached += 1
        self.drafted = []


class DraftModelProposer:
    """A model with the target's vocabulary drafts; it draws with the numbers of the row itself.

    So where its distribution is like the target's, it draws the same token at any temperature.
    """

    is_free = False

    def __init__(self, model: nn.Module, *, prefill_step_size: int = 512) -> None:
        """Takes a model with mlx-lm's interface.

        Raises:
            ModelError: the model cannot be run in a padded batch.
            ParameterError: its rows cannot go back from a rejected token.
        """
        self._runner = ModelRunner(
            model,
            prefill_step_size=prefill_step_size,
            prefix_cache_bytes=0,
            kv_options=KVOptions(num_spare=_SPARE),
            max_adapters=1,
        )
        check_rewind(self._runner, "the draft model")
        self._vocab_size = self._runner.vocab_size
        self._sampler = Sampler()
        self._slots: list[_Slot | None] = []

    def bind(self, vocab_size: int) -> ModelRunner:
        """Takes the target's vocabulary; either model may have more ids, for padding."""
        self._vocab_size = vocab_size
        return self._runner

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        """A draft of as many tokens as are asked for."""
        wanted = {row: count for row, count in zip(rows, counts, strict=True) if count > 0}
        if not wanted:
            return [Draft()] * len(rows)
        self._admit(list(wanted))
        slots = [slot for slot in self._slots if slot is not None and slot.row in wanted]
        self._reserve()
        logits = self._caught_up(slots)
        while left := [slot for slot in slots if len(slot.drafted) < wanted[slot.row]]:
            self._draw(logits, left)
            if any(len(slot.drafted) < wanted[slot.row] for slot in left):
                logits = self._forward([(slot, slot.drafted[-1:]) for slot in left])
        drafted = {slot.row: slot.drafted for slot in slots}
        for slot in slots:
            slot.drafted = slot.drafted[:-1]  # The last one was not forwarded, in general.
        return [Draft(drafted.get(row, ()), type(self).__name__) for row in rows]

    def end(self, row: Row) -> None:
        """Frees the slot of a row."""
        for place, slot in enumerate(self._slots):
            if slot is not None and slot.row is row:
                self._slots[place] = None
        live = [place for place, slot in enumerate(self._slots) if slot is not None]
        if not live:
            self._slots = []
            self._runner.drop_caches()
        elif len(live) <= len(self._slots) // 2:
            self._slots = [self._slots[place] for place in live]
            self._runner.caches.keep_rows(live)

    def clear(self) -> None:
        """Frees all slots."""
        self._slots = []
        self._runner.drop_caches()

    def _admit(self, rows: Sequence[Row]) -> None:
        """Gives new rows a slot, with their prompts prefilled."""
        known = {slot.row for slot in self._slots if slot is not None}
        new: dict[str, list[Row]] = {}
        for row in rows:
            if row not in known:
                new.setdefault(row.request.request_id, []).append(row)
        for group in new.values():
            self._prefill(group)

    def _prefill(self, group: Sequence[Row]) -> None:
        """The prompt of one request, for all of its rows that are new."""
        request = _unscored(group[0].request)
        prefill = self._runner.start_prefill([request])
        while prefill.num_left:
            self._runner.prefill_chunk(prefill)
        (prompt,) = self._runner.finish_prefill(prefill)
        places = []
        for row in group:
            if None not in self._slots:
                self._slots.append(None)
            places.append(self._slots.index(None))
            self._slots[places[-1]] = _Slot(row, prompt.num_cached)
        self._reserve()
        self._runner.fork(prompt, places)

    def _reserve(self) -> None:
        live = [slot for slot in self._slots if slot is not None]
        columns = max(len(slot.token_ids) for slot in live) + _SPARE
        most = max(slot.row.num_columns for slot in live) + _SPARE
        self._runner.reserve(len(self._slots), columns, most)

    def _caught_up(self, slots: Sequence[_Slot]) -> mx.array:
        """Forwards what the rows have had since; logits of their next tokens, (slots, V)."""
        for slot in slots:
            slot.catch_up()
        while behind := [slot for slot in slots if len(slot.missing) > _CHUNK]:
            chunks = [(slot, slot.missing[:_CHUNK]) for slot in behind]
            mx.eval(self._forward(chunks))
            for slot in behind:
                slot.num_cached += _CHUNK
        logits = self._forward([(slot, slot.missing) for slot in slots])
        for slot in slots:
            slot.num_cached = len(slot.token_ids)
        return logits

    def _forward(self, tokens: Sequence[tuple[_Slot, list[int]]]) -> mx.array:
        """Forwards each slot's tokens behind what it has; the last logits of each, (slots, V).

        Every slot is forwarded; what that writes into the others is behind what they hold.
        """
        width = max(len(token_ids) for _, token_ids in tokens)
        padded = np.zeros((len(self._slots), width), np.int32)
        last = [0] * len(self._slots)
        positions = [0 if slot is None else slot.end for slot in self._slots]
        for slot, token_ids in tokens:
            place = self._slots.index(slot)
            padded[place, : len(token_ids)] = token_ids
            last[place] = len(token_ids) - 1
            positions[place] = slot.num_cached + max(0, len(slot.drafted) - 1)
        logits = self._runner.forward_rows(mx.array(padded), positions, [None] * len(last))
        return logits[mx.arange(len(last)), mx.array(last)]

    def _draw(self, logits: mx.array, slots: Sequence[_Slot]) -> None:
        """Draws the next token of each slot, as the target would from these logits."""
        places = mx.array([self._slots.index(slot) for slot in slots])
        missing = self._vocab_size - logits.shape[-1]
        own = logits[places].astype(mx.float32)[:, : self._vocab_size]
        if missing > 0:
            own = mx.pad(own, [(0, 0), (0, missing)], constant_values=_LOGIT_OF_NONE)
        positions = [Position(slot.row, place, slot.drafted) for place, slot in enumerate(slots)]
        samples = draw(self._sampler, own, positions)
        for slot, token_id in zip(slots, np.asarray(samples.packed)[:, 0], strict=True):
            slot.drafted = [*slot.drafted, int(token_id)]


def _unscored(request: Request) -> Request:
    params = replace(request.params, prompt_logprobs=None)
    return replace(request, params=params, logprobs_start=1, prompt_entropy=False)
