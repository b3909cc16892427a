from pathlib import Path

import pyarrow as pa
import pytest

from runner.data.schemas import result_schema
from runner.data.summary import summarize

SCHEMA = result_schema(pa.schema([]))


def part(path: Path, rows: list[dict]) -> Path:
    table = pa.Table.from_pylist([{"sample_index": 0} | row for row in rows], schema=SCHEMA)
    with pa.ipc.new_file(path, SCHEMA) as writer:
        writer.write_table(table)
    return path


def test_counts_over_all_parts(tmp_path):
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
    numbers = summarize([part(tmp_path / "1", first), part(tmp_path / "2", second)])
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


def test_without_rows_or_rewards(tmp_path):
    assert summarize([])["reward"] is None
    row = {"row_id": "a", "completion_token_ids": [1], "finish_reason": "stop"}
    assert summarize([part(tmp_path / "1", [row])])["reward"] is None
