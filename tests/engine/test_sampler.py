import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import naive_distribution, naive_winner

from runner.engine.sampler import Sampler, race_numbers
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
    numbers = race_numbers(streams, np.zeros(count, np.uint64), len(logits))
    return draw(sampler, [params] * count, np.broadcast_to(logits, (count, len(logits))), numbers)


def drawn_numbers(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    streams = np.array([stream_key(seed, "row", i) for i in range(count)], np.uint64)
    return race_numbers(streams, np.zeros(count, np.uint64), vocab_size)


def draw(
    sampler: Sampler, rows: list[SamplingParams], logits: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    table = sampler.table(rows, logits.shape[-1])
    return np.array(sampler.sample(mx.array(logits), table, numbers).packed)


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
    packed = draw(sampler, rows, logits, drawn_numbers(3, VOCAB))
    assert packed[0, 1] == packed[0, 2]
    assert packed[1, 1] != packed[1, 2]


def test_mates_do_not_change_a_bit_of_a_row(sampler):
    mine = SamplingParams(temperature=0.8, top_k=5, top_p=0.9)
    others = [SamplingParams(top_k=40), SamplingParams(temperature=0.0), SamplingParams(min_p=0.2)]
    numbers = drawn_numbers(4, VOCAB)
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    alone = draw(sampler, [mine], logits[:1], numbers[:1])
    mixed = draw(sampler, [mine, *others], logits, numbers)
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


def test_a_stream_depends_on_seed_key_and_index():
    assert len({stream_key(s, k, i) for s in (0, 1) for k in ("a", "b") for i in (0, 1)}) == 8
    assert stream_key(0, "1", 11) != stream_key(0, "11", 1)


@pytest.mark.parametrize("vocab_size", [1, 5, 256, 257, 1000, 1024])
def test_the_winner_is_that_of_the_two_races(sampler, vocab_size):
    """Against float64, one row after another, for sizes that are whole blocks and not."""
    random = np.random.default_rng(vocab_size)
    logits = random.normal(size=(200, vocab_size)).astype(np.float32) * 3
    logits[random.random(logits.shape) < 0.3] = -np.inf
    logits[:, random.integers(vocab_size)] = 0.5
    numbers = drawn_numbers(200, vocab_size)
    drawn = draw(sampler, [SamplingParams()] * 200, logits, numbers)[:, 0]
    weights = np.exp(logits.astype(np.float64))
    assert drawn.tolist() == [naive_winner(w, n) for w, n in zip(weights, numbers, strict=True)]
    assert (weights[np.arange(200), drawn] > 0).all()


@pytest.mark.parametrize("extreme", [2.0**-54, 37.0])
def test_the_most_extreme_numbers_draw_tokens_that_have_weight(sampler, extreme):
    logits = np.full((3, 700), -np.inf, np.float32)
    logits[:, [300, 301, 690]] = [0.0, -3.0, -80.0]
    numbers = np.ones((3, 256 + 3), np.float32)
    numbers[:, [0, 178, 256, 258]] = extreme
    drawn = draw(sampler, [SamplingParams()] * 3, logits, numbers)[:, 0]
    assert set(drawn.tolist()) <= {300, 301, 690}


def test_the_last_bits_of_the_logits_change_no_draw(sampler):
    """A third of the weight is on tokens of so little each that their sum goes by rounding."""
    random = np.random.default_rng(2)
    logits = np.zeros(50_000, np.float32)
    logits[::1000] = 7.6
    rounded = logits + random.normal(size=logits.shape).astype(np.float32) * 2e-5
    before = draw_many(sampler, SamplingParams(), 300, logits)[:, 0]
    after = draw_many(sampler, SamplingParams(), 300, rounded)[:, 0]
    assert 40 < (before % 1000 > 0).sum() < 200, "rare tokens are drawn"
    assert np.array_equal(before, after)


def test_another_distribution_draws_other_tokens_about_as_often_as_it_differs(sampler):
    """That is how often drafts of another model are accepted, and of older weights."""
    random = np.random.default_rng(3)
    logits = random.normal(size=2000).astype(np.float32) * 3
    moved = logits + random.normal(size=logits.shape).astype(np.float32) * 0.3
    one, other = (naive_distribution(it, SamplingParams()) for it in (logits, moved))
    distance = np.abs(one - other).sum() / 2
    first = draw_many(sampler, SamplingParams(), 2000, logits)[:, 0]
    second = draw_many(sampler, SamplingParams(), 2000, moved)[:, 0]
    assert distance / 2 < (first != second).mean() < 2 * distance
