"""Adapters swapped while rows run: which weights gave which token, and no stale prefix."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny import assert_same, make_engine, naive_sample, request, run, tiny_model
from tiny_adapters import ATTENTION, random_adapter

from runner.errors import AdapterError, UnknownAdapterError
from runner.types import WeightSpan

MODEL = tiny_model()
ADAPTERS = [random_adapter(MODEL, seed, rank=2 + seed % 3) for seed in range(21)]
HEADER = list(range(20, 60))


def in_flight(num_rows, **params):
    return [
        request(
            [*HEADER[: 17 * (i % 3)], 5 + i, 9],
            f"r{i}",
            adapter="policy",
            **({"max_tokens": 6 + i % 7, "temperature": 1.0, "ignore_eos": True} | params),
        )
        for i in range(num_rows)
    ]


def swapped_under_load(mode, num_rows=64):
    """Runs rows while the adapter is swapped 20 times; the model of each version."""
    engine = make_engine(MODEL, max_batch_size=16, prefill_step_size=48)
    models = {engine.load_adapter("policy", ADAPTERS[0][0]): ADAPTERS[0][1]}
    for r in in_flight(num_rows):
        engine.add(r)
    done, swaps = {}, iter(ADAPTERS[1:])
    num_steps = 0
    while engine.has_unfinished:
        done |= {c.request_id: c for c in engine.step()}
        num_steps += 1
        weights, model = next(swaps, (None, None)) if num_steps % 2 else (None, None)
        if weights is not None:
            models[engine.load_adapter("policy", weights, mode=mode)] = model
    assert len(models) == 21 and len(done) == num_rows
    return done, models


def logprobs_of(r, completion, models):
    """Each token's logprob under the version that it claims; what is cached of it stays."""
    (first, *_) = completion.weight_versions
    cache = make_prompt_cache(MODEL)
    prompt = mx.array([r.prompt_token_ids[:-1]])
    models[first.version](prompt, cache=cache)
    ids = [r.prompt_token_ids[-1], *completion.token_ids]
    found = []
    for span in completion.weight_versions:
        for place in range(span.start, span.end):
            logits = models[span.version](mx.array([[ids[place]]]), cache=cache)[0, -1]
            found.append(float(logits[ids[place + 1]] - mx.logsumexp(logits)))
    return found


def assert_spans_cover(completion):
    spans = completion.weight_versions
    assert spans[0].start == 0 and spans[-1].end == len(completion.token_ids)
    assert all(one.end == other.start for one, other in zip(spans, spans[1:], strict=False))
    assert [it.version for it in spans] == sorted({it.version for it in spans})


def test_swapped_under_load_every_token_is_of_the_version_it_claims():
    """In-flight rows keep the content they began with."""
    done, models = swapped_under_load("keep")
    assert len({c.weight_versions[0].version for c in done.values()}) > 5
    for r in in_flight(64):
        completion = done[r.request_id]
        (span,) = completion.weight_versions
        assert span == WeightSpan(span.version, 0, len(completion.token_ids))
        assert_same(completion, naive_sample(models[span.version], r, 0))


def test_rows_that_go_on_under_the_new_content_say_where():
    done, models = swapped_under_load("update")
    assert max(len(c.weight_versions) for c in done.values()) > 3
    for r in in_flight(64):
        completion = done[r.request_id]
        assert_spans_cover(completion)
        found = logprobs_of(r, completion, models)
        np.testing.assert_allclose(found, completion.raw_logprobs, atol=1e-4)


def test_the_same_content_again_changes_nothing():
    engine = make_engine(MODEL)
    versions = [engine.load_adapter("policy", ADAPTERS[0][0]) for _ in range(2)]
    assert versions == [1, 1] and engine.adapters.weight_version == 1
    again, _ = random_adapter(MODEL, 0, rank=2)
    assert engine.load_adapter("policy", again) == 1
    assert engine.load_adapter("policy", ADAPTERS[1][0]) == 2


@pytest.mark.parametrize("mode", ["keep", "update"])
def test_the_same_name_never_meets_a_stale_prefix(mode):
    """The prompt is in the prefix cache under the old content of the same name."""
    engine = make_engine(MODEL)
    r = request([*HEADER, 7], "r", adapter="policy", ignore_eos=True)
    for weights, model in ADAPTERS[:3]:
        engine.load_adapter("policy", weights, mode=mode)
        engine.stats.num_cached_tokens = 0
        assert_same(run(engine, [r])["r", 0], naive_sample(model, r, 0))
        assert engine.stats.num_cached_tokens == 0
        assert_same(run(engine, [r])["r", 0], naive_sample(model, r, 0))
        assert engine.stats.num_cached_tokens > 0
    plain = request([*HEADER, 7], "r", ignore_eos=True)
    assert_same(run(engine, [plain])["r", 0], naive_sample(MODEL, plain, 0))


def test_a_failed_load_leaves_the_old_content_serving():
    engine = make_engine(MODEL)
    engine.load_adapter("policy", ADAPTERS[0][0])
    other, _ = random_adapter(tiny_model(hidden_size=64), 0, keys=ATTENTION)
    r = request([7, 31, 5], "r", adapter="policy", ignore_eos=True)
    engine.add(r)
    engine.step()
    with pytest.raises(AdapterError, match="has the shape"):
        engine.load_adapter("policy", other, mode="update")
    done = {c.request_id: c for _ in range(30) for c in engine.step()}
    assert_same(done["r"], naive_sample(ADAPTERS[0][1], r, 0))
    assert engine.adapters.weight_version == 1
    assert done["r"].adapter_digest == ADAPTERS[0][0].digest


def test_rows_end_with_an_adapter_that_is_unloaded_and_what_waits_fails():
    engine = make_engine(MODEL, max_batch_size=2)
    engine.load_adapter("policy", ADAPTERS[0][0])
    asked = in_flight(5, n=2, max_tokens=9)
    for r in asked:
        engine.add(r)
    done = engine.step() + engine.step() + engine.step()
    engine.unload_adapter("policy")
    with pytest.raises(UnknownAdapterError):
        engine.unload_adapter("policy")
    while engine.has_unfinished:
        done += engine.step()
    ended = {(c.request_id, c.index): c for c in done}
    assert len(done) == len(ended) == 10
    whole = [c for c in done if c.error is None]
    assert 2 <= len(whole) <= 4
    for c in whole:
        (r,) = [it for it in asked if it.request_id == c.request_id]
        assert_same(c, naive_sample(ADAPTERS[0][1], r, c.index))
    errors = {c.error.type for c in done if c.error is not None}
    assert errors == {"UnknownAdapterError"}


def test_a_thousand_swaps_leave_no_memory_behind():
    engine = make_engine(MODEL, max_batch_size=4)
    two = [ADAPTERS[1][0], ADAPTERS[4][0]]
    engine.load_adapter("other", ADAPTERS[7][0])

    def swaps(count):
        for number in range(count):
            engine.load_adapter("policy", two[number % 2])
            if number % 100 == 0:
                run(engine, [*in_flight(3, max_tokens=2), request([5], "o", adapter="other")])
                engine.clear_prefix_cache()
        gc.collect()
        mx.synchronize()
        return mx.get_active_memory()

    before = swaps(200)
    assert swaps(1000) <= before + 2**16
