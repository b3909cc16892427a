"""A model's rows in a batch against the same rows alone, by mlx-lm's own cache for one row."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tiny import VOCAB_SIZE, make_engine, naive_distribution, naive_winner, request, run

from runner.engine.hidden_states import Head
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


def assert_embedded_alike(model: nn.Module) -> None:
    """Embeddings of a batch in small chunks are pooled from the states of each row alone; and put
    through the head by hand, those of last tokens rank the vocabulary as the model does."""
    head = Head(model, VOCAB_SIZE)
    project = getattr(head.module, "as_linear", head.module)
    for pooling in ("mean", "last"):
        rows = [replace(r, pooling=pooling) for r in requests() if r.params.n == 1]
        done = run(make_engine(model, prefill_step_size=12), rows)
        for r in rows:
            ids = mx.array([list(r.prompt_token_ids)])
            with head.watched() as seen:
                logits = np.array(model(ids, cache=make_prompt_cache(model)).astype(mx.float32))
            states = np.array(seen[-1].astype(mx.float32))[0]
            expected = states.mean(0) if pooling == "mean" else states[-1]
            found = np.array(done[r.request_id, 0].embedding)
            np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    # Logits may be scaled and capped on their way, which leaves their order; so far apart, rounding
    # swaps none.
    projected = np.array(project(mx.array(states[None])))[0, -1]
    assert (np.diff(projected[logits[0, -1].argsort()[::8]]) > 0).all()
