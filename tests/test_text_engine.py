"""Requests as text, a step at a time: what is told on the way is what comes out in the end."""

from collections import defaultdict
from dataclasses import replace

import pytest
from tiny_adapters import random_adapter
from tiny_files import save_tiny_model

from runner import LLM, SamplingParams
from runner.prompts import prompt_digest
from runner.text_stream import TextDelta
from runner.types import Prompt, PromptRequest, RequestOutput

FREE = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("merging"), merges=["a b", "Ċ Ċ", "t h"])


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return LLM(directory, max_batch_size=4)


def request(name: str, text: str = "abba", **changes) -> PromptRequest:
    return PromptRequest(
        request_id=name, prompt=Prompt(text=text), params=replace(FREE, **changes), key=name
    )


def watched(llm: LLM, *requests: PromptRequest) -> tuple[list[TextDelta], list[RequestOutput]]:
    """What was told of the requests, and their outputs."""
    engine, told, done = llm.text_engine, [], []
    for one in requests:
        assert engine.add(one, told.append) is None
    while engine.engine.has_unfinished:
        done += engine.step()
    return told, sorted(done, key=lambda output: output.request_id)


def check_told(told: list[TextDelta], outputs: list[RequestOutput]) -> None:
    """The pieces of each sample make the sample."""
    by_sample = defaultdict(list)
    for delta in told:
        by_sample[delta.output.request_id, delta.index].append(delta)
    for output in outputs:
        for sample in output.outputs:
            deltas = by_sample.pop((output.request_id, sample.index))
            assert "".join(delta.text for delta in deltas) == sample.text
            assert [i for delta in deltas for i in delta.token_ids] == sample.token_ids
            raw_logprobs = [x for delta in deltas for x in delta.raw_logprobs]
            assert raw_logprobs == pytest.approx(sample.raw_logprobs, abs=1e-5)
            assert [delta.completion for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].completion is sample
    assert not by_sample


def test_pieces_of_a_sample_make_the_sample(llm):
    told, outputs = watched(
        llm, request("a", n=3), request("b", logprobs=2), request("c", max_tokens=1)
    )
    check_told(told, outputs)
    assert len(told) > 30, "it is told step by step"
    steps = [step for delta in told if delta.output.request_id == "b" for step in delta.logprobs]
    assert len(steps) == 24 and all(len(step) >= 2 for step in steps)


def test_the_beginning_of_a_stop_string_is_held_back(llm):
    (plain,) = llm.generate("abba", FREE, use_tqdm=False)
    text = plain.outputs[0].text
    for start in range(4, 10):
        stop = (text[start : start + 3], text[start + 1] + "\N{SNOWMAN}")
        told, outputs = watched(llm, replace_key(request("a", stop=stop)))
        check_told(told, outputs)
        assert outputs[0].outputs[0].finish_reason == "stop"
        told, outputs = watched(
            llm, replace_key(request("a", stop=stop, include_stop_str_in_output=True))
        )
        check_told(told, outputs)
        assert outputs[0].outputs[0].text.endswith(stop[0])


def replace_key(one: PromptRequest) -> PromptRequest:
    """The draws of `LLM.generate` for the same prompt."""
    return replace(one, key=f"{prompt_digest(one.prompt)}/0")


def test_half_a_character_is_never_shown(llm):
    smile = llm.get_tokenizer().encode("\N{GRINNING FACE}")
    bias = dict.fromkeys(smile, 100.0)
    told, outputs = watched(llm, request("a", logit_bias=bias, max_tokens=64, seed=5))
    check_told(told, outputs)
    shown = "".join(delta.text for delta in told[:-1])
    assert outputs[0].outputs[0].text.startswith(shown)


def test_what_starts_over_is_told_once(directory, monkeypatch):
    llm = LLM(directory, max_batch_size=4)
    engine, count = llm.text_engine.engine, 0
    forward = engine._launch

    def failing():
        nonlocal count
        count += 1
        if count == 6:
            raise MemoryError("[malloc] Unable to allocate 1 bytes")
        return forward()

    monkeypatch.setattr(engine, "_launch", failing)
    with pytest.warns(UserWarning, match="memory ran out"):
        told, outputs = watched(llm, request("a", n=2), request("b"))
    assert engine.stats.num_halvings == 1
    check_told(told, outputs)


def test_a_request_that_was_ended_has_no_output_and_says_no_more(llm):
    engine, told = llm.text_engine, []
    engine.add(request("gone", n=2), told.append)
    engine.add(request("stays"), told.append)
    for _ in range(5):
        engine.step()
    engine.abort("gone")
    num_told = sum(delta.output.request_id == "gone" for delta in told)
    done = []
    while engine.engine.has_unfinished:
        done += engine.step()
    assert [output.request_id for output in done] == ["stays"]
    assert sum(delta.output.request_id == "gone" for delta in told) == num_told
    assert engine.request_ids == []


def test_a_new_engine_has_the_adapters_of_the_one_that_failed(directory):
    llm = LLM(directory, max_batch_size=4)
    weights, _ = random_adapter(llm.model, 3)
    llm.engine.load_adapter("tuned", weights)
    before = llm.generate("abba", FREE, adapter="tuned", use_tqdm=False)
    llm.text_engine.add(request("lost"))
    llm.text_engine.step()
    llm.restart()
    assert not llm.engine.has_unfinished and llm.text_engine.request_ids == []
    after = llm.generate("abba", FREE, adapter="tuned", use_tqdm=False)
    assert after[0].outputs[0].token_ids == before[0].outputs[0].token_ids
    assert llm.weight_version == 1
