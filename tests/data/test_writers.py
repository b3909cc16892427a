"""What is committed is there for good; what was killed goes on where the manifest ends."""

import errno
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import Dataset, ResultWriter
from runner.data.manifest import MANIFEST_FILE, OLD_MANIFEST_FILE, Manifest
from runner.data.schemas import result_schema
from runner.errors import OutputError, ParameterError, StoppedError

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
    _started.append(results)
    return results


_started: list[ResultWriter] = []


@pytest.fixture(autouse=True)
def no_lock_is_left() -> Iterator[None]:
    """Lets go of the directories of writers that a test left open."""
    yield
    while _started:
        _started.pop()._output.unlock()


def test_nothing_is_written_before_the_start(tmp_path: Path) -> None:
    results = ResultWriter(dir=tmp_path, schema=SCHEMA, identity=IDENTITY)
    assert contents(tmp_path) == {}
    with pytest.raises(AssertionError, match="start"):
        results.write([row(0)])


def test_a_directory_without_a_row_takes_other_options(tmp_path: Path) -> None:
    writer(tmp_path, identity={"sampling.seed": 1}).close(complete=False)
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
    """Every file but the lock."""
    found = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: path.read_bytes() for path in found}


def done(results: ResultWriter) -> set[str]:
    """The ids of rows of this test that are done."""
    names = [f"r{number}" for number in range(100)]
    found = {name for name in names if name in results.done_rows}
    assert len(found) == len(results.done_rows)
    return found


def opened(folder: Path, **changes: Any) -> ResultWriter:
    """A writer that has not started."""
    return ResultWriter(dir=folder, **{"schema": SCHEMA, "identity": IDENTITY, **changes})


def died(results: ResultWriter) -> None:
    """Lets the lock go as the kernel does when a process dies; the file stays."""
    results._output._lock._file.close()
    results._output._lock._file = None


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
    assert list(contents(tmp_path / "a" / "b")) == [MANIFEST_FILE]
    assert (len(results.done_rows), results.complete, results.num_rows) == (0, False, 0)
    results.close(complete=False)


def test_nothing_is_visible_before_a_part_is_full(tmp_path: Path) -> None:
    results = writer(tmp_path)
    for number in range(3):
        results.write([row(number)])
    assert list(contents(tmp_path)) == [MANIFEST_FILE]
    assert done(results) == set()
    results.write([row(3)])
    assert len(read(tmp_path)) == results.num_rows == 4
    assert done(results) == {"r0", "r1", "r2", "r3"}


def test_commit_makes_a_part_of_what_there_is(tmp_path: Path) -> None:
    results = writer(tmp_path)
    results.commit()
    assert list(contents(tmp_path)) == [MANIFEST_FILE]
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
    assert again.complete and done(again) == {"r0"}
    again.write([row(1)])
    again.close(complete=False)
    assert not opened(tmp_path).complete


def test_an_interrupted_job_is_not_complete(tmp_path: Path) -> None:
    results = writer(tmp_path)
    results.write([row(0)])
    results.close(complete=False)
    again = writer(tmp_path)
    assert not again.complete and done(again) == {"r0"}


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
    died(first)
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

    def crash(self: Manifest, *given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "commit", crash)
        results.write([row(i) for i in range(4, 8)])
    assert (tmp_path / "part-00001.arrow").exists()
    died(results)
    again = writer(tmp_path)
    assert done(again) == {"r0", "r1", "r2", "r3"}
    assert not (tmp_path / "part-00001.arrow").exists(), "whoever reads all would meet it twice"
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


@pytest.mark.parametrize("damage", ["is gone", "bytes and not", "content has changed"])
def test_rows_of_a_damaged_part_are_made_again_and_no_others(tmp_path: Path, damage: str) -> None:
    written(tmp_path, [[row(i)] for i in range(8)])
    before = read(tmp_path)
    path = tmp_path / "part-00000.arrow"
    content = path.read_bytes()
    if damage == "is gone":
        path.unlink()
    else:
        cut, middle = content[:-200], bytearray(content)
        middle[len(content) // 2] ^= 1
        path.write_bytes(cut if damage == "bytes and not" else middle)
    looked = opened(tmp_path, shard_rows=4)
    assert not looked.complete and done(looked) == {"r4", "r5", "r6", "r7"}
    with pytest.warns(UserWarning, match=rf"part-00000\.arrow: .*{damage}.*; its 4 result rows"):
        looked.start()
    assert looked.totals.rows == 4
    assert not path.exists() and read(tmp_path) == before[4:], "no reader of all parts meets it"
    for number in range(4):
        looked.write([row(number)])
    looked.close(complete=True)
    assert sorted(read(tmp_path), key=lambda it: it["row_id"]) == before
    assert looked.totals.rows == 8
    again = opened(tmp_path)
    assert again.complete and done(again) == {f"r{i}" for i in range(8)}


def test_overwrite_starts_again_and_only_once_it_starts(tmp_path: Path) -> None:
    written(tmp_path, [[row(i)] for i in range(8)])
    before = contents(tmp_path)
    results = opened(tmp_path, identity={"sampling.seed": 9}, overwrite=True)
    assert not results.complete and len(results.done_rows) == 0
    assert contents(tmp_path) == before
    results.start()
    assert list(contents(tmp_path)) == [MANIFEST_FILE] and results.totals.rows == 0
    results.write([row(1)])
    results.close(complete=True)
    assert [r["row_id"] for r in read(tmp_path)] == ["r1"]
    assert Manifest.load(tmp_path).identity == {"sampling.seed": 9}


@pytest.mark.parametrize("manifest", [(MANIFEST_FILE, "nonsense"), (OLD_MANIFEST_FILE, "{}")])
def test_overwrite_takes_a_directory_of_results_that_it_cannot_read(
    tmp_path: Path, manifest: tuple[str, str]
) -> None:
    written(tmp_path, [[row(0)]])
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / manifest[0]).write_text(manifest[1])
    with pytest.raises(OutputError, match=r"output\.overwrite=true"):
        writer(tmp_path)
    writer(tmp_path, overwrite=True).close(complete=False)
    assert list(contents(tmp_path)) == [MANIFEST_FILE]


def test_overwrite_leaves_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "part-00000.arrow").write_text("somebody's")
    with pytest.raises(OutputError, match=r"part-\*\.arrow files without a manifest"):
        writer(tmp_path, overwrite=True)


def failing(number: int, sample: int = 0) -> dict[str, Any]:
    return row(number, sample_index=sample, error=FAILED["error"])


def test_errors_are_done_again_and_stay_until_their_replacement(tmp_path: Path) -> None:
    groups = [[row(0), failing(0, 1)], [row(1)], [row(2)], [failing(3)], [row(4)], [failing(5)]]
    written(tmp_path, groups)
    assert opened(tmp_path).complete, "without being asked, an error is a result"
    results = opened(tmp_path, shard_rows=2, retry_errors=True)
    assert not results.complete and done(results) == {"r1", "r2", "r4"}
    results.start()
    assert len(read(tmp_path)) == 7
    results.write([row(0), row(0, sample_index=1)])
    assert counted(tmp_path) == {"r0": 2, "r1": 1, "r2": 1, "r3": 1, "r4": 1, "r5": 1}
    errors = [it["row_id"] for it in read(tmp_path) if it["error"]]
    assert sorted(errors) == ["r3", "r5"] and results.totals.errors == {"PromptError": 2}
    results.write([failing(3)])
    results.close(complete=False)
    assert done(opened(tmp_path)) == {f"r{i}" for i in range(6)}, "an interrupt loses no error"
    results = opened(tmp_path, retry_errors=True)
    assert done(results) == {"r0", "r1", "r2", "r4"}
    results.start()
    results.write([row(3)])
    results.write([row(5)])
    results.close(complete=True)
    assert results.complete, "nothing is left to be done again"
    assert counted(tmp_path) == {"r0": 2, "r1": 1, "r2": 1, "r3": 1, "r4": 1, "r5": 1}
    assert not any(it["error"] for it in read(tmp_path))
    assert results.totals.errors == {} and results.totals.samples == 7
    assert opened(tmp_path, retry_errors=True).complete


def counted(folder: Path) -> dict[str, int]:
    """Result rows by row id, in the parts that a reader of all parts meets."""
    names = [it["row_id"] for it in read(folder)]
    return {name: names.count(name) for name in sorted(names)}


def test_a_row_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    results = writer(tmp_path, shard_rows=100, commit_seconds=0.05)
    results.write([row(0)])
    assert read(tmp_path) == [] and 0 < results.seconds_left <= 0.05
    time.sleep(0.06)
    results.write([row(1)])
    assert [it["row_id"] for it in read(tmp_path)] == ["r0", "r1"]
    assert results.seconds_left == 0.05
    results.close(complete=False)


def test_too_many_errors_stop_the_run_and_are_kept(tmp_path: Path) -> None:
    results = writer(tmp_path, shard_rows=1000, max_error_rate=0.02)
    for number in range(99):
        results.write([failing(number) if number < 3 else row(number)])
    with pytest.raises(StoppedError, match="3 of 100 rows failed.*0.02.*3 x PromptError: the p"):
        results.write([row(99)])
    results.close(complete=False)
    assert len(read(tmp_path)) == 100
    again = writer(tmp_path, max_error_rate=0.02)
    again.write([failing(0)])
    again.close(complete=False)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_stops_the_run_and_keeps_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    results = writer(tmp_path)
    for number in range(4):
        results.write([row(number)])

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        for number in range(4, 7):
            results.write([row(number)])
        with pytest.raises(StoppedError, match="No space left.*the same command goes on"):
            results.write([row(7)])
        results.write([row(8)])
        results.close(complete=False)
    assert not [path for path in contents(tmp_path) if path.endswith(".tmp")]
    again = writer(tmp_path)
    assert read(tmp_path) == before and done(again) == {"r0", "r1", "r2", "r3"}
    for number in range(4, 8):
        again.write([row(number)])
    again.close(complete=True)
    assert counted(tmp_path) == {f"r{i}": 1 for i in range(8)}


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        writer(tmp_path / "file")


def test_values_that_do_not_fit_are_a_bug(tmp_path: Path) -> None:
    results = writer(tmp_path)
    with pytest.raises(AssertionError, match="unknown_column"):
        results.write([row(0, unknown_column=1)])
    results.write([row(0, sample_index="first")])
    with pytest.raises(pa.ArrowInvalid):
        results.close(complete=True)
    assert not opened(tmp_path).complete


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shard_rows", 0),
        ("shard_rows", -1),
        ("commit_seconds", 0.0),
        ("max_error_rate", 1.5),
        ("max_error_rate", -0.1),
        ("merge_format", "csv"),
        ("merge_rows", 0),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{option}={value!r} is not allowed: "):
        opened(tmp_path, **{option: value})
