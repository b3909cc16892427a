"""The certificate of `runner rollout` and `generate`: what they say of their own logprobs."""

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from command_line import results, write_jsonl
from forked_cli import ForkedCommands
from in_process import run_job
from tiny_files import save_tiny_model

from runner import job
from runner.data.parts import arrow_bytes
from runner.data.schemas import result_schema

ROWS = [{"prompt": f"count {i} and a little more", "answer": str(i)} for i in range(3)]
ROLLOUT = ("rollout", "model.path=tiny", "data.path=prompts.jsonl", "output.dir=out")
SHORT = ("sampling.max_tokens=8", "sampling.n=4", "reward=exact_match")


@pytest.fixture(scope="module")
def commands():
    found = ForkedCommands()
    yield found
    found.close()


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return tmp_path


def summary(place: Path, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / out / "summary.json").read_text())
    return found


@pytest.mark.parametrize(("certify", "scored"), [(64, 12), (5, 5), (0, None)])
def test_a_rollout_scores_a_sample_of_its_own_output_again(place, commands, certify, scored):
    printed = commands.succeed(*ROLLOUT, *SHORT, f"job.certify={certify}", cwd=place)
    found = summary(place)["certificate"]
    assert (found and found["rows"]) == scored
    run = summary(place)["run"]
    lengths = results(place / "out")["completion_token_ids"].list.len()
    assert (run["scored_tokens"], run["completion_tokens"]) == (0, lengths.sum())
    assert run["prompt_tokens"] == sum(len(row["prompt"]) for row in ROWS), "it is aside"
    line = re.search(r"^  certified (.*)$", printed, re.M)
    assert (line is None) == (found is None)
    if found:
        assert f"{scored} rows: differ by" in line[1] and "the same bits" in line[1]
        assert len(line[0]) <= 80
        assert scored < 12 or found["tokens"] == lengths.sum()
        assert found["mean_difference"] <= found["max_difference"] <= 1e-4
        assert 0 <= found["mismatch_kl"] < 1e-8 and 0 <= found["share_bit_equal"] <= 1
    # It decides no result, so the directory is complete with another one too.
    again = commands.succeed(*ROLLOUT, *SHORT, "job.certify=1", cwd=place)
    assert "holds all 12" in again and summary(place)["certificate"] == found


@pytest.mark.parametrize("options", [[], ["engine.kv_bits=8", "engine.kv_group_size=32"]], ids=str)
def test_with_batch_invariance_every_bit_is_the_same(place, commands, options):
    (place / "tiny").unlink()
    save_tiny_model(place / "tiny", head_dim=32)
    given = ("engine.batch_invariant=true", "sampling.temperature=0.8", *options)
    commands.succeed(*ROLLOUT, *SHORT, *given, cwd=place)
    found = summary(place)["certificate"]
    assert found["rows"] == 12 and found["errors"] == 0
    assert (found["max_difference"], found["mismatch_kl"], found["share_bit_equal"]) == (0, 0, 1)


def test_errors_and_nothing_sampled(place, commands):
    rows = [{"prompt": "fine"}, {"prompt": ""}, {"prompt": "x" * 300}]
    write_jsonl(place / "prompts.jsonl", rows)
    base = ("generate", *ROLLOUT[1:])
    printed = commands.succeed(*base, "sampling.max_tokens=4", cwd=place)
    assert "2 errors" in printed and summary(place)["certificate"]["rows"] == 1
    scored = ("output.dir=none", "sampling.max_tokens=0", "sampling.prompt_logprobs=0")
    printed = commands.succeed(*base[:-1], *scored, cwd=place)
    assert summary(place, "none")["certificate"] is None and "certified" not in printed


def test_a_run_that_goes_on_certifies_the_same_rows(place, monkeypatch):
    """Also those that are on disk from before; here every result of before is made wrong."""
    options = (
        "data=custom",
        f"data.path={place / 'prompts.jsonl'}",
        "output.shard_rows=4",
        "job.certify=6",
    )
    given = (*options, "sampling.max_tokens=8", "sampling.n=4", "reward=exact_match")
    run_job("rollout", place, *given, out="whole")
    asked = []
    with monkeypatch.context() as patch:
        plain = job.LLM.run

        def recorded(llm, requests, **more):
            listed = list(requests)
            asked.append({tuple(r.prompt.token_ids or ()) for r in listed})
            return plain(llm, listed, **more)

        patch.setattr(job.LLM, "run", recorded)
        run_job("rollout", place, *given, out="one")
        (place / "one" / "part-00001.arrow").unlink()
        with pytest.warns(UserWarning, match="is gone"):
            run_job("rollout", place, *given, out="one")
    (_, first, _, second) = asked
    assert first == second and len(first) == 6
    whole, one = summary(place, "whole")["certificate"], summary(place, "one")["certificate"]
    assert (whole["rows"], whole["tokens"]) == (one["rows"], one["tokens"])


def test_an_interrupt_while_it_is_scored_leaves_it_to_the_next_run(place, monkeypatch):
    given = (
        "data=custom",
        f"data.path={place / 'prompts.jsonl'}",
        "sampling.max_tokens=4",
        "reward=exact_match",
    )

    def interrupt(certificate, paths, llm, *, interrupted):
        rows = pl.concat([pl.read_ipc(path) for path in paths])
        assert rows.height == 12, "all is on disk before it begins"
        assert not interrupted()
        monkeypatch.setattr(job.Interrupt, "is_requested", lambda self: True)

    with monkeypatch.context() as patch:
        patch.setattr(job.Certificate, "numbers", interrupt)
        patch.setattr(job.Interrupt, "exit_if_requested", lambda self: None)
        run_job("rollout", place, *given, "sampling.n=4")
    found = summary(place)
    assert found["certificate"] is None and not found["complete"]
    assert (found["state"], found["rows"]) == ("interrupted", 3)
    monkeypatch.undo()
    run_job("rollout", place, *given, "sampling.n=4")
    assert summary(place)["complete"] and summary(place)["certificate"]["rows"] == 12


def test_logprobs_that_are_off_are_told(place, monkeypatch):
    """As if sampling had recorded something else: results of a wrong distribution."""
    given = (
        "data=custom",
        f"data.path={place / 'prompts.jsonl'}",
        "sampling.max_tokens=4",
        "reward=exact_match",
    )
    plain = job.result_rows

    def wrong(*arguments):
        rows = plain(*arguments)
        for row in rows:
            row["raw_logprobs"] = [logprob - 0.25 for logprob in row["raw_logprobs"]]
        return rows

    monkeypatch.setattr(job, "result_rows", wrong)
    run_job("rollout", place, *given)
    found = summary(place)["certificate"]
    assert found["max_difference"] == pytest.approx(0.25, abs=1e-4)
    assert found["mismatch_kl"] == pytest.approx(0.0340254, rel=1e-2)
    assert found["share_bit_equal"] == 0


def test_results_are_not_held_in_memory(tmp_path):
    """Of 40 MiB of results, what is held is far less than a part of them."""
    from runner.certificate import _places, _read

    schema = result_schema(pa.schema([]))
    paths = []
    for part in range(4):
        rows = [
            {
                "row_id": f"{part}-{i}", "sample_index": 0, "finish_reason": "stop",
                "prompt_token_ids": [7] * 1000, "completion_token_ids": [part, i] * 1000,
                "raw_logprobs": [0.0],
            }
            for i in range(600)
        ]  # fmt: skip
        paths.append(tmp_path / f"part-{part}.arrow")
        paths[-1].write_bytes(arrow_bytes(pa.Table.from_pylist(rows, schema=schema)))
        del rows
    before, most = pa.total_allocated_bytes(), 0
    places = sorted(_places(paths))[:8]
    for row in _read(places):
        assert len(row["prompt_token_ids"]) == 1000
        most = max(most, pa.total_allocated_bytes() - before)
    assert len(places) == 8 and most < 2**20


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "null"])
def test_what_is_no_number_of_rows_is_refused_in_a_line(place, commands, value):
    for name in ("rollout", "generate"):
        line = commands.refused(name, *ROLLOUT[1:], f"job.certify={value}", cwd=place)
        assert line.startswith("error: job.certify=") and "0 for none" in line
    assert not (place / "out").exists()
