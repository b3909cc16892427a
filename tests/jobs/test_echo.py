"""`sampling.echo` on the command line: what results hold then, and which jobs cannot follow it."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from command_line import results, write_jsonl
from forked_cli import refused, succeed

from runner import LLM

PROMPTS = ["hello", "Grüße 🙂", ""]
GENERATE = ("generate", "model.path=tiny", "data.path=prompts.jsonl", "sampling.max_tokens=5")


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text, "answer": "a"} for text in PROMPTS])
    return tmp_path


def test_text_begins_with_the_prompt_and_every_token_has_a_place_and_a_logprob(place):
    for out, more in (("out", ("sampling.echo=true",)), ("plain", ())):
        succeed(*GENERATE, "sampling.n=2", f"output.dir={out}", *more, cwd=place)
    rows, plain = (results(place / out).sort("prompt", "sample_index") for out in ("out", "plain"))
    assert "text_offsets" not in plain.columns and rows.height == plain.height == 5
    field = pa.ipc.open_file(place / "out" / "part-00000.arrow").schema.field("text_offsets")
    assert field.type == pa.list_(pa.int32()) and b"characters" in field.metadata[b"unit"]
    for row, other in zip(rows.to_dicts(), plain.to_dicts(), strict=True):
        if row["error"] is not None:
            assert row["text"] is row["text_offsets"] is None
            continue
        assert row["completion_token_ids"] == other["completion_token_ids"]
        assert row["raw_logprobs"] == pytest.approx(other["raw_logprobs"], abs=1e-4)
        assert row["text"] == row["prompt"] + other["text"]
        assert other["prompt_logprobs"] is None and row["prompt_logprobs"][0] is None
        logprobs = row["prompt_logprobs"] + row["raw_logprobs"]
        tokens = row["prompt_token_ids"] + row["completion_token_ids"]
        assert len(row["text_offsets"]) == len(tokens) == len(logprobs)
        assert row["text_offsets"][len(row["prompt_token_ids"])] == len(row["prompt"])
    (score,) = LLM(place / "tiny").score(["hello"], use_tqdm=False)
    hello = rows.filter(pl.col("prompt") == "hello")["prompt_logprobs"][0].to_list()
    assert hello[1:] == pytest.approx(score.logprobs[1:], abs=1e-4)


def test_with_nothing_sampled_the_text_is_the_prompt(place):
    given = ("sampling.echo=true", "sampling.max_tokens=0", "output.dir=out")
    succeed(*GENERATE[:-1], *given, "job.certify=0", cwd=place)
    rows = results(place / "out").filter(pl.col("error").is_null())
    assert rows["text"].to_list() == rows["prompt"].to_list() and rows.height == 2
    assert rows["text_offsets"].list.len().to_list() == rows["prompt_logprobs"].list.len().to_list()


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (("rollout", "reward=exact_match"), "sampling.echo means nothing to rollout"),
        (("score",), "sampling.echo means nothing to score"),
        (("openai_batch",), "sampling.echo means nothing to openai_batch"),
    ],
)
def test_a_job_that_cannot_follow_it_says_so(place, job, message):
    given = ("model.path=tiny", "data.path=prompts.jsonl", "output.dir=out", "sampling.echo=true")
    assert message in refused(*job, *given, cwd=place)
    assert not (place / "out").exists()
    line = refused(*GENERATE, "output.dir=out", "sampling.echo=maybe", cwd=place)
    assert "sampling.echo" in line and "maybe" in line


def test_a_group_of_options_that_asks_rollout_for_it_is_told_why(place):
    group = place / "conf" / "sampling" / "echoing.yaml"
    group.parent.mkdir(parents=True)
    group.write_text("defaults: [default]\necho: true\n")
    given = ("model.path=tiny", "data.path=prompts.jsonl", "output.dir=out", "sampling=echoing")
    line = refused("rollout", "reward=exact_match", *given, cwd=place)
    assert "rewards read the completion by itself" in line
