"""`LLM.score` and prompt_logprobs in text: what is scored, in whose order, in which shape."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import assert_scored, naive_prompt_logprobs, request
from tiny_files import CONTEXT

from runner import LLM, SamplingParams, Score
from runner.errors import ParameterError, PromptError
from runner.scores import Pair, Tokens, encode_pairs, in_order_of_work, scored_texts
from runner.types import TokenLogprobs


@pytest.fixture(scope="module")
def llm(tiny_directory) -> LLM:
    return LLM(tiny_directory, max_batch_size=4)


class Words:
    """A tokenizer that takes a space to belong to the word behind it, and adds a first token."""

    def __init__(self, *, first: bool = False) -> None:
        self._first = [1] if first else []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        words = text.replace(" ", "\n ").split("\n")
        ids = [100 + sum(map(ord, word)) for word in words if word]
        return self._first * add_special_tokens + ids


def expected(llm: LLM, token_ids: list[int], start: int = 1, num_top: int = 0) -> TokenLogprobs:
    asked = request(token_ids, max_tokens=0, prompt_logprobs=num_top, logprobs_start=start)
    return naive_prompt_logprobs(llm.model, asked)


def test_a_text_is_scored_by_the_model_token_for_token(llm):
    texts = ["a longer text than the others", "ab", "x" * 90, "a"]
    scores = llm.score(texts, use_tqdm=False)
    assert [score.index for score in scores] == [0, 1, 2, 3]
    for text, score in zip(texts, scores, strict=True):
        assert score.token_ids == llm.tokenizer.encode(text)
        reference = expected(llm, score.token_ids)
        assert score.logprobs[0] is None and score.ranks == [None, *reference.ranks]
        np.testing.assert_allclose(score.logprobs[1:], reference.logprobs, atol=1e-4)
        assert score.num_tokens == len(text) - 1
        assert score.sum_logprob == pytest.approx(sum(reference.logprobs), abs=1e-3)
        assert score.is_greedy == all(rank == 1 for rank in reference.ranks)
        assert score.entropies is None and score.top_logprobs is None and score.error is None
    assert [score.is_greedy for score in scores][3], "nothing is scored of one token"


def test_continuations_are_scored_in_their_context_and_forward_it_once(tiny_directory):
    llm = LLM(tiny_directory)
    context = "The context that all of the answers share: " * 2
    answers = ["yes", "no", "perhaps"]
    before = llm.engine.stats.num_prefill_tokens
    scores = llm.score([(context, answers), (context, "no")], use_tqdm=False)
    forwarded = llm.engine.stats.num_prefill_tokens - before
    assert forwarded < len(context) + 4 * (len(" perhaps") + 1)
    assert [(s.index, s.choice) for s in scores] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for score, answer in zip(scores, [*answers, "no"], strict=True):
        whole = llm.tokenizer.encode(context + answer)
        assert llm.tokenizer.decode(score.token_ids) == f" {answer}"
        reference = expected(llm, whole, start=len(whole) - len(score.token_ids))
        np.testing.assert_allclose(score.logprobs, reference.logprobs, atol=1e-4)
        assert score.ranks == reference.ranks and score.num_tokens == len(answer) + 1


def test_choices_are_equal_scored_together_one_by_one_and_without_a_cache(tiny_directory, llm):
    inputs = [("A question? ", ["one", "another", "a third one"]), ("Another: ", ["x" * 40, "y"])]
    together = llm.score(inputs, use_tqdm=False)
    plain = LLM(tiny_directory, prefix_cache_bytes=0, prefill_step_size=3)
    apart = [
        plain.score([(context, choice)], use_tqdm=False)[0]
        for context, choices in inputs
        for choice in choices
    ]
    for one, other in zip(together, apart, strict=True):
        assert one.token_ids == other.token_ids and one.ranks == other.ranks
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_each_of_several_contexts_is_forwarded_once(tiny_directory):
    llm = LLM(tiny_directory)
    contexts = [f"{name} context that is like none of the others. " for name in "ABC"]
    scores = llm.score([(context, ["a", "b", "c"]) for context in contexts], use_tqdm=False)
    assert len(scores) == 9
    num_alone = sum(map(len, contexts))
    assert llm.engine.stats.num_prefill_tokens < num_alone + 9 * 3


def test_text_token_ids_and_a_mixture_of_them_are_the_same_pair(llm):
    before, after = llm.tokenizer.encode("some context"), llm.tokenizer.encode("more")
    pairs = [(a, b) for a in ("some context", before) for b in ("more", after)]
    first, *others = llm.score([*pairs, (before, [after, "more"])], use_tqdm=False)
    assert first.token_ids == after and len(others) == 5
    for other in others:
        assert other.token_ids == after
        np.testing.assert_allclose(other.logprobs, first.logprobs, atol=1e-4)
    (whole,) = llm.score([before + after], use_tqdm=False)
    np.testing.assert_allclose(whole.logprobs[len(before) :], first.logprobs, atol=1e-4)


def test_alternatives_and_entropy_come_where_they_are_asked_for(llm):
    (score,) = llm.score(["abcdef"], top_logprobs=3, entropy=True, use_tqdm=False)
    asked = request(
        score.token_ids, max_tokens=0, prompt_logprobs=3, logprobs_start=1, prompt_entropy=True
    )
    reference = naive_prompt_logprobs(llm.model, asked)
    assert score.top_logprobs[0] is None and score.entropies[0] is None
    np.testing.assert_allclose(score.entropies[1:], reference.entropies, atol=1e-4)
    assert [list(top) for top in score.top_logprobs[1:]] == reference.top_token_ids
    for top, values in zip(score.top_logprobs[1:], reference.top_logprobs, strict=True):
        np.testing.assert_allclose(list(top.values()), values, atol=1e-4)


def test_scores_come_as_they_are_there_longest_first_and_errors_among_them(llm):
    inputs = ["ab", "", "x" * (CONTEXT + 1), ("abc", ""), "y" * CONTEXT, [9999, 5], ("", "hi")]
    done = list(llm.score_as_completed(inputs))
    scores = {score.index: score for score in done}
    assert len(done) == len(inputs) == len(scores)
    good = [score.index for score in done if score.error is None]
    assert good[0] == 4 and set(good) == {0, 4, 6}
    assert "empty" in scores[1].error.message and scores[1].error.type == "PromptError"
    assert f"{CONTEXT + 1} tokens" in scores[2].error.message
    assert "no tokens of its own" in scores[3].error.message
    assert "9999" in scores[5].error.message
    assert scores[2].logprobs == [] and scores[2].num_tokens == 0
    assert scores[4].num_tokens == CONTEXT - 1
    assert scores[6].logprobs[0] is None and scores[6].num_tokens == 1
    with pytest.raises(PromptError, match="input 1: .*empty"):
        llm.score(inputs[:2], use_tqdm=False)
    assert len(llm.score(["fine"], use_tqdm=False)) == 1


@pytest.mark.parametrize(
    "given", [5, None, ("a",), ("a", "b", "c"), ("a", 5), ("a", ["b", 5]), (["a"], "b"), ["a", "b"]]
)
def test_what_is_no_text_is_refused(llm, given):
    with pytest.raises(ParameterError, match="input 1 cannot be scored"):
        llm.score(["fine", given], use_tqdm=False)


def test_a_number_of_alternatives_out_of_range_is_refused(llm):
    for wrong in (-1, 101):
        with pytest.raises(ParameterError, match=f"top_logprobs={wrong}"):
            llm.score(["a"], top_logprobs=wrong, use_tqdm=False)


def encode_pair(context: Tokens, continuation: Tokens, tokenizer: Any) -> Any:
    """Encoded among others, which are to leave it as it is."""
    pairs = [Pair(context, "other"), Pair(context, continuation), Pair(None, "alone")]
    return encode_pairs(pairs, tokenizer)[1]


def test_a_pair_is_split_as_the_evaluation_harness_does():
    """Spaces move to the continuation; the context keeps as many tokens as it has alone."""
    encode = Words().encode
    whole = encode("a few words")
    assert len(whole) == 3
    for context, continuation in (("a few", " words"), ("a few ", "words")):
        assert encode_pair(context, continuation, Words()) == (whole, 2)
    joined = encode("a fewer")
    assert encode_pair("a few", "er", Words()) == (joined, 2), "their last token is not the context"
    assert encode_pair("", "a few", Words()) == (encode("a few"), 0)
    assert encode_pair("", "a few", Words(first=True)) == ([1, *encode("a few")], 1)
    assert encode_pair("a", " few", Words(first=True)) == ([1, *encode("a few")], 2)
    assert encode_pair([1, 2], " few", Words(first=True)) == ([1, 2, *encode(" few")], 2)


def test_texts_are_run_longest_first_with_contexts_together():
    inputs = [[5] * 3, ([7, 8], [[1], [1, 2, 3, 4]]), [5] * 5, ([7, 9], [6]), ([7, 8], [2, 2])]
    order = in_order_of_work(scored_texts(inputs, Words()))
    places = [(text.index, text.choice) for text in order]
    assert places == [(1, 1), (4, 0), (1, 0), (2, 0), (0, 0), (3, 0)]


def test_a_score_knows_its_sums():
    score = Score(index=0, token_ids=[5, 6, 7], logprobs=[None, -0.5, -1.5], ranks=[None, 1, 1])
    assert (score.sum_logprob, score.num_tokens, score.is_greedy) == (-2.0, 2, True)
    other = Score(index=0, token_ids=[5], logprobs=[-math.inf], ranks=[97])
    assert (other.sum_logprob, other.is_greedy) == (-math.inf, False)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_have_the_shape_of_vllms(llm, max_tokens):
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=2, ignore_eos=True)
    plain = SamplingParams(max_tokens=3)
    prompts = ["abcabc", "x", "other"]
    outputs = llm.generate(prompts, [params, params, plain], use_tqdm=False)
    assert outputs[2].prompt_logprobs is None and outputs[2].prompt_token_logprobs is None
    assert outputs[1].prompt_logprobs == [None]
    (first, *steps), ids = outputs[0].prompt_logprobs, outputs[0].prompt_token_ids
    reference = expected(llm, ids, num_top=2)
    assert first is None and len(steps) == len(ids) - 1
    assert_scored(outputs[0].prompt_token_logprobs, reference)
    for place, step in enumerate(steps):
        token_id = ids[place + 1]
        assert next(iter(step)) == token_id and 2 <= len(step) <= 3
        assert step[token_id].rank == reference.ranks[place]
        assert step[token_id].logprob == pytest.approx(reference.logprobs[place], abs=1e-4)
        assert step[token_id].decoded_token == llm.tokenizer.decode([token_id])
        for rank, (other, logprob) in enumerate(
            zip(reference.top_token_ids[place], reference.top_logprobs[place], strict=True), 1
        ):
            assert (step[other].rank, step[other].logprob) == (
                rank,
                pytest.approx(logprob, abs=1e-4),
            )
            assert step[other].decoded_token is not None
    (sample,) = outputs[0].outputs
    assert len(sample.token_ids) == max_tokens and sample.finish_reason == "length"
    assert max_tokens or sample.text == ""


def test_an_abandoned_run_of_scores_leaves_nothing_behind(llm):
    scores = llm.score_as_completed(["abc" * 20] * 20)
    next(scores)
    scores.close()
    assert not llm.engine.has_unfinished
    assert len(llm.score(["a", "b"], use_tqdm=False)) == 2


def test_the_bar_counts_scored_tokens(llm, capsys):
    llm.score(["ab", "abc"])
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("2 rows, ") and ", 0 tok/s" not in shown
    llm.generate("abcd", SamplingParams(max_tokens=0, prompt_logprobs=0))
    shown = capsys.readouterr().err.splitlines()[-1]
    assert " 1/1 rows, " in shown and ", 0 tok/s" not in shown


@pytest.mark.real_model
def test_scores_equal_the_real_models_own_forward(smollm2):
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome.",
        "def add(a, b):\n    return a + b\n",
        "Grüße, 世界! " * 40,
    ]
    for score in smollm2.score(texts, use_tqdm=False):
        logits = np.array(smollm2.model(mx.array([score.token_ids]))[0]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = logprobs[np.arange(len(score.token_ids) - 1), score.token_ids[1:]]
        np.testing.assert_allclose(score.logprobs[1:], chosen, atol=1e-4)
    question = "Question: What is the capital of France?\nAnswer:"
    answers = [" Paris", " London", " Berlin", " Madrid"]
    scores = smollm2.score([(question, answers)], use_tqdm=False)
    assert max(scores, key=lambda score: score.sum_logprob).choice == 0
