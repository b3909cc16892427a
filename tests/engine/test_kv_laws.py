"""The laws with rounded keys and values and with bounded rows, against one naive forward a row."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from naive_cache import errors
from tiny import assert_same, make_engine, request, run, tiny_model
from tiny_architectures import tiny_architecture

from runner import LLM, SamplingParams
from runner.types import Request

WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6, "seed": 3}
MODELS = {
    "full": tiny_model(head_dim=32),
    "sliding": tiny_model(head_dim=32, **WINDOWS),
    "sinks": tiny_architecture("gpt_oss", head_dim=32),
    "latent": tiny_architecture("deepseek_v3", kv_lora_rank=32, qk_rope_head_dim=32),
    "hybrid": tiny_architecture("granitemoehybrid", hidden_size=128),
    "list": tiny_architecture("falcon_h1", head_dim=32),
    "shared": tiny_architecture("gemma3n", text_config={"head_dim": 32}),
    "grouped": tiny_architecture("gemma2", head_dim=32),
}
EDGES = 0.8
"""Share of completions that agree within rounding; some keys lie on an edge between two steps."""


def requests(seed: int = 0, count: int = 12, longest: int = 60) -> list[Request]:
    """Prompts of mixed lengths, half of which begin alike; every other one has a group."""
    random = np.random.default_rng(seed)
    header = random.integers(3, 97, 24).tolist()
    made = []
    for i in range(count):
        own = random.integers(3, 97, int(random.integers(1, longest))).tolist()
        prompt = header + own if i % 4 < 2 else own
        made.append(request(prompt, f"r{i}", n=1 + 2 * (i % 2), max_tokens=10, ignore_eos=True))
    return made


def bits(bits: int, start: int = 0, **options: Any) -> dict[str, Any]:
    return {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start, **options}


def check(model: nn.Module, rows: list[Request], share: float, **options: Any) -> None:
    """Laws 1, 2, 7 and 9 with chunks, batches and orders of two kinds."""
    for sizes, order in (((3, 5), 1), ((8, 64), -1)):
        max_batch_size, prefill_step_size = sizes
        engine = make_engine(
            model, max_batch_size=max_batch_size, prefill_step_size=prefill_step_size, **options
        )
        done = run(engine, rows[::order])
        assert (errors(model, rows, done, **options) < 3e-4).mean() >= share
    # Not what the plain model gives: the options do something.
    assert (errors(model, rows, done) > 3e-3).mean() > 0.5


@pytest.mark.parametrize("start", [0, 10, 40])
@pytest.mark.parametrize("model", ["full", "sliding"])
@pytest.mark.parametrize("width", [2, 4])
def test_quantised_rows_equal_a_forward_that_rounds_every_token_once(model, width, start):
    check(MODELS[model], requests(), EDGES, **bits(width, start))


@pytest.mark.parametrize("model", ["sinks", "latent", "hybrid", "list", "shared", "grouped"])
def test_quantised_rows_of_other_architectures(model):
    # Of few rows, a few that meet an edge are a larger share.
    check(MODELS[model], requests(count=10), EDGES - 0.2, **bits(2, 3))


@pytest.mark.parametrize("size", [5, 12, 40])
@pytest.mark.parametrize("model", ["full", "sliding"])
def test_bounded_rows_equal_a_forward_that_masks_the_rest(model, size):
    check(MODELS[model], requests(), 1.0, max_kv_size=size)


@pytest.mark.parametrize("model", ["sinks", "latent", "hybrid", "list", "shared"])
def test_bounded_rows_of_other_architectures(model):
    check(MODELS[model], requests(count=5), 1.0, max_kv_size=7)


@pytest.mark.parametrize("start", [0, 2, 4, 9, 300])
def test_both_together(start):
    check(MODELS["full"], requests(), EDGES, **bits(2, start, max_kv_size=12))


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
def test_more_bits_come_closer(width):
    model, rows = MODELS["full"], requests(count=6)
    done = run(make_engine(model, **bits(width)), rows)
    error = np.median(errors(model, rows, done))
    # Every further bit halves a step; at 2 bits a step is a third of what a group spans.
    assert 0.2 * 2.0**-width < error < 20 * 2.0**-width


@pytest.mark.parametrize("options", [bits(2), bits(2, 30), {"max_kv_size": 8}])
def test_a_prompt_from_the_prefix_cache_is_the_same(options):
    rows = requests()
    engine = make_engine(MODELS["full"], max_batch_size=4, **options)
    run(engine, rows)
    before = engine.stats.num_cached_tokens
    done = run(engine, rows)
    assert engine.stats.num_cached_tokens > before
    found = errors(MODELS["full"], rows, done, **options)
    assert (found < 3e-4).mean() >= (EDGES if "kv_bits" in options else 1.0)


def test_a_bound_that_no_row_reaches_changes_nothing():
    rows = requests()
    plain, bounded = (
        run(make_engine(MODELS["full"], **options), rows) for options in ({}, {"max_kv_size": 94})
    )
    assert max(len(r.prompt_token_ids) for r in rows) + 10 <= 94
    for key, completion in plain.items():
        assert_same(bounded[key], completion)


@pytest.mark.parametrize("options", [bits(2), bits(2, 3), bits(4, 0, max_kv_size=9)])
def test_a_row_that_broke_leaves_no_trace(options):
    """A NaN in a freed slot would spread to its next row."""
    model = tiny_model(head_dim=32, tie_word_embeddings=False)
    model.model.embed_tokens.weight[50] = mx.nan
    engine = make_engine(model, max_batch_size=2, **options)
    bad = [request([50, 9, 50, 7, 8], f"bad{i}", max_tokens=5) for i in range(2)]
    assert {c.finish_reason for c in run(engine, bad).values()} == {"error"}
    rows = [
        request([5, 6, 7, i], f"r{i}", max_tokens=6, ignore_eos=True, bad_words_token_ids=[[50]])
        for i in range(2)
    ]
    done = run(engine, rows)
    reference = run(make_engine(model, **options), rows)
    for key, completion in done.items():
        assert completion.finish_reason == "length"
        assert_same(completion, reference[key])


TEXT = (
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed its "
    "ninety steps, lit the lamp and wrote the weather down in a book that nobody but him would "
    "ever read. One night in November the lamp went out, and a small boat that had counted on it "
    "ran onto the rocks."
)


def text_logprobs(llm: LLM, **options: Any) -> np.ndarray:
    """The raw logprob of every sixth token of a text, as the engine predicts it."""
    token_ids = llm.tokenizer.encode(TEXT)
    places = range(2, len(token_ids), 6)
    params = [SamplingParams(max_tokens=1, allowed_token_ids=[token_ids[i]]) for i in places]
    prompts = [{"prompt_token_ids": token_ids[:i]} for i in places]
    outputs = LLM(llm.loaded, **options).generate(prompts, params, use_tqdm=False)
    return np.array([output.outputs[0].raw_logprobs[0] for output in outputs])


@pytest.mark.real_model
def test_the_effect_on_the_logprobs_of_a_real_model(smollm2):
    """The means and maxima are those of all tokens of the text, which the README names."""
    plain = text_logprobs(smollm2)
    for options, mean, most in (
        ({"kv_bits": 8}, 0.022, 0.075),
        ({"kv_bits": 4}, 0.43, 3.2),
        ({"max_kv_size": 32}, 0.13, 1.6),
    ):
        error = np.abs(text_logprobs(smollm2, **options) - plain)
        assert mean / 3 < error.mean() < mean * 2 and error.max() < most * 2, options
    roomy = text_logprobs(smollm2, max_kv_size=len(smollm2.tokenizer.encode(TEXT)))
    np.testing.assert_allclose(roomy, plain, atol=1e-3)
