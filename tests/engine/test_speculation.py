"""Law 4: speculative equals plain, for any proposer, greedy and sampled."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import which_models
from alone import requests as mixed_requests
from guesses import Guesses
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import as_requests, sizes, workloads
from tiny import EOS, VOCAB_SIZE, assert_same, make_engine, request, run, tiny_model
from tiny_adapters import random_adapter
from tiny_architectures import tiny_architecture

from runner.engine.batch import Batch
from runner.engine.draft_model import DraftModelProposer
from runner.engine.engine import Engine
from runner.engine.gate import Gate, Rows
from runner.engine.layer_kinds import layer_kinds
from runner.engine.proposers import Draft, NgramProposer
from runner.engine.sequence import Sequence as Row
from runner.engine.speculation import Launched, Speculation
from runner.errors import ParameterError
from runner.types import Completion, Request

MODEL = tiny_model()
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6, "seed": 3}
KV = {
    "full": (MODEL, {}),
    "sliding": (tiny_model(**WINDOWS), {}),
    "bounded": (MODEL, {"max_kv_size": 7}),
    "adapters": (MODEL, {}),
}
ADAPTERS = {"a": random_adapter(MODEL, 1)[0], "b": random_adapter(MODEL, 2, rank=2)[0]}


def kept_as(name: str, **options: Any) -> Engine:
    """An engine that keeps its rows in this way."""
    model, kept = KV[name]
    engine = make_engine(model, **kept, **options)
    for adapter, weights in ADAPTERS.items() if name == "adapters" else ():
        engine.load_adapter(adapter, weights)
    return engine


def drafting(known: dict[tuple[str, int], Completion], *kinds: str, **options: Any) -> Speculation:
    guesses = Guesses(known, kinds=kinds) if kinds else Guesses(known)
    return Speculation([guesses], **options)


def checked(model: Any, requests: list[Request], *kinds: str, **options: Any) -> Engine:
    """An engine that has run the requests with drafts, and given what it gives without."""
    plain = run(make_engine(model, **options), requests)
    engine = make_engine(model, speculation=drafting(plain, *kinds), **options)
    done = run(engine, requests)
    assert done.keys() == plain.keys()
    for key, completion in plain.items():
        assert_same(done[key], completion)
    return engine


@pytest.mark.parametrize("name", KV)
@settings(max_examples=12)
@given(workload=workloads, size=sizes, seed=st.integers(0, 99), most=st.sampled_from([1, 3, 8]))
def test_speculative_equals_plain(name, workload, size, seed, most):
    requests = as_requests(workload)
    if name == "adapters":
        requests = [
            replace(one, adapter=[None, "a", "b"][seed % 3 - i % 3])
            for i, one in enumerate(requests)
        ]
    plain = run(kept_as(name), requests)
    guesses = Guesses(plain, seed)
    speculation = Speculation([guesses], num_draft_tokens=most)
    done = run(kept_as(name, speculation=speculation, **size), requests)
    assert done.keys() == plain.keys()
    for key, completion in plain.items():
        assert_same(done[key], completion)
        top = [done[key].logprobs, completion.logprobs]
        ours, theirs = ([set(step) for step in steps or ()] for steps in top)
        assert ours == theirs
        assert 0 <= done[key].num_accepted <= done[key].num_drafted
    # The rows of the last step are forgotten at the next one.
    assert len(plain) > len(guesses.ended) == len(set(guesses.ended))


@pytest.mark.parametrize("name", [it for it in which_models.held() if it != "gpt2"])
def test_speculative_equals_plain_or_is_refused(name):
    model = tiny_architecture(name)
    if any(kind.is_recurrent for kind in layer_kinds(model)[0]):
        with pytest.raises(ParameterError, match="speculative is not allowed.*keeps a state"):
            make_engine(model, speculation=drafting({}))
        return
    engine = checked(model, mixed_requests(), max_batch_size=3)
    assert engine.speculation.stats.accepted_at[1] > 0


def test_a_model_that_takes_one_token_at_a_time_is_refused():
    class OneByOne:
        def __getattr__(self, name: str) -> Any:
            return getattr(MODEL, name)

        def __call__(self, token_ids: mx.array, cache: Any) -> mx.array:
            is_verified = token_ids.shape[0] > 1 and token_ids.shape[1] > 1
            return MODEL(token_ids * 0 if is_verified else token_ids, cache=cache)

    with pytest.raises(ParameterError, match="several tokens at once in rows of different lengths"):
        make_engine(OneByOne(), speculation=drafting({}))


ENDS = {
    "max_tokens": {"max_tokens": 5, "ignore_eos": True},
    "stop token": {"max_tokens": 40, "stop_token_ids": list(range(3, 97, 7))},
    "end of sequence": {"max_tokens": 90, "logit_bias": {EOS: 4.0}},
    "held back": {"max_tokens": 30, "min_tokens": 9, "stop_token_ids": list(range(3, 97, 4))},
    "bad words": {"max_tokens": 20, "bad_words_token_ids": [[i, i + 1] for i in range(3, 90)]},
    "penalties": {"max_tokens": 20, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "stop string": {"max_tokens": 60, "stop": ["7", "42"]},
    "context": {"max_tokens": None, "ignore_eos": True},
}


def decode(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    return "".join(f"{token_id} " for token_id in token_ids)


@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
def test_an_end_inside_a_draft(options):
    """All of the draft is right, and goes on past the end of the row."""
    rows = [
        request(range(3, 9 + 5 * i), f"r{i}", temperature=i % 2 * 1.2, n=1 + i % 2, **options)
        for i in range(4)
    ]
    engine = checked(MODEL, rows, "long", max_model_len=64, decode=decode, max_batch_size=4)
    assert engine.speculation.stats.accepted_at[3] > 0
    assert engine.stats.num_steps < engine.stats.num_completion_tokens / 2


def test_a_context_that_fills_up_is_not_passed_by_a_neighbour_s_draft():
    """A model whose positions are a table has no place for a pad past its end."""
    model, seen = tiny_architecture("gpt2"), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, token_ids: mx.array, cache: Any) -> mx.array:
            offset = cache[0].offset
            last = offset.max().item() if isinstance(offset, mx.array) else offset
            seen.append(int(last) + token_ids.shape[1])
            return model(token_ids, cache=cache)

    rows = [request(range(3, 5 + 6 * i), f"r{i}", max_tokens=None, ignore_eos=True) for i in (0, 3)]
    checked(Watched(), rows, "long", max_model_len=40, max_batch_size=2)
    assert max(seen) <= 40


def test_a_rejected_token_that_breaks_the_model_leaves_no_trace():
    """Its NaN is in columns that are hidden, and a weight of zero on it would still be a NaN."""
    model = tiny_model(tie_word_embeddings=False, head_dim=32)
    model.model.embed_tokens.weight[50] = mx.nan
    rows = [
        request([5, 6, 7, i], f"r{i}", max_tokens=12, ignore_eos=True, bad_words_token_ids=[[50]])
        for i in range(5)
    ]

    class Breaks(Guesses):
        def propose(self, rows: list[Row], counts: list[int]) -> list[Draft]:
            return [Draft([50, 50, 50][:count], "broken") for count in counts]

    for options in ({}, {"max_kv_size": 6}, {"kv_bits": 8, "kv_group_size": 32}):
        plain = run(make_engine(model, max_batch_size=2, **options), rows)
        speculation = Speculation([Breaks(plain)])
        done = run(make_engine(model, max_batch_size=2, speculation=speculation, **options), rows)
        for key, completion in plain.items():
            assert completion.finish_reason == done[key].finish_reason == "length"
            assert completion.token_ids == done[key].token_ids


@pytest.mark.parametrize("when", [1, 4, 9])
def test_an_aborted_row_leaves_the_others_as_they_are(when):
    rows = [request([5, 6, i], f"r{i}", max_tokens=25, ignore_eos=True) for i in range(3)]
    aborted = request([5, 6, 7], "aborted", n=2, max_tokens=30, ignore_eos=True)
    plain = run(make_engine(MODEL), [*rows, aborted])
    engine = make_engine(MODEL, max_batch_size=4, speculation=drafting(plain))
    for each in (aborted, *rows):
        engine.add(each)
    done = [completion for _ in range(when) for completion in engine.step()]
    engine.abort("aborted")
    while engine.has_unfinished:
        done += engine.step()
    for completion in done:
        if completion.request_id != "aborted":
            assert_same(completion, plain[completion.request_id, 0])
        else:
            token_ids = plain["aborted", completion.index].token_ids
            assert completion.token_ids == token_ids[: len(completion.token_ids)]
    assert len(done) == 5


def with_adapters(**options: Any) -> Engine:
    return kept_as("adapters", max_batch_size=4, **options)


@pytest.mark.parametrize("drafts", ["guesses", "model"])
def test_rows_with_adapters_in_one_batch(drafts):
    """The model that drafts knows none of them."""
    rows = [
        request([5 + i, 6, 7], f"r{i}", n=1 + i % 2, max_tokens=9, adapter=[None, "a", "b"][i % 3])
        for i in range(7)
    ]
    plain = run(with_adapters(), rows)
    proposer = Guesses(plain) if drafts == "guesses" else DraftModelProposer(MODEL)
    done = run(with_adapters(speculation=Speculation([proposer], num_draft_tokens=4)), rows)
    for key, completion in plain.items():
        assert_same(done[key], completion)
        assert done[key].adapter_digest == completion.adapter_digest
    assert sum(completion.num_accepted for completion in done.values()) > 10


def test_a_swap_between_two_drafted_steps_is_recorded_where_it_was():
    rows = [request([5, i], f"r{i}", max_tokens=24, ignore_eos=True, adapter="a") for i in (6, 7)]
    plain = run(with_adapters(), rows)
    engine = with_adapters(speculation=drafting(plain, "right", num_draft_tokens=3))
    for each in rows:
        engine.add(each)
    done = [completion for _ in range(4) for completion in engine.step()]
    num_before = [len(row.token_ids) for row in engine._flight.batch.sequences]
    engine.load_adapter("a", ADAPTERS["b"], mode="update")
    while engine.has_unfinished:
        done += engine.step()
    assert len(done) == 2 and min(num_before) > 0
    for completion in done:
        before, after = completion.weight_versions
        assert (before.start, after.end) == (0, 24) and before.end == after.start
        # A step was in flight, with up to four tokens for each row.
        assert before.end in {count + more for count in num_before for more in (1, 2, 3, 4)}
        old = plain[completion.request_id, 0].token_ids
        assert completion.token_ids[: before.end] == old[: before.end]
        assert completion.token_ids != old


class Wavering(Gate):
    """Waits for the draws of two steps in five, and takes whatever drafts there are then."""

    def __init__(self) -> None:
        super().__init__()
        self.is_drafted = False

    def probes(self, num_rows: int) -> bool:
        self._waits = self.is_drafted or self._step % 5 < 2
        self.is_drafted = False
        return False

    def width(self, rows: Rows) -> int:
        self._num_live = len(rows.lengths)
        self.is_drafted = any(rows.lengths)
        return 1 + max(rows.lengths)


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("make_gate", [Gate, Wavering])
def test_with_the_gate_the_result_is_the_same(make_gate, temperature):
    """Whatever it decides, and also where steps are launched before the one before is read."""
    rows = [
        request(
            [3 + i, 4, 5] * 4, f"r{i}", max_tokens=60 + i, temperature=temperature, ignore_eos=True
        )
        for i in range(6)
    ]
    plain = run(make_engine(MODEL, max_batch_size=4), rows)
    speculation = Speculation([NgramProposer(least=1, scope="job")], gate=make_gate())
    done = run(make_engine(MODEL, max_batch_size=4, speculation=speculation), rows)
    for key, completion in plain.items():
        assert_same(done[key], completion)
    kinds = {drafted for _, drafted in speculation.stats.steps}
    assert False in kinds, "plain steps are timed"
    assert make_gate is Gate or kinds == {False, True}


def test_what_is_cleared_is_as_new():
    """Texts, times and counts of one run are not there in the next."""
    rows = [
        request([3 + i, 4, 5] * 4, f"r{i}", max_tokens=30, temperature=0.3, ignore_eos=True)
        for i in range(4)
    ]
    speculation = Speculation([NgramProposer(least=1, scope="job")])
    engine = make_engine(MODEL, max_batch_size=2, speculation=speculation)
    first, again = run(engine, rows), run(engine, rows)
    counted = speculation.report()
    assert sum(it.num_accepted for it in again.values()) > 1.2 * sum(
        it.num_accepted for it in first.values()
    ), "its own texts of before are drafted"
    speculation.clear()
    assert speculation.report()["num_drafted"] == 0 < counted["num_drafted"]
    for key, done in run(engine, rows).items():
        assert (done.num_drafted, done.num_accepted) == (
            first[key].num_drafted,
            first[key].num_accepted,
        )


def test_only_a_step_that_may_draft_waits_for_what_came_before_it():
    """So that its time is its own; elsewhere one step is launched before the last is read."""
    gate, running, seen = Wavering(), [], set()
    speculation = Speculation([NgramProposer(least=1)], gate=gate)
    launch, read = speculation.launch, speculation.read

    def launched(batch: Batch, *, drains: bool = False) -> Launched:
        seen.add((gate.waits, len(running)))
        running.append(launch(batch, drains=drains))
        return running[-1]

    def has_read(step: Launched, *, num_tokens: int) -> None:
        running.remove(step)
        read(step, num_tokens=num_tokens)

    speculation.launch, speculation.read = launched, has_read  # type: ignore[method-assign]
    rows = [request([5, 6, 7] * 4, "r", max_tokens=40, temperature=0.0, ignore_eos=True)]
    run(make_engine(MODEL, speculation=speculation), rows)
    assert seen - {(False, 0)} == {(True, 0), (False, 1)}


class Hearing(Gate):
    """Notes what it is told of before each step, and lets all be launched ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Rows] = []

    def probes(self, num_rows: int) -> bool:
        return True

    def probe(self, rows: Rows) -> None:
        self.heard.append(rows)


def test_the_gate_is_told_what_is_left_where_nobody_waits_for_a_slot():
    gate = Hearing()
    engine = make_engine(
        MODEL, max_batch_size=2, speculation=Speculation([NgramProposer()], gate=gate)
    )
    rows = [request([5, 6, 7], f"r{i}", max_tokens=20 + i, ignore_eos=True) for i in range(3)]
    run(engine, rows)
    told = [None if it.ends is None else [left for left, _ in it.ends] for it in gate.heard]
    assert told[0] is None, "the third row waits"
    assert told[-1] == [2], "the step that runs draws one of them"
    assert len({*map(str, told)}) > 5
    assert all(0 <= share <= 1 for it in gate.heard for _, share in it.ends or ())


def test_a_prefill_is_timed_for_the_gate():
    gate = Gate()
    timed, record = [], gate.record_prefill

    def heard(num_positions: int, seconds: float) -> None:
        timed.append((num_positions, seconds))
        record(num_positions, seconds)

    gate.record_prefill = heard  # type: ignore[method-assign]
    engine = make_engine(MODEL, speculation=Speculation([NgramProposer()], gate=gate))
    run(engine, [request([*range(3, 20)], f"r{i}", max_tokens=2) for i in range(2)])
    assert sum(size for size, _ in timed) == engine.stats.num_prefill_tokens > 0
    assert all(seconds > 0 for _, seconds in timed)


def test_draws_follow_the_distribution():
    """The third token of 4,000 rows, whose first two were drafted, right or wrong."""
    params = {"max_tokens": 3, "ignore_eos": True, "allowed_token_ids": range(20, 32)}
    one = request([5, 6, 7], "r", n=4000, **params)

    class Fixed(Guesses):
        def propose(self, rows: list[Row], counts: list[int]) -> list[Draft]:
            return [Draft([21 + row.index % 3, 25], "") for row in rows]

    engine = make_engine(MODEL, max_batch_size=256, speculation=Speculation([Fixed({})]))
    drawn = np.array([done.token_ids for done in run(engine, [one]).values()])
    assert engine.speculation.stats.accepted_at[1] > 10

    def chances(prompt: list[int]) -> np.ndarray:
        logits = np.array(MODEL(mx.array([prompt]))[0, -1, 20:32], np.float64)
        return np.exp(logits) / np.exp(logits).sum()

    first = chances([5, 6, 7])
    second = [chances([5, 6, 7, 20 + i]) for i in range(12)]
    third = [[chances([5, 6, 7, 20 + i, 20 + j]) for j in range(12)] for i in range(12)]
    expected = np.einsum("i,ij,ijk->k", first, second, third) * 4000
    observed = np.bincount(drawn[:, 2] - 20, minlength=12)
    common = expected >= 5
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


def test_counts_of_what_was_drafted_and_accepted():
    rows = [request([5, 6, i], f"r{i}", max_tokens=13, ignore_eos=True) for i in range(3)]
    plain = run(make_engine(MODEL), rows)
    right = make_engine(MODEL, speculation=drafting(plain, "right", num_draft_tokens=4))
    for done in run(right, rows).values():
        # 4 drafted and 1 more a step; of the last three tokens two are drafted.
        assert (done.num_drafted, done.num_accepted) == (10, 10)
    assert right.stats.num_steps == 3 and right.stats.occupancy == pytest.approx(39 / 39)
    report = right.speculation.report()
    assert report["acceptance_rate_by_position"] == [1.0] * 4
    wrong = make_engine(MODEL, speculation=drafting(plain, "none"))
    assert {done.num_drafted for done in run(wrong, rows).values()} == {0}
    assert wrong.speculation.report()["acceptance_rate"] is None
    assert wrong.speculation.proposers[0]._vocab_size == VOCAB_SIZE


def test_what_was_drafted_in_vain_is_counted_too():
    rows = [request([5, 6, i], f"r{i}", max_tokens=13, ignore_eos=True) for i in range(3)]
    engine = checked(MODEL, rows, "wrong")
    report = engine.speculation.report()
    assert 0 < report["num_accepted"] < report["num_drafted"]


@pytest.mark.parametrize("kind", ["none", "right"])
def test_a_model_that_gives_nan_ends_the_row_with_drafts_as_without(kind):
    """A draft may have been the reason, so that the row draws again without; once."""
    model = tiny_model(tie_word_embeddings=False)
    model.model.embed_tokens.weight[50] = mx.nan
    rows = [request([5, 6, i], f"r{i}", max_tokens=6, ignore_eos=True) for i in (50, 51)]
    plain = run(make_engine(model), rows)
    done = run(make_engine(model, speculation=drafting(plain, kind)), rows)
    assert done["r50", 0].error == plain["r50", 0].error is not None
    assert done["r51", 0].token_ids == plain["r51", 0].token_ids


@pytest.mark.parametrize("count", [0, 33])
def test_how_many_may_be_drafted(count):
    with pytest.raises(ParameterError, match=f"num_draft_tokens={count} is not allowed: 1 to 32"):
        Speculation([], num_draft_tokens=count)
