import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import naive_distribution

from runner.engine.sampler import Sampler, uniforms
from runner.engine.sequence import stream_key
from runner.types import SamplingParams

VOCAB = 50
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


@pytest.fixture(params=[True, False], ids=["numpy", "mlx"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """The sampler as it is on a CPU, and as it is elsewhere."""
    return Sampler(on_host=request.param)


def draw_many(
    sampler: Sampler, params: SamplingParams, count: int, logits: np.ndarray = LOGITS
) -> np.ndarray:
    """Packed samples, (count, columns) int32, each from a stream of its own."""
    streams = np.array([stream_key(0, "row", i) for i in range(count)], np.uint64)
    uniform = uniforms(streams, np.zeros(count, np.uint64))
    return draw(sampler, [params] * count, np.broadcast_to(logits, (count, len(logits))), uniform)


def draw(
    sampler: Sampler, rows: list[SamplingParams], logits: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    table = sampler.table(rows, logits.shape[-1])
    return np.array(sampler.sample(mx.array(logits), table, uniform.astype(np.float32)).packed)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampler, options):
    """Pearson's chi-square over 20,000 draws; the bound is the 0.999 quantile (Wilson-Hilferty)."""
    params = SamplingParams(**options)
    expected = naive_distribution(LOGITS, params)
    drawn = np.bincount(draw_many(sampler, params, 20_000)[:, 0], minlength=VOCAB)
    assert drawn[expected == 0].sum() == 0, "a token that was cut off was drawn"
    common = expected * 20_000 >= 5
    chi_square = ((drawn - expected * 20_000)[common] ** 2 / (expected * 20_000)[common]).sum()
    freedom = common.sum() - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_logprobs_are_of_the_distributions_they_name(sampler, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    packed = draw_many(sampler, params, 8)
    raw = naive_distribution(LOGITS, SamplingParams())[packed[:, 0]]
    processed = naive_distribution(LOGITS, params)[packed[:, 0]]
    floats = packed.view(np.float32)
    np.testing.assert_allclose(floats[:, 1], np.log(raw), atol=1e-5)
    np.testing.assert_allclose(floats[:, 2], np.log(processed), atol=1e-5)


def test_a_plain_row_has_the_same_bits_for_both_logprobs_beside_a_cut_one(sampler):
    rows = [SamplingParams(), SamplingParams(temperature=0.5, top_k=3), SamplingParams(top_p=0.5)]
    logits = np.broadcast_to(LOGITS, (3, VOCAB))
    packed = draw(sampler, rows, logits, np.full(3, 0.5))
    assert packed[0, 1] == packed[0, 2]
    assert packed[1, 1] != packed[1, 2]


def test_mates_do_not_change_a_bit_of_a_row(sampler):
    mine = SamplingParams(temperature=0.8, top_k=5, top_p=0.9)
    others = [SamplingParams(top_k=40), SamplingParams(temperature=0.0), SamplingParams(min_p=0.2)]
    uniform = np.array([0.37, 0.1, 0.2, 0.3])
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    alone = draw(sampler, [mine], logits[:1], uniform[:1])
    mixed = draw(sampler, [mine, *others], logits, uniform)
    assert np.array_equal(alone[0], mixed[0])


def test_greedy_takes_the_largest_and_gives_its_model_logprob(sampler):
    packed = draw_many(sampler, SamplingParams(temperature=0.0, top_k=3, top_p=0.1), 2)
    assert packed[0, 0] == LOGITS.argmax()
    assert packed[0, 1] == packed[0, 2]


def test_temperatures_beyond_float32_are_the_likeliest_token_or_any(sampler):
    logits = LOGITS.copy()
    logits[:10] = -np.inf
    cold = draw_many(sampler, SamplingParams(temperature=1e-300), 50, logits)
    assert set(cold[:, 0]) == {int(logits.argmax())}
    hot = draw_many(sampler, SamplingParams(temperature=1e300), 2000, logits)
    assert set(hot[:, 0]) == set(range(10, VOCAB))
    assert np.allclose(hot[:, 2].view(np.float32), -np.log(VOCAB - 10), atol=1e-5)


def test_alternatives_are_ranked_and_hold_the_largest(sampler):
    packed = draw_many(sampler, SamplingParams(logprobs=4, temperature=3.0), 16)
    order = np.argsort(-LOGITS)
    floats = packed.view(np.float32)
    expected = np.log(naive_distribution(LOGITS, SamplingParams()))
    for row, values in zip(packed, floats, strict=True):
        assert order[row[3] - 1] == row[0], "the rank names the drawn token"
        assert row[4:8].tolist() == order[:4].tolist()
        np.testing.assert_allclose(values[8:], expected[order[:4]], atol=1e-5)


def test_ties_at_the_edge_stay_in(sampler):
    logits = np.array([1.0, 2.0, 2.0, 0.0], np.float32)
    drawn = draw_many(sampler, SamplingParams(top_k=1), 200, logits)[:, 0]
    assert set(drawn.tolist()) == {1, 2}


def test_uniforms_are_those_of_splitmix64_and_so_the_same_in_any_version():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # From the seed 0.
    drawn = uniforms(np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64))
    assert drawn.tolist() == [((number >> 42) + 0.5) / 2**22 for number in published]


def test_uniforms_are_uniform_independent_and_never_0_or_1():
    streams = np.array([stream_key(7, "row", i) for i in range(100)], np.uint64)
    drawn = np.stack(
        [np.array(uniforms(streams, np.full(100, c, np.uint64))) for c in range(200)]
    )  # (200, 100)
    assert drawn.min() > 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 0.999 quantile, 19 degrees of freedom
    between = np.corrcoef(drawn.T)[np.triu_indices(100, 1)]
    assert abs(between).max() < 0.35 and abs(between.mean()) < 0.01
    along = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(along) < 0.03


def test_a_stream_depends_on_seed_key_and_index():
    assert len({stream_key(s, k, i) for s in (0, 1) for k in ("a", "b") for i in (0, 1)}) == 8
    assert stream_key(0, "1", 11) != stream_key(0, "11", 1)


@pytest.mark.parametrize("vocab_size", [1, 5, 256, 257, 1000, 1024])
def test_the_inverse_is_that_of_the_whole_cumulative_sum(sampler, vocab_size):
    """Against float64 over the vocabulary in one go, for sizes that are whole blocks and not."""
    random = np.random.default_rng(vocab_size)
    logits = random.normal(size=(200, vocab_size)).astype(np.float32) * 3
    logits[random.random(logits.shape) < 0.3] = -np.inf
    logits[:, random.integers(vocab_size)] = 0.5
    uniform = random.random(200).astype(np.float32)
    drawn = draw(sampler, [SamplingParams()] * 200, logits, uniform)[:, 0]
    weights = np.exp(logits.astype(np.float64))
    cumulative = np.cumsum(weights, axis=-1)
    cumulative /= cumulative[:, -1:]
    rows = np.arange(200)
    assert (weights[rows, drawn] > 0).all()
    assert (cumulative[rows, drawn] > uniform - 1e-5).all()
    before = cumulative[rows, drawn] - weights[rows, drawn] / weights.sum(-1)
    assert (before <= uniform + 1e-5).all()


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_weight(sampler):
    logits = np.full((2, 700), -np.inf, np.float32)
    logits[:, [300, 301, 690]] = [0.0, -3.0, -9.0]
    least, most = 2.0**-23, 1 - 2.0**-23
    drawn = draw(sampler, [SamplingParams()] * 2, logits, np.array([least, most]))[:, 0]
    assert drawn.tolist() == [300, 690]
