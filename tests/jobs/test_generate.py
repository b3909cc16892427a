"""`runner generate`, run as a user runs it, on a tiny model."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import datasets
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from command_line import ROOT, results, write_jsonl
from forked_cli import refused, run_cli, succeed
from omegaconf import OmegaConf

from runner import LLM
from runner.data.manifest import Manifest

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": i} for i in range(6)]
SHORT = ("sampling.max_tokens=6", "sampling.ignore_eos=true")


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    """A working directory with a model `tiny` and a file of prompts."""
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return tmp_path


def generate(place: Path, *overrides: str, out: str = "out", path: str = "prompts.jsonl") -> str:
    return succeed(
        "generate", "model.path=tiny", f"data.path={path}", f"output.dir={out}", *overrides,
        cwd=place,
    )  # fmt: skip


def test_the_directory_holds_rows_manifest_summary_and_config(place):
    printed = generate(place, "data.prompt_column=question", *SHORT)
    out = place / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml", "manifest.jsonl", "part-00000.arrow", "run.log", "summary.json",
    ]  # fmt: skip
    rows = results(out)
    assert rows.height == 6
    assert set(rows["question"]) == {row["question"] for row in ROWS}
    assert rows["prompt"].to_list() == rows["question"].to_list()
    assert rows["level"].dtype == pl.Int64
    assert set(rows["finish_reason"]) == {"length"} and rows["error"].null_count() == 6
    assert rows["completion_token_ids"].list.len().to_list() == [6] * 6
    assert rows["logprobs"].list.len().to_list() == rows["raw_logprobs"].list.len().to_list()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == summary["samples"] == summary["total_rows"] == 6
    assert summary["complete"]
    assert summary["completion_tokens"] == summary["run"]["completion_tokens"] == 36
    assert summary["finish_reasons"] == {"length": 6} and summary["errors"] == {}
    assert summary["run"]["max_batch_size"] == 32 and summary["run"]["batch_halvings"] == 0
    assert summary["run"]["memory_budget_bytes"] > 2**24
    assert summary["run"]["max_batch_size_auto"] is None
    assert summary["blas"] and summary["versions"]["mlx"] and summary["reward"] is None
    config = OmegaConf.load(out / "config.yaml")
    assert config.sampling.max_tokens == 6 and config.data.path == "prompts.jsonl"
    assert max(map(len, printed.splitlines())) <= 80 + len(str(out))
    assert f'polars.scan_ipc("{out}/part-*.arrow")' in printed


def test_a_run_is_logged_and_reported_to_a_tracker_and_its_status_is_told(place):
    pytest.importorskip("tensorboardX")
    generate(
        place, "data.prompt_column=question", "tracker=tensorboard", "output.shard_rows=2", *SHORT
    )
    log = (place / "out" / "run.log").read_text()
    assert "sampling.max_tokens=6" in log and "INFO model name=tiny" in log and " blas=" in log
    assert "commit rows=2 " in log and "commit rows=6 " in log and "What is" not in log
    assert log.splitlines()[-1].endswith("INFO end state=finished rows=6")
    (events,) = (place / "out" / "tensorboard").iterdir()
    assert b"tokens_per_second" in events.read_bytes()
    shown = succeed("status", "out", cwd=place)
    assert "  state     finished\n  rows      6 of 6 (100%), 0 errors\n" in shown


def test_prompt_logprobs_are_a_column_of_the_models_own_distribution(place):
    write_jsonl(place / "some.jsonl", [{"question": text} for text in ("hello", "a", "")])
    options = ["data.prompt_column=question", "sampling.prompt_logprobs=0"]
    generate(place, *options, "sampling.n=2", *SHORT, path="some.jsonl")
    printed = generate(place, *options, "sampling.max_tokens=0", path="some.jsonl", out="scored")
    assert "4 tokens of the prompts" in printed
    rows, scored = results(place / "out"), results(place / "scored")
    assert rows.schema["prompt_logprobs"] == pl.List(pl.Float32)
    field = pa.ipc.open_file(place / "out" / "part-00000.arrow").schema.field("prompt_logprobs")
    assert b"model" in field.metadata[b"distribution"]
    for table, samples in ((rows, 2), (scored, 1)):
        hello = table.filter(pl.col("prompt") == "hello")["prompt_logprobs"].to_list()
        assert len(hello) == samples and all(row == hello[0] for row in hello)
        assert hello[0][0] is None and len(hello[0]) == 5 and max(hello[0][1:]) < 0
        alone = table.filter(pl.col("prompt") == "a")["prompt_logprobs"].to_list()
        assert alone == [[None]] * samples
        failed = table.filter(pl.col("error").is_not_null())
        assert failed.height == 1 and failed["prompt_logprobs"].to_list() == [None]
    assert set(scored["completion_token_ids"].list.len().drop_nulls()) == {0}
    llm = LLM(place / "tiny")
    (score,) = llm.score(["hello"], use_tqdm=False)
    one = scored.filter(pl.col("prompt") == "hello")["prompt_logprobs"][0].to_list()
    assert one[1:] == pytest.approx(score.logprobs[1:], abs=1e-4)
    generate(place, "data.prompt_column=question", *SHORT, path="some.jsonl", out="none")
    assert results(place / "none")["prompt_logprobs"].null_count() == 3


def test_results_open_unchanged_in_polars_pyarrow_and_datasets(place):
    generate(place, "data.prompt_column=question", "sampling.n=3", "output.shard_rows=6", *SHORT)
    parts = sorted(map(str, (place / "out").glob("part-*.arrow")))
    assert len(parts) == 3
    by_polars = results(place / "out")
    by_arrow = pyarrow.dataset.dataset(parts, format="arrow").to_table()
    loaded = datasets.load_dataset(
        "arrow", data_files=parts, split="train", cache_dir=str(place / "cache")
    )
    key = ["row_id", "sample_index"]
    assert by_polars.height == 18
    assert pl.from_arrow(by_arrow).sort(key).equals(by_polars)
    assert (
        pl.from_arrow(loaded.data.table)
        .sort(key)
        .select("text", "logprobs")
        .equals(by_polars.select("text", "logprobs"))
    )
    field = by_arrow.schema.field("raw_logprobs")
    assert b"model" in field.metadata[b"distribution"]


def test_the_same_rows_in_any_format_give_the_same_completions(place):
    pq.write_table(pa.Table.from_pylist(ROWS), place / "prompts.parquet")
    with gzip.open(place / "prompts.jsonl.gz", "wt") as file:
        file.write((place / "prompts.jsonl").read_text())
    seen = []
    for name in ("prompts.jsonl", "prompts.jsonl.gz", "prompts.parquet"):
        generate(place, "data.prompt_column=question", *SHORT, out=f"from-{name}", path=name)
        seen.append(results(place / f"from-{name}"))
    assert seen[0].equals(seen[1]) and seen[0].equals(seen[2])


def test_batch_size_and_order_change_nothing_and_the_seed_does(place):
    column = "data.prompt_column=question"
    generate(place, column, "sampling.n=2", *SHORT)
    generate(
        place, column, "sampling.n=2", "engine.max_batch_size=3", "data.shuffle_seed=1", *SHORT,
        out="other",
    )  # fmt: skip
    generate(place, column, "sampling.n=2", "sampling.seed=7", *SHORT, out="seed")
    one, other, seed = (results(place / name) for name in ("out", "other", "seed"))
    assert one["completion_token_ids"].to_list() == other["completion_token_ids"].to_list()
    assert one["completion_token_ids"].to_list() != seed["completion_token_ids"].to_list()
    assert set(seed["seed"]) == {7}


def test_bad_rows_are_rows_with_an_error_and_the_others_go_on(place):
    rows = [
        {"id": "good", "prompt": "hello"},
        {"id": "null", "prompt": None},
        {"id": "long", "prompt": "x" * 300},
        {"id": "empty", "prompt": ""},
    ]
    write_jsonl(place / "bad.jsonl", rows)
    printed = generate(place, "data.id_column=id", *SHORT, path="bad.jsonl")
    done = {row["row_id"]: row for row in results(place / "out").to_dicts()}
    assert done.keys() == {"good", "null", "long", "empty"}
    assert done["good"]["error"] is None and len(done["good"]["completion_token_ids"]) == 6
    for name in ("null", "long", "empty"):
        assert done[name]["error"]["type"] == "PromptError"
        assert done[name]["finish_reason"] == "error"
        assert done[name]["completion_token_ids"] is None
    assert "300 tokens" in done["long"]["error"]["message"]
    assert "3 errors" in printed
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert summary["errors"] == {"PromptError": 3} and summary["rows"] == 4


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["data.prompt_column=q"], "hi"),
        (["data.prompt_column=q", "data.chat=true"], "<user>hi<a>"),
        (["data.prompt_column=q", "data.chat=true", "data.system_prompt=be kind"],
         "<system>be kind<user>hi<a>"),
        (["data.messages_column=chat"], "<user>yo<a>"),
        (["data.messages_column=chat", "+data.chat_template_kwargs.mood=ok"], "<user>yo<a>ok"),
        (["data.token_ids_column=ids"], None),
        (["data.prompt_template=Q {{ q }}:\n{{ n }}"], "Q hi:\n3"),
    ],
    ids=["raw", "chat", "system", "messages", "kwargs", "token ids", "template"],
)  # fmt: skip
def test_every_way_to_make_a_prompt(place, options, prompt):
    row = {"q": "hi", "n": 3, "chat": [{"role": "user", "content": "yo"}], "ids": [10, 11, 12]}
    write_jsonl(place / "one.jsonl", [row])
    generate(place, *options, *SHORT, path="one.jsonl")
    (done,) = results(place / "out").to_dicts()
    assert done["prompt"] == prompt and done["error"] is None
    if prompt is None:
        assert done["prompt_token_ids"] == [10, 11, 12]


def test_limit_offset_and_id_column_choose_and_name_rows(place):
    generate(
        place, "data.prompt_column=question", "data.id_column=level", "data.offset=1",
        "data.limit=2", *SHORT,
    )  # fmt: skip
    assert results(place / "out")["row_id"].to_list() == ["1", "2"]


def test_an_id_that_names_two_rows_is_refused_before_the_model_is_loaded(place):
    rows = [{"id": name, "prompt": f"row {i}"} for i, name in enumerate([*"abcdefghijkl", "a"])]
    write_jsonl(place / "ids.jsonl", rows)
    line = refused(
        "generate", "model.path=tiny", "data.path=ids.jsonl", "data.id_column=id",
        "model.dtype=bfloat16", "output.dir=out", *SHORT, cwd=place,
    )  # fmt: skip
    assert line == "error: id_column=id: 'a' names rows 1, 13; give each row its own"
    assert not (place / "out").exists()


def test_a_repeated_prompt_is_two_rows_with_draws_of_their_own(place):
    write_jsonl(place / "twice.jsonl", [{"prompt": "same"}, {"prompt": "same"}])
    generate(place, "sampling.max_tokens=20", *SHORT[1:], path="twice.jsonl")
    rows = results(place / "out")
    assert rows["row_id"].n_unique() == 2 and rows["text"].n_unique() == 2


def test_a_column_with_a_name_of_ours_is_kept_under_another(place):
    write_jsonl(place / "named.jsonl", [{"prompt": "hi", "text": "mine", "seed": "yours"}])
    generate(place, *SHORT, path="named.jsonl")
    (row,) = results(place / "out").to_dicts()
    assert row["input_text"] == "mine" and row["input_seed"] == "yours" and row["seed"] == 0


def test_a_finished_directory_is_left_as_it_is(place):
    generate(place, "data.prompt_column=question", *SHORT)
    before = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    printed = generate(place, "data.prompt_column=question", *SHORT)
    assert "holds all 6 results already" in printed
    assert before == {p.name: p.read_bytes() for p in (place / "out").iterdir()}


def test_options_about_keys_and_values_decide_results_and_the_batch_size_does_not(place):
    given = ("data.prompt_column=question", *SHORT)
    generate(place, *given, "engine.max_kv_size=8")
    words = ["generate", "model.path=tiny", "data.path=prompts.jsonl", "output.dir=out", *given]
    changed = ["engine.kv_bits=8", "engine.kv_group_size=32", "engine.quantized_kv_start=4"]
    for option in (*changed, "engine.max_kv_size=9"):
        line = refused(*words, *dict.fromkeys(["engine.max_kv_size=8", option]), cwd=place)
        key, _, value = option.partition("=")
        assert f"{key}: " in line and line.count(" -> ") == 1 and f"-> {value}" in line
    printed = generate(place, *given, "engine.max_kv_size=8", "engine.max_batch_size=2")
    assert "holds all 6 results already" in printed


def test_a_bounded_cache_changes_results(place):
    given = ("data.prompt_column=question", *SHORT)
    generate(place, *given, "engine.max_kv_size=8", out="bounded")
    generate(place, *given, "engine.max_kv_size=200", out="roomy")
    generate(place, *given, out="plain")
    bounded, roomy, plain = (
        results(place / name)["raw_logprobs"] for name in ("bounded", "roomy", "plain")
    )
    assert roomy.to_list() == plain.to_list() != bounded.to_list()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_commits_and_goes_on_where_it_was(place, number):
    write_jsonl(place / "many.jsonl", [{"prompt": f"row {i}"} for i in range(120)])
    command = [
        "generate", "model.path=tiny", "data.path=many.jsonl", "output.dir=out",
        "sampling.max_tokens=60", "sampling.ignore_eos=true", "engine.max_batch_size=4",
        "output.shard_rows=4",
        # Of 7,200 draws, one may else lie on an edge that rounding in another batch moves.
        "engine.batch_invariant=true",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *command],
        cwd=place, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(place.glob("out/part-*.arrow")):
        time.sleep(0.01)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert "the same command goes on" in printed and "Traceback" not in printed
    first = results(place / "out")
    assert 0 < first.height < 120
    assert not Manifest.load(place / "out").complete
    done = run_cli(*command, "engine.max_batch_size=16", cwd=place)
    assert done.returncode == 0, done.stderr
    whole = results(place / "out")
    assert whole.height == whole["row_id"].n_unique() == 120
    assert whole.join(first, on="row_id", how="semi").equals(first)
    succeed(*[a.replace("dir=out", "dir=straight") for a in command], cwd=place)
    straight = results(place / "straight")
    assert straight["completion_token_ids"].to_list() == whole["completion_token_ids"].to_list()


def test_the_batch_size_and_the_memory_can_be_chosen_and_change_nothing(place):
    column = "data.prompt_column=question"
    generate(place, column, *SHORT)
    printed = command_line.run_cli(
        "generate", "model.path=tiny", "data.path=prompts.jsonl", column, "output.dir=auto",
        "engine.max_batch_size=auto", "engine.memory_budget=400MB", *SHORT,
        cwd=place, XDG_CACHE_HOME=str(place / "cache"),
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert "max_batch_size=auto: " in printed.stderr
    run = json.loads((place / "auto" / "summary.json").read_text())["run"]
    assert run["memory_budget_bytes"] == 400 * 10**6
    assert run["max_batch_size_auto"]["max_batch_size"] == run["max_batch_size"]
    one, other = (results(place / name) for name in ("out", "auto"))
    assert one["completion_token_ids"].to_list() == other["completion_token_ids"].to_list()
