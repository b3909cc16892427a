"""`runner benchmark`: what it writes, prints and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, refused, succeed
from omegaconf import OmegaConf

from runner.errors import ParameterError
from runner.jobs.benchmark import benchmark

BASELINES = sorted((ROOT / "tests" / "benchmarks").glob("*.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Path:
    place = tmp_path_factory.mktemp("benchmark")
    (place / "tiny").symlink_to(tiny_directory)
    return place


ARGUMENTS = (
    "benchmark", "model.path=tiny", "job.workloads=[decode]", "job.rounds=2", "output.dir=out",
    "job.compare=[mlx_lm,stock]", "job.stock_rows=3", f"job.baseline={BASELINES[0]}",
)  # fmt: skip


@pytest.fixture(scope="module")
def printed(place: Path) -> str:
    return succeed(*ARGUMENTS, cwd=place)


@pytest.fixture(scope="module")
def written(place: Path, printed: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((place / "out" / "benchmark.json").read_text())
    return result


def test_decode_is_measured_beside_two_loops_and_stock(written, printed):
    (row,) = written["workloads"]
    assert (row["rows"], row["useful_tokens"]) == (32, 32 * 64)
    ours, peers = row["runner"], row["peers"]
    kinds = ["mlx_lm", "mlx_lm", "stock"] if written["device"] == "cpu" else ["mlx_lm", "stock"]
    assert [peer["kind"] for peer in peers] == kinds
    assert (peers[-1]["rows"], peers[-1]["useful_tokens"]) == (3, 3 * 64)
    for side in (ours, *peers):
        speeds = [side["useful_tokens"] / seconds for seconds in side["seconds"]]
        assert side["tokens_per_second"]["rounds"] == pytest.approx(speeds) and len(speeds) == 2
        assert side["rows_per_hour"]["max"] == pytest.approx(3600 / 64 * max(speeds))
        assert side["peak_bytes"] > written["weights_bytes"]
        assert side["name"] in printed
    for peer in peers:
        pairs = zip(*(s["tokens_per_second"]["rounds"] for s in (ours, peer)), strict=True)
        assert peer["ratio"]["rounds"] == pytest.approx([one / two for one, two in pairs])


def test_the_table_fits_a_screen(printed):
    assert max(map(len, printed.splitlines())) <= 80
    assert "did 3 of 32 rows of decode" in printed
    assert "baseline" in printed or "slower" in printed


def test_the_circumstances_are_written_down(written, place):
    assert written["engine"]["max_batch_size"] == 32 and written["engine"]["kv_bits"] is None
    assert written["versions"]["mlx-lm"] and written["blas"] and written["unequal"] == []
    assert written["command"].startswith("runner benchmark ")
    assert "job.rounds=2" in written["command"] and "out" not in written["command"]
    assert {it.name for it in (place / "out").glob("benchmark.*")} == {
        "benchmark.json", "benchmark.png", "benchmark.svg",
    }  # fmt: skip


def test_what_is_not_equal_is_said(place):
    printed = succeed(
        "benchmark", "model.path=tiny", "job.workloads=[decode]", "job.rounds=1", "output.dir=kv",
        "engine.max_kv_size=48", "job.picture=false", cwd=place,
    )  # fmt: skip
    assert "* not equal: only this engine runs with engine.max_kv_size=48" in printed
    written = json.loads((place / "kv" / "benchmark.json").read_text())
    assert written["unequal"] == ["engine.max_kv_size=48"]
    assert written["engine"]["max_kv_size"] == 48
    assert not list((place / "kv").glob("*.png"))


def shape(value: Any) -> Any:
    """The keys and the kinds of values, whatever the figures and however many."""
    if isinstance(value, dict):
        return {key: shape(it) for key, it in value.items() if key != "engine"}
    if isinstance(value, list):
        return [shape(it) for it in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_is_what_the_job_writes(path, written):
    baseline = json.loads(path.read_text())
    assert shape(baseline) == shape(written)
    assert (
        path.stem == re.sub(r"\W+", "-", f"{baseline['machine']} {baseline['cores']} cores").lower()
    )
    assert baseline["command"].startswith("runner benchmark")
    assert not re.search(r"(^|[\s=\"])[~/]\w", path.read_text()), "a path"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workloads": ["decod"]}, "decod is not there: group, mixed, decode, adapters, score"),
        ({"compare": "pip"}, "pip is not there: mlx_lm, stock, batch_invariant"),
        ({"compare": []}, r"job.compare=\[\]"),
        ({"rounds": 0}, "job.rounds=0"),
        ({"stock_rows": 0}, "job.stock_rows=0"),
        ({"baseline": "none.json"}, "job.baseline=none.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(options, said):
    given = {
        "workloads": ["decode"], "rounds": 1, "compare": "stock", "stock_rows": 1,
        "baseline": None, "picture": False,
    }  # fmt: skip
    with pytest.raises(ParameterError, match=said):
        benchmark(OmegaConf.create({}), **(given | options))


def test_results_are_not_replaced_and_a_context_is_large_enough(place, printed):
    assert "there already" in refused(*ARGUMENTS, cwd=place)
    needs = refused("benchmark", "model.path=tiny", "job.workloads=[group]", cwd=place)
    assert "job.workloads=group" in needs and "the model has 256" in needs
