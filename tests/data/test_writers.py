"""What is committed is there for good; what was killed goes on where the manifest ends."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import Dataset, ResultWriter
from runner.data.manifest import MANIFEST_FILE, Manifest
from runner.data.schemas import result_schema
from runner.errors import OutputError, ParameterError

SCHEMA = result_schema(pa.schema([("answer", pa.large_string()), ("nothing", pa.null())]))
IDENTITY = {"model.path": "tiny", "sampling.seed": 0}


def row(number: int, **values: Any) -> dict[str, Any]:
    return {
        "row_id": f"r{number}",
        "group_id": "g",
        "sample_index": 0,
        "prompt": f"prompt {number}",
        "prompt_token_ids": [1, number],
        "completion_token_ids": [number] * (number % 3),
        "text": "x" * (number % 5),
        "logprobs": [-0.5] * (number % 3),
        "raw_logprobs": [-0.25] * (number % 3),
        "finish_reason": "stop",
        "answer": str(number),
        **values,
    }


FAILED = {"row_id": "failed", "error": {"type": "PromptError", "message": "the prompt is empty"}}


def writer(folder: Path, shard_rows: int = 4, **changes: Any) -> ResultWriter:
    options = {"schema": SCHEMA, "identity": IDENTITY, **changes}
    results = ResultWriter(dir=folder, shard_rows=shard_rows, **options)
    results.start()
    return results


def test_nothing_is_written_before_the_start(tmp_path: Path) -> None:
    results = ResultWriter(dir=tmp_path, schema=SCHEMA, identity=IDENTITY)
    assert contents(tmp_path) == {}
    with pytest.raises(AssertionError, match="start"):
        results.write([row(0)])


def test_a_directory_without_a_row_takes_other_options(tmp_path: Path) -> None:
    writer(tmp_path, identity={"sampling.seed": 1})
    results = writer(tmp_path)
    results.write([row(0)])
    results.close(complete=True)
    assert Manifest.load(tmp_path).identity == IDENTITY


def written(folder: Path, groups: Sequence[list[dict[str, Any]]], shard_rows: int = 4) -> None:
    results = writer(folder, shard_rows)
    for group in groups:
        results.write(group)
    results.close(complete=True)


def read(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*.arrow"))
    return [r for part in parts for r in pa.ipc.open_file(part).read_all().to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_come_back_with_nulls_and_empty_lists(tmp_path: Path) -> None:
    rows = [row(0), row(1), {**row(2), "completion_token_ids": None, "logprobs": None}, FAILED]
    written(tmp_path, [rows])
    back = read(tmp_path)
    assert back == [{name: r.get(name) for name in SCHEMA.names} for r in rows]
    assert back[0]["completion_token_ids"] == []
    assert back[2]["completion_token_ids"] is None
    assert [r["error"] for r in back] == [None, None, None, FAILED["error"]]


def test_the_parts_are_arrow_files_with_exactly_the_schema(tmp_path: Path) -> None:
    written(tmp_path, [[row(i)] for i in range(6)])
    assert sorted(contents(tmp_path)) == [MANIFEST_FILE, "part-00000.arrow", "part-00001.arrow"]
    for part in tmp_path.glob("part-*.arrow"):
        assert pa.ipc.open_file(part).schema.equals(SCHEMA, check_metadata=True)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([1] * 8, [4, 4]), ([3, 3, 3], [6, 3]), ([9], [9]), ([4, 4], [4, 4]), ([0, 2], [2]), ([], [])],
)
def test_a_group_is_never_split_over_two_parts(
    tmp_path: Path, sizes: list[int], parts: list[int]
) -> None:
    written(tmp_path, [[row(i) for i in range(size)] for size in sizes])
    manifest = Manifest.load(tmp_path)
    assert manifest is not None and manifest.complete
    assert [part.rows for part in manifest.parts] == parts
    assert [len(pa.ipc.open_file(p).read_all()) for p in sorted(tmp_path.glob("part-*"))] == parts


def test_polars_reads_the_parts(tmp_path: Path) -> None:
    written(tmp_path, [[row(i), {**FAILED, "row_id": f"f{i}"}] for i in range(6)])
    frame = polars.scan_ipc(tmp_path / "part-*.arrow").collect()
    assert frame["row_id"].to_list() == [r["row_id"] for r in read(tmp_path)]
    assert frame["logprobs"].to_list() == [r["logprobs"] for r in read(tmp_path)]
    failed = polars.scan_ipc(tmp_path / "part-*.arrow").filter(polars.col("error").is_not_null())
    assert failed.select(polars.col("error").struct.field("type")).collect().height == 6


def test_pyarrow_reads_the_parts(tmp_path: Path) -> None:
    written(tmp_path, [[row(i), {**FAILED, "row_id": f"f{i}"}] for i in range(6)])
    files = [str(part) for part in sorted(tmp_path.glob("part-*.arrow"))]
    found = pa.dataset.dataset(files, format="arrow")
    assert found.to_table().to_pylist() == read(tmp_path)
    assert found.count_rows(filter=pa.dataset.field("row_id") == "r3") == 1


def test_datasets_reads_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    written(tmp_path / "out", [[row(i), {**FAILED, "row_id": f"f{i}"}] for i in range(6)])
    found = datasets.load_dataset(
        "arrow",
        data_files=str(tmp_path / "out" / "part-*.arrow"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert list(found) == read(tmp_path / "out")


def test_this_package_reads_the_parts(tmp_path: Path) -> None:
    written(tmp_path, [[row(i)] for i in range(6)])
    assert list(Dataset(path=str(tmp_path))) == read(tmp_path)


def test_a_fresh_directory_is_made_with_a_manifest_before_any_part(tmp_path: Path) -> None:
    results = writer(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == [MANIFEST_FILE]
    assert (results.done_rows, results.complete, results.num_rows) == (set(), False, 0)


def test_nothing_is_visible_before_a_part_is_full(tmp_path: Path) -> None:
    results = writer(tmp_path)
    for number in range(3):
        results.write([row(number)])
    assert os.listdir(tmp_path) == [MANIFEST_FILE]
    assert results.done_rows == set()
    results.write([row(3)])
    assert len(read(tmp_path)) == results.num_rows == 4
    assert results.done_rows == {"r0", "r1", "r2", "r3"}


def test_commit_makes_a_part_of_what_there_is(tmp_path: Path) -> None:
    results = writer(tmp_path)
    results.commit()
    assert os.listdir(tmp_path) == [MANIFEST_FILE]
    results.write([row(0)])
    results.commit()
    results.commit()
    assert [r["row_id"] for r in read(tmp_path)] == ["r0"]
    assert not results.complete


def test_a_closed_directory_knows_that_it_is_complete(tmp_path: Path) -> None:
    results = writer(tmp_path)
    results.write([row(0)])
    results.close(complete=True)
    with pytest.raises(AssertionError, match="close"):
        results.write([row(1)])
    again = writer(tmp_path)
    assert again.complete and again.done_rows == {"r0"}
    again.write([row(1)])
    again.commit()
    assert not writer(tmp_path).complete


def test_an_interrupted_job_is_not_complete(tmp_path: Path) -> None:
    results = writer(tmp_path)
    results.write([row(0)])
    results.close(complete=False)
    again = writer(tmp_path)
    assert not again.complete and again.done_rows == {"r0"}


GROUP_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=12)


@given(sizes=GROUP_SIZES, killed_after=st.integers(0, 12), seed=st.integers(0, 10**6))
def test_killed_and_resumed_is_byte_for_byte_never_interrupted(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], killed_after: int, seed: int
) -> None:
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    numbers = iter(range(100))
    groups = [[row(next(numbers)) for _ in range(size)] for size in sizes]
    written(whole, groups)
    first = writer(resumed)
    for group in groups[:killed_after]:
        first.write(group)
    # Killed here: the buffer is lost, and a part may be there that the manifest does not list.
    if random.Random(seed).random() < 0.5:
        (resumed / f"part-{len(list(resumed.glob('part-*'))):05d}.arrow").write_bytes(b"half")
    second = writer(resumed)
    for group in groups:
        if group[0]["row_id"] not in second.done_rows:
            second.write(group)
    second.close(complete=True)
    files = [MANIFEST_FILE, *(part.name for part in sorted(whole.glob("part-*")))]
    assert [(resumed / file).read_bytes() for file in files] == list(
        map(contents(whole).get, files)
    )


def test_a_crash_between_part_and_manifest_loses_only_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = writer(tmp_path)
    results.write([row(i) for i in range(4)])

    def crash(self: Manifest, directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "save", crash)
        results.write([row(i) for i in range(4, 8)])
    assert (tmp_path / "part-00001.arrow").exists()
    again = writer(tmp_path)
    assert again.done_rows == {"r0", "r1", "r2", "r3"}
    again.write([row(i) for i in range(8, 12)])
    assert [r["row_id"] for r in read(tmp_path)][4:] == ["r8", "r9", "r10", "r11"]


def test_other_options_are_refused_and_named(tmp_path: Path) -> None:
    written(tmp_path, [[row(0)]])
    message = r"other options \(data.limit: not set -> 5; sampling.seed: 0 -> 1\); choose"
    with pytest.raises(OutputError, match=message):
        writer(tmp_path, identity={**IDENTITY, "sampling.seed": 1, "data.limit": 5})


def test_other_columns_are_refused_and_named(tmp_path: Path) -> None:
    written(tmp_path, [[row(0)]])
    other = result_schema(pa.schema([("answer", pa.int64()), ("nothing", pa.null())]))
    with pytest.raises(OutputError, match="answer: large_string -> int64"):
        writer(tmp_path, schema=other)
    turned = pa.schema(list(SCHEMA)[::-1])
    with pytest.raises(OutputError, match="in another order"):
        writer(tmp_path, schema=turned)


def test_parts_without_a_manifest_are_refused(tmp_path: Path) -> None:
    written(tmp_path, [[row(0)]])
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(OutputError, match=r"part-\*\.arrow files without a manifest"):
        writer(tmp_path)


def test_other_files_in_the_directory_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0")
    written(tmp_path, [[row(0)]])
    assert (tmp_path / "config.yaml").read_text() == "seed: 0"


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "rows"])
def test_a_listed_part_that_is_not_what_the_manifest_says(tmp_path: Path, damage: str) -> None:
    written(tmp_path, [[row(0)]])
    part, manifest = tmp_path / "part-00000.arrow", tmp_path / MANIFEST_FILE
    if damage == "missing":
        part.unlink()
    elif damage == "rows":
        content = json.loads(manifest.read_text())
        content["parts"][0]["rows"] = 7
        manifest.write_text(json.dumps(content))
    else:
        part.write_bytes(part.read_bytes()[:-200] if damage == "truncated" else b"")
    with pytest.raises(OutputError, match=r"part-00000\.arrow: .*choose another directory"):
        writer(tmp_path)


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        writer(tmp_path / "file")


def test_values_that_do_not_fit_are_a_bug(tmp_path: Path) -> None:
    results = writer(tmp_path)
    with pytest.raises(pa.ArrowInvalid):
        results.write([row(0, sample_index="first")])
    with pytest.raises(AssertionError, match="unknown_column"):
        results.write([row(0, unknown_column=1)])


@pytest.mark.parametrize("shard_rows", [0, -1])
def test_a_part_holds_at_least_a_row(tmp_path: Path, shard_rows: int) -> None:
    with pytest.raises(ParameterError, match="shard_rows"):
        writer(tmp_path, shard_rows)
