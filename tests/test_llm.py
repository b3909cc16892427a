"""The public face: vLLM's words, text in and out, errors, order."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny_files import CONTEXT

from runner import LLM, SamplingParams
from runner.errors import ParameterError, PromptError
from runner.models.blas import Blas
from runner.types import Prompt, PromptRequest, RequestOutput

FREE = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def llm(tiny_directory) -> LLM:
    return LLM(tiny_directory, max_batch_size=4)


def texts(outputs: list[RequestOutput]) -> list[list[str]]:
    return [[sample.text for sample in output.outputs] for output in outputs]


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def test_a_script_for_vllm_runs(llm):
    prompts = ["Hello, my name is", "The future of AI is"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, logprobs=1, seed=1)
    outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt and output.finished
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        (sample,) = output.outputs
        assert sample.index == 0 and len(sample.token_ids) == 16
        assert sample.finish_reason == "length" and sample.stop_reason is None
        assert len(sample.logprobs) == 16
        first = sample.logprobs[0][sample.token_ids[0]]
        assert first.rank >= 1 and first.decoded_token is not None
        assert sample.cumulative_logprob == pytest.approx(
            sum(step[i].logprob for i, step in zip(sample.token_ids, sample.logprobs, strict=True))
        )


def test_outputs_are_in_the_order_of_the_prompts(llm):
    prompts = [f"{i}" * (1 + 7 * (i % 3)) for i in range(11)]
    params = [SamplingParams(max_tokens=1 + 5 * (i % 4), ignore_eos=True) for i in range(11)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]


@pytest.mark.parametrize("as_list", [True, False])
def test_text_and_its_token_ids_are_the_same_prompt(llm, as_list):
    ids = llm.tokenizer.encode("abc")
    forms = ["abc", {"prompt": "abc"}, {"prompt_token_ids": ids}]
    greedy = SamplingParams(temperature=0, max_tokens=8)
    done = [llm.generate([f] if as_list else f, greedy, use_tqdm=False) for f in forms]
    assert token_ids(done[0]) == token_ids(done[1]) == token_ids(done[2])
    assert [o[0].prompt for o in done] == ["abc", "abc", None]


def test_samples_of_a_prompt_differ_and_come_in_order_of_their_index(llm):
    (output,) = llm.generate("abc", SamplingParams(n=5, max_tokens=12), use_tqdm=False)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 5


def test_a_call_with_a_seed_repeats_and_one_without_draws_anew(tiny_directory, llm):
    first, again = (llm.generate(["abc"] * 2, FREE, use_tqdm=False) for _ in range(2))
    assert token_ids(first) == token_ids(again)
    assert first[0].outputs[0].token_ids != first[1].outputs[0].token_ids
    unseeded = SamplingParams(max_tokens=20, ignore_eos=True)
    calls = [token_ids(llm.generate("abc", unseeded, use_tqdm=False)) for _ in range(2)]
    assert calls[0] != calls[1]
    scripts = [
        [token_ids(fresh.generate("abc", unseeded, use_tqdm=False)) for _ in range(2)]
        for fresh in (LLM(tiny_directory, seed=3), LLM(tiny_directory, seed=3))
    ]
    assert scripts[0] == scripts[1]
    other = LLM(tiny_directory, seed=4).generate("abc", unseeded, use_tqdm=False)
    assert token_ids(other) != scripts[0][0]


def test_chat_takes_one_conversation_or_several(llm):
    one = [{"role": "user", "content": "hi"}]
    greedy = SamplingParams(temperature=0, max_tokens=4)
    (alone,) = llm.chat(one, greedy, use_tqdm=False)
    assert alone.prompt == "<user>hi<a>"
    several = llm.chat([one, one], greedy, use_tqdm=False)
    assert texts(several) == [*texts([alone])] * 2
    options = {"mood": "!", "add_generation_prompt": False}
    (changed,) = llm.chat(one, greedy, use_tqdm=False, chat_template_kwargs=options)
    assert changed.prompt == "<user>hi!"


def test_a_stop_string_is_cut_off_unless_it_is_wanted(llm):
    whole = llm.generate("abc", FREE, use_tqdm=False)[0].outputs[0]
    stop = next(whole.text[i : i + 2] for i in range(4, 15) if whole.text[i : i + 2].isascii())
    cut, kept = (
        llm.generate(
            "abc",
            SamplingParams(
                max_tokens=20,
                ignore_eos=True,
                seed=1,
                stop=stop,
                include_stop_str_in_output=include,
            ),
            use_tqdm=False,
        )[0].outputs[0]
        for include in (False, True)
    )
    assert cut.stop_reason == kept.stop_reason == stop and cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert kept.text == cut.text + stop
    assert cut.token_ids == kept.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_min_tokens_leave_an_earlier_stop_string_in_the_text(llm):
    def ended(**options) -> tuple[str, list[int]]:
        params = SamplingParams(
            max_tokens=9, temperature=0, allowed_token_ids=ab, stop="b", min_tokens=4, **options
        )
        (output,) = llm.generate("xyz", params, use_tqdm=False)
        assert output.outputs[0].stop_reason == "b"
        return output.outputs[0].text, output.outputs[0].token_ids

    ab = llm.tokenizer.encode("b")
    assert ended() == ("bbbb", ab * 5)
    assert ended(include_stop_str_in_output=True) == ("bbbbb", ab * 5)


def test_bad_words_are_texts_and_a_bias_is_of_token_ids(llm):
    a, b, c = llm.tokenizer.encode("abc")
    likely = SamplingParams(temperature=0, max_tokens=8, logit_bias={a: 50, b: 40, str(c): 30})
    assert texts(llm.generate("x", likely, use_tqdm=False)) == [["aaaaaaaa"]]
    for words, text in (
        (["a"], "bbbbbbbb"),
        (["a", "b"], "cccccccc"),
        (["aa"], "abababab"),
        (["aa", "ba", "aba"], "abbbbbbb"),
        ([" aaa"], "aabaabaa"),
    ):
        params = replace(likely, bad_words=words)
        assert texts(llm.generate("aaa", params, use_tqdm=False)) == [[text]], words


def test_the_token_that_ended_a_row_is_in_its_ids_and_not_in_its_text(llm):
    whole = llm.generate("abc", FREE, use_tqdm=False)[0].outputs[0]
    last = whole.token_ids[7]
    end = whole.token_ids.index(last)
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, stop_token_ids=[last])
    ended = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert ended.token_ids == whole.token_ids[: end + 1] and ended.stop_reason == last
    assert ended.text == llm.tokenizer.decode(whole.token_ids[:end])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no tokens"),
        ("x" * CONTEXT, f"{CONTEXT} tokens"),
        ({"prompt_token_ids": [9999]}, "9999"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused_and_the_llm_goes_on(llm, prompt, message):
    with pytest.raises(PromptError, match=message):
        llm.generate(["fine", prompt], FREE, use_tqdm=False)
    assert len(llm.generate("fine", FREE, use_tqdm=False)) == 1


def test_mistakes_are_named(llm):
    with pytest.raises(ParameterError, match="2 entries for 1 prompts"):
        llm.generate(["a"], [FREE, FREE], use_tqdm=False)
    with pytest.raises(ParameterError, match="text"):
        llm.generate({"text": "a"}, FREE, use_tqdm=False)
    with pytest.raises(ParameterError, match="temperature=-1"):
        SamplingParams(temperature=-1)
    with pytest.raises(ParameterError, match="logit_bias has the token id 9999"):
        llm.generate("a", replace(FREE, logit_bias={9999: 1.0}), use_tqdm=False)
    with pytest.raises(ParameterError, match="allowed_token_ids has the token id 9999"):
        llm.check(replace(FREE, allowed_token_ids=[9999]))
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def requests(count: int) -> Iterator[PromptRequest | RequestOutput]:
    for index in range(count):
        prompt = Prompt(text="x" * CONTEXT if index == 2 else f"row {index}")
        yield PromptRequest(request_id=f"{index}", prompt=prompt, params=FREE, key=f"{index}")


def test_run_gives_a_bad_row_as_an_output_and_goes_on(llm):
    failed = RequestOutput(request_id="before", prompt=None, prompt_token_ids=[])
    done = {o.request_id: o for o in llm.run([failed, *requests(6)])}
    assert done.keys() == {"before", *"012345"}
    assert done["before"] is failed
    assert done["2"].error.type == "PromptError" and not done["2"].outputs
    assert all(o.error is None for key, o in done.items() if key not in ("2", "before"))


def test_run_pulls_requests_as_it_needs_them(llm):
    pulled = []

    def source():
        for request in requests(100):
            pulled.append(request)
            yield request

    next(llm.run(source()))
    assert len(pulled) < 20


def test_outputs_can_be_had_as_they_finish(llm):
    prompts = ["long", "short", "", "middle"]
    params = [SamplingParams(max_tokens=most, ignore_eos=True, seed=1) for most in (60, 2, 5, 20)]
    done = list(llm.as_completed(prompts, params))
    assert [output.request_id for output in done] == ["2", "1", "3", "0"]
    assert done[0].error.type == "PromptError"
    listed = llm.generate(["long"], params[0], use_tqdm=False)
    assert done[-1].outputs[0].token_ids == listed[0].outputs[0].token_ids


def test_an_abandoned_or_interrupted_run_leaves_nothing_behind(llm):
    run = llm.run(requests(10))
    next(run)
    with pytest.raises(RuntimeError, match="another run"):
        next(llm.run(requests(1)))
    run.close()
    steps = iter([False, False, True])
    assert list(llm.run(requests(2), interrupted=lambda: next(steps))) == []
    assert not llm.engine.has_unfinished
    assert len(list(llm.run(requests(2)))) == 2


def test_an_error_of_the_engine_is_not_hidden_by_the_next(tiny_directory, monkeypatch):
    llm, told = LLM(tiny_directory), iter(["first", "second"])

    def step():
        raise RuntimeError(next(told))

    monkeypatch.setattr(llm.engine, "step", step)
    with pytest.raises(RuntimeError, match="first"):
        llm.generate("a", FREE, use_tqdm=False)


def test_two_requests_of_one_name_are_refused(llm):
    same = [next(requests(1)), next(requests(1))]
    with pytest.raises(ValueError, match="in flight"):
        list(llm.run(same))


def test_the_bar_can_be_had(llm, capsys):
    llm.generate(["a", "b"], FREE)
    assert "2/2" in capsys.readouterr().err


def test_a_slow_blas_is_warned_of(llm):
    slow = replace(llm.loaded, blas=Blas("reference", warning="no optimised BLAS found"))
    with pytest.warns(UserWarning, match="no optimised BLAS"):
        LLM(slow)


@pytest.mark.real_model
def test_the_capital_of_france(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = smollm2.chat(messages, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.real_model
def test_batched_equals_alone_on_the_real_model(smollm2):
    """Law 1 with real weights: a mixed batch against each prompt by itself."""
    prompts = ["Once upon a time", "The", "def add(a, b):\n    ", "1 2 3 4 5 6 7 8 9 10 11 12"]
    params = [
        SamplingParams(max_tokens=12, seed=5, temperature=t, top_p=p, n=n)
        for t, p, n in [(0.0, 1.0, 1), (1.0, 1.0, 3), (0.7, 0.9, 2), (1.0, 0.95, 1)]
    ]
    together = smollm2.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (alone,) = smollm2.generate(prompt, one, use_tqdm=False)
        for ours, theirs in zip(output.outputs, alone.outputs, strict=True):
            assert ours.token_ids == theirs.token_ids
            np.testing.assert_allclose(ours.raw_logprobs, theirs.raw_logprobs, atol=1e-3)
            np.testing.assert_allclose(
                ours.processed_logprobs, theirs.processed_logprobs, atol=1e-3
            )
