"""A model that drafts: its rows come, lag, go wrong and leave; and whether a model can go back."""

import random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_engine, request, run, tiny_model

from runner.engine.draft_model import DraftModelProposer
from runner.engine.rewind import check_rewind
from runner.engine.sequence import Sequence as Row
from runner.errors import ParameterError

MODEL = tiny_model()
VOCAB_SIZE = 97


def row(name: str, prompt: list[int], **params: Any) -> Row:
    asked = request(prompt, name, **({"max_tokens": 60, "ignore_eos": True} | params))
    return Row(asked, 0, max_tokens=60, stop_token_ids=frozenset())


def proposer(model: Any = MODEL, vocab_size: int = VOCAB_SIZE) -> DraftModelProposer:
    made = DraftModelProposer(model)
    made.bind(vocab_size)
    return made


def drafted(one: DraftModelProposer, rows: list[Row], counts: list[int]) -> list[list[int]]:
    return [list(draft.token_ids) for draft in one.propose(rows, counts)]


def grow(one: Row, token_ids: list[int]) -> None:
    one.token_ids += token_ids
    one.num_launched = len(one.token_ids)


def test_what_is_drafted_depends_on_the_row_alone_and_not_on_earlier_drafts():
    """Of a draft some tokens are drawn, or all, or none, or others; rows are left out of steps."""
    dice, old = random.Random(4), proposer()
    rows = [row(f"r{i}", [5 + i] * (1 + 4 * i)) for i in range(3)]
    for _ in range(8):
        counts = [dice.choice([0, 1, 4]) for _ in rows]
        found = drafted(old, rows, counts)
        assert found == drafted(proposer(), rows, counts)
        assert list(map(len, found)) == counts
        for one, draft in zip(rows, found, strict=True):
            kept = draft[: dice.randrange(6)]
            grow(one, [*kept, dice.randrange(3, VOCAB_SIZE)][: 40 - len(one.token_ids)])


def test_rows_that_stay_are_where_they_were_after_others_have_left():
    rows = [row(f"r{i}", [5 + i, 9, 30 + i]) for i in range(4)]
    done = run(make_engine(MODEL), [it.request for it in rows])
    said = [done[it.request.request_id, 0].token_ids for it in rows]
    one = proposer()
    assert drafted(one, rows, [3] * 4) == [ids[:3] for ids in said]
    for it, ids in zip(rows, said, strict=True):
        grow(it, ids[:3])
    for gone in (0, 1, 2):
        one.end(rows[gone])
    assert [slot.row for slot in one._slots] == [rows[3]], "its slot is among the first"
    assert drafted(one, rows[3:], [4]) == [said[3][3:7]]
    # A new row stands beside it, and neither disturbs the other.
    late = row("late", [40, 41])
    grow(rows[3], said[3][3:5])
    assert drafted(one, [late, rows[3]], [2, 2])[1] == said[3][5:7]
    for it in (late, rows[3]):
        one.end(it)
    assert one._slots == [] and one._runner.caches.num_rows == 0
    one.end(rows[0])


@pytest.mark.parametrize("size", [80, 97, 130])
def test_a_vocabulary_that_is_padded_otherwise_drafts_what_both_have(size):
    """Fewer logits than the target's leave tokens that are never drafted, more are cut off."""
    rows = [row(f"r{i}", [5 + i], temperature=2.0) for i in range(12)]
    one = proposer(tiny_model(vocab_size=size))
    found = np.array(drafted(one, rows, [5] * 12))
    assert found.shape == (12, 5) and found.min() >= 0 and found.max() < min(size, VOCAB_SIZE)
    assert len(np.unique(found)) > 12


def test_a_prompt_that_is_scored_is_drafted_for_as_any_other():
    plain, scored = row("r", [5, 6, 7]), row("r", [5, 6, 7], prompt_logprobs=2)
    assert drafted(proposer(), [scored], [4]) == drafted(proposer(), [plain], [4])


def test_nothing_is_forwarded_where_nothing_is_asked():
    one = proposer()
    assert drafted(one, [row("r", [5])], [0]) == [[]] and one._slots == []
    assert one.propose([], []) == []


class Runner:
    """Stands for a model of one layer whose logits say what its columns hold."""

    num_spare = 8

    def __init__(self, *, fault: str = "", is_recurrent: bool = False) -> None:
        self.kinds = [
            SimpleNamespace(is_recurrent=False),
            SimpleNamespace(is_recurrent=is_recurrent),
        ]
        self.fault, self.num_dropped = fault, 0
        self.columns: list[dict[int, int]] = [{}, {}]

    def reserve(self, *_: int) -> None:
        self.columns = [{}, {}]

    def drop_caches(self) -> None:
        self.num_dropped += 1

    def forward_rows(self, token_ids: mx.array, positions: list[int], _: Any) -> mx.array:
        ids = np.array(token_ids)
        if self.fault == "shape" and ids.shape[1] > 1:
            raise ValueError("[matmul] a shape")
        found = np.zeros((*ids.shape, 16), np.float32)
        for (at, place), token_id in np.ndenumerate(ids):
            is_one = self.fault == "one offset" and ids.shape[1] > 1
            start = max(positions) if is_one else positions[at]
            self.columns[at][start + place] = int(token_id)
            last = start + (ids.shape[1] - 1 if self.fault == "sees ahead" else place)
            for column in range(last + 1):
                seen = self.columns[at].get(column, int(ids[at, -1]))
                found[at, place, (3 * column + seen) % 16] += 1 + column
        return mx.array(found)


def test_a_model_that_can_go_back_is_taken_and_left_clean():
    runner: Any = Runner()
    check_rewind(runner)
    assert runner.num_dropped == 1


@pytest.mark.parametrize("fault", ["shape", "one offset", "sees ahead"])
def test_one_that_cannot_is_refused_and_left_clean(fault):
    runner: Any = Runner(fault=fault)
    with pytest.raises(ParameterError, match="with the draft model: it does not take several tok"):
        check_rewind(runner, "the draft model")
    assert runner.num_dropped == 1


def test_a_layer_that_keeps_a_state_is_named():
    runner: Any = Runner(is_recurrent=True)
    with pytest.raises(
        ParameterError, match="with this model: layer 1 keeps a state, which cannot"
    ):
        check_rewind(runner)
