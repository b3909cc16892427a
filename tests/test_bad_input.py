"""What a user gets wrong: one line with the offending value and what to do, exit code 2."""

import json
from pathlib import Path

import command_line
import pytest
from command_line import results, write_jsonl
from forked_cli import refused, succeed


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", [{"question": "hi", "answer": "1"}])
    write_jsonl(tmp_path / "mixed.jsonl", [{"prompt": "hi"}, {"prompt": 3}])
    write_jsonl(tmp_path / "numbers.jsonl", [{"prompt": 3}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "hi"}\n{"prompt": \n')
    (tmp_path / "broken.parquet").write_text("not a parquet file")
    (tmp_path / "broken.gguf").write_text("not a gguf file")
    (tmp_path / "prompts.csv").write_text("a,b\n")
    (tmp_path / "hollow").mkdir()
    return tmp_path


BASE = ["generate", "model.path=tiny", "output.dir=out"]
DATA = ["data.path=prompts.jsonl", "data.prompt_column=question"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*BASE, "data.path=nowhere.jsonl"], ["nowhere.jsonl"]),
        ([*BASE, "data.path=prompts.jsonl", "data.prompt_column=q"], ["q", "question, answer"]),
        ([*BASE, "data.path=prompts.jsonl"], ["question, answer", "prompt_column"]),
        ([*BASE, "data.path=mixed.jsonl"], ["mixed.jsonl", "line 2", "prompt"]),
        ([*BASE, "data.path=numbers.jsonl"], ["prompt", "int64"]),
        ([*BASE, "data.path=empty.jsonl"], ["empty.jsonl", "no rows"]),
        ([*BASE, "data.path=broken.jsonl"], ["broken.jsonl", "line 2"]),
        ([*BASE, "data.path=broken.parquet"], ["broken.parquet"]),
        ([*BASE, "data.path=prompts.csv"], ["prompts.csv", ".parquet"]),
        ([*BASE, *DATA, "data.limit=-1"], ["limit=-1"]),
        ([*BASE, *DATA, "data.system_prompt=x"], ["system_prompt", "chat"]),
        ([*BASE, *DATA, "sampling.tempratur=1"], ["tempratur", "temperature"]),
        ([*BASE, *DATA, "sampling.n=abc"], ["sampling.n", "abc"]),
        ([*BASE, *DATA, "sampling.top_p=2"], ["top_p=2"]),
        ([*BASE, *DATA, "sampling.presence_penalty=3"], ["presence_penalty=3", "-2 and 2"]),
        ([*BASE, *DATA, "sampling.logit_bias={a: 1}"], ["logit_bias={'a': 1}", "token id"]),
        ([*BASE, *DATA, "sampling.logit_bias=5"], ["logit_bias=5", "token id"]),
        ([*BASE, *DATA, "sampling.logit_bias={9999: 1}"], ["logit_bias", "9999", "0 to 257"]),
        ([*BASE, *DATA, "sampling.allowed_token_ids=[-1]"], ["allowed_token_ids", "-1"]),
        ([*BASE, *DATA, "sampling.max_tokens=0"], ["max_tokens=0", "prompt_logprobs"]),
        ([*BASE, *DATA, "sampling.prompt_logprobs=2"], ["prompt_logprobs=2", "no alternatives"]),
        ([*BASE, *DATA, "sampling.prompt_logprobs=-1"], ["prompt_logprobs=-1", "0 and 100"]),
        ([*BASE, *DATA, "engine.max_batch_size=0"], ["max_batch_size=0", "or auto"]),
        ([*BASE, *DATA, "engine.max_batch_size=many"], ["max_batch_size='many'", "or auto"]),
        ([*BASE, *DATA, "engine.memory_budget=lots"], ["memory_budget='lots'", "8GiB"]),
        ([*BASE, *DATA, "engine.memory_budget=1MB"], ["memory_budget is 976.6 KiB", "weights"]),
        ([*BASE, *DATA, "output.shard_rows=0"], ["shard_rows=0"]),
        ([*BASE, *DATA, "model.dtype=int3"], ["int3", "float32"]),
        ([*BASE, *DATA, "model.max_model_len=100000"], ["100000", "256"]),
        ([*BASE, *DATA, "sampling=gready"], ["gready", "greedy"]),
        (["generat", *BASE[1:], *DATA], ["generat", "generate"]),
        (["generate", *DATA, "output.dir=out", "model.path=nowhere"], ["nowhere"]),
        (["generate", *DATA, "output.dir=out", "model.path=hollow"], ["hollow"]),
        (["generate", *DATA, "output.dir=out", "model.path=broken.gguf"], ["broken.gguf"]),
        (["generate", *DATA, "output.dir=out", "model.path=pkg://nope/a.gguf"], ["nope"]),
        (["generate", *DATA, "output.dir=out", "model=smolm2"], ["smolm2", "smollm2"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(place, arguments, words):
    line = refused(*arguments, cwd=place)
    assert all(word in line for word in words), line
    assert not (place / "out").exists(), "nothing is left behind"


def test_a_hub_id_without_network_is_one_line(place):
    line = command_line.refused(
        "generate", *DATA, "output.dir=out", "model.path=some-org/some-model",
        cwd=place, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert "some-org/some-model" in line
    line = command_line.refused(
        *BASE, "data.path=some-org/some-data", cwd=place, HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    assert "some-org/some-data" in line


def test_results_of_another_configuration_are_never_touched(place):
    succeed(*BASE, *DATA, "sampling.max_tokens=4", cwd=place)
    before = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    line = refused(*BASE, *DATA, "sampling.max_tokens=5", cwd=place)
    assert "sampling.max_tokens: 4 -> 5" in line
    assert before == {p.name: p.read_bytes() for p in (place / "out").iterdir()}


def test_files_that_are_not_ours_are_never_touched(place):
    (place / "out").mkdir()
    (place / "out" / "part-00000.arrow").write_text("somebody's")
    assert "part-" in refused(*BASE, *DATA, cwd=place)
    assert [p.name for p in (place / "out").iterdir()] == ["part-00000.arrow"]


def test_a_mistake_that_is_mended_runs_in_the_same_directory(place):
    (place / "out").mkdir()
    refused(*BASE, *DATA, "model.max_model_len=100000", cwd=place)
    succeed(*BASE, *DATA, "sampling.max_tokens=4", cwd=place)
    assert results(place / "out").height == 1
    assert json.loads((place / "out" / "summary.json").read_text())["complete"]
