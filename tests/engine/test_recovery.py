import warnings

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.llama import Model
from tiny import assert_same, make_engine, request, run, tiny_model
from tiny_architectures import tiny_architecture

from runner.engine.recovery import is_allocation_failure, smaller_batch_size, unfinished
from runner.engine.sequence import Sequence

MODEL = tiny_model()
FULL = "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed"
FREE = {"ignore_eos": True, "temperature": 1.5}


class SmallMemory(Model):
    """A llama that runs out of memory above `most_rows` rows, or for prompts above `most_columns`.

    It does so after all layers have written to their caches, as a device that fails late.
    """

    most_rows: int
    most_columns: int
    message: str

    def __call__(self, inputs, cache=None, **options):
        logits = super().__call__(inputs, cache=cache, **options)
        if inputs.shape[0] > self.most_rows or inputs.shape[1] > self.most_columns:
            raise RuntimeError(self.message)
        return logits


def small_memory(most_rows: int = 99, most_columns: int = 999, message: str = FULL) -> Model:
    model = tiny_model()
    model.__class__ = SmallMemory
    SmallMemory.most_rows, SmallMemory.most_columns = most_rows, most_columns
    SmallMemory.message = message
    return model


def quietly(engine, requests):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memory ran out")
        return run(engine, requests)


def group_of(sizes, **params):
    return [request([5, 6, 7 + i], f"r{i}", n=n, **FREE, **params) for i, n in enumerate(sizes)]


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        (FULL, True),
        ("[malloc] Unable to allocate 34359738368 bytes.", True),
        ("[malloc_or_wait] Unable to allocate 16 bytes.", True),
        ("[metal::malloc] Resource limit (499000) exceeded.", True),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", True),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            True,
        ),
        ("[matmul] Last dimension of first input with shape (2,3) must match", False),
        ("There is no Stream(gpu, 0) in current thread.", False),
    ],
)
def test_tells_a_lack_of_memory_from_other_errors(message, is_one):
    assert is_allocation_failure(RuntimeError(message)) == is_one


def test_a_memory_error_is_one_whatever_it_says():
    assert is_allocation_failure(MemoryError())


def test_what_is_left_is_listed_by_request_with_each_sample_once():
    one, two, three = (request([5], name, n=4) for name in ("one", "two", "three"))
    rows = [Sequence(r, i, max_tokens=3, stop_token_ids=frozenset()) for r, i in
            ((one, 3), (two, 0), (one, 1))]  # fmt: skip
    left = unfinished(rows, [(two, [2, 3])], [(three, [0, 1, 2, 3])])
    assert [(r.request_id, indices) for r, indices in left] == [
        ("one", [1, 3]),
        ("two", [0, 2, 3]),
        ("three", [0, 1, 2, 3]),
    ]


def test_half_of_what_was_tried_is_tried_next_and_one_alone_is_too_many():
    ready = [(request([5], n=6), [3, 4, 5])]
    assert smaller_batch_size(32, num_rows=32, ready=[], num_prefilling=0) == 16
    assert smaller_batch_size(32, num_rows=5, ready=ready, num_prefilling=2) == 5
    assert smaller_batch_size(4, num_rows=4, ready=ready, num_prefilling=0) == 2
    assert smaller_batch_size(32, num_rows=1, ready=[], num_prefilling=0) == 0
    assert smaller_batch_size(32, num_rows=0, ready=[], num_prefilling=1) == 0
    assert smaller_batch_size(1, num_rows=1, ready=ready, num_prefilling=0) == 0


def test_halves_until_it_fits_says_so_and_gives_the_same():
    requests = group_of([1] * 20, max_tokens=9)
    engine = make_engine(small_memory(most_rows=3), max_batch_size=16)
    with pytest.warns(UserWarning, match="memory ran out; .* rows at most") as caught:
        done = run(engine, requests)
    assert len(caught) == engine.stats.num_halvings == 3
    assert all("\n" not in str(warning.message) for warning in caught)
    assert engine.max_batch_size == 2
    reference = run(make_engine(MODEL, max_batch_size=16), requests)
    assert done.keys() == reference.keys()
    for key, completion in done.items():
        assert_same(completion, reference[key])


def test_what_was_thrown_away_is_not_counted():
    requests = group_of([2, 3, 1, 1, 5], max_tokens=7)
    engine = make_engine(small_memory(most_rows=3), max_batch_size=12, prefix_cache_bytes=0)
    done = quietly(engine, requests)
    assert engine.stats.num_halvings > 0
    assert engine.stats.num_completion_tokens == sum(len(c.token_ids) for c in done.values())
    assert engine.stats.num_prompt_tokens == sum(len(r.prompt_token_ids) for r in requests)
    assert engine.stats.num_requests == len(requests)


workloads = st.lists(
    st.tuples(
        st.lists(st.integers(3, 96), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 12)
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=15)
@given(workload=workloads, most_rows=st.integers(1, 5), size=st.integers(2, 9))
def test_running_out_of_memory_changes_no_row(workload, most_rows, size):
    requests = [
        request(p, f"r{i}", n=n, max_tokens=m, temperature=1.2)
        for i, (p, n, m) in enumerate(workload)
    ]
    engine = make_engine(small_memory(most_rows), max_batch_size=size)
    done = quietly(engine, requests)
    reference = run(make_engine(MODEL), requests)
    assert done.keys() == reference.keys()
    for key, completion in done.items():
        assert_same(completion, reference[key])


def test_a_row_that_fails_alone_is_an_error_and_the_others_go_on():
    requests = [*group_of([2, 2], max_tokens=5), request([9] * 40, "long", n=3, **FREE)]
    engine = make_engine(small_memory(most_columns=20), max_batch_size=8)
    done = quietly(engine, requests)
    for index in range(3):
        failed = done["long", index]
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert failed.error.type == "MemoryError" and FULL in failed.error.message
    reference = run(make_engine(MODEL), requests[:2])
    for key, completion in reference.items():
        assert completion.error is None
        assert_same(done[key], completion)


def test_another_error_is_not_caught():
    engine = make_engine(small_memory(most_rows=1, message="[matmul] a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(engine, group_of([4]))


def test_a_request_that_started_over_can_be_aborted():
    engine = make_engine(small_memory(most_rows=3), max_batch_size=8)
    for each in group_of([6, 1], max_tokens=20):
        engine.add(each)
    with pytest.warns(UserWarning, match="memory ran out"):
        while not engine.stats.num_halvings:
            engine.step()
    engine.abort("r0")
    done = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memory ran out")
        while engine.has_unfinished:
            done += engine.step()
    assert sorted(c.index for c in done if c.request_id == "r0") == list(range(6))
    assert {c.finish_reason for c in done if c.request_id == "r0"} == {"abort"}
    assert [c.finish_reason for c in done if c.request_id == "r1"] == ["length"]


def test_a_recurrent_model_starts_over_from_clean_states():
    hybrid = tiny_architecture("lfm2")
    requests = group_of([3, 3], max_tokens=6)
    reference = run(make_engine(hybrid), requests)
    engine = make_engine(hybrid, max_batch_size=6)
    decode, calls = engine._runner.decode, []

    def fails_once(*args):
        calls.append(mx.array(0))
        logits = decode(*args)
        if len(calls) == 4:
            raise RuntimeError(FULL)
        return logits

    engine._runner.decode = fails_once
    done = quietly(engine, requests)
    assert engine.stats.num_halvings == 1
    for key, completion in done.items():
        assert_same(completion, reference[key])
