"""Penalties, biases and forbidden tokens: by hand, beside plain rows, and in reused slots."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import EOS, VOCAB_SIZE, assert_same, make_engine, naive_sample, request, run, tiny_model

from runner.engine.logits_processors import LogitsProcessors
from runner.engine.sequence import Sequence
from runner.errors import ParameterError
from runner.types import SamplingParams

MODEL = tiny_model()
FREE = {"ignore_eos": True, "temperature": 1.5, "max_tokens": 20}
V = 6
LOGITS = [2.0, -1.0, 0.5, 3.0, -4.0, 0.0]
INF = float("inf")


def sequence(prompt=(0,), row=0, **options) -> Sequence:
    r = request(prompt, **options)
    eos = frozenset([5])
    return Sequence(r, 0, max_tokens=9, stop_token_ids=frozenset(), eos_token_ids=eos, row=row)


def push(processors: LogitsProcessors, rows: list[Sequence], token_ids: list[int]) -> None:
    for one in rows:
        one.num_launched += 1
    processors.push(mx.array(token_ids, mx.int32))


def after(generated: list[int], prompt=(0,), **options) -> list[float]:
    """What becomes of LOGITS once a row has generated these tokens."""
    rows = [sequence(prompt, **options)]
    processors = LogitsProcessors.build(rows, V)
    for token_id in generated:
        push(processors, rows, [token_id])
    return processors(mx.array([LOGITS]))[0].tolist()


@pytest.mark.parametrize(
    ("options", "generated", "expected"),
    [
        ({"repetition_penalty": 2.0}, [], [1.0, -2.0, 0.5, 3.0, -4.0, 0.0]),
        ({"repetition_penalty": 2.0}, [3, 4, 3], [1.0, -2.0, 0.5, 1.5, -8.0, 0.0]),
        ({"repetition_penalty": 0.5}, [2], [4.0, -0.5, 1.0, 3.0, -4.0, 0.0]),
        ({"presence_penalty": 1.5}, [3, 4, 3], [2.0, -1.0, 0.5, 1.5, -5.5, 0.0]),
        ({"frequency_penalty": 0.5}, [3, 4, 3], [2.0, -1.0, 0.5, 2.0, -4.5, 0.0]),
        ({"frequency_penalty": -2.0}, [1, 1, 1], [2.0, 5.0, 0.5, 3.0, -4.0, 0.0]),
        ({"logit_bias": {2: 1.5, "4": -100}}, [2], [2.0, -1.0, 2.0, 3.0, -104.0, 0.0]),
        ({"allowed_token_ids": [1, 4]}, [1], [-INF, -1.0, -INF, -INF, -4.0, -INF]),
        ({"bad_words_token_ids": [[3], [1]]}, [], [2.0, -INF, 0.5, -INF, -4.0, 0.0]),
        ({"min_tokens": 2}, [], [2.0, -1.0, 0.5, 3.0, -4.0, -INF]),
        ({"min_tokens": 2}, [3], [2.0, -1.0, 0.5, 3.0, -4.0, -INF]),
        ({"min_tokens": 2}, [3, 3], LOGITS),
    ],
    ids=str,
)
def test_by_hand(options, generated, expected):
    """The prompt is [0, 1], so that repetition counts it and the others do not."""
    assert after(generated, prompt=(0, 1), **options) == expected


def test_all_together_bias_first_then_repetition_then_the_counts():
    options = {
        "repetition_penalty": 2.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {1: 3.0, 3: -4.0},
        "bad_words_token_ids": [[1, 2]],
        "allowed_token_ids": [0, 1, 2, 3],
    }
    # 1: (-1 + 3) / 2 - 0.5 - 2 * 0.25; 3: (3 - 4) * 2 - 0.5 - 0.25.
    expected = [1.0, 0.0, -INF, -2.75, -INF, -INF]
    assert after([3, 1, 1], **options) == expected


@pytest.mark.parametrize(
    ("words", "generated", "forbidden"),
    [
        ([[1, 2]], [], []),
        ([[1, 2]], [1], [2]),
        ([[1, 2]], [1, 3], []),
        ([[1, 2, 3]], [2], []),
        ([[1, 2, 3]], [1, 2], [3]),
        ([[1, 2, 3]], [4, 1, 2], [3]),
        ([[1, 2, 3]], [1, 2, 2], []),
        ([[1, 2, 3], [2, 4], [5]], [1, 2], [3, 4, 5]),
        ([[1, 1]], [1], [1]),
        ([[0, 2]], [], []),
    ],
)
def test_a_bad_word_forbids_its_last_token_after_the_ones_before_it(words, generated, forbidden):
    """The prompt ends in 0: a word that would begin there is not seen, as in vLLM."""
    expected = [-INF if i in forbidden else logit for i, logit in enumerate(LOGITS)]
    assert after(generated, prompt=(0,), bad_words_token_ids=words) == expected


def test_nothing_is_built_where_no_row_asks():
    plain = sequence(temperature=0.3, top_k=2, max_tokens=5)
    assert LogitsProcessors.build([plain, None], V) is None
    spent = sequence(min_tokens=2)
    spent.num_launched = 2
    assert LogitsProcessors.build([spent], V) is None


def test_the_models_logits_and_the_plain_rows_keep_their_bits():
    options = {"frequency_penalty": 1.0, "allowed_token_ids": [1], "logit_bias": {2: 1.0}}
    rows = [sequence(row=0), sequence(row=1, **options), None, sequence(row=3)]
    processors = LogitsProcessors.build(rows, V)
    processors.push(mx.array([1, 1, 1, 1], mx.int32))
    logits = mx.random.normal((4, V), key=mx.random.key(3))
    before = np.array(logits)
    changed = np.array(processors(logits))
    assert np.array_equal(np.array(logits), before)
    for row in (0, 2, 3):
        assert np.array_equal(changed[row], before[row])
    assert not np.array_equal(changed[1], before[1])


def test_a_history_follows_its_row_and_ends_with_it():
    words = [[3, 4], [1, 1, 1, 2]]
    stays = sequence(row=2, frequency_penalty=1.0, bad_words_token_ids=words[:1])
    leaves = sequence(row=0, frequency_penalty=1.0, bad_words_token_ids=words[1:])
    full = LogitsProcessors.build([leaves, None, stays], V)
    for token_ids in ([1, 0, 2], [1, 0, 3]):
        push(full, [leaves, stays], token_ids)
    stays.row = 0
    joins = sequence(row=1, frequency_penalty=1.0, bad_words_token_ids=words[1:])
    again = LogitsProcessors.build([stays, joins], V, before=full)
    changed = again(mx.array([LOGITS, LOGITS])).tolist()
    assert changed[0] == [2.0, -1.0, -0.5, 2.0, -INF, 0.0]
    assert changed[1] == LOGITS
    push(again, [stays, joins], [3, 1])
    assert again(mx.array([LOGITS, LOGITS])).tolist()[1][1] == -2.0


ASKING = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.0, "frequency_penalty": 0.8},
    {"logit_bias": {9: 3.0, 40: 2.0}},
    {"allowed_token_ids": [*range(3, 30)]},
    {"bad_words_token_ids": [[i] for i in range(3, 40)]},
    {"min_tokens": 15, "ignore_eos": False, "logit_bias": {EOS: 6.0}},
]


@pytest.mark.parametrize("options", ASKING, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_option_alone_and_beside_plain_rows(options, temperature):
    params = FREE | {"temperature": temperature} | options
    mine = request([5, 6, 7], "mine", **params)
    mates = [request([8, 9], f"mate{i}", n=2, **FREE) for i in range(2)]
    mixed = run(make_engine(MODEL), [mates[0], mine, mates[1]])
    assert_same(mixed["mine", 0], naive_sample(MODEL, mine, 0))
    plain = run(make_engine(MODEL), [mates[0], request([5, 6, 7], "mine", **FREE), mates[1]])
    assert mixed["mine", 0].token_ids != plain["mine", 0].token_ids
    for key in [key for key in plain if key[0] != "mine"]:
        assert mixed[key] == plain[key], "the same bits"


def test_what_was_sampled_from_is_told_from_what_the_model_said():
    done = run(make_engine(MODEL), [request([5], allowed_token_ids=[7], max_tokens=3)])["r", 0]
    assert done.token_ids == [7, 7, 7]
    assert done.processed_logprobs == [0.0, 0.0, 0.0]
    assert max(done.raw_logprobs) < -0.1


@pytest.mark.parametrize("where", ["stop_token_ids", "eos"])
def test_min_tokens_hold_the_end_back_and_no_longer(where):
    stop = [11] if where == "stop_token_ids" else []
    eager = {"logit_bias": {11 if stop else EOS: 100.0}, "stop_token_ids": stop}
    requests = [request([5], str(k), min_tokens=k, **eager) for k in (0, 1, 5, 12)]
    done = run(make_engine(MODEL), requests)
    assert [len(done[r.request_id, 0].token_ids) for r in requests] == [1, 2, 6, 12]
    assert [done[r.request_id, 0].finish_reason for r in requests] == ["stop"] * 3 + ["length"]


def as_text(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    return "".join(chr(token_id + 200) for token_id in token_ids)


def test_min_tokens_pass_over_a_stop_string():
    engine = make_engine(MODEL, decode=as_text)
    greedy = {"temperature": 0.0, "allowed_token_ids": [9], "stop": [chr(209) * 2]}
    for least, length in ((0, 2), (1, 2), (2, 3), (5, 6), (12, 12)):
        requests = [request([5], skip_special_tokens=False, min_tokens=least, **greedy)]
        done = run(engine, requests)["r", 0]
        assert len(done.token_ids) == length
        assert done.finish_reason == ("length" if least == 12 else "stop")


def test_a_slot_that_a_penalised_row_had_is_as_new():
    engine = make_engine(MODEL, max_batch_size=1)
    options = FREE | {"frequency_penalty": 1.5, "bad_words_token_ids": [[7, 8], [9]]}
    run(engine, [request([5, 6], "gone", **options)])
    for kind in (FREE, options):
        fresh = run(make_engine(MODEL, max_batch_size=1), [request([7, 8, 9], **kind)])
        assert run(engine, [request([7, 8, 9], **kind)]) == fresh


def test_histories_survive_rows_that_leave_and_the_batch_that_closes_up():
    words = [[a, b] for a in range(40) for b in range(30)]
    long = FREE | {"max_tokens": 50, "presence_penalty": 1.0, "frequency_penalty": 0.7}
    asked = request([5, 6], "long", n=2, bad_words_token_ids=words, **long)
    short = [
        request([7], f"s{i}", **FREE | {"max_tokens": 1 + i, "frequency_penalty": 1.0})
        for i in range(9)
    ]
    engine = make_engine(MODEL, max_batch_size=8)
    done = run(engine, [*short[:5], asked, *short[5:]])
    assert engine.stats.num_row_steps < 8 * 50, "the batch was compacted"
    for index in range(2):
        assert_same(done["long", index], naive_sample(MODEL, asked, index))
    for one in short:
        assert_same(done[one.request_id, 0], naive_sample(MODEL, one, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, f"logit_bias has the token id {VOCAB_SIZE}"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has the token id -1"),
        ({"allowed_token_ids": [4, 500]}, "allowed_token_ids has the token id 500"),
        (
            {"stop_token_ids": [97]},
            "stop_token_ids has the token id 97; the vocabulary has 0 to 96",
        ),
        ({"bad_words_token_ids": [[5], [3, 97]]}, "bad_words has the token id 97"),
        ({"bad_words_token_ids": [[]]}, "a word without tokens"),
        ({"bad_words": ["x"]}, "bad_words_token_ids"),
        ({"allowed_token_ids": [4], "bad_words_token_ids": [[4]]}, "allowed_token_ids=.4,."),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_what_the_engine_cannot_follow_is_refused(options, message):
    engine = make_engine(MODEL)
    with pytest.raises(ParameterError, match=message):
        engine.add(request([5], **options))
    assert not engine.has_unfinished


def test_a_row_that_is_left_no_token_ends_as_an_error():
    options = {"allowed_token_ids": [4], "bad_words_token_ids": [[4, 4]], "max_tokens": 5}
    done = run(make_engine(MODEL), [request([5], **options), request([6], "other")])
    assert done["r", 0].finish_reason == "error" and len(done["r", 0].token_ids) == 2
    assert_same(done["other", 0], naive_sample(MODEL, request([6], "other"), 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 .*above 0"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 .*between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logit_bias": {5: 101}}, "logit_bias=.5: 101.0. .*between -100 and 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias=.'five': 1. .*for each token id"),
        ({"logit_bias": {5: 1, "5": 2}}, "an id comes twice"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 .*at most max_tokens"),
        ({"bad_words": ["fine", " "]}, "bad_words="),
        ({"allowed_token_ids": []}, "allowed_token_ids=.. .*at least one"),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_named(options, message):
    with pytest.raises(ParameterError, match=message):
        SamplingParams(**options)


def test_one_word_or_id_may_come_without_a_list():
    params = SamplingParams(bad_words="x", allowed_token_ids=[3, 4], logit_bias={"7": 1})
    assert (params.bad_words, params.allowed_token_ids) == (("x",), (3, 4))
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(logit_bias=None, allowed_token_ids=None) == SamplingParams()
