import mlx.core as mx

from runner.engine.cache_list import ListKind
from runner.engine.kv_cache import KVKind
from runner.engine.row_caches import RowCaches
from runner.engine.state_cache import StateKind

STATE = StateKind(shapes=((3,),), dtypes=(mx.float32,))
ATTENTION = KVKind((2, 4), (1, 5), mx.float32)
KIND = ListKind((STATE, ATTENTION))


def past(value: float, num_columns: int = 2) -> tuple[mx.array, ...]:
    keys, values = mx.full((2, num_columns, 4), value), mx.full((1, num_columns, 5), value)
    return mx.full((3,), value), keys, values


def test_is_recurrent_as_soon_as_a_part_is():
    assert KIND.is_recurrent and not ListKind((ATTENTION, ATTENTION)).is_recurrent
    assert KIND.num_arrays == 3


def test_a_past_is_split_among_the_parts():
    state, attention = KIND.split(past(1.0))
    assert [a.shape for a in state] == [(3,)]
    assert [a.shape for a in attention] == [(2, 2, 4), (1, 2, 5)]


def test_a_prompt_in_prefill_gives_back_what_its_parts_hold():
    cache = KIND.prompt_cache(2, 4)
    cache.start_from(past(3.0), 2)
    cache[1].update_and_fetch(mx.ones((2, 2, 1, 4)), mx.ones((2, 1, 1, 5)))
    cache[0][0] = mx.full((2, 3), 8.0)
    cache.end_rows([0, 1])
    state, keys, values = cache.past(1, 3)
    assert state.tolist() == [8.0] * 3
    assert keys[0, :, 0].tolist() == values[0, :, 0].tolist() == [3.0, 3.0, 1.0]
    assert len(cache.arrays) == 1 + 2 * 1 + 2, "the states, those set aside, keys and values"


def test_rows_go_through_all_parts():
    caches = RowCaches([KIND])
    caches.reserve(2, 8)
    layer = caches.layers[0]
    layer.write_prefix([1], past(4.0))
    caches.begin_step([0, 2])
    assert layer[1].offset.tolist() == [0, 2] and layer[1].num_columns == 32
    caches.reserve(3, 8)
    assert [array.shape[0] for array in layer.arrays] == [3, 3, 3]
    caches.keep_rows([1, 0])
    assert [array.reshape(2, -1)[:, 0].tolist() for array in layer.arrays] == [[4.0, 0.0]] * 3
    caches.clear_row(0)
    assert not any(mx.any(array).item() for array in layer.arrays)
