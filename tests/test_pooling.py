"""What is made of pooled states: cut, and of length 1."""

import numpy as np
import pytest

from runner.errors import ParameterError
from runner.pooling import PoolingParams

STATES = [3.0, 4.0, 0.0, 12.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3 / 13, 4 / 13, 0, 12 / 13]),
        ({"normalize": False}, STATES),
        ({"dimensions": 2}, [0.6, 0.8]),
        ({"dimensions": 2, "normalize": False}, [3, 4]),
        ({"dimensions": 4, "pooling": "last"}, [3 / 13, 4 / 13, 0, 12 / 13]),
    ],
    ids=str,
)
def test_a_vector_is_cut_first_and_then_given_its_length(options, expected):
    vector = PoolingParams(**options).vector(STATES)
    np.testing.assert_allclose(vector, expected, rtol=1e-7)
    assert vector == np.array(vector, np.float32).tolist(), "each is a float32"


def test_a_vector_of_zeros_has_no_direction_and_stays_one():
    assert PoolingParams().vector([0.0, 0.0]) == [0.0, 0.0]
    huge = PoolingParams().vector([3e38, 3e38])
    np.testing.assert_allclose(huge, [0.5**0.5] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not allowed: mean or last"),
        ({"pooling": None}, "pooling=None is not allowed"),
        ({"normalize": 1}, "normalize=1 is not allowed: true or false"),
        ({"dimensions": 0}, "dimensions=0 is not allowed: at least 1, or null"),
        ({"dimensions": 2.0}, "dimensions=2.0 is not allowed"),
        ({"dimensions": True}, "dimensions=True is not allowed"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        PoolingParams(**options)


def test_more_dimensions_than_there_are_are_refused():
    PoolingParams(dimensions=4).check(4)
    PoolingParams().check(1)
    with pytest.raises(ParameterError, match="dimensions=5 is not allowed: at most 4, the hidden"):
        PoolingParams(dimensions=5).check(4)
