"""`runner perplexity` against a slow direct computation, and what it writes."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from command_line import write_jsonl
from forked_cli import refused, succeed
from in_process import by_text, run_job

from runner import LLM

TEXTS = [
    "A first text, which is longer than most windows.",
    "x",
    "Grüße, 世界! 🙂",
    "ab",
    "one more of them",
]
SIZES = [(2, 1), (5, 4), (5, 2), (16, 15), (16, 1), (16, 9), (200, 100)]


@pytest.fixture
def place(tiny_place: Path) -> Path:
    rows = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
    write_jsonl(tiny_place / "texts.jsonl", rows)
    return tiny_place


def run(place: Path, *overrides: str, path: str = "texts.jsonl", out: str = "out") -> pl.DataFrame:
    return run_job("perplexity", place, f"data.path={place / path}", *overrides, out=out)


def numbers(place: Path, out: str = "out") -> dict:
    return json.loads((place / out / "summary.json").read_text())


def logprob(llm: LLM, context: list[int], token_id: int) -> float:
    """By one forward of the context and float64."""
    logits = np.array(llm.model(mx.array([context]))[0, -1]).astype(np.float64)
    return float(logits[token_id] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def context_start(place: int, length: int, window: int, stride: int, *, short: bool) -> int:
    """Where the window begins that scores the token at `place`: the definition, spelled out."""
    if place < window:
        return 0
    number = 1 + (place - window) // stride
    if short:
        return number * stride
    return min(window + number * stride, length) - window


def directly(
    llm: LLM, texts: list[str], mode: str, prefix: int | None, window: int, stride: int,
    short: bool = False,
) -> dict[str, list[float | None]]:  # fmt: skip
    """The logprobs of each text, a forward per token."""
    streams = [texts] if mode == "concat" else [[text] for text in texts]
    found: dict[str, list[float | None]] = {}
    for stream in streams:
        owners: list[str | None] = []
        ids: list[int] = []
        for text in stream:
            encoded = llm.tokenizer.encode(text, add_special_tokens=False)
            head = [] if prefix is None else [prefix]
            ids += head + encoded
            owners += [None] * len(head) + [text] * len(encoded)
        for at, owner in enumerate(owners):
            if owner is None:
                continue
            start = context_start(at, len(ids), window, stride, short=short)
            value = logprob(llm, ids[start:at], ids[at]) if at else None
            found.setdefault(owner, []).append(value)
    return found


def assert_logprobs(rows: pl.DataFrame, expected: dict[str, list[float | None]]) -> None:
    done = by_text(rows)
    assert done.keys() == expected.keys()
    for text, values in expected.items():
        row = done[text]
        assert [value is None for value in row["logprobs"]] == [value is None for value in values]
        scored = [value for value in values if value is not None]
        ours = [value for value in row["logprobs"] if value is not None]
        np.testing.assert_allclose(ours, scored, atol=1e-4)
        assert row["sum_logprob"] == pytest.approx(sum(scored), abs=1e-3)
        assert (row["num_scored"], row["num_tokens"]) == (len(scored), len(values))


@pytest.mark.parametrize("mode", ["document", "concat"])
@pytest.mark.parametrize("prefix", ["bos", "eos", "none"])
def test_every_token_is_scored_once_in_the_context_that_the_definition_says(
    place, llm, mode, prefix
):
    token_id = {"bos": 0, "eos": 1, "none": None}[prefix]
    for window, stride in SIZES:
        options = [f"job.mode={mode}", f"job.prefix={prefix}"]
        options += [f"job.window={window}", f"job.stride={stride}"]
        out = f"{window}-{stride}"
        rows = run(place, *options, out=out)
        expected = directly(llm, TEXTS, mode, token_id, window, stride)
        assert_logprobs(rows, expected)
        values = [value for text in TEXTS for value in expected[text] if value is not None]
        found = numbers(place, out)
        assert found["definition"] == {
            "preset": None, "mode": mode, "prefix": prefix, "prefix_token_id": token_id,
            "window": window, "stride": stride, "last_window": "full", "words": "whitespace",
        }  # fmt: skip
        assert_corpus_numbers(found["perplexity"], values, TEXTS)


def assert_corpus_numbers(found: dict, values: list[float], texts: list[str]) -> None:
    """Sums divided once, whatever the documents' own perplexities are."""
    total, count = math.fsum(values), len(values)
    num_words = sum(len(text.split()) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    spread = np.std(values, ddof=1) / math.sqrt(count)
    assert (found["documents"], found["scored_tokens"]) == (len(texts), count)
    assert (found["words"], found["bytes"], found["tokens"]) == (num_words, num_bytes, num_bytes)
    expected = {
        "sum_logprob": total,
        "mean_logprob": total / count,
        "mean_logprob_stderr": spread,
        "token_perplexity": math.exp(-total / count),
        "token_perplexity_stderr": math.exp(-total / count) * spread,
        "word_perplexity": math.exp(-total / num_words),
        "byte_perplexity": math.exp(-total / num_bytes),
        "bits_per_byte": -total / num_bytes / math.log(2),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_the_defaults_are_documents_behind_a_bos_in_the_models_whole_context(place, llm):
    rows = run(place)
    assert_logprobs(rows, directly(llm, TEXTS, "document", 0, 256, 255))
    definition = numbers(place)["definition"]
    assert (definition["window"], definition["stride"], definition["prefix"]) == (256, 255, "bos")
    schema = pa.ipc.open_file(place / "out" / "part-00000.arrow").schema
    assert json.loads(schema.metadata[b"perplexity"]) == definition
    assert rows.schema["logprobs"] == pl.List(pl.Float32) and rows["n"].to_list().sort() is None
    run(place, "job.preset=lm_eval", out="lm_eval")
    assert numbers(place, "lm_eval")["perplexity"]["bits_per_byte"] == pytest.approx(
        numbers(place)["perplexity"]["bits_per_byte"], abs=1e-6
    )


def test_the_preset_of_the_evaluation_harness(place, llm):
    """Its `loglikelihood_rolling`, written down again: what it yields for max_length = window-1."""
    pages = (" a b\n" * 12 + "xyz", "short ")
    write_jsonl(place / "pages.jsonl", [{"text": text} for text in pages])
    rows = run(place, "job.preset=lm_eval", "job.window=11", path="pages.jsonl")
    total = 0.0
    for text in pages:
        ids, most = llm.tokenizer.encode(text, add_special_tokens=False), 10
        first = min(most, len(ids))
        pairs = [([0, *ids[: first - 1]], ids[:first])]
        for predicted in range(most, len(ids), most):
            end = min(predicted + most, len(ids))
            pairs.append((ids[end - most - 1 : end - 1], ids[predicted:end]))
        for given, wanted in pairs:
            whole = given[: len(given) - (len(wanted) - 1)] + wanted
            for place_, token_id in enumerate(wanted, start=len(whole) - len(wanted)):
                total += logprob(llm, whole[:place_], token_id)
    found = numbers(place)["perplexity"]
    assert found["sum_logprob"] == pytest.approx(total, abs=1e-3)
    assert rows["sum_logprob"].sum() == pytest.approx(total, abs=1e-3)
    # The split at white space has an empty string at each end that is blank.
    assert (found["words"], found["bytes"]) == (26 + 2, 69)
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / 28), rel=1e-4)


@pytest.mark.parametrize("window", [8, 9])
def test_the_preset_of_llama_cpp_scores_second_halves_of_whole_windows(place, llm, window):
    rows = run(place, "job.preset=llama_cpp", f"job.window={window}")
    ids = [i for text in TEXTS for i in llm.tokenizer.encode(text, add_special_tokens=False)]
    expected: list[float | None] = [None] * len(ids)
    for chunk in range(len(ids) // window):
        start = chunk * window
        for at in range(start + window // 2 + 1, start + window):
            expected[at] = logprob(llm, ids[start:at], ids[at])
    done = by_text(rows)
    ours = [value for text in TEXTS for value in done[text]["logprobs"]]
    assert [value is None for value in ours] == [value is None for value in expected]
    values = [value for value in expected if value is not None]
    assert [v for v in ours if v is not None] == pytest.approx(values, abs=1e-4)
    found, mean = numbers(place)["perplexity"], math.fsum(values) / len(values)
    assert found["scored_tokens"] == len(values) == len(ids) // window * ((window - 1) // 2)
    error = math.sqrt((np.square(values).mean() - mean**2) / (len(values) - 1))
    assert found["token_perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["token_perplexity_stderr"] == pytest.approx(math.exp(-mean) * error, rel=1e-3)
    assert found["word_perplexity"] is None and found["bits_per_byte"] is None


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 15)])
def test_the_preset_of_the_sliding_window_starts_its_windows_a_stride_apart(
    place, llm, window, stride
):
    rows = run(place, "job.preset=hf_stride", f"job.window={window}", f"job.stride={stride}")
    assert_logprobs(rows, directly(llm, TEXTS, "concat", None, window, stride, short=True))
    ids = [i for text in TEXTS for i in llm.tokenizer.encode(text, add_special_tokens=False)]
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        for at in range(max(before, begin + 1), end):
            total, count = total + logprob(llm, ids[begin:at], ids[at]), count + 1
        before = end
        if end == len(ids):
            break
    found = numbers(place)["perplexity"]
    assert found["scored_tokens"] == count
    assert found["token_perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_documents_that_are_short_empty_or_null(place, llm):
    given = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "bc"}]
    write_jsonl(place / "odd.jsonl", given)
    for mode in ("document", "concat"):
        rows = run(place, f"job.mode={mode}", "job.prefix=none", path="odd.jsonl", out=mode)
        done = by_text(rows)
        first = None if mode == "document" else logprob(llm, [*llm.tokenizer.encode("a")], 0)
        assert done["a"]["logprobs"] == [None] and done["a"]["num_scored"] == 0
        assert done["a"]["sum_logprob"] == 0 and done["a"]["error"] is None
        assert (done["bc"]["logprobs"][0] is None) == (first is None)
        for text, why in (("", "empty"), (None, "null")):
            assert why in done[text]["error"]["message"] and done[text]["logprobs"] is None
        found = numbers(place, mode)
        assert found["errors"] == {"PromptError": 2} and found["perplexity"]["documents"] == 2
        assert found["perplexity"]["bytes"] == 3 and found["complete"]
    rows = run(place, "job.prefix=eos", "data.offset=3", path="odd.jsonl", out="eos")
    assert_logprobs(rows, directly(llm, ["bc"], "document", 1, 256, 255))


def test_nothing_scored_has_no_perplexity(place):
    write_jsonl(place / "one.jsonl", [{"text": "a"}])
    run(place, "job.prefix=none", path="one.jsonl")
    found = numbers(place)["perplexity"]
    assert found["scored_tokens"] == 0 and found["token_perplexity"] is None


def test_token_ids_have_a_perplexity_per_token_only(place, llm):
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    write_jsonl(place / "ids.jsonl", [{"ids": row} for row in ids])
    run(place, out="texts")
    run(place, "data.token_ids_column=ids", path="ids.jsonl", out="ids")
    one, other = (numbers(place, out)["perplexity"] for out in ("texts", "ids"))
    assert other["token_perplexity"] == pytest.approx(one["token_perplexity"], rel=1e-5)
    assert other["words"] is other["bytes"] is other["bits_per_byte"] is None
    write_jsonl(place / "bad.jsonl", [{"ids": [5, 99999]}, {"ids": [5, 6]}])
    rows = run(place, "data.token_ids_column=ids", path="bad.jsonl", out="bad")
    assert rows.filter(pl.col("error").is_not_null())["ids"].to_list() == [[5, 99999]]


def test_text_files_are_a_document_each_or_a_line_each(place, llm):
    content = "First line\n\n Second, Grüße  \r\nlast"
    (place / "book.txt").write_bytes(content.encode())
    rows = run(place, path="book.txt")
    assert_logprobs(rows, directly(llm, [content], "document", 0, 256, 255))
    assert rows["file"].to_list() == ["book.txt"]
    rows = run(place, "data.text_lines=true", path="book.txt", out="lines")
    lines = ["First line", " Second, Grüße  ", "last"]
    assert_logprobs(rows, directly(llm, lines, "document", 0, 256, 255))


@pytest.mark.parametrize("mode", ["document", "concat"])
def test_what_is_there_is_not_scored_again(place, llm, mode):
    options = [f"job.mode={mode}", "job.window=16", "output.shard_rows=1"]
    whole = run(place, *options, out="whole")
    run(place, *options)
    lost = sorted((place / "out").glob("part-*.arrow"))[1:4]
    for path in lost:
        path.unlink()
    with pytest.warns(UserWarning, match="is gone"):
        again = run(place, *options)
    kept = numbers(place)["run"]["scored_tokens"]
    assert 0 < kept < numbers(place, "whole")["run"]["scored_tokens"]
    for text, row in by_text(whole).items():
        np.testing.assert_allclose(
            np.array(by_text(again)[text]["logprobs"], float),
            np.array(row["logprobs"], float),
            atol=1e-4,
        )
    one, other = (numbers(place, out)["perplexity"] for out in ("whole", "out"))
    assert one == pytest.approx(other, rel=1e-5)


def test_as_a_user_runs_it_again_with_another_corpus_and_merged(place):
    base = ("perplexity", "model.path=tiny", "output.dir=out")
    options = (*base, "data.path=texts.jsonl", "job.window=16")
    printed = succeed(*options, "output.merge=true", cwd=place)
    found = numbers(place)["perplexity"]
    assert f"{found['token_perplexity']:.4f} ± {found['token_perplexity_stderr']:.4f}" in printed
    assert f"{found['bits_per_byte']:.4f} bits" in printed and "sampl" not in printed
    assert max(map(len, printed.splitlines())) <= 80 + len(str(place))
    merged = pl.read_ipc(place / "out" / "merged" / "part-00000.arrow")
    assert merged["text"].to_list() == TEXTS
    assert "holds all 5 results" in succeed(*options, cwd=place)
    with open(place / "texts.jsonl", "a") as file:
        file.write('{"text": "another", "n": 5}\n')
    assert "data.content" in refused(*options, cwd=place)
    assert "job.window: 16 -> 8" in refused(*options[:-1], "job.window=8", cwd=place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["job.window=1"], "job.window=1 is not allowed: a number of tokens, at least 2"),
        (["job.window=abc"], "job.window=abc is not allowed"),
        (["job.window=8", "job.stride=9"], "job.stride=9 is not allowed: at most 7"),
        (["job.window=8", "job.stride=8"], "job.stride=8 is not allowed: at most 7"),
        (["job.stride=256"], "job.stride=256 is not allowed: at most 255"),
        (["job.stride=0"], "job.stride=0 is not allowed"),
        (["job.window=257"], "job.window=257 is not allowed: at most 256, the context"),
        (["job.mode=both"], "job.mode=both is not allowed: document, concat, or null"),
        (["job.prefix=x"], "job.prefix=x is not allowed: bos, eos, none, or null"),
        (["job.preset=x"], "job.preset=x is not allowed: lm_eval, llama_cpp, hf_stride"),
        (["job.preset=lm_eval", "job.stride=2"], "null, as preset=lm_eval sets it"),
        (["job.preset=hf_stride", "job.mode=document"], "null, as preset=hf_stride sets it"),
        (["data.chat=true"], "data.chat=true is not allowed"),
        (["data.prompt_column=n"], "has the type int64, not text"),
        (["data.text_lines=true"], "text_lines=True is for .txt files"),
        (["data.prompt_column=title"], "title"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(place, options, message):
    base = ("perplexity", "model.path=tiny", "data.path=texts.jsonl", "output.dir=out")
    assert message in refused(*base, *options, cwd=place)
    assert not (place / "out" / "manifest.jsonl").exists()
