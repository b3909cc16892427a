import numpy as np

from runner.engine.random_streams import exponentials, split_mix
from runner.engine.sequence import stream_key

STREAMS = np.array([stream_key(7, "row", i) for i in range(100)], np.uint64)


def drawn(count: int = 4) -> np.ndarray:
    """(200 counters, 100 streams, count)."""
    return np.stack([exponentials(STREAMS, np.full(100, c, np.uint64), count) for c in range(200)])


def test_the_numbers_are_those_of_splitmix64_and_so_the_same_in_any_version():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # From the seed 0.
    places = np.arange(3, dtype=np.uint64)
    assert split_mix(np.zeros(3, np.uint64), places).tolist() == published
    seed = split_mix(np.array([5], np.uint64), np.array([8], np.uint64))
    expected = [-np.log((int(n >> np.uint64(12)) + 0.5) / 2**52) for n in split_mix(seed, places)]
    found = exponentials(np.array([5], np.uint64), np.array([8], np.uint64), 3)
    assert found[0].tolist() == [float(np.float32(value)) for value in expected]


def test_they_are_exponential_independent_and_above_zero():
    uniforms = np.exp(-drawn().astype(np.float64))
    assert uniforms.min() > 0 and uniforms.max() < 1
    counts = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 43.8  # 0.999 quantile, 19 degrees of freedom
    by_stream = uniforms.transpose(0, 2, 1).reshape(-1, 100)
    between = np.corrcoef(by_stream.T)[np.triu_indices(100, 1)]
    assert abs(between).max() < 0.18 and abs(between.mean()) < 0.005
    along = np.corrcoef(uniforms[:-1].ravel(), uniforms[1:].ravel())[0, 1]
    lanes = np.corrcoef(uniforms[..., :-1].ravel(), uniforms[..., 1:].ravel())[0, 1]
    assert abs(along) < 0.015 and abs(lanes) < 0.015


def test_more_of_them_do_not_change_the_first():
    assert np.array_equal(drawn(9)[..., :4], drawn(4))


def test_the_least_and_the_most_are_numbers_that_divide():
    """Of a draw of all zeros or all ones."""
    for bits in (0, 2**52 - 1):
        uniform = (np.uint64(bits) + 0.5) * 2.0**-52
        assert 0 < np.float32(-np.log(uniform)) < 40
