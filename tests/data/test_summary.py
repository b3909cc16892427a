"""Numbers over result rows, part by part."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.result_kinds import result_kind
from runner.data.schemas import ECHO_FIELDS, RESULT_FIELDS, result_schema
from runner.data.score_schemas import PERPLEXITY_FIELDS, SCORE_FIELDS
from runner.data.summary import Totals

SCHEMA = result_schema(pa.schema([]))


def totals(*parts: list[dict]) -> Totals:
    """Those of each part, through JSON as the manifest has them, added up."""
    found = Totals()
    for rows in parts:
        table = pa.Table.from_pylist([{"sample_index": 0} | row for row in rows], schema=SCHEMA)
        found += Totals.from_json(json.loads(json.dumps(Totals.of(table).as_json())))
    return found


def test_counts_over_all_parts():
    first = [
        {"row_id": "a", "completion_token_ids": [1, 2], "finish_reason": "stop", "reward": 1.0},
        {"row_id": "a", "completion_token_ids": [1], "finish_reason": "stop", "reward": 0.0},
    ]
    second = [
        {"row_id": "b", "completion_token_ids": [], "finish_reason": "length", "reward": 5.0},
        {
            "row_id": "c",
            "finish_reason": "error",
            "error": {"type": "PromptError", "message": "no tokens"},
        },
    ]
    numbers = totals(first, second).report()
    reward = numbers.pop("reward")
    assert numbers == {
        "rows": 3,
        "samples": 4,
        "completion_tokens": 3,
        "finish_reasons": {"stop": 2, "length": 1, "error": 1},
        "errors": {"PromptError": 1},
    }
    assert reward["mean"] == pytest.approx(2.0) and (reward["min"], reward["max"]) == (0.0, 5.0)
    assert reward["std"] == pytest.approx((14 / 3) ** 0.5)


def test_without_rows_or_rewards():
    assert Totals().report()["reward"] is None
    row = {"row_id": "a", "completion_token_ids": [1], "finish_reason": "stop"}
    assert totals([row]).report()["reward"] is None
    assert totals([]) == Totals()


@given(st.lists(st.lists(st.floats(-9, 9), max_size=6), max_size=5))
def test_the_spread_of_the_parts_is_that_of_the_whole(parts):
    rows = [
        [{"row_id": f"{i}-{j}", "reward": r} for j, r in enumerate(p)] for i, p in enumerate(parts)
    ]
    one, each = totals([row for part in rows for row in part]), totals(*rows)
    assert each.rows == one.rows == sum(map(len, parts))
    assert (each.reward.count, each.reward.least, each.reward.most) == (
        one.reward.count, one.reward.least, one.reward.most,
    )  # fmt: skip
    assert each.reward.mean == pytest.approx(one.reward.mean, abs=1e-12)
    assert each.reward.squares == pytest.approx(one.reward.squares, abs=1e-9)


KINDS = [
    (RESULT_FIELDS, "samples"), (ECHO_FIELDS, "samples"), (SCORE_FIELDS, "scores"),
    (PERPLEXITY_FIELDS, "texts"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind"), KINDS, ids=["samples", "echo", "scores", "texts"])
def test_results_of_results_are_of_the_job_that_came_last(fields, kind):
    assert result_kind(pa.schema(fields)) == kind
    for others, _ in KINDS:
        assert result_kind(result_schema(pa.schema(others), fields)) == kind


def test_rows_that_are_no_results_are_of_no_kind():
    for names in ([], ["row_id"], ["text", "group_id"], ["row_id", "text"]):
        assert result_kind(pa.schema([(name, pa.string()) for name in names])) is None


@pytest.mark.parametrize("fields", [SCORE_FIELDS, PERPLEXITY_FIELDS], ids=["scores", "texts"])
def test_what_was_sampled_before_is_not_counted_where_it_is_scored_again(fields):
    """The columns of the rollout pass through: its rewards and reasons are not of this job."""
    row = {
        "row_id": "a", "completion_token_ids": [1, 2], "finish_reason": "stop", "reward": 1.0,
        "sum_logprob": -3.0,
    }  # fmt: skip
    found = Totals.of(pa.Table.from_pylist([row], schema=result_schema(SCHEMA, fields)))
    numbers = found.report()
    assert (numbers["rows"], numbers["samples"], numbers["completion_tokens"]) == (1, 1, 0)
    assert numbers["finish_reasons"] == {} and numbers["reward"] is None
