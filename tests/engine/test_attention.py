import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, llama
from tiny import make_engine, tiny_model

from runner.engine import attention as folded
from runner.engine.kv_cache import KVKind, RowKVCache

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="folds on a CPU alone")
KIND = KVKind(key_shape=(2, 8), value_shape=(2, 8), dtype=mx.float32)


def inputs(num_queries: int, columns: int = 11, heads: int = 6) -> dict[str, mx.array]:
    random = np.random.default_rng(0)
    shape = {"queries": (3, heads, num_queries, 8), "keys": (3, 2, columns, 8)}
    made = {n: mx.array(random.normal(size=s).astype(np.float32)) for n, s in shape.items()}
    visible = np.arange(columns) <= np.array([2, 10, 5])[:, None, None, None]
    return made | {"values": made["keys"] * 2 + 1, "mask": mx.array(visible)}


@pytest.mark.parametrize("heads", [2, 6])
def test_equals_the_attention_of_mlx_lm(heads):
    given = inputs(1, heads=heads)
    ours = folded.attention(**given, cache=RowKVCache(KIND), scale=0.3)
    theirs = base.scaled_dot_product_attention(**given, cache=RowKVCache(KIND), scale=0.3)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("num_queries", "cache", "sinks"),
    [(2, RowKVCache(KIND), None), (1, None, None), (1, RowKVCache(KIND), mx.zeros((6,)))],
)
def test_all_else_goes_to_mlx_lm(monkeypatch, num_queries, cache, sinks):
    seen = []
    monkeypatch.setattr(folded, "_original", lambda *args, **kwargs: seen.append(kwargs))
    folded.attention(**inputs(num_queries), cache=cache, scale=0.3, sinks=sinks)
    assert seen[0]["cache"] is cache and seen[0]["scale"] == 0.3


@pytest.mark.parametrize("axes", ["heads", "none", "groups", "scores"])
def test_other_masks_go_to_mlx_lm(monkeypatch, axes):
    """Such as the rotary scores that latent attention adds, or a mask for grouped queries."""
    seen = []
    monkeypatch.setattr(folded, "_original", lambda *args, **kwargs: seen.append(kwargs))
    given = inputs(1)
    mask = given.pop("mask")
    masks = {
        "heads": mx.repeat(mask, 6, axis=1),
        "none": None,
        "groups": mask[:, :, None],
        "scores": mx.zeros((3, 1, 1, 11)),
    }
    folded.attention(**given, mask=masks[axes], cache=RowKVCache(KIND), scale=0.3)
    assert seen[0]["mask"] is masks[axes]


def test_an_engine_binds_it_to_its_model_once():
    model = tiny_model()
    for _ in range(2):
        make_engine(model)
    assert llama.scaled_dot_product_attention is folded.attention
    assert base.scaled_dot_product_attention is folded._original
