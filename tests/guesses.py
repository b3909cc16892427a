"""A proposer that knows what comes, and is right, wrong or silent by chance."""

import random
from collections.abc import Mapping, Sequence

from tiny import VOCAB_SIZE

from runner.engine.proposers import Draft
from runner.engine.sequence import Sequence as Row
from runner.types import Completion

KINDS = ("right", "right", "wrong", "nonsense", "none", "long")


class Guesses:
    """Drafts right tokens, a wrong one among them, any tokens, none, or more than are wanted."""

    is_free = True

    def __init__(
        self,
        known: Mapping[tuple[str, int], Completion],
        seed: int = 0,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self._known, self._random, self._kinds = known, random.Random(seed), kinds
        self.ended: list[Row] = []

    def bind(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        pairs = zip(rows, counts, strict=True)
        return [Draft(self._guess(row, count), "guess") for row, count in pairs]

    def _guess(self, row: Row, count: int) -> list[int]:
        assert len(row.token_ids) == row.num_launched < row.max_tokens, "all draws are read"
        rest = self._known[row.request.request_id, row.index].token_ids[len(row.token_ids) :]
        kind = self._random.choice(self._kinds)
        if kind == "nonsense":
            return self._random.choices([-1, *range(VOCAB_SIZE), 10**6], k=count)
        if kind == "long":
            return [*rest, *self._random.choices(range(VOCAB_SIZE), k=count + 3)]
        if kind == "wrong" and rest:
            place = self._random.randrange(len(rest))
            rest[place] = (rest[place] + 1) % VOCAB_SIZE
        return [] if kind == "none" else rest[:count]

    def end(self, row: Row) -> None:
        self.ended.append(row)

    def clear(self) -> None:
        self.ended = []
