"""How streams are cut into windows, and the numbers that come of sums."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.summary import Moments
from runner.errors import ParameterError
from runner.perplexity import (
    Definition,
    PerplexityOptions,
    Tokens,
    Window,
    perplexity_numbers,
    windows,
)

TOKENS = Tokens(bos=0, eos=1, adds_bos=False, max_model_len=256)


def definition(**options) -> Definition:
    return PerplexityOptions(**options).definition(TOKENS)


sizes = st.tuples(st.integers(2, 40), st.integers(0, 38)).map(
    lambda pair: {"window": pair[0], "stride": 1 + pair[1] % (pair[0] - 1)}
)


@given(st.integers(0, 300), sizes, st.sampled_from([None, "hf_stride"]))
def test_every_token_but_the_first_is_scored_once_and_in_order(length, size, preset):
    found = list(windows(length, definition(preset=preset, **size)))
    scored = [place for window in found for place in range(window.first, window.end)]
    assert scored == list(range(1, length))
    for window in found:
        assert 0 <= window.start < window.first < window.end <= length
        assert window.end - window.start <= size["window"]
    for window in found[1:]:
        assert window.end - window.first <= size["stride"]
        least = size["window"] - size["stride"]
        assert window.first - window.start >= least, "a token has less context than the others"


def test_the_windows_of_the_evaluation_harness_as_its_own_tests_have_them():
    """34 tokens behind a prefix, 10 at a time: the last window is filled from the left."""
    found = list(windows(35, definition(preset="lm_eval", window=11)))
    assert found == [Window(0, 1, 11), Window(10, 11, 21), Window(20, 21, 31), Window(24, 31, 35)]


def test_the_windows_of_llama_cpp_and_of_the_sliding_window():
    llama = definition(preset="llama_cpp", window=8)
    assert list(windows(23, llama)) == [Window(0, 5, 8), Window(8, 13, 16)]
    assert list(windows(7, llama)) == []
    sliding = definition(preset="hf_stride", window=8)
    assert sliding.stride == 4
    assert list(windows(14, sliding)) == [Window(0, 1, 8), Window(4, 8, 12), Window(8, 12, 14)]
    assert list(windows(12, sliding))[-1] == Window(4, 8, 12)


def test_what_the_model_decides():
    assert definition().prefix == "bos" and definition().window == 256
    no_bos = Tokens(bos=None, eos=7, adds_bos=False, max_model_len=None)
    found = PerplexityOptions().definition(no_bos)
    assert (found.prefix, found.prefix_token_id, found.window) == ("eos", 7, 2048)
    nothing = Tokens(bos=None, eos=None, adds_bos=False, max_model_len=9)
    assert PerplexityOptions().definition(nothing).prefix == "none"
    with pytest.raises(ParameterError, match="job.prefix=bos is not allowed: the tokenizer has no"):
        PerplexityOptions(prefix="bos").definition(no_bos)
    adding = Tokens(bos=0, eos=1, adds_bos=True, max_model_len=None)
    llama = PerplexityOptions(preset="llama_cpp")
    assert llama.definition(adding).prefix_token_id == 0 and llama.definition(adding).window == 512
    assert llama.definition(TOKENS).prefix == "none" and llama.definition(TOKENS).window == 256
    with pytest.raises(ParameterError, match="job.window=1 is not allowed: at least 2"):
        PerplexityOptions().definition(Tokens(bos=0, eos=1, adds_bos=True, max_model_len=1))


def moments(*values: float) -> Moments:
    return sum((Moments(count=1, mean=v, least=v, most=v) for v in values), Moments())


def test_sums_are_divided_once_and_no_perplexity_is_averaged():
    columns = {
        "logprobs": moments(-1.0, -3.0, -8.0),
        "num_tokens": moments(1, 3),
        "num_words": moments(1, 1),
        "num_bytes": moments(2, 6),
    }
    found = perplexity_numbers(columns, definition())
    assert found["token_perplexity"] == pytest.approx(math.exp(4))
    assert found["word_perplexity"] == pytest.approx(math.exp(6))
    assert found["byte_perplexity"] == pytest.approx(math.exp(1.5))
    assert found["bits_per_byte"] == pytest.approx(1.5 / math.log(2))
    error = math.sqrt(((4 - 1) ** 2 + 1 + 16) / 2 / 3)
    assert found["mean_logprob_stderr"] == pytest.approx(error)
    assert found["token_perplexity_stderr"] == pytest.approx(error * math.exp(4))
    assert (found["tokens"], found["scored_tokens"], found["documents"]) == (4, 3, 2)


def test_a_number_that_does_not_exist_is_null():
    def found(*values: float) -> dict:
        ones = {f"num_{unit}": moments(1) for unit in ("tokens", "words", "bytes")}
        return perplexity_numbers(ones | {"logprobs": moments(*values)}, definition())

    assert found()["token_perplexity"] is found()["mean_logprob"] is None
    assert found(-2.0)["token_perplexity_stderr"] is None
    assert found(-1e6)["token_perplexity"] is None and found(-1e6)["sum_logprob"] == -1e6
    impossible = found(-math.inf)
    assert impossible["token_perplexity"] is impossible["sum_logprob"] is None
    with_ids = perplexity_numbers({"num_tokens": moments(5), "logprobs": moments(-1)}, definition())
    assert with_ids["words"] is with_ids["bits_per_byte"] is None


def test_words_are_counted_as_the_definition_says():
    assert definition().count_words(" two  words\n") == 2
    assert definition(preset="lm_eval").count_words(" two  words\n") == 4
