import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.kv_cache import KVKind, PromptKVCache
from runner.engine.kv_segments import Quantization
from runner.engine.row_caches import RowCaches

KIND = KVKind(key_shape=(2, 4), value_shape=(2, 3), dtype=mx.float32)


def columns(rows: int, count: int, dim: int, start: float) -> mx.array:
    shape = (rows, 2, count, dim)
    return start + mx.arange(rows * 2 * count * dim).reshape(shape)


def test_rows_write_at_their_own_column():
    caches = RowCaches([KIND])
    caches.reserve(3, 10)
    caches.begin_step([0, 4, 9])
    layer = caches.layers[0]
    keys, values = columns(3, 1, 4, 1.0), columns(3, 1, 3, 500.0)
    seen_keys, seen_values = layer.update_and_fetch(keys, values)
    assert seen_keys.shape[2] == seen_values.shape[2] == 32
    for row, column in enumerate([0, 4, 9]):
        assert mx.array_equal(seen_keys[row, :, column], keys[row, :, 0])
        assert mx.array_equal(seen_values[row, :, column], values[row, :, 0])
    written = np.array(mx.any(seen_keys != 0, axis=(1, 3)))
    assert written.sum() == 3, "nothing else was touched"


def test_mask_shows_a_row_its_own_columns_and_the_new_one():
    caches = RowCaches([KIND, KVKind((2, 4), (2, 3), mx.float32, window=3)])
    caches.reserve(2, 8)
    caches.begin_step([0, 5])
    full, sliding = (np.array(layer.make_mask(1))[:, 0, 0] for layer in caches.layers)
    assert [row.nonzero()[0].tolist() for row in full] == [[0], [0, 1, 2, 3, 4, 5]]
    assert [row.nonzero()[0].tolist() for row in sliding] == [[0], [0, 1, 2]], "a ring of three"


def test_a_window_that_the_model_asks_for_is_found_in_a_ring():
    """Position 9 stands in column 4 of a ring of 5, so its last three are in columns 2 to 4."""
    caches = RowCaches([KVKind((2, 4), (2, 3), mx.float32, window=5)])
    caches.reserve(2, 12)
    caches.begin_step([9, 1])
    mask = np.array(caches.layers[0].make_mask(1, window_size=3))[:, 0, 0]
    assert [row.nonzero()[0].tolist() for row in mask] == [[2, 3, 4], [0, 1]]


def test_growing_keeps_what_is_there():
    caches = RowCaches([KIND])
    caches.reserve(2, 8)
    layer = caches.layers[0]
    layer.write_prefix([0, 1], (columns(1, 5, 4, 1.0)[0], columns(1, 5, 3, 1.0)[0]))
    before = np.array(layer.keys)
    caches.reserve(4, caches.capacity + 1)
    assert layer.keys.shape[0] == 4 and caches.capacity >= 257
    after = np.array(layer.keys)
    assert np.array_equal(after[:2, :, : before.shape[2]], before)
    assert not after[2:].any() and not after[:, :, before.shape[2] :].any()
    assert caches.nbytes == sum(a.nbytes for a in layer.arrays)


@pytest.mark.parametrize("rows", [[0], [2, 3], [4, 0, 1], [5, 1, 3]])
def test_a_prefix_is_copied_to_the_rows_it_is_for_alone(rows):
    caches = RowCaches([KIND])
    caches.reserve(6, 8)
    layer = caches.layers[0]
    keys, values = columns(1, 5, 4, 1.0)[0], columns(1, 5, 3, 1.0)[0]
    layer.write_prefix(rows, (keys, values))
    for row in range(6):
        if row in rows:
            assert mx.array_equal(layer.keys[row, :, :5], keys)
            assert mx.array_equal(layer.values[row, :, :5], values)
        else:
            assert not mx.any(layer.keys[row]).item()


def test_rows_are_kept_in_the_given_order_and_cleared():
    caches = RowCaches([KIND])
    caches.reserve(3, 8)
    layer = caches.layers[0]
    for row in range(3):
        past = mx.full((2, 1, 4), row + 1.0), mx.full((2, 1, 3), row + 1.0)
        layer.write_prefix([row], past)
    caches.keep_rows([2, 0])
    assert caches.num_rows == 2
    assert layer.keys[:, 0, 0, 0].tolist() == [3.0, 1.0]
    caches.clear_row(0)
    assert layer.keys[:, 0, 0, 0].tolist() == [0.0, 1.0]


def test_prompt_cache_gives_back_all_columns_and_the_mask_for_the_next():
    cache = PromptKVCache(KIND, 2, 6)
    assert cache.make_mask(4) == "causal" and cache.make_mask(1) is None
    cache.update_and_fetch(columns(2, 4, 4, 0.0), columns(2, 4, 3, 0.0))
    keys, _ = cache.update_and_fetch(columns(2, 2, 4, 900.0), columns(2, 2, 3, 0.0))
    assert keys.shape == (2, 2, 6, 4)
    assert mx.array_equal(keys[:, :, 4:], columns(2, 2, 4, 900.0))


def test_prompt_cache_masks_what_lies_outside_the_window():
    cache = PromptKVCache(KVKind((2, 4), (2, 3), mx.float32, window=3), 1, 6)
    cache.update_and_fetch(columns(1, 4, 4, 0.0), columns(1, 4, 3, 0.0))
    mask = np.array(cache.make_mask(2))
    assert [row.nonzero()[0].tolist() for row in mask] == [[2, 3, 4], [3, 4, 5]]


def test_a_layer_that_groups_its_queries_gets_a_mask_with_one_axis_more():
    caches = RowCaches([KVKind((2, 4), (2, 3), mx.float32, groups_queries=True)])
    caches.reserve(2, 8)
    caches.begin_step([0, 5])
    assert caches.layers[0].make_mask(1).shape == (2, 1, 1, 1, 32)


def test_an_empty_past_is_written_to_no_column():
    caches = RowCaches([KIND])
    caches.reserve(2, 8)
    prompt = KIND.prompt_cache(1, 0)
    caches.layers[0].write_prefix([0, 1], prompt.past(0, 0))
    assert not mx.any(caches.layers[0].keys).item()


def test_another_layer_can_attend_to_the_same_columns():
    prompt = PromptKVCache(KIND, 1, 6)
    seen = prompt.update_and_fetch(columns(1, 4, 4, 0.0), columns(1, 4, 3, 0.0))
    for one, other in zip(seen, prompt.keys_and_values(), strict=True):
        assert mx.array_equal(one, other)
    caches = RowCaches([KIND])
    caches.reserve(1, 8)
    caches.begin_step([0])
    seen = caches.layers[0].update_and_fetch(columns(1, 1, 4, 1.0), columns(1, 1, 3, 1.0))
    for one, other in zip(seen, caches.layers[0].keys_and_values(), strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("quantization", [None, Quantization(4, 32), Quantization(8, 64, 100)])
def test_the_bytes_of_a_slot_are_known_beforehand(window, kept, quantization):
    kind = KVKind((2, 64), (2, 128), mx.float32, window, False, kept, quantization)
    caches = RowCaches([kind])
    caches.reserve(3, 288)
    assert caches.nbytes == 3 * kind.nbytes(288)


def test_quantised_rows_and_prompts_take_a_fraction_of_the_memory():
    plain = KVKind((2, 64), (2, 64), mx.float32)
    coarse = KVKind((2, 64), (2, 64), mx.float32, quantization=Quantization(4, 64))
    share = (4 + 2 * 32 / 64) / 32  # of four-bit entries with a scale and a bias a group
    assert coarse.nbytes(256) == plain.nbytes(256) * share
    sizes = []
    for kind in (plain, coarse):
        prompt = kind.prompt_cache(2, 50)
        prompt.update_and_fetch(mx.ones((2, 2, 50, 64)), mx.ones((2, 2, 50, 64)))
        sizes.append(
            [sum(a.nbytes for a in arrays) for arrays in (prompt.arrays, prompt.past(0, 9))]
        )
    assert sizes[1] == [size * share for size in sizes[0]]


def test_a_bounded_row_stops_growing():
    kind = KVKind((2, 64), (2, 64), mx.float32, window=36, kept=4)
    assert kind.nbytes(40) == kind.nbytes(100_000) == 40 * 2 * 2 * 64 * 4
    caches = RowCaches([kind])
    caches.reserve(1, 100_000)
    caches.begin_step([99_999])
    keys, _ = caches.layers[0].update_and_fetch(mx.ones((1, 2, 1, 64)), mx.ones((1, 2, 1, 64)))
    assert keys.shape[2] == 40 and caches.layers[0].make_mask(1).shape[-1] == 40


def test_rows_on_either_side_of_the_start_share_a_batch():
    kind = KVKind((1, 32), (1, 32), mx.float32, quantization=Quantization(2, 32, start=3))
    caches = RowCaches([kind])
    caches.reserve(3, 40)
    layer, random = caches.layers[0], np.random.default_rng(0)
    written = mx.array(random.normal(size=(6, 3, 1, 1, 32)).astype(np.float32))
    rounded = kind.segments[1].decode(kind.segments[1].encode(written))
    for step in range(6):
        caches.begin_step([max(step - 2, 0), step, 39])
        seen, _ = layer.update_and_fetch(written[step], written[step])
    for row, last in ((0, 3), (1, 5)):
        for position in range(last + 1):
            step = position + (2 if row == 0 else 0)
            expected = written if position < 3 else rounded
            assert mx.array_equal(seen[row, 0, position], expected[step, row, 0, 0])


@given(data=st.data())
def test_several_columns_at_once_are_the_same_as_one_by_one(data):
    """At places of each row's own, over what is to be rejected, in every layout."""
    kind = KVKind(
        (2, 32),
        (2, 32),
        mx.float32,
        window=data.draw(st.none() | st.integers(1, 7)),
        kept=data.draw(st.integers(0, 4)),
        quantization=data.draw(
            st.none() | st.builds(Quantization, st.just(4), st.just(32), st.integers(0, 9))
        ),
        num_spare=4,
    )
    starts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    width = data.draw(st.integers(1, 5))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = mx.array(random.standard_normal((len(starts), 2, 40, 32)).astype(np.float32))
    others = mx.array(random.standard_normal((len(starts), 2, 40, 32)).astype(np.float32))

    def seen(widths: list[int], rejected: int) -> list[np.ndarray]:
        """What each of the last queries may look at, by position."""
        cache = kind.row_cache()
        cache.reserve(len(starts), 40)

        def forward(source: mx.array, columns: list[int], count: int) -> tuple[mx.array, mx.array]:
            cache.begin_step(mx.array(columns), 32)
            mask = cache.make_mask(count)
            part = mx.stack([source[i, :, c : c + count] for i, c in enumerate(columns)])
            keys, _ = cache.update_and_fetch(part, part)
            return keys, mask

        for column in range(max(starts)):
            forward(tokens, [min(column, start) for start in starts], 1)
        if rejected:
            forward(others, starts, rejected)
        found, done = [], 0
        for count in widths:
            keys, mask = forward(tokens, [start + done for start in starts], count)
            shape = (*mask.shape[:2], count, keys.shape[2])
            hidden = mx.broadcast_to(mask, shape)
            for query in range(count):
                for row in range(len(starts)):
                    visible = np.flatnonzero(np.array(hidden[row, 0, query]))
                    columns = np.array(keys[row, 0])[visible]
                    found.append((done + query, row, sorted(map(bytes, columns))))
            done += count
        return sorted(found)

    rejected = data.draw(st.integers(0, 5))
    assert seen([width], rejected) == seen([1] * width, 0)
