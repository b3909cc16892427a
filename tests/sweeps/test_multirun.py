"""Names of points, and what becomes of a sweep in which one fails, stops or is interrupted."""

from pathlib import Path

import polars as pl
import pytest
from forked_cli import ForkedCommands
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.multirun import _name

JOB = """
import json, os, signal, sys
from runner.errors import DataError, StoppedError

def run(config, *, a, b=None, fail=None):
    place = config.output.dir
    print("ran", a, b)
    if a in (fail or {}):
        {"usage": usage, "stop": stop, "bug": bug, "interrupt": interrupt}[fail[a]]()
    with open(f"{place}/summary.json", "w") as file:
        json.dump({"rows": 3, "errors": {}, "run": {}}, file)

def usage():
    raise DataError("no rows here")
def stop():
    raise StoppedError("the disk is full")
def bug():
    raise RuntimeError("a bug")
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture(scope="module")
def commands():
    found = ForkedCommands()
    yield found
    found.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "job").mkdir(parents=True)
    conf = "# Mine.\n_target_: sweep_job.run\na: 1\nb: null\nfail: null\n"
    (tmp_path / "conf" / "job" / "mine.yaml").write_text(conf)
    (tmp_path / "sweep_job.py").write_text(JOB)
    return tmp_path


def names(*words: str) -> list[str]:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parser = OverridesParser.create()
    parsed = parser.parse_overrides(list(words))
    swept = {it.key_or_group for it in parsed if it.is_sweep_override()}
    points = BasicSweeper.split_arguments(parsed, None)[0]
    return [_name(parser.parse_overrides(point), swept) for point in points]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job=mine", "engine.kv_bits=null,8"], ["kv_bits=null", "kv_bits=8"]),
        (["model=a,b", "sampling.n=2"], ["model=a", "model=b"]),
        (["a.n=1,2", "b.n=3"], ["n=1", "n=2"]),
        (["a.n=1,2", "b.n=3,4"], ["a.n=1,b.n=3", "a.n=1,b.n=4", "a.n=2,b.n=3", "a.n=2,b.n=4"]),
        (["x=range(1,3)", "+y=0.5,-1"], ["x=1,y=0.5", "x=1,y=-1", "x=2,y=0.5", "x=2,y=-1"]),
        (["x=3", "y=4"], ["0"]),
    ],
)
def test_a_point_is_named_by_what_is_swept(words, expected):
    assert names(*words) == expected


def test_values_that_are_no_file_names_stay_apart_and_short():
    found = names("p=/models/one,/other/one,pkg://x/one.gguf", "t='a b','a/b',''")
    assert len(set(found)) == 9
    assert all("/" not in it and " " not in it for it in found)
    assert found[0].startswith("p=one-") and "t=a-b-" in found[0]
    (long, _) = names(f"x={'y' * 500},1")
    assert len(long) < 80
    many = names(*(f"key_{i}={'z' * 30},{'w' * 30}" for i in range(6)))
    assert len(set(many)) == 64 and max(map(len, many)) <= 170


def test_more_values_and_another_order_change_no_name():
    few, more = names("a=1,2", "b=x,y"), names("a=3,2,1", "b=y,z,x")
    assert set(few) < set(more)


def table(place: Path, out: str = "out") -> dict[str, dict]:
    rows = pl.read_parquet(place / out / "sweep.parquet").to_dicts()
    return {row["directory"]: row for row in rows}


def test_a_point_that_fails_is_named_and_the_others_go_on(place, commands):
    words = ("mine", "-m", "job.a=1,2,3", "job.fail={2: usage}", "output.dir=out")
    done = commands.run(*words, cwd=place)
    assert done.returncode == 2
    assert done.stderr == "error: point a=2: no rows here\n"
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
        "ran 1 None", "ran 2 None", "ran 3 None",
    ]  # fmt: skip
    found = table(place)
    assert [it["state"] for it in found.values()] == ["finished", "failed", "finished"]
    assert [it["error"] for it in found.values()] == [None, "no rows here", None]
    assert [it["rows"] for it in found.values()] == [3, None, 3]
    assert [it["job.a"] for it in found.values()] == [1, 2, 3]
    assert not (place / "out" / "a=2").exists(), "nothing of it began"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert commands.run(*words[:3], "output.dir=out", cwd=place).returncode == 0
    assert [it["state"] for it in table(place).values()] == ["finished"] * 3


def test_a_point_that_stops_gives_1_and_a_mistake_beside_it_2(place, commands):
    done = commands.run("mine", "-m", "job.a=1,2", "job.fail={1: stop}", cwd=place)
    assert (done.returncode, done.stderr) == (1, "error: point a=1: the disk is full\n")
    fail = "job.fail={1: stop, 2: usage}"
    assert commands.run("mine", "-m", "job.a=1,2", fail, cwd=place).returncode == 2


def test_a_bug_keeps_its_traceback_and_the_other_points(place, commands):
    words = ("mine", "-m", "job.a=1,2,3", "job.fail={2: bug}", "output.dir=out")
    done = commands.run(*words, cwd=place)
    assert done.returncode == 70, "the fork's code for an exception"
    assert "sweep_job.py" in done.stderr and done.stderr.endswith("RuntimeError: a bug\n")
    found = table(place).values()
    assert [it["state"] for it in found] == ["finished", "stopped", "finished"]
    assert [it["error"] for it in found] == [None, "RuntimeError: a bug", None]


def test_an_interrupt_ends_the_sweep_and_nothing_is_lost(place, commands):
    words = ("mine", "-m", "job.a=1,2,3", "output.dir=out")
    done = commands.run(*words, "job.fail={2: interrupt}", cwd=place)
    assert done.returncode == 130 and "ran 3" not in done.stdout
    states = [it["state"] for it in table(place).values()]
    assert states == ["finished", "interrupted", "waiting"]
    assert commands.run(*words, cwd=place).returncode == 0
    assert [it["state"] for it in table(place).values()] == ["finished"] * 3


def test_options_have_types(place, commands):
    words = ("job.b=null,0.5", "job.a=1,x", "output.dir=out")
    commands.succeed("mine", "-m", *words, cwd=place)
    rows = pl.read_parquet(place / "out" / "sweep.parquet")
    assert rows["job.b"].to_list() == [None, None, 0.5, 0.5]
    assert rows["job.a"].to_list() == ["1", "x", "1", "x"]
    assert rows["job"].unique().to_list() == ["mine"] and "output.dir" not in rows.columns


def test_bad_values_are_found_before_the_first_point(place, commands):
    line = commands.refused("mine", "-m", "sampling.n=1,x", "output.dir=out", cwd=place)
    assert line.startswith("error: sampling.n=x: ")
    assert not list(place.glob("out/*/*")) and not (place / "out" / "sweep.parquet").exists()


def test_a_sweep_may_be_moved_and_goes_on_there(place, commands):
    words = ("mine", "-m", "job.a=1,2")
    commands.succeed(*words, "output.dir=out", cwd=place)
    (place / "out").rename(place / "moved")
    commands.succeed(*words, "output.dir=moved", cwd=place)
    assert list(table(place, "moved")) == ["a=1", "a=2"]


def test_a_secret_has_no_column(place, commands):
    conf = (place / "conf" / "job" / "mine.yaml").read_text()
    (place / "conf" / "job" / "mine.yaml").write_text(f"{conf}api_key: null\n")
    job = (place / "sweep_job.py").read_text().replace("b=None", "b=None, api_key=None")
    (place / "sweep_job.py").write_text(job)
    commands.succeed("mine", "-m", "job.a=1,2", "job.api_key=abc", "output.dir=out", cwd=place)
    assert "job.api_key" not in pl.read_parquet(place / "out" / "sweep.parquet").columns
