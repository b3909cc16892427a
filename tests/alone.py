"""A model's rows in a batch against the same rows alone, by mlx-lm's own cache for one row."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_engine, naive_distribution, naive_winner, request, run

from runner.engine.sampler import race_numbers
from runner.engine.sequence import stream_key
from runner.types import Completion, Request, SamplingParams

LENGTHS = [1, 13, 2, 6, 9]
MAX_TOKENS = 3


def requests() -> list[Request]:
    """Prompts of mixed lengths; every other one has a group of two."""
    random = np.random.default_rng(5)
    params = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    return [
        request(random.integers(3, 97, length).tolist(), f"r{i}", n=1 + i % 2, **params)
        for i, length in enumerate(LENGTHS)
    ]


def naive_logits(model: nn.Module, request: Request, token_ids: list[int]) -> np.ndarray:
    """(N, V): what one forward of the row's tokens, without a batch, predicts each of N from."""
    ids = [*request.prompt_token_ids, *token_ids[:-1]]
    logits = model(mx.array([ids]), cache=make_prompt_cache(model))
    return np.array(logits[0, -len(token_ids) :].astype(mx.float32))


def assert_drawn_from(logits: np.ndarray, request: Request, done: Completion) -> None:
    """Every token and logprob of a completion is what `logits` give for its seed."""
    assert np.isfinite(logits).all() and len(logits) == len(done.token_ids)
    stream = np.array([stream_key(request.params.seed or 0, request.key, done.index)], np.uint64)
    for position, row in enumerate(logits):
        raw = naive_distribution(row, SamplingParams(temperature=1.0))
        numbers = race_numbers(stream, np.array([position], np.uint64), len(raw))
        assert done.token_ids[position] == naive_winner(raw, numbers[0])
        expected = np.log(raw[done.token_ids[position]])
        np.testing.assert_allclose(done.raw_logprobs[position], expected, atol=1e-3)


def assert_batched_equals_alone(model: nn.Module) -> None:
    """Laws 1, 2, 7 and 9: groups through three slots, prefilled in large and small chunks, the
    latter once more in reverse through the slots that others have left."""
    expected: dict[tuple[str, int, tuple[int, ...]], np.ndarray] = {}
    for prefill_step_size, orders in ((64, [1]), (4, [1, -1])):
        engine = make_engine(model, max_batch_size=3, prefill_step_size=prefill_step_size)
        for rows in (requests()[::order] for order in orders):
            done = run(engine, rows)
            for r in rows:
                for index in range(r.params.n):
                    completion = done[r.request_id, index]
                    key = (r.request_id, index, tuple(completion.token_ids))
                    if key not in expected:
                        expected[key] = naive_logits(model, r, completion.token_ids)
                    assert_drawn_from(expected[key], r, completion)
        num_prompt_tokens = len(orders) * (sum(LENGTHS) - len(LENGTHS))
        assert engine.stats.num_prefill_tokens > num_prompt_tokens, "no prompt was padded"
