"""What a directory of results says of each document, read back from its parts."""

import json
import math
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from runner.data.manifest import Manifest
from runner.data.parts import write_part
from runner.data.schemas import result_schema
from runner.data.score_schemas import PERPLEXITY_FIELDS, SCORE_FIELDS
from runner.sweeps import measures
from runner.sweeps.measures import MEASURES, Measures, read_measures

INPUT = pa.schema([("question", pa.string())])
SAMPLES = result_schema(INPUT)
SCORES, TEXTS = (result_schema(INPUT, fields) for fields in (SCORE_FIELDS, PERPLEXITY_FIELDS))
FAILED = {"type": "PromptError", "message": "no tokens"}


def measured(rows: list[dict[str, Any]], schema: pa.Schema, **metadata: Any) -> Measures:
    named = {key: json.dumps(value) for key, value in metadata.items()}
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata(named))
    return measures._measured(table)


def values(found: pl.DataFrame) -> dict[str, tuple[float | None, float]]:
    return {row["key"]: (row["value"], row["weight"]) for row in found.to_dicts()}


def text(name: str, nats: float | None, *, ids: tuple[int, ...] = (1, 2), **more: Any) -> Any:
    counts = {"num_scored": len(ids), "num_bytes": 8}
    return {"row_id": name, "sum_logprob": nats, "token_ids": list(ids)} | counts | more


def test_a_directory_without_results_has_no_measures(tmp_path):
    assert read_measures(tmp_path) == {}


def test_only_rows_that_are_committed_count(tmp_path):
    """A part that the manifest does not list was not finished, or is of a row made again."""
    rows = [pa.Table.from_pylist([text(name, -4.0)], schema=TEXTS) for name in "abc"]
    parts = [write_part(tmp_path, f"part-{i:05d}.arrow", table) for i, table in enumerate(rows)]
    manifest = Manifest(identity={})
    manifest.create(tmp_path)
    assert read_measures(tmp_path) == {}
    manifest.commit(tmp_path, parts[:2])
    assert set(values(read_measures(tmp_path)["nats_per_token"])) == {"a", "b"}
    manifest.commit(tmp_path, [], drop=[parts[0].file])
    assert set(values(read_measures(tmp_path)["nats_per_token"])) == {"b"}


def test_nats_are_the_negative_of_logprobs_over_their_own_counts():
    found = measured([text("a", -4.0), text("b", -6.0, ids=(1, 2, 3))], TEXTS)
    assert list(found) == ["bits_per_byte", "nats_per_byte", "nats_per_token"]
    assert values(found["nats_per_token"]) == {"a": (4.0, 2.0), "b": (6.0, 3.0)}
    assert values(found["nats_per_byte"]) == {"a": (4.0, 8.0), "b": (6.0, 8.0)}
    bits = values(found["bits_per_byte"])
    assert bits["a"] == (pytest.approx(4 / math.log(2)), 8.0)


def test_a_text_without_a_finite_number_has_none():
    rows = [text("a", -math.inf), text("b", None, error=FAILED), text("c", -1.0)]
    found = values(measured(rows, TEXTS)["nats_per_token"])
    assert found == {"a": (None, 2.0), "b": (None, 2.0), "c": (1.0, 2.0)}


def test_texts_of_other_tokens_are_told_apart_and_the_same_are_the_same():
    rows = [text("a", -1.0, ids=(1, 2)), text("b", -1.0, ids=(2, 1)), text("c", -1.0)]
    tokens = measured(rows, TEXTS)["nats_per_token"]["tokens"].to_list()
    assert tokens[0] == tokens[2] != tokens[1]


@pytest.mark.parametrize(
    ("rows", "definition"),
    [
        ([text("a", -1.0)], {"last_window": "dropped"}),
        ([text("a", -1.0, num_bytes=None)], {"last_window": "full"}),
    ],
    ids=["the end is left out", "no bytes"],
)
def test_without_all_of_the_bytes_nothing_is_said_of_a_byte(rows, definition):
    assert list(measured(rows, TEXTS, perplexity=definition)) == ["nats_per_token"]


def choice(name: str, number: int, nats: float | None, **right: bool | None) -> dict[str, Any]:
    given = {f"is_correct{suffix}": right.get(suffix or "raw") for suffix in SUFFIXES}
    return {"row_id": name, "choice": number, "sum_logprob": nats} | given


SUFFIXES = ("", "_per_token", "_per_byte")


def test_a_row_is_right_where_its_right_choice_was_chosen():
    rows = [
        choice("a", 0, -1.0, raw=True, _per_token=False),
        choice("a", 1, -2.0),
        choice("b", 0, -3.0),
        choice("b", 1, -4.0, raw=False, _per_token=True),
    ]
    found = measured(rows, SCORES)
    assert list(found) == ["mean_sum_logprob", "accuracy", "accuracy_per_token"]
    assert values(found["accuracy"]) == {"a": (1.0, 1.0), "b": (0.0, 1.0)}
    assert values(found["accuracy_per_token"]) == {"a": (0.0, 1.0), "b": (1.0, 1.0)}
    assert values(found["mean_sum_logprob"]) == {"a": (-3.0, 2.0), "b": (-7.0, 2.0)}


@pytest.mark.parametrize("missing", [None, -math.inf, math.nan])
def test_a_row_of_which_a_choice_has_no_number_has_none(missing):
    rows = [choice("a", 0, -1.0), choice("a", 1, missing), choice("b", 0, -1.0)]
    found = values(measured(rows, SCORES)["mean_sum_logprob"])
    assert found == {"a": (None, 2.0), "b": (-1.0, 1.0)}


def sample(name: str, question: str, reward: float | None, length: int = 1, **more: Any) -> Any:
    ids = {"completion_token_ids": list(range(length))}
    return {"row_id": name, "question": question, "reward": reward} | ids | more


def test_a_prompt_is_paired_by_what_the_input_says_of_it():
    """Its row id has the sampling in it, which is what a sweep changes."""
    one = measured([sample("r1", "x", 1.0), sample("r2", "y", 0.0)], SAMPLES)
    other = measured([sample("s9", "y", 0.5), sample("s3", "x", 2.0)], SAMPLES)
    both = one["mean_reward"].join(other["mean_reward"], on="key")
    assert sorted(zip(both["value"], both["value_right"], strict=True)) == [(0.0, 0.5), (1.0, 2.0)]


def test_of_rows_that_are_alike_the_first_is_paired_with_the_first():
    one, other = (
        measured([sample(f"{run}-{i}", "x", float(i)) for i in order], SAMPLES)["mean_reward"]
        for run, order in (("r", (0, 1, 2)), ("s", (2, 0, 1)))
    )
    assert values(one) == values(other) and len(values(one)) == 3


def test_of_a_group_it_is_the_mean_and_what_failed_is_left_out():
    rows = [
        sample("a", "x", 1.0, 2),
        sample("a", "x", 0.0, 4),
        sample("a", "x", None, 9, error={"type": "RewardError", "message": "no"}),
    ]
    found = measured(rows, SAMPLES)
    assert [it["value"].to_list() for it in found.values()] == [[0.5], [3.0]]


def test_without_rewards_there_is_no_measure_of_them():
    assert list(measured([sample("a", "x", None)], SAMPLES)) == ["mean_completion_tokens"]


def test_samples_that_are_scored_again_are_scores():
    """Columns of the rollout pass through, its own measures do not."""
    row = choice("a", 0, -1.0) | {"completion_token_ids": [1], "reward": 1.0}
    again = result_schema(SAMPLES, SCORE_FIELDS)
    assert list(measured([row], again)) == ["mean_sum_logprob"]
    texts = result_schema(SCORES, PERPLEXITY_FIELDS)
    assert "nats_per_byte" in measured([text("a", -1.0)], texts)


def test_every_measure_has_a_title_of_its_own():
    titles = [it.title for it in MEASURES.values()]
    assert len(set(titles)) == len(titles) and all(it.unit for it in MEASURES.values())
