"""Sweeps from the command line: the files, the pairs against NumPy, what is loaded and resumed."""

import json
import math
import shutil
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from command_line import write_jsonl
from forked_cli import ForkedCommands
from tiny_files import save_tiny_model

from runner.cli import main
from runner.models import weights

TEXTS = ["A first text, longer than others.", "x", "", "Grüße, 世界! 🙂", "ab in there", "the end"]
ROWS = [
    {
        "prompt": f"Question {i}? ",
        "choices": ["one", "another"],
        "answer": ["one", "another"][i % 2],
    }
    for i in range(4)
]
PERPLEXITY = (
    "perplexity", "-m", "model.path=a,b", "engine.kv_bits=null,8", "data.path=texts.jsonl",
    "job.window=32", "output.max_error_rate=1", "output.dir=out",
)  # fmt: skip
NAMES = [f"path={model},kv_bits={bits}" for model in "ab" for bits in ("null", "8")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models whose tokenizers differ, with heads of a size that can be quantised."""
    directory = tmp_path_factory.mktemp("models")
    save_tiny_model(directory / "a", head_dim=64)
    save_tiny_model(directory / "b", head_dim=64, seed=1, merges=["t h", "e r", "i n"])
    return directory


@pytest.fixture(scope="module")
def commands():
    found = ForkedCommands()
    yield found
    found.close()


def make_place(directory: Path, models: Path) -> Path:
    for name in "ab":
        (directory / name).symlink_to(models / name)
    write_jsonl(directory / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(directory / "rows.jsonl", ROWS)
    return directory


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Path:
    return make_place(tmp_path, models)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, models, commands) -> tuple[Path, str]:
    """Two models by two KV settings from one command line, and what it printed."""
    place = make_place(tmp_path_factory.mktemp("swept"), models)
    return place, commands.succeed(*PERPLEXITY, cwd=place)


def parts(directory: Path) -> pl.DataFrame:
    return pl.scan_ipc(directory / "part-*.arrow").collect()


def differences(a: dict, b: dict, weight: dict) -> tuple[float, float]:
    """The difference of two ratios over the same keys and its standard error, spelled out."""
    y = np.array([b[key] - a[key] for key in weight])
    w = np.array([weight[key] for key in weight], float)
    ratio, n = y.sum() / w.sum(), len(w)
    return ratio, math.sqrt(n / (n - 1) * ((y - ratio * w) ** 2).sum()) / w.sum()


def test_two_models_by_two_kv_settings(swept):
    place, printed = swept
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    assert table["directory"].to_list() == NAMES and table["point"].to_list() == [0, 1, 2, 3]
    assert table["model.path"].to_list() == ["a", "a", "b", "b"]
    assert table["engine.kv_bits"].to_list() == [None, 8, None, 8]
    assert table.schema["engine.kv_bits"] == pl.Int64
    assert table["state"].unique().to_list() == ["finished"]
    for row in table.to_dicts():
        summary = json.loads((place / "out" / row["directory"] / "summary.json").read_text())
        for name in ("token_perplexity", "bits_per_byte", "scored_tokens", "sum_logprob"):
            assert row[name] == pytest.approx(summary["perplexity"][name], rel=1e-12)
        assert (row["rows"], row["errors"]) == (6, 1)
    assert all(name in printed for name in NAMES)
    shown = printed.partition("\n  point ")[2]
    assert max(map(len, shown.splitlines())) <= 80
    assert "sweep.parquet, sweep_pairs.parquet, sweep.png, sweep.svg in out" in shown


def test_every_two_points_are_paired_over_their_documents(swept):
    place, _ = swept
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    pairs = pl.read_parquet(place / "out" / "sweep_pairs.parquet").to_dicts()
    rows = [parts(place / "out" / name).filter(pl.col("error").is_null()) for name in NAMES]
    nats = [dict(zip(it["row_id"], -it["sum_logprob"], strict=True)) for it in rows]
    by_key = {(it["point_a"], it["point_b"], it["measure"]): it for it in pairs}
    assert {key[:2] for key in by_key} == {(a, b) for b in range(4) for a in range(b)}
    for (a, b, measure), found in by_key.items():
        assert (found["documents"], found["left_out"]) == (5, 1)
        unit = "num_scored" if measure == "nats_per_token" else "num_bytes"
        weight = dict(rows[a].select("row_id", unit).iter_rows())
        expected, stderr = differences(nats[a], nats[b], weight)
        scale = math.log(2) if measure == "bits_per_byte" else 1
        assert found["difference"] == pytest.approx(expected / scale, rel=1e-9)
        assert found["stderr"] == pytest.approx(stderr / scale, rel=1e-9)
        assert found["difference"] == pytest.approx(found["value_b"] - found["value_a"])
        if a == 0:
            row = table.row(b, named=True)
            assert row[f"{measure}_difference"] == found["difference"]
            assert row[f"{measure}_difference_stderr"] == found["stderr"]
            assert row[f"{measure}_paired"] == 5
    # The tokenizers of a and b differ, so that a nat per token means something else in each.
    per_token = {key[:2] for key in by_key if key[2] == "nats_per_token"}
    assert per_token == {(0, 1), (2, 3)}


def test_the_same_command_does_the_rest_and_more_values_only_what_is_new(swept, commands):
    place, _ = swept
    before = pl.read_parquet(place / "out" / "sweep.parquet")
    assert commands.succeed(*PERPLEXITY, cwd=place).count("holds all 6 results already") == 4
    assert pl.read_parquet(place / "out" / "sweep.parquet").equals(before)
    shutil.rmtree(place / "out" / NAMES[1])
    more = [word.replace("null,8", "4,8,null") for word in PERPLEXITY]
    assert commands.succeed(*more, cwd=place).count("holds all 6 results already") == 3
    after = pl.read_parquet(place / "out" / "sweep.parquet")
    assert after["directory"][0] == "path=a,kv_bits=4" and after.height == 6
    numbers = ["directory", "sum_logprob", "bits_per_byte"]
    same = after.filter(pl.col("directory").is_in(NAMES)).select(numbers).sort("directory")
    assert same.equals(before.select(numbers).sort("directory"))


def test_an_interrupted_sweep_keeps_what_an_earlier_one_finished(swept, commands):
    """The first point is stopped, and the others are in the table as they lie on disk."""
    place, _ = swept
    (place / "stop.py").write_text(
        "import os, signal\ndef tracker():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    words = [*PERPLEXITY, "+tracker._target_=stop.tracker"]
    done = commands.run(*words, cwd=place)
    assert done.returncode == 130
    states = pl.read_parquet(place / "out" / "sweep.parquet")["state"].to_list()
    assert states == ["interrupted", "finished", "finished", "finished"]
    commands.succeed(*PERPLEXITY, cwd=place)


def run_here(monkeypatch, place: Path, *words: str) -> None:
    """Runs a command line in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["runner", *words])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main()


def test_a_model_is_loaded_once_for_the_points_that_share_it(place, monkeypatch):
    """And it is gone before the next one is read."""
    read, loaded = weights.read_model, []

    def counted(path, **options):
        alive = [name for name, model in loaded if model() is not None]
        assert alive == [], "two models are in memory"
        found = read(path, **options)
        loaded.append((path.name, weakref.ref(found.model)))
        return found

    monkeypatch.setattr(weights, "read_model", counted)
    words = [*PERPLEXITY, "engine.max_batch_size=1,2"]
    run_here(monkeypatch, place, *words)
    assert [name for name, _ in loaded] == ["a", "b"]
    assert pl.read_parquet(place / "out" / "sweep.parquet").height == 8
    again = [word.replace("dir=out", "dir=dtypes") for word in PERPLEXITY]
    again[3] = "model.max_model_len=64,null"
    run_here(monkeypatch, place, *again)
    assert [name for name, _ in loaded[2:]] == ["a", "a", "b", "b"], "other options, another model"


def test_a_sweep_of_rollouts_pairs_the_rewards_of_a_prompt(place, commands):
    (place / "my.py").write_text("def reward(text, row):\n    return float(len(text) % 5)\n")
    printed = commands.succeed(
        "rollout", "-m", "model.path=a", "sampling.temperature=1.0,0.5", "sampling.n=2",
        "data.path=rows.jsonl", "reward=my.reward", "sampling.max_tokens=6", "output.dir=out",
        cwd=place,
    )  # fmt: skip
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    names = table["directory"].to_list()
    assert names == ["temperature=1.0", "temperature=0.5"]
    means = [
        dict(parts(place / "out" / it).group_by("prompt").agg(pl.mean("reward")).iter_rows())
        for it in names
    ]
    expected, stderr = differences(*means, dict.fromkeys(means[0], 1))
    row = table.row(1, named=True)
    assert row["mean_reward_difference"] == pytest.approx(expected)
    assert row["mean_reward_difference_stderr"] == pytest.approx(stderr)
    assert (row["mean_reward_paired"], row["mean_reward_left_out"]) == (4, 0)
    assert row["mean_reward"] == pytest.approx(np.mean(list(means[1].values())))
    assert row["tokens_per_second"] > 0 and row["mean_completion_tokens"] <= 6
    assert "mean reward" in printed and "tokens/s" in printed


def test_a_sweep_of_scores_pairs_sums_and_what_is_chosen(place, commands):
    commands.succeed(
        "score", "-m", "model.path=a,b", "data.path=rows.jsonl", "job.choices_column=choices",
        "job.answer_column=answer", "output.dir=out", cwd=place,
    )  # fmt: skip
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    found = [parts(place / "out" / it) for it in table["directory"]]
    right = [dict(it.group_by("row_id").agg(pl.max("is_correct")).iter_rows()) for it in found]
    right = [{key: float(value) for key, value in it.items()} for it in right]
    expected, stderr = differences(*right, dict.fromkeys(right[0], 1))
    row = table.row(1, named=True)
    assert row["accuracy"] == np.mean(list(right[1].values()))
    assert row["accuracy_difference"] == pytest.approx(expected)
    assert row["accuracy_difference_stderr"] == pytest.approx(stderr)
    sums = [dict(it.group_by("row_id").agg(pl.sum("sum_logprob")).iter_rows()) for it in found]
    expected, stderr = differences(*sums, dict.fromkeys(sums[0], 2))
    assert row["mean_sum_logprob_difference"] == pytest.approx(expected)
    assert row["mean_sum_logprob_difference_stderr"] == pytest.approx(stderr)


def test_a_sweep_of_one_point_and_a_missing_matplotlib(place, monkeypatch, capsys):
    from runner.sweeps import picture

    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    run_here(
        monkeypatch, place, "generate", "-m", "model.path=a", "data.path=rows.jsonl",
        "sampling.max_tokens=3", "output.dir=out",
    )  # fmt: skip
    assert sorted(it.name for it in (place / "out").iterdir() if it.is_dir()) == ["0"]
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    assert table["mean_completion_tokens"][0] <= 3
    assert pl.read_parquet(place / "out" / "sweep_pairs.parquet").height == 0
    said = capsys.readouterr()
    (line,) = [it for it in said.err.splitlines() if "matplotlib" in it]
    assert "pip install 'mlx-runner[plots]'" in line
    assert said.out.endswith("\nsweep.parquet, sweep_pairs.parquet in out\n")
    assert not (place / "out" / "sweep.png").exists()


def test_a_sweep_of_benchmarks_goes_on_where_it_was(place, commands):
    """A point that is there is not timed again; the file of other options is refused."""
    spread = {"min": 3.0, "median": 4.0, "max": 5.0}
    peer = {"name": "mlx-lm", "ratio": spread}
    workload = {"workload": "decode", "runner": {"tokens_per_second": spread}, "peers": [peer]}
    for size in (1, 2):
        directory = place / "out" / f"max_batch_size={size}"
        directory.mkdir(parents=True)
        given = ["engine.max_batch_size=1", "model.path=a", "job.picture=False"]
        command = " ".join(["runner benchmark model=custom", *given])
        written = {"command": command, "workloads": [workload]}
        (directory / "benchmark.json").write_text(json.dumps(written))
    words = ("engine.max_batch_size=1,2", "model.path=a", "job.picture=false", "output.dir=out")
    done = commands.run("benchmark", "-m", *words, cwd=place)
    assert done.returncode == 2 and "point max_batch_size=2: " in done.stderr
    assert done.stdout.count("holds this benchmark already") == 1, done.stderr
    table = pl.read_parquet(place / "out" / "sweep.parquet")
    assert table["state"].to_list() == ["finished", "failed"]
    assert table["decode_ratio_mlx-lm"].to_list() == [4.0, None]


def test_the_loader_of_a_sweep_is_no_option(place, commands):
    words = ("generate", "model.path=a", "data.path=rows.jsonl", "+job.load_model=x")
    assert "load_model" in commands.refused(*words, cwd=place)
