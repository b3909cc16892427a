import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, RotatingKVCache
from tiny import tiny_model
from tiny_architectures import tiny_architecture

from runner.engine.cache_list import ListKind
from runner.engine.kv_cache import KVKind
from runner.engine.layer_kinds import layer_kinds
from runner.engine.state_cache import StateKind
from runner.errors import ModelError


def test_keys_and_values_are_read_off_the_model():
    model = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=6)
    kinds, vocab_size = layer_kinds(model)
    assert [kind.window for kind in kinds] == [None, 6]
    assert kinds[0].key_shape == (2, 8) and kinds[0].dtype == mx.float32
    assert vocab_size == 97


def test_latent_keys_and_values_may_differ_in_shape():
    kinds, _ = layer_kinds(tiny_architecture("deepseek_v3"))
    assert {(kind.key_shape, kind.value_shape) for kind in kinds} == {((1, 8), (1, 4))}


def test_states_are_read_off_the_model():
    kinds, _ = layer_kinds(tiny_architecture("qwen3_next"))
    assert [type(kind) for kind in kinds] == [StateKind] * 3 + [KVKind]
    assert kinds[0].num_arrays == 2 and kinds[0].shapes[0][0] == 3, "a convolution of four"
    assert kinds[0].is_recurrent and not kinds[3].is_recurrent


def test_parts_of_a_layer_are_read_off_the_model():
    kinds, _ = layer_kinds(tiny_architecture("falcon_h1"))
    assert {type(kind) for kind in kinds} == {ListKind}
    assert [type(part) for part in kinds[0].parts] == [StateKind, KVKind]


def test_a_layer_may_leave_its_cache_alone():
    kinds, _ = layer_kinds(tiny_architecture("nemotron-nas"))
    assert [kind.key_shape for kind in kinds] == [(2, 8), (0, 0), (4, 8)]


@pytest.mark.parametrize(("num_key_value_heads", "groups"), [(2, True), (4, False)])
def test_gemma2_groups_its_queries_where_they_share_a_key_head(num_key_value_heads, groups):
    model = tiny_architecture("gemma2", num_key_value_heads=num_key_value_heads)
    assert {kind.groups_queries for kind in layer_kinds(model)[0]} == {groups}


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (ChunkedKVCache(4), "ChunkedKVCache"),
        (RotatingKVCache(max_size=8, keep=2), "RotatingKVCache"),
        (CacheList(ArraysCache(1), ChunkedKVCache(4)), "ChunkedKVCache"),
    ],
)
def test_a_kind_that_is_not_covered_is_refused_by_name(cache, name):
    model = tiny_model()
    model.make_cache = lambda: [cache, cache]
    with pytest.raises(ModelError, match=f"its past in a {name}, which"):
        layer_kinds(model)


def test_a_model_that_wraps_a_refused_one_is_refused():
    model = tiny_model()
    model.inner = tiny_architecture("afm7")
    with pytest.raises(ModelError, match="afm7 cannot be run in a padded batch"):
        layer_kinds(model)
