"""Jobs that are killed, interrupted, stopped and started twice, as a user would meet it."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import ROOT, results, write_jsonl
from forked_cli import refused, run_cli, succeed

ROWS = [{"prompt": f"row {i}", "level": i} for i in range(24)]
# A logprob's last bits would depend on how many rows and columns are multiplied together, and a run
# that goes on has other batches.
EQUAL_BYTES = ("engine.batch_invariant=true", "engine.max_batch_size=4")
BASE = (
    "generate", "model.path=tiny", "data.path=prompts.jsonl", "sampling.max_tokens=6",
    "sampling.ignore_eos=true", *EQUAL_BYTES,
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return tmp_path


def generate(place: Path, *overrides: str, out: str = "out") -> str:
    return succeed(*BASE, f"output.dir={out}", *overrides, cwd=place)


def merged(place: Path, out: str = "out") -> bytes:
    return (place / out / "merged" / "part-00000.arrow").read_bytes()


@contextmanager
def started(place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run in the background, once its directory has a part."""
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *arguments],
        cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not list(place.glob("out/part-*.arrow")):
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


MANY = (
    "generate", "model.path=tiny", "data.path=many.jsonl", "sampling.max_tokens=40",
    "sampling.ignore_eos=true", "engine.max_batch_size=4", "output.dir=out", "output.shard_rows=8",
)  # fmt: skip


def many(place: Path, number: int = 1500) -> int:
    write_jsonl(place / "many.jsonl", [{"prompt": f"row {i}"} for i in range(number)])
    return number


def test_a_hundred_kills_give_the_bytes_of_an_uninterrupted_run(place):
    """Law 8 of the design: no row lost, none twice, bytes equal after the merge, though every run
    has another batch size."""
    write_jsonl(place / "prompts.jsonl", [*ROWS[:14], *ROWS[:4], {"prompt": None, "level": 0}])
    generate(place, "sampling.n=2", "output.max_error_rate=1", out="whole")
    config = (place / "whole" / "config.yaml").read_text()
    (place / "job.yaml").write_text(config)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed_runs.py"), str(place), "100",
         str(random.randrange(10**6))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, directories = map(int, done.stdout.split())
    assert killed == 100 and directories >= 2
    names = ["whole", *(f"out-{number}" for number in range(directories))]
    for name in names:
        succeed("merge", name, cwd=place)
    assert {merged(place, name) for name in names} == {merged(place, "whole")}
    assert results(place / "out-0").height == 18 * 2 + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_and_the_run_goes_on_later(place, number):
    total = many(place)
    with started(place, *MANY) as process:
        process.send_signal(number)
        time.sleep(0.001)
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
        # The second may come before or after the first has ended the run.
        assert process.returncode in (128 + number, -number), printed
        assert "Traceback" not in printed
    first = results(place / "out")
    assert 0 < first.height < total
    write_jsonl(place / "many.jsonl", [{"prompt": f"row {i}"} for i in range(60)])
    succeed(*MANY, cwd=place)
    assert results(place / "out")["row_id"].n_unique() == results(place / "out").height


def test_the_second_of_two_runs_is_refused_with_the_pid_of_the_first(place):
    many(place)
    with started(place, *MANY) as process:
        assert f"(pid {process.pid})" in refused(*MANY, cwd=place)
        assert "(pid" in refused("merge", "out", cwd=place)
        process.send_signal(signal.SIGKILL)
        process.wait()
    write_jsonl(place / "many.jsonl", [{"prompt": f"row {i}"} for i in range(40)])
    succeed(*MANY, cwd=place)


def test_a_running_job_can_be_watched(place):
    total = many(place)
    with started(place, *MANY):
        deadline = time.monotonic() + 60
        seen: list[int] = []
        while len(set(seen)) < 3 and time.monotonic() < deadline:
            if (place / "out" / "summary.json").exists():
                summary = json.loads((place / "out" / "summary.json").read_text())
                assert summary["total_rows"] == total and not summary["complete"]
                seen.append(summary["rows"])
        assert seen == sorted(seen) and len(set(seen)) >= 3


def limited() -> None:
    """No file of this process may be larger than this: what a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_disk_that_refuses_stops_the_run_which_goes_on_later(place):
    generate(place, "output.shard_rows=4", out="whole")
    done = subprocess.run(
        [sys.executable, "-m", "runner", *BASE, "output.dir=out", "output.shard_rows=100",
         "sampling.max_tokens=60", "data.limit=24"],
        cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, preexec_fn=limited,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "out: cannot be written: File too large" in last
    assert "Traceback" not in done.stderr
    command = ("output.shard_rows=100", "sampling.max_tokens=60", "data.limit=24")
    generate(place, *command)
    assert results(place / "out").height == 24


@pytest.mark.parametrize("size", [0, 1500])
@pytest.mark.parametrize("job", ["generate", "openai_batch"])
def test_a_disk_without_room_for_a_beginning_is_one_line(job, size, place):
    request = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "x"},
    }
    write_jsonl(place / "batch.jsonl", [request])
    path = "batch.jsonl" if job == "openai_batch" else "prompts.jsonl"
    command = [job, "model.path=tiny", f"data.path={path}", "output.dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "runner", *command],
        cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "File too large" in line and "same command" in line
    if size:
        there = {path.name for path in (place / "out").iterdir()}
        assert "config.yaml" not in there and there & {"manifest.jsonl", "batch.json"}
        succeed(*command, cwd=place)


def full_disk(place: Path, size: str) -> bool:
    """Mounts a small file system; False where that is not allowed."""
    (place / "small").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place / "small")]
    with_output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run(command, **with_output).returncode == 0


def test_a_full_file_system_stops_the_run_which_goes_on_once_there_is_space(place):
    if not full_disk(place, "64k"):
        pytest.skip("mounting needs a privilege that is not there")
    try:
        out = ("output.dir=small/out", "output.shard_rows=4", "sampling.max_tokens=100")
        done = run_cli(*BASE, *out, cwd=place)
        assert done.returncode == 1, done.stderr
        assert "No space left on device" in done.stderr.strip().splitlines()[-1]
        first = results(place / "small" / "out")
        assert 0 < first.height < 24 and not list(place.glob("small/out/.*.tmp"))
        remount = ["mount", "-o", "remount,size=8m", str(place / "small")]
        subprocess.run(remount, check=True)
        succeed(*BASE, *out, cwd=place)
        whole = results(place / "small" / "out")
        assert whole.height == 24
        assert whole.join(first, on="row_id", how="semi").equals(first)
    finally:
        subprocess.run(["umount", str(place / "small")], check=True)


def test_a_job_that_fails_wholesale_stops_and_its_errors_are_done_again(place):
    rows = [{"prompt": f"row {i}"} for i in range(150)]
    for index in range(0, 150, 20):
        rows[index]["prompt"] = "x" * 300
    write_jsonl(place / "prompts.jsonl", rows)
    done = run_cli(*BASE, "output.dir=out", cwd=place)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "rows failed, more than output.max_error_rate=0.01" in last and "300 tokens" in last
    assert 0 < results(place / "out").height < 150
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert not summary["complete"] and summary["state"] == "stopped"
    assert summary["rows"] == results(place / "out").height
    generate(place, "output.max_error_rate=1")
    assert results(place / "out").height == 150
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert summary["complete"] and summary["errors"] == {"PromptError": 8}
    assert "holds all 150 results already" in generate(place)
    printed = generate(place, "job.retry_errors=true")
    assert "150 rows, 150 samples, 8 errors" in printed, "they fail again, and are there once"
    assert results(place / "out")["row_id"].n_unique() == results(place / "out").height == 150
    line = refused(*BASE, "output.dir=out", "job.retry_errors=maybe", cwd=place)
    assert "job.retry_errors='maybe'" in line and "true or false" in line


def test_the_input_may_change_between_runs_and_the_rest_may_not(place):
    generate(place, "output.shard_rows=5")
    before = results(place / "out")
    changed = [*ROWS[20:], {"prompt": "new", "level": 99}, *ROWS[:20]]
    write_jsonl(place / "prompts.jsonl", changed)
    line = refused(*BASE, "output.dir=out", "sampling.temperature=0.5", cwd=place)
    assert "sampling.temperature: 1.0 -> 0.5" in line
    (place / "prompts.jsonl").rename(place / "other.jsonl")
    line = refused(*BASE, "output.dir=out", "data.path=other.jsonl", cwd=place)
    assert 'data.path: "prompts.jsonl" -> "other.jsonl"' in line
    (place / "other.jsonl").rename(place / "prompts.jsonl")
    others = ("engine.prefill_step_size=64", "engine.max_batch_size=2")
    generate(place, "output.shard_rows=3", "output.merge=true", *others)
    after = results(place / "out")
    assert after.height == 25 and after.join(before, on="row_id", how="semi").equals(before)
    generate(place, "output.merge=true", out="straight")
    assert merged(place) == merged(place, "straight")
    assert "holds all 25 results already" in generate(place)
    write_jsonl(place / "prompts.jsonl", changed[:10])
    printed = generate(place, "output.merge=true")
    assert "holds all 25 results" in printed
    assert "Merged 10 rows into " in printed
    assert "out/merged; left out 15 that the input no longer has." in printed


def test_another_model_under_the_same_path_is_refused_and_a_copy_is_not(place, tiny_directory):
    import shutil

    generate(place)
    (place / "tiny").unlink()
    shutil.copytree(tiny_directory, place / "tiny")
    assert "holds all 24 results already" in generate(place)
    shutil.move(place / "tiny", place / "moved")
    assert "holds all 24 results" in generate(place, "model.path=moved")
    weights = place / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    line = refused(*BASE, "output.dir=out", "model.path=moved", cwd=place)
    assert "model.weights: " in line


def test_a_directory_that_lost_something_is_made_whole(place):
    generate(place, "output.shard_rows=4", "output.merge=true", out="whole")
    generate(place, "output.shard_rows=4")
    out = place / "out"
    (out / "part-00001.arrow").unlink()
    last = out / "part-00005.arrow"
    last.write_bytes(last.read_bytes()[:1000])
    done = run_cli(*BASE, "output.dir=out", "output.merge=true", cwd=place)
    assert done.returncode == 0
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    assert "part-00001.arrow: it is gone; its 4 result rows are made again" in warned[0]
    assert "part-00005.arrow: it has 1000 bytes and not" in warned[1]
    assert merged(place) == merged(place, "whole")
    manifest = out / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-300])
    generate(place, "output.merge=true")
    assert results(out).height == 24 and merged(place) == merged(place, "whole")


def test_overwrite_starts_again(place):
    generate(place, "output.merge=true")
    generate(place, "sampling.seed=5", "output.overwrite=true")
    assert set(results(place / "out")["seed"]) == {5}
    assert not (place / "out" / "merged").exists(), "it was made of other results"


def test_merging_from_the_command_line(place):
    generate(place, "sampling.n=2", "output.shard_rows=5")
    assert "Merged 24 rows into " in succeed("merge", "out", cwd=place)
    succeed(
        "merge", "output.dir=out", "output.merge_format=jsonl", "output.merge_rows=20", cwd=place
    )
    files = sorted((place / "out" / "merged").iterdir())
    assert [file.name for file in files] == [f"part-0000{i}.jsonl" for i in range(3)]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["level"] for row in rows] == [row["level"] for row in ROWS for _ in range(2)]
    assert [row["sample_index"] for row in rows] == [0, 1] * 24
    assert "nowhere: no such directory" in refused("merge", "nowhere", cwd=place)
    assert not (place / "nowhere").exists()
    assert "merge needs a directory: runner merge DIR" in refused("merge", cwd=place)
    assert "tiny: holds no results" in refused("merge", "tiny", cwd=place)
    assert "merge_format='csv'" in refused("merge", "out", "output.merge_format=csv", cwd=place)
