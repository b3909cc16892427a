"""`runner embed`: vectors of texts, token ids and chats, by the command line and resumed."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from command_line import write_jsonl
from forked_cli import refused, succeed
from in_process import by_text, rows_of, run_job
from tiny_adapters import ATTENTION, save_mlx, with_lora_layers

from runner.errors import ParameterError

ROWS = [{"text": text, "level": i} for i, text in enumerate(["one", "two texts", "Grüße", "4"])]
BASE = ("embed", "model.path=tiny", "data.path=rows.jsonl", "output.dir=out")


@pytest.fixture
def place(tiny_place: Path) -> Path:
    write_jsonl(tiny_place / "rows.jsonl", ROWS)
    return tiny_place


def run(place: Path, *overrides: str, path: str = "rows.jsonl", out: str = "out") -> pl.DataFrame:
    return run_job("embed", place, f"data.path={place / path}", *overrides, out=out)


def summary(place: Path, out: str = "out") -> dict:
    return json.loads((place / out / "summary.json").read_text())


def test_the_command_line_embeds_every_row_and_says_how(place, llm):
    printed = succeed(*BASE, "data.prompt_column=text", cwd=place)
    assert "rows      4 rows, 4 result rows, 0 errors" in printed
    assert "vectors   32 components, mean, of length 1" in printed
    rows = rows_of(place / "out")
    assert rows.schema["embedding"] == pl.List(pl.Float32)
    assert rows.columns == [
        "row_id", "embedding", "num_tokens", "model", "adapter", "adapter_digest", "error",
        "text", "level",
    ]  # fmt: skip
    expected = llm.embed([row["text"] for row in ROWS], use_tqdm=False)
    found = by_text(rows)
    for row, one in zip(ROWS, expected, strict=True):
        assert found[row["text"]]["level"] == row["level"]
        assert found[row["text"]]["num_tokens"] == one.num_tokens
        np.testing.assert_allclose(found[row["text"]]["embedding"], one.vector, atol=1e-5)
    tokens = sum(one.num_tokens for one in expected)
    numbers = summary(place)
    assert numbers["embedding"] == {
        "pooling": "mean", "normalize": True, "dimensions": None, "size": 32, "rows": 4,
        "tokens": tokens,
    }  # fmt: skip
    assert numbers["run"]["embedded_tokens"] == tokens and numbers["complete"]
    assert numbers["run"]["tokens_per_second"] > 0
    assert f"tokens    {tokens} in" in printed
    assert "holds all 4 results already" in succeed(*BASE, "data.prompt_column=text", cwd=place)
    line = refused(*BASE, "data.prompt_column=text", "job.pooling=last", cwd=place)
    assert "job.pooling" in line and "mean" in line


def test_the_options_decide_the_vector_and_stand_in_the_file(place, llm):
    options = ("job.pooling=last", "job.dimensions=4", "job.normalize=false")
    rows = by_text(run(place, "data.prompt_column=text", *options))
    expected = llm.embed(
        ["two texts"], pooling="last", dimensions=4, normalize=False, use_tqdm=False
    )[0]
    np.testing.assert_allclose(rows["two texts"]["embedding"], expected.vector, atol=1e-5)
    (path,) = (place / "out").glob("part-*.arrow")
    field = pa.ipc.open_file(path).schema.field("embedding")
    made = {key.decode(): json.loads(value) for key, value in field.metadata.items()}
    assert made == {"pooling": "last", "normalize": False, "dimensions": 4}


def test_templates_token_ids_and_chats_are_embedded_too(place, llm):
    ids = llm.tokenizer.encode("say one")
    write_jsonl(place / "ids.jsonl", [{"ids": ids, "text": "one"}])
    given = [
        ("data.prompt_template='say {{ text }}'",),
        ("data.token_ids_column=ids",),
        ("data.prompt_column=text", "data.chat=true"),
    ]
    found = [run(place, *it, path="ids.jsonl", out=f"out{i}") for i, it in enumerate(given)]
    texts = ["say one", "say one", "<user>one<a>"]
    for rows, one in zip(found, llm.embed(texts, use_tqdm=False), strict=True):
        (row,) = rows.to_dicts()
        np.testing.assert_allclose(row["embedding"], one.vector, atol=1e-5)


def test_bad_rows_are_rows_with_an_error_and_can_be_tried_again(place):
    rows = [{"id": "good", "text": "a"}, {"id": "null", "text": None}, {"id": "empty", "text": ""}]
    write_jsonl(place / "bad.jsonl", [*rows, {"id": "long", "text": "x" * 300}])
    options = ("data.prompt_column=text", "data.id_column=id")
    done = {row["row_id"]: row for row in run(place, *options, path="bad.jsonl").to_dicts()}
    assert len(done) == 4 and done["good"]["error"] is None
    for name in ("null", "empty", "long"):
        row = done[name]
        assert (row["embedding"], row["num_tokens"]) == (None, None)
        assert row["error"]["type"] == "PromptError" and row["id"] == name
    assert "300 tokens" in done["long"]["error"]["message"]
    numbers = summary(place)
    assert numbers["errors"] == {"PromptError": 3} and numbers["embedding"]["rows"] == 1
    again = run(place, *options, "job.retry_errors=true", path="bad.jsonl")
    assert sorted(again["row_id"]) == sorted(done)


def test_a_run_goes_on_with_what_is_missing_and_does_no_row_twice(place):
    """Rows have come since, and a part is gone; what is there stays."""
    options = ("data.prompt_column=text", "output.shard_rows=2")
    before = by_text(run(place, *options))
    parts = sorted((place / "out").glob("part-*.arrow"))
    assert len(parts) == 2
    kept = by_text(pl.read_ipc(parts[0]))
    parts[1].unlink()
    write_jsonl(place / "rows.jsonl", [{"text": "new", "level": 9}, *ROWS])
    with pytest.warns(UserWarning, match=parts[1].name):
        rows = run(place, *options)
    after = by_text(rows)
    assert rows.height == 5 and after.keys() == before.keys() | {"new"}
    for text, row in before.items():
        np.testing.assert_allclose(after[text]["embedding"], row["embedding"], atol=1e-5)
    assert all(after[text]["embedding"] == row["embedding"] for text, row in kept.items())
    assert summary(place)["run"]["embedded_tokens"] < summary(place)["embedding"]["tokens"]


def test_the_bytes_are_the_same_in_any_batch(place):
    """Alone in small chunks and all together, where the engine holds itself to it."""
    write_jsonl(place / "rows.jsonl", [{"text": "ab " * (3 * i + 1)} for i in range(12)])
    for pooling in ("mean", "last"):
        merged = []
        for size, step in ((1, 16), (8, 512)):
            out = f"{pooling}-{size}"
            succeed(
                "embed", "model.path=tiny", "data.path=rows.jsonl", f"output.dir={out}",
                "data.prompt_column=text", f"job.pooling={pooling}", "output.merge=true",
                "engine.batch_invariant=true", f"engine.max_batch_size={size}",
                f"engine.prefill_step_size={step}", cwd=place,
            )  # fmt: skip
            merged.append((place / out / "merged" / "part-00000.arrow").read_bytes())
        assert merged[0] == merged[1]


def test_each_row_with_its_adapter(place, llm):
    adapted = with_lora_layers(llm.model, rank=3, dora=False, keys=ATTENTION, seed=1)
    save_mlx(place / "a", adapted, rank=3, keys=ATTENTION)
    write_jsonl(place / "rows.jsonl", [{"text": "one", "use": name} for name in ("a", None, "b")])
    options = (f"lora.adapters={{a: {place / 'a'}}}", "lora.column=use")
    rows = {row["use"]: row for row in run(place, "data.prompt_column=text", *options).to_dicts()}
    assert rows["b"]["error"]["type"] == "UnknownAdapterError"
    assert rows["a"]["adapter"] == "a" and rows["a"]["adapter_digest"]
    (plain,) = llm.embed(["one"], use_tqdm=False)
    np.testing.assert_allclose(rows[None]["embedding"], plain.vector, atol=1e-5)
    assert np.abs(np.array(rows["a"]["embedding"]) - plain.vector).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("job.pooling=max",), "pooling='max' is not allowed: mean or last"),
        (("job.normalize=2",), "normalize=2 is not allowed"),
        (("job.dimensions=0",), "dimensions=0 is not allowed"),
        (("job.dimensions=33",), "dimensions=33 is not allowed: at most 32"),
        (("sampling.temperature=2",), "sampling.temperature=2.0 is not allowed: this job reads"),
        (("job.retry_errors=1",), "job.retry_errors=1 is not allowed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(place, options, message):
    with pytest.raises(ParameterError, match=message):
        run(place, "data.prompt_column=text", *options)
    assert not list(place.glob("out/part-*")) and not list(place.glob("out/manifest*"))
