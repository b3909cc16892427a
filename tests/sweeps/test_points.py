"""The points of a sweep without a run: what is taken from their directories, and compared."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from runner.data.manifest import Manifest
from runner.data.parts import write_part
from runner.data.schemas import result_schema
from runner.data.score_schemas import PERPLEXITY_FIELDS
from runner.sweeps.paired import Pair
from runner.sweeps.point import Point
from runner.sweeps.sweep import Sweep

SCHEMA = result_schema(pa.schema([]), PERPLEXITY_FIELDS)


def write(directory: Path, **nats: float) -> None:
    """The results of a perplexity: documents of eight bytes by their names."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row_id": name, "sum_logprob": -value, "num_scored": 2, "num_bytes": 8, "token_ids": [1]}
        for name, value in nats.items()
    ]
    manifest = Manifest(identity={})
    manifest.create(directory)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    manifest.commit(directory, [write_part(directory, "part-00000.arrow", table)])
    summary = {"rows": len(rows), "errors": {}, "run": {"seconds": 2.0, "scored_tokens": 4}}
    (directory / "summary.json").write_text(json.dumps(summary | {"state": "finished"}))


def point(directory: Path, **options: Any) -> Point:
    return Point(name="p", directory=directory, options=options)


def test_a_point_says_what_its_directory_has(tmp_path):
    one = point(tmp_path / "p")
    assert (one.state, one.numbers, one.measures) == ("waiting", {}, {})
    write(tmp_path / "p", a=4.0, b=8.0)
    one.end("finished", None)
    assert one.numbers["tokens_per_second"] == 2.0 and "nats_per_byte" in one.measures
    row = one.row(0, tmp_path, {})
    assert row["nats_per_byte"] == 12 / 16 and row["nats_per_token"] == 12 / 4
    assert (row["point"], row["directory"], row["state"], row["rows"]) == (0, "p", "finished", 2)


def test_one_that_failed_has_no_numbers_whatever_lies_there(tmp_path):
    """They may be those of other options, which it was refused for."""
    write(tmp_path / "p", a=4.0)
    one = point(tmp_path / "p")
    one.end("finished", None)
    one.end("failed", "kv_bits=7 is not allowed")
    row = one.row(3, tmp_path, {})
    assert (row["state"], row["error"]) == ("failed", "kv_bits=7 is not allowed")
    assert "rows" not in row and "nats_per_byte" not in row


def test_a_broken_directory_is_left_to_its_run(tmp_path):
    write(tmp_path / "p", a=4.0)
    (tmp_path / "p" / "summary.json").write_text("{")
    one = point(tmp_path / "p")
    one.take_what_is_there()
    assert one.state == "waiting" and one.measures == {}


def test_options_are_columns_but_for_the_directory_and_secrets(tmp_path):
    given = {"engine.kv_bits": 8, "output.dir": "x", "tracker.api_key": "secret"}
    row = point(tmp_path / "p", **given).row(0, tmp_path, {})
    assert row["engine.kv_bits"] == 8
    assert not {"output.dir", "tracker.api_key"} & row.keys() and "secret" not in row.values()


def test_differences_to_the_first_are_columns(tmp_path):
    it = Pair(documents=5, left_out=2, value_a=1.0, value_b=1.5, difference=0.5, stderr=None)
    row = point(tmp_path / "p").row(1, tmp_path, {"mean_reward": it})
    found = {name: value for name, value in row.items() if name.startswith("mean_reward")}
    assert found == {
        "mean_reward_difference": 0.5, "mean_reward_difference_stderr": None,
        "mean_reward_paired": 5, "mean_reward_left_out": 2,
    }  # fmt: skip


def test_a_directory_elsewhere_is_named_in_full(tmp_path, monkeypatch):
    assert point(tmp_path / "a" / "p").relative(tmp_path / "a") == "p"
    assert point(tmp_path / "b" / "p").relative(tmp_path / "a") == str(tmp_path / "b" / "p")
    monkeypatch.chdir(tmp_path)
    assert point(Path("a/p")).relative(tmp_path / "a") == "p"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, [(name, {"x": i}) for i, name in enumerate(["x=0", "x=1", "x=2"])])


def pairs(directory: Path, measure: str = "nats_per_byte") -> dict[tuple[int, int], float]:
    rows = pl.read_parquet(directory / "sweep_pairs.parquet").filter(pl.col("measure") == measure)
    return {(row["point_a"], row["point_b"]): row["difference"] for row in rows.to_dicts()}


def test_points_are_compared_as_they_end_and_again_where_one_changes(sweep, tmp_path, capsys):
    for place, value in enumerate((4.0, 6.0, 12.0)):
        name = f"x={place}"
        sweep.begin(name, tmp_path / name)
        write(tmp_path / name, a=value, b=value)
        sweep.end(name, "finished")
        assert len(pairs(tmp_path)) == [0, 1, 3][place]
    assert pairs(tmp_path) == {(0, 1): 2 / 8, (0, 2): 8 / 8, (1, 2): 6 / 8}
    write(tmp_path / "x=1", a=8.0, b=8.0)
    sweep.end("x=1", "finished")
    assert pairs(tmp_path) == {(0, 1): 4 / 8, (0, 2): 8 / 8, (1, 2): 4 / 8}
    sweep.end("x=0", "failed", "gone")
    assert pairs(tmp_path) == {(1, 2): 4 / 8}
    table = pl.read_parquet(tmp_path / "sweep.parquet")
    assert table["state"].to_list() == ["failed", "finished", "finished"]
    assert table["x"].to_list() == [0, 1, 2]
    assert "Point 2 of 3: x=1" in capsys.readouterr().out


def test_what_an_earlier_sweep_finished_is_there_from_the_beginning(tmp_path):
    for place in (0, 1):
        write(tmp_path / f"x={place}", a=4.0 + place)
    sweep = Sweep(tmp_path, [(f"x={i}", {"x": i}) for i in range(3)])
    states = [it.state for it in sweep.points.values()]
    assert states[2] == "waiting" and "running" not in states
    sweep.end("x=2", "interrupted")
    assert pairs(tmp_path) == {(0, 1): 1 / 8}
