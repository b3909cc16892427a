"""Embeddings are pooled hidden states of a full forward, however the prompt comes to be pooled."""

from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB_SIZE, assert_same, make_engine, naive_sample, request, run, tiny_model
from tiny_adapters import random_adapter
from tiny_architectures import tiny_architecture

from runner.engine import pooling
from runner.engine.hidden_states import Head
from runner.engine.pooling import PromptEmbeddings
from runner.errors import ModelError, PromptError, UnknownAdapterError
from runner.types import Completion, Request

MODEL = tiny_model()
WINDOWED = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=6, seed=3)
MODELS = {"full": MODEL, "sliding": WINDOWED, "hybrid": tiny_architecture("lfm2")}
HEADER = [7, 31, 5, 64, 90, 12, 45, 3, 77, 21, 50, 8, 33, 60, 18, 41, 29, 84, 11, 70]

asked = st.fixed_dictionaries(
    {
        "header": st.sampled_from([[], HEADER]),
        "tail": st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=40),
        "pooling": st.sampled_from(["mean", "mean", "last", "last", None]),
    }
)
limits = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 5),
        "prefill_step_size": st.sampled_from([1, 5, 64, 512]),
        "prefix_cache_bytes": st.sampled_from([0, 20_000, 2**20]),
        "order": st.sampled_from(["offline", "fcfs"]),
    }
)


def pooled(prompt, request_id="r", pooling="mean", **options) -> Request:
    return request(prompt, request_id, pooling=pooling, **options)


def naive_embedding(model: nn.Module, r: Request) -> np.ndarray:
    """By one full forward of what mlx-lm's models call `model`, without a batch and its caches."""
    states = np.array(model.model(mx.array([list(r.prompt_token_ids)])).astype(mx.float32))[0]
    exact = states.astype(np.float64)
    return exact.mean(0) if r.pooling == "mean" else exact[-1]


def assert_embedded(done: Completion, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert (done.token_ids, done.finish_reason, done.error) == ([], "length", None)
    assert done.embedding is not None and len(done.embedding) == len(expected)
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(done.embedding, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=25)
@given(workload=st.lists(asked, min_size=1, max_size=6), limits=limits)
def test_embeddings_equal_a_full_forward(model, workload, limits):
    """Whatever the chunks, the mates, the order and the cache, also beside rows that sample."""
    requests = [
        request(one["header"] + one["tail"], f"r{i}", pooling=one["pooling"], max_tokens=3)
        for i, one in enumerate(workload)
    ]
    engine = make_engine(model, **limits)
    for rows in (requests, requests[::-1]):
        done = run(engine, rows)
        assert len(done) == len(rows)
        for r in rows:
            if r.pooling is None:
                assert done[r.request_id, 0].embedding is None
                assert_same(done[r.request_id, 0], naive_sample(model, r, 0))
            else:
                assert_embedded(done[r.request_id, 0], naive_embedding(model, r))
    assert not engine.has_unfinished


def test_a_model_without_a_linear_head_is_refused_with_the_reason():
    model = tiny_model(tie_word_embeddings=False)
    weight = model.lm_head.weight
    model.lm_head = lambda states: states @ weight.T
    engine = make_engine(model)
    with pytest.raises(ModelError, match="gives no embeddings: its projection onto"):
        engine.add(pooled([5, 6]))
    assert not engine.has_unfinished
    assert run(engine, [request([5, 6])])["r", 0].finish_reason in ("stop", "length")


def test_what_is_watched_is_itself_again_after_a_forward_that_fails():
    head = Head(MODEL, VOCAB_SIZE)
    kind = type(head.module)
    with pytest.raises(ValueError, match="no"), head.watched():
        raise ValueError("no")
    assert type(head.module) is kind
    assert not [name for part in MODEL.modules() for name in vars(part) if "seen" in name]


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_several_adapters_are_embedded_as_the_merged_models_do(order):
    made = {name: random_adapter(MODEL, seed) for seed, name in enumerate("ab")}
    engine = make_engine(MODEL)
    for name, (weights, _) in made.items():
        engine.load_adapter(name, weights)
    requests = [
        pooled([*HEADER[i:], 5], f"r{i}", "mean" if i % 2 else "last", adapter=name)
        for i, name in enumerate(["a", None, "b", "a", "b", None])
    ]
    done = run(engine, requests[::order])
    for r in requests:
        model = made[r.adapter][1] if r.adapter else MODEL
        assert_embedded(done[r.request_id, 0], naive_embedding(model, r), 1e-4)
        assert done[r.request_id, 0].adapter == r.adapter
        assert (done[r.request_id, 0].adapter_digest is None) == (r.adapter is None)
    with pytest.raises(UnknownAdapterError):
        engine.add(pooled([5], adapter="other"))


def test_a_kept_prompt_serves_the_last_token_and_never_the_mean():
    prompt = HEADER * 3
    for how, forwarded in (("last", 60 - 59), ("mean", 60)):
        engine = make_engine(MODEL)
        run(engine, [request(prompt, max_tokens=1)])
        before = engine.stats.num_prefill_tokens
        r = pooled(prompt, pooling=how)
        assert_embedded(run(engine, [r])["r", 0], naive_embedding(MODEL, r))
        assert engine.stats.num_prefill_tokens - before == forwarded
        assert engine.stats.num_embedded_tokens == 60


def test_the_bits_do_not_depend_on_chunks_and_mates():
    """Of the sums by themselves, over the same states cut in many ways."""
    prompt, found = (HEADER * 5)[:90], set()
    whole = mx.array(np.random.default_rng(0).normal(size=(2, 90, 8)).astype(np.float32))
    for cut in (1, 7, 32, 90):
        sums = PromptEmbeddings([pooled(prompt), pooled(prompt[:31], "s")])
        for start in range(0, 90, cut):
            sums.push(whole[:, start : start + cut], start)
        found.add((tuple(sums.read(0)), tuple(sums.read(1))))
    assert len(found) == 1
    exact = np.array(whole).astype(np.float64)[1, :31].mean(0)
    np.testing.assert_array_equal(np.float32(exact), np.array(sums.read(1), np.float32))


@pytest.mark.parametrize("how", ["mean", "last"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["host", "device"])
def test_pads_add_nothing_even_where_they_hold_no_number(how, on_cpu):
    states = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    states[1, 3:] = np.nan
    with mock.patch.object(pooling, "on_cpu", lambda: on_cpu):
        sums = PromptEmbeddings([pooled([5] * 6, "a", how), pooled([5] * 3, "b", how)])
        for start in (0, 2, 4):
            mx.eval(sums.push(mx.array(states[:, start : start + 2]), start))
    for row, length in enumerate((6, 3)):
        expected = states[row, :length].mean(0) if how == "mean" else states[row, length - 1]
        np.testing.assert_allclose(sums.read(row), expected, atol=1e-6)


def test_half_precision_is_added_up_in_float32():
    states = mx.array(np.full((1, 3000, 2), [1.0, 1e-3])).astype(mx.float16)
    exact = np.array(states.astype(mx.float32))[0, 0]
    for on_cpu in (True, False):
        with mock.patch.object(pooling, "on_cpu", lambda on_cpu=on_cpu: on_cpu):
            sums = PromptEmbeddings([pooled([5] * 3000)])
            for start in range(0, 3000, 500):
                sums.push(states[:, start : start + 500], start)
            np.testing.assert_allclose(sums.read(0), exact, rtol=1e-5)


def test_embeddings_need_no_row_and_make_no_logits():
    """They neither wait for a row nor hold one up, and nothing is projected onto the vocabulary."""
    engine = make_engine(MODEL, max_batch_size=1, prefill_step_size=8)
    engine.add(request([5, 6, 7], "sampled", max_tokens=40, ignore_eos=True))
    for i in range(6):
        engine.add(pooled(HEADER[i:], f"embedded{i}"))
    order = []
    while engine.has_unfinished:
        order += [completion.request_id for completion in engine.step()]
    assert len(order) == 7 and order.index("sampled") > 0
    wide = tiny_model(vocab_size=60_000)
    rows = [pooled((HEADER * 12)[i:230], f"r{i}") for i in range(8)]
    engine = make_engine(wide)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    done = run(engine, rows)
    assert mx.get_peak_memory() - before < 8 * 230 * 60_000 * 4 / 10, "logits would be 440 MB"
    assert_embedded(done["r0", 0], naive_embedding(wide, rows[0]))


@pytest.mark.parametrize("num_steps", range(4))
def test_aborting_while_a_prompt_is_embedded_leaves_the_others_alone(num_steps):
    engine = make_engine(MODEL, prefill_step_size=16)
    gone, left = pooled(HEADER * 2, "gone"), pooled(HEADER[:9], "left")
    engine.add(gone)
    engine.add(left)
    done = [completion for _ in range(num_steps) for completion in engine.step()]
    engine.abort("gone")
    while engine.has_unfinished:
        done += engine.step()
    by_id = {c.request_id: c for c in done}
    assert sorted(by_id) == ["gone", "left"] and len(done) == 2
    assert_embedded(by_id["left"], naive_embedding(MODEL, left))
    assert by_id["gone"].finish_reason in ("abort", "length")
    assert num_steps > 1 or by_id["gone"].finish_reason == "abort"


def test_a_prompt_that_fills_the_context_is_embedded_and_a_longer_one_is_not():
    engine = make_engine(MODEL, max_model_len=40)
    full = pooled((HEADER * 2)[:40])
    assert_embedded(run(engine, [full])["r", 0], naive_embedding(MODEL, full))
    for prompt, what in (([*full.prompt_token_ids, 5], "41 tokens"), ([], "no tokens")):
        with pytest.raises(PromptError, match=what):
            engine.add(pooled(prompt))


def test_states_that_are_no_numbers_are_an_error_and_spare_the_next():
    poisoned = tiny_model()
    poisoned.model.embed_tokens.weight[90] = mx.nan
    good = pooled([5, 6, 7, 8], "good")
    done = run(make_engine(poisoned), [pooled([5, 90, 7], "bad"), good])
    bad = done["bad", 0]
    assert bad.finish_reason == "error" and bad.error.type == "ModelOutputError"
    assert_embedded(done["good", 0], naive_embedding(poisoned, good))


def test_memory_that_runs_out_halves_the_batch_and_every_prompt_is_embedded():
    rows = [pooled(HEADER[i:], f"r{i}", pooling="mean" if i % 2 else "last") for i in range(8)]
    engine, failures = make_engine(MODEL), [RuntimeError("[malloc] Unable to allocate 1 bytes.")]
    push = PromptEmbeddings.push

    def failing(self, states, column):
        if failures:
            raise failures.pop()
        return push(self, states, column)

    with (
        mock.patch.object(PromptEmbeddings, "push", failing),
        pytest.warns(UserWarning, match="memory ran out"),
    ):
        done = run(engine, rows)
    assert len(done) == 8
    for r in rows:
        assert_embedded(done[r.request_id, 0], naive_embedding(MODEL, r))
