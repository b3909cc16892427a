import mlx.core as mx
import numpy as np
import pytest
from tiny import assert_same, make_engine, naive_sample, request, run, tiny_model

from runner.engine.prefix_cache import PrefixCache

MODEL = tiny_model()
BYTES = 2 * 2 * 4 * 4  # keys and values of a token: two heads of four float32


def columns(count: int) -> list[tuple[mx.array, mx.array]]:
    return [(mx.ones((2, count, 4)), mx.ones((2, count, 4)))]


def filled(*prompts: list[int], max_bytes: int = 10**6) -> PrefixCache:
    cache = PrefixCache(max_bytes=max_bytes)
    for prompt in prompts:
        cache.add(prompt, columns(len(prompt)))
    return cache


def test_finds_the_longest_common_beginning():
    cache = filled(list(range(30)), [*range(20), *range(50, 60)])
    entry, shared = cache.find([[*range(25), 99]])
    assert shared == 25 and entry.token_ids.tolist() == list(range(30))
    assert cache.find([[*range(20), 50, 51]])[1] == 22
    assert cache.find([list(range(40))])[1] == 30


def test_a_batch_shares_what_all_of_it_shares():
    cache = filled(list(range(30)))
    assert cache.find([list(range(30)), list(range(18))])[1] == 18
    assert cache.find([list(range(30)), [9] * 30]) is None


def test_whole_entries_serve_only_prompts_that_begin_with_all_of_one():
    cache = PrefixCache(max_bytes=10**6, whole_entries=True)
    for size in (20, 30):
        cache.add(list(range(size)), columns(size))
    assert cache.find([list(range(29))])[1] == 20
    assert cache.find([list(range(40)), [*range(30), 99]])[1] == 30
    assert cache.find([list(range(19))]) is None


@pytest.mark.parametrize("prompt", [[], [1, 2, 3], list(range(15)), [*range(15), 99, 98, 97]])
def test_a_short_match_is_none(prompt):
    assert filled(list(range(30))).find([prompt]) is None


def test_keeps_within_its_bytes_and_drops_the_least_recently_used():
    one, two, three = ([first] * 20 for first in (1, 2, 3))
    cache = filled(one, two, max_bytes=2 * 20 * BYTES)
    assert cache.nbytes == 2 * 20 * BYTES
    assert cache.find([one]) is not None
    cache.add(three, columns(20))
    assert cache.find([two]) is None
    assert cache.find([one]) is not None and cache.find([three]) is not None
    cache.add([4] * 60, columns(60))
    assert len(cache) == 2, "what can never fit drops nothing"


def test_the_same_prompt_is_kept_once():
    cache = filled([1] * 20, [1] * 20)
    assert len(cache) == 1 and cache.nbytes == 20 * BYTES


def test_a_shared_header_is_forwarded_once_and_changes_nothing():
    header = list(range(10, 50))
    requests = [request([*header, 60 + i, 3], f"r{i}", n=2) for i in range(4)]
    engine = make_engine(MODEL, max_batch_size=2)
    done = run(engine, requests)
    assert engine.stats.num_prefill_tokens == 41 + 3
    assert engine.stats.num_cached_tokens == 3 * 40
    for r in requests:
        for index in range(2):
            assert_same(done[r.request_id, index], naive_sample(MODEL, r, index))


def test_the_same_prompt_again_forwards_nothing():
    engine = make_engine(MODEL)
    prompt = list(range(10, 50))
    first = run(engine, [request(prompt)])["r", 0]
    before = engine.stats.num_prefill_tokens
    assert_same(first, run(engine, [request(prompt)])["r", 0])
    assert engine.stats.num_prefill_tokens == before


def test_without_bytes_nothing_is_kept():
    engine = make_engine(MODEL, prefix_cache_bytes=0)
    for _ in range(2):
        run(engine, [request(list(range(10, 50)))])
    assert engine.stats.num_cached_tokens == 0
    assert np.isclose(engine.stats.num_prefill_tokens, 2 * 39)
