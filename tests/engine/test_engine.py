from dataclasses import replace

import mlx.core as mx
import pytest
from tiny import EOS, VOCAB_SIZE, assert_same, make_engine, naive_sample, request, run, tiny_model

from runner.errors import ParameterError, PromptError

MODEL = tiny_model()
LONG = {"ignore_eos": True, "temperature": 1.5}


def as_text(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    return "".join(chr(token_id + 200) for token_id in token_ids)


def one(prompt=(5, 6, 7), engine=None, **params):
    return run(engine or make_engine(MODEL), [request(prompt, **params)])["r", 0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([5] * 256, "256 tokens"),
        ([5, VOCAB_SIZE], f"token id {VOCAB_SIZE}"),
        ([-1], "token id -1"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(prompt, message):
    engine = make_engine(MODEL)
    with pytest.raises(PromptError, match=message):
        engine.add(request(prompt))
    assert not engine.has_unfinished


@pytest.mark.parametrize("option", ["max_batch_size", "prefill_step_size", "max_model_len"])
def test_a_size_below_one_is_refused(option):
    with pytest.raises(ParameterError, match=f"{option}=0"):
        make_engine(MODEL, **{option: 0})


def test_stop_strings_need_a_decode():
    with pytest.raises(ParameterError, match="decode"):
        make_engine(MODEL).add(request([5], stop=["x"]))


def test_no_limit_at_all_is_refused():
    with pytest.raises(ParameterError, match="max_tokens=None"):
        make_engine(MODEL, max_model_len=None).add(request([5], max_tokens=None))


def test_without_max_tokens_the_context_is_filled():
    engine = make_engine(MODEL, max_model_len=40)
    done = one(engine=engine, max_tokens=None, **LONG)
    assert len(done.token_ids) == 37 and done.finish_reason == "length"
    assert len(one(range(5, 44), engine, max_tokens=9, **LONG).token_ids) == 1


def test_growing_past_the_first_capacity_changes_nothing():
    engine = make_engine(MODEL, max_model_len=None)
    long = one(engine=engine, max_tokens=600, **LONG)
    assert len(long.token_ids) == 600
    short = one(max_tokens=200, **LONG)
    assert long.token_ids[:200] == short.token_ids


def test_end_of_sequence_is_kept_and_ends_the_row():
    options = {"max_tokens": 200, "temperature": 4.0, "logit_bias": {EOS: 4.0}}
    free = one(ignore_eos=True, **options)
    assert free.token_ids.index(EOS) > 5, "choose another prompt"
    ended = one(**options)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(EOS) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert len(ended.raw_logprobs) == len(ended.processed_logprobs) == len(ended.token_ids)


def test_stop_token_ids_end_the_row_and_are_named():
    free = one(max_tokens=30, **LONG)
    stop = free.token_ids[12]
    ended = one(max_tokens=30, stop_token_ids=[stop], **LONG)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_a_stop_string_over_two_tokens_ends_the_row():
    engine = make_engine(MODEL, decode=as_text)
    free = one(engine=engine, max_tokens=30, **LONG)
    stop = as_text(free.token_ids[10:12], skip_special_tokens=True)
    ended = one(engine=engine, max_tokens=30, stop=["nowhere", stop], **LONG)
    assert ended.token_ids == free.token_ids[:12]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_logprobs_hold_the_sampled_token_and_as_many_alternatives_as_asked():
    requests = [request([5, 6], f"{k}", logprobs=k, max_tokens=4, **LONG) for k in (0, 2, 5)]
    done = run(make_engine(MODEL), [*requests, request([5, 6], "none", max_tokens=4)])
    assert done["none", 0].logprobs is None
    for k in (0, 2, 5):
        completion = done[str(k), 0]
        for token_id, raw, step in zip(
            completion.token_ids, completion.raw_logprobs, completion.logprobs, strict=True
        ):
            assert k <= len(step) <= k + 1 and step[token_id].logprob == raw
            others = [entry.rank for entry in list(step.values())[1:]]
            assert others == sorted(others)


def test_a_group_larger_than_the_batch_runs_in_waves():
    group = run(make_engine(MODEL, max_batch_size=3), [request([5, 6, 7], n=8, **LONG)])
    wide = run(make_engine(MODEL, max_batch_size=16), [request([5, 6, 7], n=8, **LONG)])
    assert len(group) == 8
    for key, completion in group.items():
        assert_same(completion, wide[key])


def test_the_shared_prompt_is_forwarded_once():
    engine = make_engine(MODEL)
    run(engine, [request([5] * 20, n=6)])
    assert engine.stats.num_prefill_tokens == 19
    assert engine.stats.num_prompt_tokens == 20


def test_requests_are_pulled_as_they_are_needed():
    pulled = []

    def source():
        for index in range(50):
            pulled.append(index)
            yield request([5, 6], f"r{index}", max_tokens=2)

    engine = make_engine(MODEL, max_batch_size=2)
    next(engine.run(source()))
    assert len(pulled) <= 2 + 4 * 2, "a batch runs, four wait"


def test_rows_are_dropped_as_the_batch_drains():
    engine = make_engine(MODEL, max_batch_size=8)
    short = [request([5, 6], f"s{i}", max_tokens=2, **LONG) for i in range(7)]
    run(engine, [request([7, 8], "long", max_tokens=50, **LONG), *short])
    assert engine.stats.num_row_steps < 8 * 6 + 50
    assert engine.stats.num_completion_tokens == 7 * 2 + 50
    assert engine.stats.occupancy > 0.7


def test_a_model_that_gives_nan_ends_the_row_as_an_error_and_spares_the_next():
    poisoned = tiny_model()
    weight = poisoned.model.embed_tokens.weight
    weight[90] = mx.nan
    poisoned.args.tie_word_embeddings = False
    poisoned.lm_head = MODEL.model.embed_tokens.as_linear
    engine = make_engine(poisoned, max_batch_size=1)
    done = run(engine, [request([5, 90, 7], "bad"), request([5, 6, 7], "good")])
    assert done["bad", 0].finish_reason == "error"
    assert done["bad", 0].error.type == "ModelOutputError" and done["good", 0].error is None
    clean = run(make_engine(poisoned, max_batch_size=1), [request([5, 6, 7], "good")])
    assert_same(done["good", 0], clean["good", 0])


def test_the_shortest_and_the_longest_beside_each_other():
    """Each as it would be alone: one token of prompt or of completion, an end at once, no room."""
    edges = {
        "one token of prompt": request([5], "one token of prompt"),
        "one token": request([5, 6, 7], "one token", max_tokens=1),
        "ends at once": request([9, 8], "ends at once", logit_bias={EOS: 100.0}),
        "one of one": request([11], "one of one", max_tokens=1, logit_bias={EOS: 100.0}),
        "fills the context": request([7] * 39, "fills the context", max_tokens=None),
    }
    done = run(make_engine(MODEL, max_model_len=40, prefill_step_size=16), edges.values())
    for name, one in edges.items():
        limit = 1 if name == "fills the context" else one.params.max_tokens
        alone = naive_sample(MODEL, replace(one, params=replace(one.params, max_tokens=limit)), 0)
        assert_same(done[name, 0], alone)
    assert done["ends at once", 0].token_ids == [EOS]
    assert done["one of one", 0].finish_reason == "stop"
    assert done["fills the context", 0].finish_reason == "length"


def test_rows_of_clients_never_wait_for_more_than_a_chunk_of_anothers_prompt() -> None:
    engine = make_engine(tiny_model(), prefill_step_size=8, order="fcfs", max_batch_size=8)
    engine.add(request([5, 6, 7], "stream", max_tokens=40))
    while not engine.sequences or not engine.sequences[0].token_ids:
        engine.step()
    engine.add(request([3 + i % 20 for i in range(100)], "long", max_tokens=2))
    before = engine.stats.num_prefill_tokens
    for _ in range(10):
        num_tokens = len(engine.sequences[0].token_ids)
        engine.step()
        assert len(engine.sequences[0].token_ids) == num_tokens + 1
        assert engine.stats.num_prefill_tokens - before <= 8
        before = engine.stats.num_prefill_tokens


@pytest.mark.parametrize("max_tokens", [4, 0])
def test_a_long_prefill_that_nobody_waits_for_ends_with_the_next_step(max_tokens: int) -> None:
    engine = make_engine(tiny_model(), prefill_step_size=8)
    scores = {"prompt_logprobs": 0} if max_tokens == 0 else {"n": 2}
    prompt = [3 + i % 20 for i in range(100)]
    engine.add(request(prompt, "gone", max_tokens=max_tokens, **scores))
    for _ in range(3):
        engine.step()
    engine.abort("gone")
    before = engine.stats.num_prefill_tokens
    done = engine.step()
    assert [it.finish_reason for it in done] == ["abort"] * (1 if max_tokens == 0 else 2)
    assert engine.stats.num_prefill_tokens == before and not engine.has_unfinished
    asked = [request(prompt, "gone", max_tokens=4)]
    (fresh,) = run(make_engine(tiny_model()), asked).values()
    (again,) = run(engine, asked).values()
    assert_same(again, fresh)
