import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base

from runner.engine import attention as ours

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="for a CPU alone")
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> mx.array:
    return mx.array(RANDOM.normal(size=shape).astype(np.float32))


def inputs(num_queries: int, columns: int = 11, heads: int = 6) -> dict[str, mx.array]:
    return {
        "queries": normal(3, heads, num_queries, 8),
        "keys": normal(3, 2, columns, 8),
        "values": normal(3, 2, columns, 4),
    }


def masks(num_queries: int, columns: int) -> dict[str, mx.array | str | None]:
    last = np.array([2, columns - 1, 5])[:, None, None, None]
    positions = np.arange(columns - num_queries, columns)[:, None]
    return {
        "none": None,
        "causal": "causal",
        "rows": mx.array(np.arange(columns) <= np.minimum(last, positions)),
        "window": mx.array(
            (np.arange(columns) <= positions) & (np.arange(columns) > positions - 4)
        ),
        "scores": normal(3, 6, num_queries, columns),
    }


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", masks(1, 11))
@pytest.mark.parametrize("num_queries", [1, 5, 11])
@pytest.mark.parametrize("heads", [2, 6])
def test_equals_the_attention_of_mlx_lm(monkeypatch, heads, num_queries, name, with_sinks):
    monkeypatch.setattr(ours, "_BLOCK", 4)  # Five and eleven queries are several blocks.
    given = inputs(num_queries, heads=heads) | {"scale": 0.3, "cache": None}
    mask = masks(num_queries, 11)[name]
    given["mask"] = mask[:, :heads] if name == "scores" else mask
    given["sinks"] = normal(heads) if with_sinks else None
    theirs = base.scaled_dot_product_attention(**given)
    monkeypatch.setattr(ours, "plain_attention", None)  # It is not asked.
    np.testing.assert_allclose(ours.attention(**given), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": (mx.zeros((3, 2, 11, 2)),) * 3},
        {"queries": mx.zeros((3, 6, 1, 8), mx.bfloat16)},
        {"mask": mx.ones((3, 1, 1, 1, 11), mx.bool_)},
    ],
    ids=["quantised", "bfloat16", "grouped mask"],
)
def test_all_else_goes_to_mlx_lm(monkeypatch, change):
    seen = []
    monkeypatch.setattr(ours, "plain_attention", lambda *args, **kwargs: seen.append(kwargs))
    ours.attention(**(inputs(1) | {"cache": None, "scale": 0.3, "mask": None} | change))
    assert seen[0]["scale"] == 0.3


def test_inputs_are_left_as_they_were():
    given = inputs(5)
    before = {name: np.array(array) for name, array in given.items()}
    mx.eval(ours.attention(**given, cache=None, scale=0.3, mask="causal"))
    assert all(np.array_equal(before[name], array) for name, array in given.items())
