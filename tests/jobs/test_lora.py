"""Jobs with adapters: one for all, by row, and every row with each."""

import json
import shutil
from contextlib import nullcontext as does_not_raise
from contextlib import suppress

import polars as pl
import pytest
from in_process import run_job
from mlx_lm.utils import load as load_mlx
from tiny_adapters import ATTENTION, random_adapter, save_mlx

from runner import LLM, SamplingParams
from runner.adapter_watch import AdapterWatch
from runner.errors import AdapterError, OutputError, ParameterError

TEXTS = ["the cat", "a dog sat here", "two and two"]
SHORT = ("sampling.max_tokens=5", "sampling.ignore_eos=true", "sampling.temperature=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_directory):
    place = tmp_path_factory.mktemp("lora")
    (place / "tiny").symlink_to(tiny_directory)
    model, _ = load_mlx(str(tiny_directory))
    for seed, name in enumerate("ab"):
        _, adapted = random_adapter(model, seed, rank=2 + seed, keys=ATTENTION)
        save_mlx(place / name, adapted, rank=2 + seed, keys=ATTENTION)
    rows = [{"text": text, "who": who} for text in TEXTS for who in ("a", "b", None, "nobody")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return place


@pytest.fixture(scope="module")
def llm(place):
    llm = LLM(place / "tiny", max_batch_size=1)
    for name in "ab":
        llm.load_adapter(name, place / name)
    return llm


def run(job, place, *overrides, out, path="texts.jsonl"):
    given = (f"data.path={place / path}", "data=custom", "data.prompt_column=text")
    return run_job(job, place, *given, *overrides, out=out)


def adapters(place):
    return f"lora.adapters={{a: {place / 'a'}, b: {place / 'b'}}}"


def summary(place, out):
    return json.loads((place / out / "summary.json").read_text())


def alone(llm, row):
    """What the model says to one row by itself, with the adapter that it names."""
    (score,) = llm.score(
        [(row["prompt_token_ids"], row["completion_token_ids"])],
        adapter=row["adapter"],
        use_tqdm=False,
    )
    return score.logprobs


def test_a_column_says_which_adapter_a_row_uses(place, llm):
    options = (adapters(place), "lora.column=who", *SHORT, "output.max_error_rate=1")
    found = run("generate", place, *options, out="column", path="rows.jsonl")
    assert found.height == 12
    assert found["adapter"].equals(found["who"].alias("adapter"))
    failed = found.filter(pl.col("who") == "nobody")
    assert failed["finish_reason"].to_list() == ["error"] * 3
    message = "the adapter 'nobody' is not loaded; loaded are: a, b"
    assert {(e["type"], e["message"]) for e in failed["error"]} == {
        ("UnknownAdapterError", message)
    }
    done = found.filter(pl.col("error").is_null())
    for row in done.iter_rows(named=True):
        assert row["raw_logprobs"] == pytest.approx(alone(llm, row), abs=1e-4)
        assert (row["adapter_digest"] is None) == (row["adapter"] is None)
        version = {"a": 1, "b": 2, None: 0}[row["adapter"]]
        assert row["weight_versions"] == [{"version": version, "start": 0, "end": 5}]
    assert done["adapter_digest"].drop_nulls().n_unique() == 2


def test_a_sweep_runs_every_row_with_each_adapter_and_none(place, llm):
    found = run("generate", place, adapters(place), "lora.sweep=true", *SHORT, out="sweep")
    assert found.height == 9 and found["row_id"].n_unique() == 9
    assert found["adapter"].value_counts(sort=True)["count"].to_list() == [3, 3, 3]
    for row in found.iter_rows(named=True):
        assert row["raw_logprobs"] == pytest.approx(alone(llm, row), abs=1e-4)
        assert row["row_id"].endswith(f"@{row['adapter'] or ''}")
    assert summary(place, "sweep")["total_rows"] == 9 and summary(place, "sweep")["complete"]


def test_perplexity_of_a_sweep_has_numbers_for_each_adapter(place):
    run("perplexity", place, adapters(place), "lora.sweep=true", out="ppl")
    swept = summary(place, "ppl")["adapters"]
    assert set(swept) == {"(none)", "a", "b"}
    for name, path in (("(none)", None), ("a", place / "a"), ("b", place / "b")):
        chosen = [] if path is None else [f"lora.path={path}"]
        run("perplexity", place, *chosen, out=f"ppl-{path and name}")
        one = summary(place, f"ppl-{path and name}")
        assert "adapters" not in one
        assert swept[name] == pytest.approx(one["perplexity"], rel=1e-5)
    concat = ("job.mode=concat", "job.window=16", "job.stride=8")
    run("perplexity", place, adapters(place), "lora.sweep=true", *concat, out="concat")
    run("perplexity", place, f"lora.path={place / 'b'}", *concat, out="concat-b")
    expected = summary(place, "concat-b")["perplexity"]
    assert summary(place, "concat")["adapters"]["b"] == pytest.approx(expected, rel=1e-5)


def test_scores_have_their_adapter(place, llm):
    found = run("score", place, adapters(place), "lora.sweep=true", out="score")
    assert found.height == 9
    for row in found.iter_rows(named=True):
        (score,) = llm.score([row["text"]], adapter=row["adapter"], use_tqdm=False)
        assert row["logprobs"][1:] == pytest.approx(score.logprobs[1:], abs=1e-4)


def test_a_directory_goes_on_with_the_same_adapter_alone(place):
    path = f"lora.path={place / 'a'}"
    found = run("generate", place, path, *SHORT, out="one")
    assert set(found["adapter"]) == {"a"}
    run("generate", place, path, *SHORT, out="one")
    with pytest.raises(OutputError, match=r"lora\.adapters\.a"):
        run("generate", place, *SHORT, out="one")
    config = place / "b" / "adapter_config.json"
    run("generate", place, f"lora.path={place / 'b'}", *SHORT, out="changed")
    before = config.read_text()
    config.write_text(before.replace("2.0", "3.0"))
    with pytest.raises(OutputError, match=r"lora\.adapters\.b"):
        run("generate", place, f"lora.path={place / 'b'}", *SHORT, out="changed")
    config.write_text(before)


def test_options_that_do_not_go_together_are_refused(place):
    for options, what in (
        ([adapters(place)], "lora.adapters is not allowed alone: lora.column=NAME"),
        (["lora.sweep=true"], "lora.sweep=True is not allowed without lora.adapters"),
        (["lora.column=who"], "lora.column=who is not allowed without lora.adapters"),
        ([adapters(place), "lora.column=x"], "lora.column=x is not a column; there are text"),
        ([adapters(place), "lora.path=x"], "lora.path and lora.adapters: give one"),
        ([adapters(place), "lora.sweep=true", "lora.column=text"], "lora.column and lora.sweep"),
        (["lora.adapters=[a]"], "lora.adapters=.*is not allowed"),
    ):
        with pytest.raises(ParameterError, match=what):
            run("generate", place, *options, out="refused")
    with pytest.raises(AdapterError, match="'nowhere' is not an adapter: it has no adapter_config"):
        run("generate", place, "lora.path=nowhere", out="refused")


def test_an_llm_takes_names_by_prompt(place, llm):
    params = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
    names = ["a", None, "b"]
    outputs = llm.generate(TEXTS, params, adapter=names, use_tqdm=False)
    assert [output.adapter for output in outputs] == names
    assert [output.outputs[0].adapter for output in outputs] == names
    digests = [output.outputs[0].adapter_digest for output in outputs]
    assert digests == [llm.adapters["a"], None, llm.adapters["b"]]
    (one,) = llm.chat([{"role": "user", "content": "hi"}], params, adapter="a", use_tqdm=False)
    assert one.outputs[0].adapter == "a"
    with pytest.raises(ParameterError, match="adapter has 2 entries for 3 prompts"):
        llm.generate(TEXTS, params, adapter=["a", "b"], use_tqdm=False)
    with pytest.raises(ParameterError, match="a path, or arrays with their scale"):
        llm.load_adapter("c")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch_line(name, model):
    body = {"model": model, "prompt": "the cat", "max_tokens": 4, "seed": 1, "ignore_eos": True}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def test_a_line_of_a_batch_names_its_adapter_as_the_model(place, llm):
    lines = [batch_line(name, name) for name in ("a", "b", "tiny", "other")]
    (place / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = (f"data.path={place / 'batch.jsonl'}", adapters(place), "output.max_error_rate=1")
    (place / "batch").mkdir()
    with suppress(pl.exceptions.PolarsError):
        run_job("openai_batch", place, *options, out="batch")  # It leaves no Arrow files.
    answers = read_jsonl(place / "batch" / "output.jsonl")
    said = {it["custom_id"]: it["response"]["body"] for it in answers}
    assert {name: body["model"] for name, body in said.items()} == {
        name: name for name in ("a", "b", "tiny")
    }
    params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    for name, body in said.items():
        adapter = None if name == "tiny" else name
        (output,) = llm.generate("the cat", params, adapter=adapter, use_tqdm=False)
        assert body["choices"][0]["text"] == output.outputs[0].text
    (error,) = read_jsonl(place / "batch" / "errors.jsonl")
    assert error["response"]["status_code"] == 404


def test_a_watched_directory_gives_its_newest_adapter_while_the_job_runs(place, monkeypatch):
    """Each look happens after a step; b comes after a few of them, and is whole two looks later."""
    watched = place / "policy"
    shutil.copytree(place / "a", watched / "step-1")
    looks = []
    look = AdapterWatch.look

    def looked(watch, llm, mode):
        looks.append(mode)
        watch._looked = 0.0
        if len(looks) == 2:
            shutil.copytree(place / "b", watched / "step-2", copy_function=shutil.copyfile)
        look(watch, llm, mode)

    monkeypatch.setattr(AdapterWatch, "look", looked)
    options = (f"lora.watch={watched}", "lora.swap=update", "sampling.max_tokens=12")
    found = run("generate", place, *options, "sampling.ignore_eos=true", out="watched")
    assert set(found["adapter"]) == {"policy"} and set(looks) == {"update"}
    for spans in found["weight_versions"].to_list():
        assert [it["version"] for it in spans] == [1, 2]
        assert spans[0]["start"] == 0 < spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == 12


def test_a_watched_adapter_that_does_not_fit_is_left_out_with_a_warning(place, llm):
    watched = place / "broken"
    shutil.copytree(place / "a", watched / "step-1")
    watch = AdapterWatch(str(watched), "broken")
    watch.start(llm)
    before = llm.adapters["broken"]
    shutil.copytree(place / "b", watched / "step-2", copy_function=shutil.copyfile)
    (watched / "step-2" / "adapters.safetensors").write_bytes(b"half")
    for wanted in (does_not_raise(), pytest.warns(UserWarning, match="cannot be read")):
        watch._looked = 0.0
        with wanted:
            watch.look(llm, "keep")
    assert llm.adapters["broken"] == before
    llm.unload_adapter("broken")


def test_watching_needs_an_adapter_and_a_job_that_samples(place):
    (place / "empty").mkdir()
    for job, options, error, what in (
        ("generate", [f"lora.watch={place / 'empty'}"], AdapterError, "has no adapter yet"),
        ("score", [f"lora.watch={place / 'a'}"], ParameterError, "lora.watch=.*is not allowed"),
        ("generate", ["lora.swap=update"], ParameterError, "not allowed without lora.watch"),
        ("generate", ["lora.swap=now"], ParameterError, "lora.swap='now' is not allowed"),
        ("generate", ["lora.watch=x", "lora.path=y"], ParameterError, "not allowed beside"),
    ):
        with pytest.raises(error, match=what):
            run(job, place, *options, out=f"refused-{job}")


def test_the_certificate_scores_rows_with_their_adapter(place):
    options = (adapters(place), "lora.sweep=true", *SHORT, "job.certify=9")
    run("generate", place, *options, out="certified")
    found = summary(place, "certified")["certificate"]
    assert (found["rows"], found["errors"], found["tokens"]) == (9, 0, 45)
    assert found["max_difference"] < 1e-4
