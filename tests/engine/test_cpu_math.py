import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations

from runner.engine.cpu_math import softmax_in_place, sum_in_order, swiglu, view

RANDOM = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RANDOM.normal(size=shape) * scale).astype(np.float32)


def test_a_view_is_the_array_itself():
    array = mx.array([1.0, 2.0]) + 1
    view(array)[0] = 7
    assert array.tolist() == [7.0, 3.0]


def test_swiglu_is_that_of_mlx_lm_and_leaves_its_inputs():
    gate, x = mx.array(normal(3, 4, 8, scale=60)), mx.array(normal(3, 4, 8))
    before = np.array(gate), np.array(x)
    np.testing.assert_allclose(swiglu(gate, x), activations.swiglu(gate, x), rtol=1e-5, atol=1e-30)
    assert np.array_equal(gate, before[0]) and np.array_equal(x, before[1])


def test_swiglu_of_other_dtypes_is_mlx_lms():
    gate, x = (mx.array(normal(2, 8)).astype(mx.bfloat16) for _ in range(2))
    assert mx.array_equal(swiglu(gate, x), activations.swiglu(gate, x))


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 300])
def test_softmax_against_float64(columns):
    scores = normal(3, 2, columns, scale=5)
    scores[0, 0, columns // 2 + 1 :] = -np.inf
    sinks = normal(2, 1)
    whole = np.concatenate([scores.astype(np.float64), np.broadcast_to(sinks, (3, 2, 1))], -1)
    for logits, given in ((whole[..., :-1], None), (whole, sinks)):
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True))[..., :columns]
        actual = scores.copy()
        softmax_in_place(actual, given)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)


def test_a_row_that_sees_nothing_is_nan():
    scores = np.full((1, 4), -np.inf, np.float32)
    softmax_in_place(scores)
    assert np.isnan(scores).all()


@pytest.mark.parametrize("added", [1, 31, 32, 200])
def test_zeros_behind_change_no_bit_of_a_sum(added):
    for columns in range(1, 140, 3):
        values = np.abs(normal(2, columns))
        padded = np.pad(values, ((0, 0), (0, added)))
        assert np.array_equal(sum_in_order(values), sum_in_order(padded))
