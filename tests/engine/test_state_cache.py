import mlx.core as mx
import pytest
from alone import assert_drawn_from, naive_logits
from mlx_lm.models.cache import ArraysCache
from tiny import make_engine, request, run
from tiny_architectures import tiny_architecture

from runner.engine.row_caches import RowCaches
from runner.engine.state_cache import StateKind

KIND = StateKind(shapes=((3, 2), (4,)), dtypes=(mx.float32, mx.float16))
MODEL = tiny_architecture("lfm2")
RECURRENT = ["lfm2", "mamba", "rwkv7", "falcon_h1"]


def past(value: float) -> tuple[mx.array, ...]:
    return mx.full((3, 2), value), mx.full((4,), value, mx.float16)


def filled(*values: float) -> RowCaches:
    caches = RowCaches([KIND])
    caches.reserve(len(values), 8)
    for row, value in enumerate(values):
        caches.layers[0].write_prefix([row], past(value))
    return caches


def firsts(caches: RowCaches) -> list[list[float]]:
    return [array.reshape(array.shape[0], -1)[:, 0].tolist() for array in caches.layers[0].arrays]


def test_to_a_model_both_are_the_cache_that_it_asked_for():
    for cache in (KIND.prompt_cache(2, 8), KIND.row_cache()):
        assert isinstance(cache, ArraysCache)
        assert cache.make_mask(5) is None and cache.lengths is None


def test_rows_are_written_kept_and_cleared():
    caches = filled(1.0, 2.0, 3.0)
    caches.layers[0].write_prefix([2, 0], past(7.0))
    assert firsts(caches) == [[7.0, 2.0, 7.0]] * 2
    caches.keep_rows([1, 0])
    assert firsts(caches) == [[2.0, 7.0]] * 2
    caches.clear_row(1)
    assert firsts(caches) == [[2.0, 0.0]] * 2


def test_growing_keeps_what_is_there_and_its_types():
    caches = filled(1.0, 2.0)
    caches.reserve(4, 1000)
    assert firsts(caches) == [[1.0, 2.0, 0.0, 0.0]] * 2
    assert [array.dtype for array in caches.layers[0].arrays] == [mx.float32, mx.float16]
    assert caches.nbytes == 4 * (6 * 4 + 4 * 2)


def test_a_prompt_that_ended_keeps_its_state_while_pads_go_on():
    cache = KIND.prompt_cache(2, 8)
    cache[0], cache[1] = mx.ones((2, 3, 2)), mx.ones((2, 4), mx.float16)
    cache.end_rows([1])
    cache[0], cache[1] = mx.full((2, 3, 2), 9.0), mx.full((2, 4), 9.0, mx.float16)
    cache.end_rows([0])
    assert [array.max().item() for array in cache.past(1, 2)] == [1.0, 1.0]
    assert [array.max().item() for array in cache.past(0, 8)] == [9.0, 9.0]
    assert [array.shape for array in cache.past(0, 8)] == list(KIND.shapes)


def test_a_prompt_of_which_nothing_is_prefilled_starts_from_zeros():
    cache = KIND.prompt_cache(2, 0)
    cache.end_rows([0, 1])
    assert not any(mx.any(array).item() for array in cache.past(1, 0))


def test_prompts_go_on_from_a_state_that_is_known():
    cache = KIND.prompt_cache(2, 8)
    cache.start_from(past(5.0), 4)
    assert [array.shape[0] for array in cache.arrays] == [2, 2]
    cache.end_rows([1])
    assert cache.past(1, 4)[0].min().item() == 5.0


def assert_alone(model, requests, done):
    for r in requests:
        for index in range(r.params.n):
            completion = done[r.request_id, index]
            assert_drawn_from(naive_logits(model, r, completion.token_ids), r, completion)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_reused_slot_starts_anew_also_for_a_prompt_of_one_token(name):
    """Nothing is prefilled then, and still nothing of the row before may be left."""
    model = tiny_architecture(name)
    engine = make_engine(model, max_batch_size=2)
    run(engine, [request(range(3, 20), "gone", n=2, max_tokens=9, ignore_eos=True)])
    requests = [request([5 + i], f"r{i}", n=2, max_tokens=3, ignore_eos=True) for i in range(2)]
    assert_alone(model, requests, run(engine, requests))


@pytest.mark.parametrize("name", RECURRENT)
def test_empty_slots_poison_nobody(name):
    """One long row goes on alone beside slots that were left; then they are filled again."""
    model = tiny_architecture(name)
    engine = make_engine(model, max_batch_size=3)
    requests = [
        request([9, 8, 7], "long", max_tokens=12, ignore_eos=True),
        request([4], "short", max_tokens=1, ignore_eos=True),
        request([4, 5], "other", max_tokens=2, ignore_eos=True),
    ]
    assert_alone(model, requests, run(engine, requests))
    again = [request([6, 7], f"r{i}", max_tokens=3, ignore_eos=True) for i in range(3)]
    assert_alone(model, again, run(engine, again))


def test_a_known_state_serves_only_prompts_that_begin_with_all_of_it():
    header = list(range(10, 40))
    engine = make_engine(MODEL)
    prompts = {
        "first": ([*header, 3], 0),
        "longer": ([*header, 50, 51, 52], 30),
        "same": ([*header, 4], 30),
        "shorter": (header[:25], 0),
        "other": ([*header[:28], 60, 61, 62], 24),
    }
    for name, (prompt, num_cached) in prompts.items():
        before = engine.stats.num_cached_tokens
        requests = [request(prompt, name, n=2, max_tokens=3, ignore_eos=True)]
        assert_alone(MODEL, requests, run(engine, requests))
        assert engine.stats.num_cached_tokens - before == num_cached, name


def test_prompts_of_mixed_lengths_go_on_from_one_known_state():
    header = list(range(10, 40))
    engine = make_engine(MODEL, prefill_step_size=8)
    run(engine, [request([*header, 3], max_tokens=1)])
    tails = [[5], [5, 6, 7], [8, 9, 10, 11, 12]]
    requests = [request([*header, *t], f"r{len(t)}", max_tokens=3, ignore_eos=True) for t in tails]
    assert_alone(MODEL, requests, run(engine, requests))
    assert engine.stats.num_cached_tokens == 3 * 30
