import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, make_engine, request, run, tiny_model
from tiny_architectures import tiny_architecture

from runner.engine.cache_list import ListKind
from runner.engine.engine import Engine
from runner.engine.kv_cache import KVKind
from runner.engine.layer_cache import LayerKind
from runner.engine.memory import MemoryBudget
from runner.engine.row_caches import RowCaches
from runner.engine.state_cache import StateKind
from runner.errors import ParameterError, PromptError
from runner.types import Request, SamplingParams

MODEL = tiny_model()
COLUMN = 2 * 2 * 2 * 8 * 4  # two layers' keys and values of a token: two heads of eight float32
WEIGHTS = make_engine(MODEL).memory.weights_bytes
KV = KVKind(key_shape=(2, 4), value_shape=(1, 6), dtype=mx.bfloat16)
STATE = StateKind(((3, 2), (5,)), (mx.float32, mx.float16))
FREE = {"ignore_eos": True, "temperature": 1.5}


def budget(num_bytes: int | None, *kinds: LayerKind, max_prefill_tokens: int = 32) -> MemoryBudget:
    return MemoryBudget(
        num_bytes=num_bytes,
        kinds=kinds or [KVKind((1, 1), (1, 1), mx.float32)],
        weights_bytes=1000,
        prefix_cache_bytes=500,
        max_prefill_tokens=max_prefill_tokens,
    )


def bytes_for(num_rows: int, num_columns: int, prefill_columns: int) -> int:
    """A budget that the tiny model fills with these rows, and without a prefix cache."""
    return int((WEIGHTS + (num_rows * num_columns + prefill_columns) * COLUMN) * 1.2) + 1


def small_engine(num_rows: int, num_columns: int, **options) -> Engine:
    memory = bytes_for(num_rows, num_columns, min(512, num_rows * num_columns))
    options = {"prefix_cache_bytes": 0, "prefill_step_size": 32, "memory_budget": memory} | options
    return make_engine(MODEL, **options)


def most_rows_and_columns(engine: Engine, requests: list[Request]) -> tuple[int, int]:
    """The most row slots and columns that the engine held at a time."""
    seen = []
    for each in requests:
        engine.add(each)
    while engine.has_unfinished:
        engine.step()
        seen.append((engine._runner.caches.num_rows, engine._runner.caches.capacity))
        assert engine._runner.caches.nbytes <= engine.memory.num_bytes
    return max(rows for rows, _ in seen), max(columns for _, columns in seen)


@pytest.mark.parametrize("kind", [KV, STATE, ListKind((STATE, KV))], ids=["kv", "state", "list"])
def test_a_kind_says_how_many_bytes_a_slot_takes(kind):
    cache = kind.row_cache()
    cache.reserve(3, 64)
    assert sum(array.nbytes for array in cache.arrays) == 3 * kind.nbytes(64)


def test_a_state_takes_the_same_however_long_the_row_is():
    assert STATE.nbytes(0) == STATE.nbytes(500) == 6 * 4 + 5 * 2
    assert KV.nbytes(0) == 0 and KV.nbytes(3) == 3 * (8 + 6) * 2


def test_the_cost_is_the_longest_row_for_every_row_and_a_fifth_more():
    made = budget(10**6)
    # 8 bytes a column; the prefill takes 32 columns beside the rows, or one whole prompt.
    assert made.batch_bytes(4, 64) == int((1500 + 8 * (4 * 64 + 64)) * 1.2)
    assert budget(10**6, max_prefill_tokens=128).batch_bytes(4, 64) == int(
        (1500 + 8 * (4 * 64 + 128)) * 1.2
    )


@settings(max_examples=50)
@given(num_bytes=st.integers(3000, 10**7), num_columns=st.integers(1, 3000))
def test_as_many_rows_as_fit_and_not_one_more(num_bytes, num_columns):
    made = budget(num_bytes)
    rows = made.max_rows(num_columns)
    columns = -(-num_columns // 32) * 32
    assert rows == 0 or made.batch_bytes(rows, columns) <= num_bytes
    assert made.batch_bytes(rows + 1, columns) > num_bytes


def test_no_budget_is_no_limit():
    assert budget(None).max_rows(10**6) >= 10**6


def test_a_budget_without_room_for_a_row_is_refused():
    with pytest.raises(ParameterError, match="memory_budget=.*iB is not allowed: the weights"):
        make_engine(MODEL, memory_budget=WEIGHTS)
    with pytest.raises(ParameterError, match="memory_budget=0"):
        make_engine(MODEL, memory_budget=0)


def test_a_prompt_that_never_fits_is_refused_and_a_shorter_one_is_not():
    engine = small_engine(1, 64)
    engine.add(request([5] * 50, "fits", max_tokens=14))
    with pytest.raises(
        PromptError, match="51 tokens of prompt and up to 14 of comp.*memory_budget is"
    ):
        engine.add(request([5] * 51, "does not", max_tokens=14))


def test_options_that_no_row_fits_are_refused():
    engine = small_engine(1, 64)
    engine.admission.check_params(SamplingParams(max_tokens=63), [])
    with pytest.raises(ParameterError, match="max_tokens=64 is not allowed: .*memory_budget is"):
        engine.admission.check_params(SamplingParams(max_tokens=64), [])
    with pytest.raises(ParameterError, match="max_tokens=None is not allowed"):
        engine.admission.check_params(SamplingParams(max_tokens=None), [])


def test_rows_are_as_many_as_the_longest_of_them_allows():
    short = [request([5, 6 + i], f"s{i}", max_tokens=20, **FREE) for i in range(9)]
    assert most_rows_and_columns(small_engine(4, 32), short)[0] == 4
    assert most_rows_and_columns(small_engine(8, 32), short)[0] == 8
    long = request([7] * 60, "long", max_tokens=60, **FREE)
    rows, columns = most_rows_and_columns(small_engine(2, 128), [*short, long])
    assert (rows, columns) == (7, 128), "two short ones end beside the long one, and seven are left"


@settings(max_examples=20)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 4)),
        min_size=1,
        max_size=8,
    ),
    num_rows=st.integers(1, 6),
    order=st.sampled_from(["offline", "fcfs"]),
)
def test_a_budget_is_kept_and_changes_no_row(lengths, num_rows, order):
    requests = [
        request([3 + i] * p, f"r{i}", n=n, max_tokens=m, temperature=1.2)
        for i, (p, m, n) in enumerate(lengths)
    ]
    engine = small_engine(num_rows, 96, order=order)
    most_rows_and_columns(engine, requests)
    done = run(small_engine(num_rows, 96, order=order), requests)
    reference = run(make_engine(MODEL), requests)
    assert done.keys() == reference.keys()
    for key, completion in done.items():
        assert_same(completion, reference[key])


def test_a_hybrid_model_keeps_its_budget_too():
    hybrid = tiny_architecture("lfm2")
    requests = [request([5] * 9, f"r{i}", max_tokens=9, **FREE) for i in range(7)]
    free = make_engine(hybrid, prefill_step_size=32, prefix_cache_bytes=0)
    memory = free.memory.batch_bytes(3, 32)
    engine = make_engine(hybrid, prefill_step_size=32, prefix_cache_bytes=0, memory_budget=memory)
    assert most_rows_and_columns(engine, requests)[0] == 3
    again = make_engine(hybrid, prefill_step_size=32, prefix_cache_bytes=0, memory_budget=memory)
    reference = run(free, requests)
    for key, completion in run(again, requests).items():
        assert_same(completion, reference[key])


def test_columns_shrink_when_the_long_rows_have_gone():
    engine = make_engine(MODEL, max_model_len=None, max_batch_size=2)
    short = [request([9, 5 + i], f"s{i}", max_tokens=40, **FREE) for i in range(6)]
    for each in [request([5] * 600, "long", max_tokens=8, **FREE), *short]:
        engine.add(each)
    seen, done = [], {}
    while engine.has_unfinished:
        done |= {(c.request_id, c.index): c for c in engine.step()}
        seen.append(engine._runner.caches.capacity)
    assert max(seen) == 608 and seen[-1] <= 256
    reference = run(make_engine(MODEL), short)
    for key, completion in reference.items():
        assert_same(done[key], completion)


def test_columns_never_exceed_what_the_rows_can_come_to():
    caches = RowCaches([KV])
    caches.reserve(2, 10, 40)
    assert caches.capacity == 64
    caches.reserve(2, 65, 300)
    assert caches.capacity == 256, "by half, and at least the first capacity"
    caches.reserve(2, 257, 300)
    assert caches.capacity == 320
    caches.reserve(3, 10, 100)
    assert caches.capacity == 128, "more rows are a copy anyway"


def test_growing_holds_one_layer_twice_at_most():
    kinds = [KVKind((2, 64), (2, 64), mx.float32) for _ in range(8)]
    caches = RowCaches(kinds)
    caches.reserve(4, 512)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    held = caches.nbytes
    caches.reserve(8, 1024)
    mx.eval([layer.arrays for layer in caches.layers])
    layer = caches.nbytes // len(kinds)
    growth = mx.get_peak_memory() - before
    assert caches.nbytes - held <= growth <= caches.nbytes - held + 2 * layer
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    caches.keep_rows([7, 1, 2])
    mx.eval([layer.arrays for layer in caches.layers])
    assert mx.get_peak_memory() - before <= layer


def test_a_kept_prompt_keeps_no_more_than_its_own_columns():
    """Of eight that were prefilled together, one of 110 columns of 2 kB is kept."""
    wide = tiny_model(head_dim=64)
    before = mx.get_active_memory()
    engine = make_engine(wide, max_batch_size=8, prefix_cache_bytes=2**18)
    lengths = [*[200] * 7, 111]
    run(engine, [request([3 + i] * n, f"r{i}", max_tokens=1) for i, n in enumerate(lengths)])
    kept = engine._runner.caches.nbytes + engine._runner._prefix_cache.nbytes
    assert kept >= 110 * 2**11
    assert mx.get_active_memory() - before <= kept + 2**18


def test_dropping_every_row_and_starting_again():
    caches = RowCaches([KV, STATE])
    caches.reserve(3, 40)
    caches.keep_rows([])
    assert caches.nbytes == 0
    caches.reserve(2, 40)
    assert [array.shape[0] for layer in caches.layers for array in layer.arrays] == [2] * 4


def test_memory_does_not_grow_with_the_number_of_rows():
    """Ten thousand rows of mixed lengths that share a header, the longest of them early on."""
    header = list(range(3, 40))

    def requests():
        for index in range(10_000):
            prompt = [*header, *[3 + index % 90] * (index % 7), 3 + index // 90 % 90]
            yield request(prompt, f"r{index}", max_tokens=1 + index // 250 % 3)

    engine = make_engine(MODEL, max_batch_size=64, prefix_cache_bytes=2**18)
    mx.reset_peak_memory()
    active, peak = [], []
    for number, _ in enumerate(engine.run(requests()), start=1):
        if number in (500, 10_000):
            active.append(mx.get_active_memory())
            peak.append(mx.get_peak_memory())
            mx.reset_peak_memory()
    # 30 bytes kept of each row would be as much.
    assert peak[1] <= 1.1 * peak[0] and active[1] <= 1.1 * active[0]
    assert engine.stats.num_requests == 10_000


@pytest.mark.real_model
@pytest.mark.parametrize("kind", ["many prompts", "groups"])
def test_the_peak_is_weights_and_cache_and_a_fifth(smollm2, kind):
    """Of what mlx holds, from the first prompt to the last token."""
    engine = Engine(smollm2.model, max_batch_size=16, prefix_cache_bytes=2**26)
    lengths, n = ([40, 90, 150] * 6, 1) if kind == "many prompts" else ([400, 250], 12)
    for index, length in enumerate(lengths):
        engine.add(request(range(index, index + length), f"r{index}", n=n, max_tokens=16, **FREE))
    before, cache = mx.get_active_memory(), 0
    mx.reset_peak_memory()
    while engine.has_unfinished:
        engine.step()
        cache = max(cache, engine._runner.caches.nbytes)
    cache += engine._runner._prefix_cache.nbytes
    weights = engine.memory.weights_bytes
    held = mx.get_peak_memory() - before
    assert cache < held + 2**20, "the cache was there"
    assert weights + held <= 1.2 * (weights + cache)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_longest_rows_that_fit_are_the_longest(num_rows):
    kind = KVKind((1, 4), (1, 4), mx.float32)
    memory = budget(20_000, kind)
    longest = memory.max_columns(num_rows, 10_000)
    assert 0 < longest < 10_000
    assert memory.batch_bytes(num_rows, longest) <= 20_000
    assert memory.batch_bytes(num_rows, longest + 1) > 20_000
    assert memory.max_columns(num_rows, 5) == 5
    assert memory.max_columns(1_000_000, 5) == 0
    assert budget(None, kind).max_columns(num_rows, 10_000) == 10_000
    assert f"holds a row of {memory.max_columns(1, 10_000)} tokens" in memory.shortage(10_000)
