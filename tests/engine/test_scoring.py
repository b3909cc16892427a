"""Law 5: a prompt's logprobs are those of a full forward, however the prompt comes to be scored."""

import math
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import HEADER, HYBRID, MODEL, WINDOWED
from tiny import (
    VOCAB_SIZE,
    assert_same,
    assert_scored,
    make_engine,
    naive_prompt_logprobs,
    request,
    run,
    tiny_model,
)

from runner.engine import scoring
from runner.engine.engine import Engine
from runner.engine.scoring import max_scored_positions, score_tokens
from runner.errors import ParameterError, PromptError
from runner.types import Request, SamplingParams

MODELS = {"full": MODEL, "sliding": WINDOWED, "hybrid": HYBRID}

asked = st.fixed_dictionaries(
    {
        "header": st.sampled_from([[], HEADER, HEADER[:18]]),
        "tail": st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=40),
        "context": st.sampled_from([0.0, 0.0, 0.5, 0.9, 1.0]),
        "prompt_logprobs": st.sampled_from([None, 0, 0, 1, 4]),
        "max_tokens": st.sampled_from([0, 0, 3]),
        "prompt_entropy": st.booleans(),
        "n": st.sampled_from([1, 3]),
    }
)
limits = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 5),
        "prefill_step_size": st.sampled_from([1, 5, 64, 512]),
        "prefix_cache_bytes": st.sampled_from([0, 20_000, 2**20]),
    }
)
bounds = st.sampled_from([1, 7 * 4 * VOCAB_SIZE, 2**26])


def as_request(index: int, asked: dict) -> Request:
    prompt = asked["header"] + asked["tail"]
    scored = asked["prompt_logprobs"] is not None
    most = asked["max_tokens"] if scored else 3
    return request(
        prompt,
        f"r{index}",
        prompt_logprobs=asked["prompt_logprobs"],
        max_tokens=most,
        n=asked["n"] if most else 1,
        ignore_eos=True,
        logprobs_start=1 + int(asked["context"] * (len(prompt) - 1)),
        prompt_entropy=asked["prompt_entropy"] and scored,
    )


def only_scored(prompt, request_id="r", **options) -> Request:
    return request(prompt, request_id, **({"max_tokens": 0, "prompt_logprobs": 0} | options))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=25)
@given(workload=st.lists(asked, min_size=1, max_size=6), limits=limits, bound=bounds)
def test_prompt_logprobs_equal_a_full_forward(model, workload, limits, bound):
    """Whatever the chunks, the mates, the cache and where the logprobs start."""
    requests = [as_request(index, one) for index, one in enumerate(workload)]
    with mock.patch.object(scoring, "MAX_LOGITS_BYTES", bound):
        engine = make_engine(model, **limits)
        rounds = [run(engine, requests), run(engine, requests[::-1])]
    plain = run(make_engine(model), [r for r in requests if r.needs_row])
    for done in rounds:
        assert len(done) == sum(r.params.n for r in requests)
        for r in requests:
            for index in range(r.params.n):
                completion = done[r.request_id, index]
                if r.is_scored:
                    expected = naive_prompt_logprobs(model, r)
                    assert_scored(completion.prompt_logprobs, expected)
                else:
                    assert completion.prompt_logprobs is None
                if r.needs_row:
                    assert_same(completion, plain[r.request_id, index])
                else:
                    assert (completion.token_ids, completion.finish_reason) == ([], "length")
    assert not engine.has_unfinished


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_was_sampled_scores_as_it_was_sampled(model):
    """The raw logprobs recorded while sampling, at any temperature, against the row fed back."""
    options = [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0}, {"logit_bias": {5: 3}}]
    requests = [
        request(HEADER[:size], f"r{size}", n=2 * ("temperature" not in o) or 1, max_tokens=30, **o)
        for size, o in zip((1, 7, 12, 20), options, strict=True)
    ]
    engine = make_engine(model)
    done = run(engine, requests)
    prompts = {r.request_id: list(r.prompt_token_ids) for r in requests}
    rows = [
        only_scored(
            prompts[name] + c.token_ids, f"{name}/{i}", logprobs_start=len(prompts[name]), n=1
        )
        for (name, i), c in done.items()
    ]
    scored = run(engine, rows)
    assert len(scored) == 6
    for (name, index), completion in done.items():
        echoed = scored[f"{name}/{index}", 0].prompt_logprobs
        np.testing.assert_allclose(echoed.logprobs, completion.raw_logprobs, atol=1e-4)


@pytest.mark.usefixtures("everywhere")
def test_the_numbers_are_the_definitions_worked_out_by_hand():
    """Three tokens of probabilities 1/2, 3/8 and 1/8, beside a shift that has to cancel out."""
    logits = mx.log(mx.array([[[0.5, 0.375, 0.125]] * 2])) + mx.array([[[80.0], [-80.0]]])
    scores = score_tokens(logits, mx.array([[2, 1]]), num_top=2, entropy=True)
    np.testing.assert_allclose(scores.logprobs, [[math.log(1 / 8), math.log(3 / 8)]], atol=1e-5)
    assert np.array(scores.ranks).tolist() == [[3, 2]]
    assert np.array(scores.top_token_ids).tolist() == [[[0, 1], [0, 1]]]
    top = [math.log(1 / 2), math.log(3 / 8)]
    np.testing.assert_allclose(scores.top_logprobs, [[top, top]], atol=1e-5)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.375, 0.125))
    np.testing.assert_allclose(scores.entropies, [[entropy, entropy]], atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_half_precision_is_summed_in_float32_and_the_impossible_adds_no_entropy():
    random = np.random.default_rng(0).normal(size=(1, 3, 4000)).astype(np.float32)
    half = mx.array(random).astype(mx.float16)
    scores = score_tokens(half, mx.array([[0, 1, 2]]))
    exact = np.array(half).astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(scores.logprobs[0], [expected[0, i, i] for i in range(3)], atol=1e-5)
    assert scores.logprobs.dtype == mx.float32 and scores.top_token_ids.shape == (1, 3, 0)
    masked = mx.array([[[0.0, -math.inf, 0.0]]])
    scores = score_tokens(masked, mx.array([[1]]), num_top=9, entropy=True)
    np.testing.assert_allclose(scores.entropies, [[math.log(2)]], atol=1e-6)
    assert scores.logprobs.item() == -math.inf and scores.ranks.item() == 3
    assert scores.top_token_ids.shape == (1, 1, 3), "no more than the vocabulary"


@pytest.fixture(params=[True, False], ids=["host", "device"])
def everywhere(request, monkeypatch):
    """By NumPy, and by what runs on a device."""
    monkeypatch.setattr(scoring, "on_cpu", lambda: request.param)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("vocab_size", [255, 256, 257, 50_000])
def test_sums_over_a_vocabulary_lose_nothing_and_skip_the_impossible(vocab_size):
    """Added up in order in float32, 50 000 terms would be off by some 5e-5, all to one side."""
    random = np.random.default_rng(1).normal(scale=3, size=(2, 4, vocab_size)).astype(np.float32)
    random[1, :, : vocab_size // 2] = -np.inf
    exact = random.astype(np.float64) - random.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    last = mx.full((2, 4), vocab_size - 1)
    scores = score_tokens(mx.array(random), last, entropy=True)
    np.testing.assert_allclose(scores.logprobs, exact[..., -1], atol=5e-6)
    terms = np.where(np.isfinite(exact), np.exp(exact) * np.maximum(exact, -1e9), 0)
    np.testing.assert_allclose(scores.entropies, -terms.sum(-1), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 5, "prompt_entropy": True}], ids=str)
def test_the_logits_in_memory_are_bounded_whatever_the_prompts(options):
    """A full forward would hold 4 x 1500 x 9000 floats, 216 MB; here a chunk is 4 MiB of them.

    In proportion: four chunks of logits and the keys and values of two prompts, beside the weights.
    """
    model = tiny_model(vocab_size=9000)
    random = np.random.default_rng(0)
    rows = [
        only_scored(random.integers(3, 9000, size).tolist(), f"{i}", **options)
        for i, size in enumerate((1500, 1400, 1500, 40, 30, 30, 20))
    ]
    shapes = []

    def recorded(logits: mx.array, *arguments, **options):
        shapes.append(logits.shape)
        return score_tokens(logits, *arguments, **options)

    with (
        mock.patch.object(scoring, "MAX_LOGITS_BYTES", 2**22),
        mock.patch.object(scoring, "score_tokens", recorded),
    ):
        engine = make_engine(model, max_model_len=None)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        done = run(engine, rows)
        peak = mx.get_peak_memory() - before
    assert len(done) == len(rows) and sum(n * p for n, p, _ in shapes) >= 4500
    assert max(4 * math.prod(shape) for shape in shapes) <= 2**22
    assert any(n > 1 for n, _, _ in shapes), "short prompts are scored together"
    assert peak < 2**24, f"{peak / 2**20:.0f} MiB"


def test_a_chunk_has_at_least_a_position_and_at_most_the_bytes_that_are_stated():
    assert max_scored_positions(49152) * 49152 * 4 <= scoring.MAX_LOGITS_BYTES == 2**26
    assert max_scored_positions(2**30) == 1


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**24])
def test_a_context_is_forwarded_once_for_all_its_continuations(model, prefix_cache_bytes):
    context = (HEADER * 4)[:70]
    continuations = [[3, 9], [4], [9, 9, 9], [10, 3]]
    engine = make_engine(model, prefix_cache_bytes=prefix_cache_bytes)
    requests = [
        only_scored(context + more, f"{i}", logprobs_start=70)
        for i, more in enumerate(continuations)
    ]
    done = run(engine, requests)
    for r in requests:
        assert_scored(done[r.request_id, 0].prompt_logprobs, naive_prompt_logprobs(model, r))
    # 69 of the context alone; its last token and the continuations, padded, four times.
    assert engine.stats.num_prefill_tokens <= 69 + 4 * 3
    assert engine.stats.num_cached_tokens == 3 * 69
    assert engine.stats.num_scored_tokens == 8
    if prefix_cache_bytes:
        more = only_scored([*context, 5, 6], "later", logprobs_start=70)
        before = engine.stats.num_prefill_tokens
        scored = run(engine, [more])["later", 0].prompt_logprobs
        assert_scored(scored, naive_prompt_logprobs(model, more))
        assert engine.stats.num_prefill_tokens - before == 2


def test_continuations_too_many_for_one_prefill_still_share_their_context():
    """The context goes into the prefix cache by itself, so that the next prefill finds it."""
    engine = make_engine(HYBRID, prefill_step_size=64)
    requests = [only_scored([*HEADER, 3 + i, 4], f"{i}", logprobs_start=20) for i in range(9)]
    run(engine, requests)
    assert engine.stats.num_prefill_tokens <= 19 + 9 * 2


def test_sampling_goes_on_while_prompts_are_scored_and_takes_all_its_rows():
    """Requests that need no row neither wait for one nor hold up those that have one."""
    engine = make_engine(MODEL, max_batch_size=2, prefill_step_size=8)
    for i in range(2):
        engine.add(request([5, 6, 7 + i], f"sampled{i}", max_tokens=8, ignore_eos=True))
    for i in range(12):
        engine.add(only_scored(HEADER * 2, f"scored{i}"))
    order = []
    while engine.has_unfinished:
        order += [completion.request_id for completion in engine.step()]
    assert len(order) == 14
    last = max(order.index("sampled0"), order.index("sampled1"))
    assert 0 < last < 8, "some were scored beside the full batch, and most came after"


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_aborting_while_a_prompt_is_scored_leaves_the_others_alone(num_steps, max_tokens):
    engine = make_engine(MODEL, prefill_step_size=16, max_batch_size=2)
    engine.add(only_scored(HEADER * 2, "gone", max_tokens=max_tokens))
    others = [only_scored(HEADER[:9], "left"), request(HEADER[:4], "sampled", max_tokens=5)]
    for other in others:
        engine.add(other)
    done = [completion for _ in range(num_steps) for completion in engine.step()]
    engine.abort("gone")
    while engine.has_unfinished:
        done += engine.step()
    assert sorted(c.request_id for c in done) == ["gone", "left", "sampled"]
    by_id = {c.request_id: c for c in done}
    assert by_id["gone"].finish_reason in ("abort", "length")
    assert num_steps > 3 or by_id["gone"].finish_reason == "abort"
    assert_scored(by_id["left"].prompt_logprobs, naive_prompt_logprobs(MODEL, others[0]))
    assert_same(by_id["sampled"], run(make_engine(MODEL), [others[1]])["sampled", 0])


def test_a_prompt_of_one_token_has_nothing_to_score():
    for most in (0, 2):
        done = run(make_engine(MODEL), [only_scored([5], max_tokens=most, prompt_entropy=True)])
        scored = done["r", 0].prompt_logprobs
        assert (scored.with_nulls(), scored.ranks, scored.entropies) == ([None], [], [])
        assert len(done["r", 0].token_ids) == most


def test_a_prompt_that_fills_the_context_can_be_scored_and_a_longer_one_cannot():
    engine = make_engine(MODEL, max_model_len=40)
    full = (HEADER * 2)[:40]
    assert len(run(engine, [only_scored(full)])["r", 0].prompt_logprobs.logprobs) == 39
    with pytest.raises(PromptError, match="41 tokens"):
        engine.add(only_scored([*full, 5]))
    with pytest.raises(PromptError, match="40 tokens"):
        engine.add(only_scored(full, max_tokens=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 is not allowed: .* beside prompt_logprobs"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "n=2 is not allowed: .*max_tokens=0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is not allowed: between 0 and 100"),
        ({"prompt_logprobs": 101}, "prompt_logprobs=101"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        SamplingParams(**options)


def test_a_prompt_whose_logprobs_are_no_numbers_is_an_error_and_spares_the_next():
    poisoned = tiny_model()
    poisoned.model.embed_tokens.weight[90] = mx.nan
    poisoned.args.tie_word_embeddings = False
    poisoned.lm_head = MODEL.model.embed_tokens.as_linear
    engine: Engine = make_engine(poisoned)
    good = only_scored([5, 6, 7, 8], "good")
    done = run(engine, [only_scored([5, 90, 7], "bad"), good])
    assert done["bad", 0].finish_reason == "error"
    assert done["good", 0].finish_reason == "length"
    assert_scored(done["good", 0].prompt_logprobs, naive_prompt_logprobs(poisoned, good))


def test_a_prompt_is_projected_onto_the_vocabulary_only_where_it_is_scored():
    """Logits that nobody reads are never computed, also beside a context or a sampled row."""
    shapes = []

    def recorded(logits: mx.array, *arguments, **options):
        shapes.append(logits.shape[:2])
        return score_tokens(logits, *arguments, **options)

    with mock.patch.object(scoring, "score_tokens", recorded):
        rows = [
            request(HEADER, "sampled", max_tokens=2),
            only_scored([*HEADER[::-1], 5, 6, 7], "scored", logprobs_start=20),
        ]
        run(make_engine(MODEL, prefill_step_size=7), rows)
    assert shapes == [(1, 3)]
