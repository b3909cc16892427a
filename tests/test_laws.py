"""The laws: what batching, order, groups and neighbours may never change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    VOCAB_SIZE,
    assert_same,
    assert_scored,
    make_engine,
    naive_prompt_logprobs,
    naive_sample,
    request,
    run,
    tiny_model,
)
from tiny_architectures import tiny_architecture

from runner.types import Request

MODEL = tiny_model()
WINDOWED = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=6, seed=3)
HYBRID = tiny_architecture("lfm2")

HEADER = [7, 31, 5, 64, 90, 12, 45, 3, 77, 21, 50, 8, 33, 60, 18, 41, 29, 84, 11, 70]
prompts = st.tuples(
    st.sampled_from([[], HEADER, HEADER[:17]]),
    st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=40),
).map(lambda parts: parts[0] + parts[1])
tokens = st.integers(0, VOCAB_SIZE - 1)
# Each alone and any of them together; most of the tokens stay possible.
logits_options = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.3, 2.0]),
        "presence_penalty": st.sampled_from([-1.5, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7, 2.0]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100, -2.5, 1.5, 4.0]), max_size=6),
        "min_tokens": st.integers(1, 14),
        "stop_token_ids": st.lists(tokens, max_size=12, unique=True),
        "bad_words_token_ids": st.lists(
            st.lists(st.integers(3, 30), min_size=1, max_size=3), max_size=20
        ),
        "allowed_token_ids": st.sampled_from([range(25, 97), [*range(0, 97, 2)]]),
    },
)
sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5]),
        "top_k": st.sampled_from([0, 1, 5, 70]),
        "min_p": st.sampled_from([0.0, 0.05, 0.3]),
        "max_tokens": st.integers(1, 14),
        "ignore_eos": st.booleans(),
        "n": st.sampled_from([1, 1, 2, 5]),
        "seed": st.integers(0, 3),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)
sampling = st.tuples(sampling, st.just({}) | logits_options).map(
    lambda parts: {
        **parts[0],
        **parts[1],
        "min_tokens": min(parts[1].get("min_tokens", 0), parts[0]["max_tokens"]),
    }
)
workloads = st.lists(st.tuples(prompts, sampling), min_size=1, max_size=7)
sizes = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 9),
        "prefill_step_size": st.sampled_from([1, 5, 64]),
        "prefix_cache_bytes": st.sampled_from([0, 20_000, 2**20]),
        "order": st.sampled_from(["offline", "fcfs"]),
    }
)


def as_requests(workload: list[tuple[list[int], dict]]) -> list[Request]:
    return [request(prompt, f"r{i}", **params) for i, (prompt, params) in enumerate(workload)]


@pytest.mark.parametrize(
    ("model", "options"),
    [(MODEL, {}), (WINDOWED, {}), (HYBRID, {}), (WINDOWED, {"max_kv_size": 9})],
    ids=["full", "sliding", "hybrid", "bounded"],
)
@settings(max_examples=25)
@given(workload=workloads, sizes=sizes)
def test_batched_equals_alone_by_a_naive_forward(model, options, workload, sizes):
    """Law 1, against an implementation that shares no code with the engine."""
    requests = as_requests(workload)
    done = run(make_engine(model, **sizes, **options), requests)
    assert len(done) == sum(r.params.n for r in requests)
    for r in requests:
        for index in range(r.params.n):
            assert_same(done[r.request_id, index], naive_sample(model, r, index, **options))


@settings(max_examples=25)
@given(workload=workloads, sizes=sizes, order=st.randoms(use_true_random=False))
def test_order_mates_and_batch_size_change_nothing(workload, sizes, order):
    """Law 2: the same rows shuffled, in a batch of another size, with mates left out."""
    requests = as_requests(workload)
    reference = run(make_engine(MODEL, max_batch_size=4), requests)
    fewer = [r for r in requests if order.random() < 0.7]
    order.shuffle(fewer)
    for key, completion in run(make_engine(MODEL, **sizes), fewer).items():
        assert_same(completion, reference[key])


@settings(max_examples=15)
@given(prompt=prompts, seed=st.integers(0, 2**31))
def test_same_seed_same_text_other_index_other_text(prompt, seed):
    """Law 3; 24 free draws at temperature 1.5 do not agree by chance."""
    params = {"temperature": 1.5, "max_tokens": 24, "ignore_eos": True, "seed": seed}
    first, again = (run(make_engine(MODEL), [request(prompt, n=3, **params)]) for _ in range(2))
    texts = [tuple(first["r", i].token_ids) for i in range(3)]
    assert texts == [tuple(again["r", i].token_ids) for i in range(3)]
    assert len(set(texts)) == 3
    other = run(make_engine(MODEL), [request(prompt, n=1, **(params | {"seed": seed + 1}))])
    assert tuple(other["r", 0].token_ids) not in texts


@pytest.mark.parametrize("model", [MODEL, WINDOWED, HYBRID], ids=["full", "sliding", "hybrid"])
@settings(max_examples=10)
@given(workload=workloads, sizes=sizes, again=sizes)
def test_what_was_sampled_is_what_is_scored_is_a_full_forward(model, workload, sizes, again):
    """Law 5: the row fed back, in other batches, by the engine and by one naive forward."""
    requests = as_requests(workload)
    sampled = run(make_engine(model, **sizes), requests)
    rows = {
        f"{one.request_id}/{index}": (
            request(
                [*one.prompt_token_ids, *sampled[one.request_id, index].token_ids],
                f"{one.request_id}/{index}",
                max_tokens=0,
                prompt_logprobs=0,
                logprobs_start=len(one.prompt_token_ids),
            ),
            sampled[one.request_id, index].raw_logprobs,
        )
        for one in requests
        for index in range(one.params.n)
    }
    scored = run(make_engine(model, **again), [row for row, _ in rows.values()])
    for name, (row, recorded) in rows.items():
        echoed = scored[name, 0].prompt_logprobs
        assert_scored(echoed, naive_prompt_logprobs(model, row))
        assert echoed is not None
        np.testing.assert_allclose(echoed.logprobs, recorded, atol=1e-4)


@settings(max_examples=15)
@given(prompt=prompts, n=st.integers(2, 9), sizes=sizes)
def test_group_with_shared_prefill_equals_separate_requests(prompt, n, sizes):
    """Law 7: n samples of one request, against a request per sample with its stream."""
    group = run(make_engine(MODEL, **sizes), [request(prompt, n=n, temperature=1.2)])
    for index in range(n):
        alone = naive_sample(MODEL, request(prompt, temperature=1.2), index)
        assert_same(group["r", index], alone)


@pytest.mark.parametrize("model", [MODEL, HYBRID], ids=["full", "hybrid"])
@settings(max_examples=15)
@given(workload=workloads, leaver=st.lists(st.integers(3, 96), min_size=1, max_size=60))
def test_a_row_that_leaves_leaves_no_trace(model, workload, leaver):
    """Law 9: rows that pass through a long row's old slot are as if it had never been there."""
    requests = as_requests(workload)
    engine = make_engine(model, max_batch_size=2)
    run(engine, [request(leaver, f"gone{i}", max_tokens=30, ignore_eos=True) for i in range(2)])
    used = run(engine, requests)
    for key, completion in run(make_engine(model, max_batch_size=2), requests).items():
        assert_same(used[key], completion)


@settings(max_examples=15)
@given(workload=workloads, when=st.integers(0, 12))
def test_an_aborted_request_leaves_the_others_alone(workload, when):
    """Law 9 for a row that is taken out while it runs."""
    requests = as_requests(workload)
    engine = make_engine(MODEL, max_batch_size=3)
    for r in [request([5, 6, 7], "aborted", n=4, max_tokens=30, ignore_eos=True), *requests]:
        engine.add(r)
    done = [completion for _ in range(when) for completion in engine.step()]
    engine.abort("aborted")
    while engine.has_unfinished:
        done += engine.step()
    aborted = [c for c in done if c.request_id == "aborted"]
    assert sorted(c.index for c in aborted) == [0, 1, 2, 3]
    assert all(c.finish_reason == "abort" for c in aborted)
    reference = run(make_engine(MODEL), requests)
    for c in done:
        if c.request_id != "aborted":
            assert_same(c, reference[c.request_id, c.index])
    assert len(done) == 4 + len(reference)
