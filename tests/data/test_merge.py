"""Merged results: the order of the input, the same bytes however the parts came about."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import Dataset, ResultWriter, merge
from runner.data.lock import DirectoryLock
from runner.data.manifest import MANIFEST_FILE
from runner.data.merge import Merged, MergeFormat
from runner.data.schemas import result_schema
from runner.errors import OutputError

PASSED = [("answer", pa.large_string()), ("numbers", pa.list_(pa.int64())), ("nothing", pa.null())]
SCHEMA = result_schema(pa.schema(PASSED))
ARROW = MergeFormat()


def group(name: str, size: int) -> list[dict[str, Any]]:
    """The samples of a row, some with nulls in every kind of column."""
    number = sum(name.encode())
    return [
        {
            "row_id": name,
            "sample_index": index,
            "text": "é" * ((number + index) % 4),
            "completion_token_ids": None if index % 3 == 2 else list(range(number % 5)),
            "logprobs": [-0.5] * (number % 3),
            "reward": None if number % 2 else index / 7,
            "error": {"type": "RewardError", "message": name} if number % 7 == 0 else None,
            "answer": None if number % 4 == 0 else name,
            "numbers": [index, None] if number % 2 else None,
        }
        for index in range(size)
    ]


def write(folder: Path, groups: list[list[dict[str, Any]]], shard_rows: int) -> Path:
    results = ResultWriter(dir=folder, shard_rows=shard_rows, schema=SCHEMA, identity={})
    results.start()
    for rows in groups:
        results.write(rows)
    results.close(complete=True)
    return folder


def merged_bytes(merged: Merged) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in merged.paths}


@pytest.mark.parametrize("format", ["arrow", "parquet", "jsonl"])
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    shards=st.tuples(st.integers(1, 9), st.integers(1, 60)),
    rows=st.none() | st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_bytes_are_those_of_the_input_alone(
    tmp_path_factory: pytest.TempPathFactory,
    format: str,
    sizes: list[int],
    shards: tuple[int, int],
    rows: int | None,
    seed: int,
) -> None:
    groups = [group(f"r{i}", size) for i, size in enumerate(sizes)]
    shuffled = random.Random(seed).sample(groups, len(groups))
    names = [rows[0]["row_id"] for rows in groups]
    place = tmp_path_factory.mktemp("merge")
    one, other = write(place / "one", groups, shards[0]), write(place / "two", shuffled, shards[1])
    each = [merge.merge(it, names, MergeFormat(format, rows)) for it in (one, other)]
    assert merged_bytes(each[0]) == merged_bytes(each[1])
    assert (each[0].rows, each[0].missing, each[0].left_out) == (len(groups), 0, 0)
    if rows is None:
        assert len(each[0].paths) == 1


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pa.ipc.open_file(path).read_all().to_pylist()


@pytest.mark.parametrize("format", ["arrow", "parquet", "jsonl"])
def test_every_format_holds_the_rows_in_order(tmp_path: Path, format: str) -> None:
    groups = [group(f"r{i}", 1 + i % 3) for i in range(40)]
    write(tmp_path, groups[::-1], 7)
    names = [rows[0]["row_id"] for rows in groups]
    found = merge.merge(tmp_path, names, MergeFormat(format, rows=10))
    rows = [row for path in found.paths for row in read(path)]
    wanted = [{name: row.get(name) for name in SCHEMA.names} for rows in groups for row in rows]
    assert rows == wanted
    assert [path.name for path in found.paths][:2] == [f"part-0000{i}.{format}" for i in (0, 1)]
    sizes = [len(read(path)) for path in found.paths]
    assert all(10 <= size <= 12 for size in sizes[:-1]) and sum(sizes) == len(wanted)


def test_polars_and_this_package_read_what_was_merged(tmp_path: Path) -> None:
    write(tmp_path, [group("b", 2), group("a", 1)], 1)
    merge.merge(tmp_path, ["a", "b"], ARROW)
    merged = tmp_path / "merged"
    assert pl.read_ipc(merged / "part-00000.arrow")["row_id"].to_list() == ["a", "b", "b"]
    rows = Dataset(path=str(merged), prompt_column="text")
    assert [row["row_id"] for row in rows] == ["a", "b", "b"]
    assert len(list(Dataset(path=str(tmp_path), prompt_column="text"))) == 3, "not both"


def test_chunks_are_cut_alike_whatever_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(merge, "_OPEN_PARTS", 2)
    groups = [group(f"r{i}", 3) for i in range(40)]
    names = [rows[0]["row_id"] for rows in groups]
    one = merge.merge(write(tmp_path / "one", groups, 1), names, ARROW)
    other = merge.merge(write(tmp_path / "two", groups[::-1], 50), names, ARROW)
    assert merged_bytes(one) == merged_bytes(other)
    assert pa.ipc.open_file(one.paths[0]).num_record_batches == 14


def test_rows_without_results_and_results_without_rows_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [group("a", 1), group("gone", 2), group("c", 1)], 2)
    found = merge.merge(tmp_path, ["new", "c", "a"], ARROW)
    assert (found.rows, found.missing, found.left_out) == (2, 1, 1)
    assert [row["row_id"] for row in read(found.paths[0])] == ["c", "a"]
    nothing = merge.merge(tmp_path, [], ARROW)
    assert (nothing.rows, nothing.left_out) == (0, 3) and read(nothing.paths[0]) == []


def test_a_name_that_two_rows_of_the_input_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [group("a", 1), group("b", 2)], 2)
    with pytest.raises(OutputError, match="'b' names two rows of the input"):
        merge.merge(tmp_path, ["b", "a", "b"], ARROW)
    assert not (tmp_path / "merged").exists()


def test_merging_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    write(tmp_path, [group(f"r{i}", 1) for i in range(6)], 2)
    names = [f"r{i}" for i in range(6)]
    merge.merge(tmp_path, names, MergeFormat("jsonl", rows=1))
    found = merge.merge(tmp_path, names, ARROW)
    assert list((tmp_path / "merged").iterdir()) == found.paths
    assert not (tmp_path / ".merged.tmp").exists() and not (tmp_path / ".lock").exists()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="merged: holds other files"):
        merge.merge(tmp_path, names, ARROW)
    assert (tmp_path / "merged" / "mine.txt").exists()


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a directory of results"):
        merge.merge(tmp_path / "nowhere", [], ARROW)
    with pytest.raises(OutputError, match="there is no manifest"):
        merge.merge(tmp_path, [], ARROW)
    write(tmp_path, [], 1)
    with pytest.raises(OutputError, match="no results yet"):
        merge.merge(tmp_path, [], ARROW)
    (tmp_path / MANIFEST_FILE).unlink()
    write(tmp_path, [group("a", 1)], 1)
    with DirectoryLock(tmp_path), pytest.raises(OutputError, match="another process"):
        merge.merge(tmp_path, ["a"], ARROW)
    (tmp_path / "part-00000.arrow").unlink()
    with pytest.raises(OutputError, match="part-00000.arrow: it is gone; the job's own command"):
        merge.merge(tmp_path, ["a"], ARROW)
