"""Law 4: speculative equals plain, for any proposer, greedy and sampled."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import as_requests, sizes, workloads
from tiny import VOCAB_SIZE, assert_same, make_engine, run, tiny_model

from runner.engine.proposers import Draft
from runner.engine.sequence import Sequence as Row
from runner.engine.speculation import Speculation
from runner.types import Completion

MODELS = {
    "full": tiny_model(head_dim=32),
    "sliding": tiny_model(
        layer_types=["full_attention", "sliding_attention"], sliding_window=6, seed=3, head_dim=32
    ),
}
KV_OPTIONS = {
    "full": ("full", {}),
    "sliding": ("sliding", {}),
    "bounded": ("full", {"max_kv_size": 7}),
    "quantised": ("full", {"kv_bits": 4, "kv_group_size": 32}),
    "quantised later": ("sliding", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 9}),
}
Known = dict[tuple[str, int], Completion]


class Guesses:
    """Drafts by chance: right, wrong from some place on, nonsense, none, or too long."""

    is_free = True

    def __init__(self, known: Known, seed: int) -> None:
        self._known, self._random = known, random.Random(seed)
        self.ended: list[Row] = []

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[Draft]:
        return [
            Draft(self._guess(row, count), "test") for row, count in zip(rows, counts, strict=True)
        ]

    def _guess(self, row: Row, count: int) -> list[int]:
        assert len(row.token_ids) == row.num_launched < row.max_tokens, "asked of what is read"
        rest = self._known[row.request.request_id, row.index].token_ids[len(row.token_ids) :]
        kind = self._random.choice(["right", "right", "wrong", "nonsense", "none", "long"])
        if kind == "none":
            return []
        if kind == "nonsense":
            return self._random.choices([-1, *range(VOCAB_SIZE), 10**6], k=count)
        if kind == "long":
            return [*rest, *self._random.choices(range(VOCAB_SIZE), k=count + 3)]
        if kind == "wrong" and rest:
            place = self._random.randrange(len(rest))
            rest[place] = (rest[place] + 1) % VOCAB_SIZE
        return rest[:count]

    def end(self, row: Row) -> None:
        self.ended.append(row)


def speculative(known: Known, seed: int = 0, **options: Any) -> Speculation:
    return Speculation([Guesses(known, seed)], **options)


@pytest.mark.parametrize("name", KV_OPTIONS)
@settings(max_examples=12, deadline=None)
@given(workload=workloads, size=sizes, seed=st.integers(0, 99), most=st.sampled_from([1, 3, 8]))
def test_speculative_equals_plain(name, workload, size, seed, most):
    model, options = KV_OPTIONS[name]
    requests = as_requests(workload)
    plain = run(make_engine(MODELS[model], **options), requests)
    engine = make_engine(
        MODELS[model],
        speculation=speculative(plain, seed, num_draft_tokens=most),
        **options,
        **size,
    )
    done = run(engine, requests)
    assert done.keys() == plain.keys()
    for key, completion in plain.items():
        assert_same(done[key], completion)
        assert done[key].logprobs is None or [set(it) for it in done[key].logprobs] == [
            set(it) for it in completion.logprobs
        ]
        assert 0 <= done[key].num_accepted <= done[key].num_drafted
    assert engine.speculation is not None
    guesses: Any = engine.speculation.proposers[0]
    assert len(guesses.ended) == len(set(guesses.ended)) == len(plain)
