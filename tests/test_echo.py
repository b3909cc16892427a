"""`echo`: the prompt before the completion, one logprob and one place for every token of both."""

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from runner import LLM, SamplingParams
from runner.errors import ParameterError

FREE = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, skip_special_tokens=False)
ECHO = SamplingParams(**{**vars(FREE), "echo": True})


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> LLM:
    return LLM(tiny_directory)


def changed(**options) -> SamplingParams:
    return SamplingParams(**{**vars(ECHO), **options})


def teacher_forced(llm: LLM, ids: list[int]) -> list[float]:
    """By one full forward of mlx-lm's and float64."""
    logits = np.array(llm.model(mx.array([ids]))[0]).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return [float(logprobs[at, token_id]) for at, token_id in enumerate(ids[1:])]


PROMPTS = ["a prompt", "Grüße, 世界! 🙂", {"prompt_token_ids": [5, 60, 7]}, "x"]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 4}, {"logprobs": 2}], ids=str
)
def test_echoed_is_teacher_forced_is_what_was_recorded_while_sampling(llm, options):
    """Law 5, as a user sees it."""
    params = changed(prompt_logprobs=0, n=2, **options)
    plain = llm.generate(PROMPTS, SamplingParams(**{**vars(params), "echo": False}), use_tqdm=False)
    for output, without in zip(llm.generate(PROMPTS, params, use_tqdm=False), plain, strict=True):
        (score,) = llm.score([output.prompt_token_ids], use_tqdm=False)
        for sample, other in zip(output.outputs, without.outputs, strict=True):
            echoed, own = sample.echoed, sample.token_ids
            assert echoed.token_ids == output.prompt_token_ids + own
            assert (own, sample.raw_logprobs) == (other.token_ids, other.raw_logprobs)
            assert other.echoed is None
            expected = teacher_forced(llm, echoed.token_ids)
            assert echoed.logprobs[0] is None
            np.testing.assert_allclose(echoed.logprobs[1:], expected, atol=1e-4)
            np.testing.assert_allclose(sample.raw_logprobs, expected[-len(own) :], atol=1e-4)
            prompt = slice(1, len(output.prompt_token_ids))
            np.testing.assert_allclose(echoed.logprobs[prompt], score.logprobs[1:], atol=1e-4)


def test_the_text_is_the_prompt_and_the_completion_and_every_token_has_its_place(llm):
    plain = llm.generate(PROMPTS, FREE, use_tqdm=False)
    for output, without in zip(llm.generate(PROMPTS, ECHO, use_tqdm=False), plain, strict=True):
        (sample,), echoed = output.outputs, output.outputs[0].echoed
        decode = llm.tokenizer.decode
        prompt = decode(output.prompt_token_ids) if output.prompt is None else output.prompt
        assert sample.text == prompt + without.outputs[0].text
        assert len(echoed.text_offsets) == len(echoed.token_ids) == len(echoed.logprobs)
        num_prompt = len(output.prompt_token_ids)
        assert echoed.text_offsets[num_prompt] == len(prompt)
        # A token is a byte here, so that those before one give the text up to it.
        for place, offset in enumerate(echoed.text_offsets[:num_prompt]):
            before = decode(output.prompt_token_ids[:place])
            assert offset == len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert all(a <= b for a, b in pairwise(echoed.text_offsets))
        assert echoed.text_offsets[-1] <= len(sample.text)


def test_a_character_between_prompt_and_completion_is_decoded_in_two_parts(llm):
    """Each side says what it holds of it: the prompt's text never depends on what follows."""
    first, *rest = llm.tokenizer.encode("世", add_special_tokens=False)
    params = changed(allowed_token_ids=[rest[0]], max_tokens=1)
    (output,) = llm.generate({"prompt_token_ids": [5, first]}, params, use_tqdm=False)
    (sample,) = output.outputs
    assert sample.token_ids == [rest[0]]
    assert sample.text == llm.tokenizer.decode([5, first]) + llm.tokenizer.decode([rest[0]])
    assert sample.echoed.text_offsets == [0, 1, 2] and sample.text[1:] == "\ufffd\ufffd"


def test_the_prompts_logprobs_come_where_any_are_asked_for(llm):
    def asked(**options):
        (output,) = llm.generate("abc", changed(**options), use_tqdm=False)
        return output, output.outputs[0]

    output, sample = asked()
    assert sample.echoed.logprobs[:3] == [None] * 3 and None not in sample.echoed.logprobs[3:]
    assert output.prompt_logprobs is None
    output, sample = asked(logprobs=2)
    assert None not in sample.echoed.logprobs[1:]
    assert [len(step) in (2, 3) for step in output.prompt_logprobs[1:]] == [True, True]
    output, sample = asked(logprobs=2, prompt_logprobs=0)
    assert [len(step) for step in output.prompt_logprobs[1:]] == [1, 1]


def test_nothing_sampled_is_the_prompt_by_itself(llm):
    params = SamplingParams(max_tokens=0, echo=True)
    (output,) = llm.generate("abc", params, use_tqdm=False)
    (sample,) = output.outputs
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("abc", [], "length")
    (score,) = llm.score(["abc"], use_tqdm=False)
    assert sample.echoed.logprobs[1:] == pytest.approx(score.logprobs[1:], abs=1e-5)
    assert sample.echoed.text_offsets == [0, 1, 2]
    with pytest.raises(ParameterError, match="0 beside prompt_logprobs or echo"):
        SamplingParams(max_tokens=0)


def test_special_tokens_and_what_a_stop_string_cuts_take_no_place(llm):
    ids = [0, *llm.tokenizer.encode("ab", add_special_tokens=False)]
    (output,) = llm.generate({"prompt_token_ids": ids}, ECHO, use_tqdm=False)
    assert output.outputs[0].text.startswith("<s>ab"), "token ids say all that they hold"
    assert output.outputs[0].echoed.text_offsets[:4] == [0, 3, 4, 5]
    whole = llm.generate("abc", FREE, use_tqdm=False)[0].outputs[0].text
    stop = whole[4:6]
    (sample,) = llm.generate("abc", changed(stop=[stop]), use_tqdm=False)[0].outputs
    end = 3 + whole.index(stop)
    assert sample.text == "abc" + whole[: end - 3]
    assert max(sample.echoed.text_offsets) <= end == len(sample.text)
    (output,) = llm.chat([[{"role": "user", "content": "hi"}]], ECHO, use_tqdm=False)
    assert output.outputs[0].text.startswith("<user>hi<a>")
