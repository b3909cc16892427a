"""`runner openai_batch`, run as a user runs it, on a tiny model."""

import base64
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from command_line import ROOT, refused, succeed
from in_process import run_config
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from runner import LLM
from runner.composition import register
from runner.errors import DataError, OutputError, ParameterError, StoppedError
from runner.status import read_status

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    """A working directory with a model `tiny`."""
    (tmp_path / "tiny").symlink_to(tiny_directory)
    return tmp_path


def request(custom_id: str, url: str = TEXT, **body: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": f"say {custom_id}"}]}
    if url == TEXT:
        prompt = {"prompt": f"say {custom_id}"}
    whole = {"model": "tiny", "max_tokens": 5} | prompt | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": whole}


def write_batch(place: Path, lines: list[Any], name: str = "in.jsonl") -> None:
    raw = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (place / name).write_text("\n".join(raw) + "\n")


def command(*options: str, out: str = "out", name: str = "in.jsonl") -> list[str]:
    return ["openai_batch", "model.path=tiny", f"data.path={name}", f"output.dir={out}", *options]


def run(place: Path, *options: str, out: str = "out", name: str = "in.jsonl") -> None:
    """Runs the job in this process, which is quicker than a new one."""
    register()
    words = [
        "job=openai_batch", "data=custom", f"model.path={place / 'tiny'}",
        f"data.path={place / name}", f"output.dir={place / out}", "job.served_model_name=[tiny]",
    ]  # fmt: skip
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        config = hydra.compose("config", [*words, *options])
    (place / out).mkdir(exist_ok=True)
    run_config(config)


def answers(directory: Path) -> list[dict[str, Any]]:
    """All lines of both files; those of the error file say so by their error."""
    found = []
    for name in ("output.jsonl", "errors.jsonl"):
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        assert all((line["error"] is None) == (name == "output.jsonl") for line in lines)
        found += lines
    return found


def by_id(directory: Path) -> dict[str, Any]:
    """All lines by their ids, which no two of them share."""
    lines = answers(directory)
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def assert_same(one: Any, other: Any) -> None:
    """Equal but for times, and for what batch sizes may change in a float."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"created"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        is_float = isinstance(one, float)
        assert one == (pytest.approx(other, abs=1e-4) if is_float else other)


BAD = {
    7: ("{not json", "invalid_json_line", None),
    18: (request("a-0"), "duplicate_custom_id", "a-0"),
    29: ({"method": "POST", "url": TEXT, "body": {}}, "missing_required_parameter", None),
    30: (request("a-30") | {"method": "PUT"}, "invalid_method", "a-30"),
    49: (request("a-49") | {"body": "text"}, "invalid_request", "a-49"),
}


def fifty() -> Iterator[Any]:
    for place in range(50):
        if place in BAD:
            yield BAD[place][0]
        elif place % 2:
            options = {"logprobs": True, "top_logprobs": 2, "n": 2, "max_completion_tokens": 4}
            yield request(f"a-{place}", CHAT, max_tokens=None, **options)
        else:
            yield request(f"a-{place}", logprobs=1, echo=place % 4 == 0)


def test_fifty_lines_five_of_them_malformed_line_by_line(place: Path) -> None:
    write_batch(place, list(fifty()))
    printed = succeed(*command(), cwd=place)
    assert "answers   45 in" in printed and "errors    5 in" in printed
    done = answers(place / "out")
    by_name = {line["custom_id"]: line for line in done if line["error"] is None}
    assert by_name.keys() == {f"a-{number}" for number in range(50) if number not in BAD}
    for name, line in by_name.items():
        assert list(line) == ["id", "custom_id", "response", "error"]
        response = line["response"]
        assert response["status_code"] == 200
        assert response["request_id"] == line["id"].replace("batch_req_", "req_")
        body, number = response["body"], int(name.removeprefix("a-"))
        assert abs(body["created"] - time.time()) < 600
        assert body["model"] == "tiny"
        if number % 2:
            assert ChatCompletion.model_validate(body, strict=True).to_dict() == body
            assert [len(it["logprobs"]["content"]) for it in body["choices"]] == [4, 4]
            assert body["usage"]["prompt_tokens"] == len(f"<user>say {name}<a>")
            assert body["usage"]["completion_tokens"] == 8
        else:
            echoed = f"say {name}" if number % 4 == 0 else ""
            if echoed:  # OpenAI sends nulls here, which its own types do not know.
                first = body["choices"][0]["logprobs"]
                assert first["token_logprobs"][0] is None and first["top_logprobs"][0] is None
                first["token_logprobs"][0], first["top_logprobs"][0] = 0.0, {}
            assert Completion.model_validate(body, strict=True).to_dict() == body
            assert len(body["choices"][0]["logprobs"]["tokens"]) == len(echoed) + 5
            assert body["choices"][0]["text"].startswith(echoed)
            assert body["usage"]["prompt_tokens"] == len(f"say {name}")
    errors = {line["error"]["line"]: line for line in done if line["error"] is not None}
    for number, (_, code, custom_id) in BAD.items():
        line = errors.pop(number + 1)
        assert (line["error"]["code"], line["custom_id"]) == (code, custom_id)
        assert line["response"] is None
    assert not errors


def test_requests_that_cannot_be_answered_are_error_lines_with_a_status(place: Path) -> None:
    cases = {
        "suffix": (request("suffix", suffix="x"), 400, "unsupported_parameter", "suffix"),
        "typo": (request("typo", temprature=0), 400, "unknown_parameter", "temprature"),
        "model": (request("model", model="gpt-4o"), 404, "model_not_found", "model"),
        "long": (request("long", prompt="x" * 300), 400, "context_length_exceeded", "prompt"),
        "embed": (
            {"custom_id": "embed", "method": "POST", "url": "/v1/embeddings", "body": {}},
            400, "missing_required_parameter", "input",
        ),
        "bias": (request("bias", logit_bias={"999": 1}), 400, "invalid_value", "logit_bias"),
        "ids": (request("ids", stop_token_ids=[2**70]), 400, "invalid_value", "stop_token_ids"),
        "words": (request("words", bad_words=[" "]), 400, "invalid_value", "bad_words"),
        "boom": (
            request("boom", CHAT, messages=[{"role": "boom", "content": "x"}]),
            400, "invalid_value", "messages",
        ),
    }  # fmt: skip
    write_batch(place, [case[0] for case in cases.values()] + [request("good")])
    run(place)
    done = {line["custom_id"]: line for line in answers(place / "out")}
    assert done.pop("good")["error"] is None
    for name, (_, status, code, param) in cases.items():
        error, response = done[name]["error"], done[name]["response"]
        assert (response["status_code"], error["code"], error["param"]) == (status, code, param)
        assert response["body"]["error"]["message"] == error["message"]
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert summary["rows"] == summary["total_rows"] == 10 and summary["complete"]
    assert sum(summary["errors"].values()) == 9


def embedding_line(custom_id: str, **body: Any) -> dict[str, Any]:
    whole = {"model": "tiny", "input": f"say {custom_id}"} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": whole}


def test_embeddings_beside_completions(place: Path, llm: LLM) -> None:
    lines = [
        embedding_line("one"),
        request("text"),
        embedding_line("many", input=["a", "bcd", "ef"], encoding_format="base64", dimensions=6),
        embedding_line("ids", input=[5, 6, 7]),
        embedding_line("long", input=["good", "x" * 300]),
        embedding_line("wide", dimensions=33),
        embedding_line("other", model="gpt-4o"),
    ]
    write_batch(place, lines)
    run(place, "job.pooling=last")
    done = {line["custom_id"]: line for line in answers(place / "out")}
    codes = {name: line["error"]["code"] for name, line in done.items() if line["error"]}
    assert codes == {
        "long": "context_length_exceeded", "wide": "invalid_value", "other": "model_not_found",
    }  # fmt: skip
    assert "input 1: " in done["long"]["error"]["message"]
    assert done["text"]["response"]["body"]["choices"]
    (expected,) = llm.embed(["say one"], pooling="last", use_tqdm=False)
    body = done["one"]["response"]["body"]
    assert CreateEmbeddingResponse.model_validate(body, strict=True).to_dict() == body
    assert body["data"][0]["embedding"] == pytest.approx(expected.vector, abs=1e-5)
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    coded = [it["embedding"] for it in done["many"]["response"]["body"]["data"]]
    floats = [np.frombuffer(base64.b64decode(it), "<f4") for it in coded]
    for found, it in zip(
        floats,
        llm.embed(["a", "bcd", "ef"], pooling="last", dimensions=6, use_tqdm=False),
        strict=True,
    ):
        np.testing.assert_allclose(found, it.vector, atol=1e-5)
    before = by_id(place / "out")
    run(place, "job.pooling=last")
    assert by_id(place / "out") == before
    with pytest.raises(OutputError, match=r"job\.pooling"):
        run(place, "job.pooling=mean")
    with pytest.raises(ParameterError, match="pooling='max'"):
        run(place, "job.pooling=max", out="other")


def test_numbers_that_no_array_holds_are_answered_all_the_same(place: Path) -> None:
    huge = {"top_k": 2**40, "max_tokens": 2**70, "seed": -(2**80), "temperature": 1e300}
    options = huge | {"repetition_penalty": 1e300, "min_p": 1e-320}
    lines = [
        request(name, **({"max_tokens": 3} | {name: value})) for name, value in options.items()
    ]
    write_batch(place, [*lines, request("good")])
    run(place)
    done = {line["custom_id"]: line for line in answers(place / "out")}
    assert done.keys() == {*options, "good"} and done["good"]["error"] is None
    assert done["top_k"]["error"] is None and done["seed"]["error"] is None


def test_without_a_seed_draws_follow_the_custom_id_and_with_one_the_request(place: Path) -> None:
    prompt = {"prompt": "same", "max_tokens": 12}
    names = ["free-1", "free-2"]
    lines = [request(name, **prompt) for name in names]
    lines += [request(name, seed=5, **prompt) for name in ("seed-1", "seed-2")]
    write_batch(place, lines)
    write_batch(place, lines[::-1], name="moved.jsonl")
    texts = []
    for out, name, more in [
        ("out", "in.jsonl", []),
        ("moved", "moved.jsonl", ["engine.max_batch_size=1"]),
        ("other", "in.jsonl", ["sampling.seed=1"]),
    ]:
        run(place, *more, out=out, name=name)
        done = answers(place / out)
        texts.append({it["custom_id"]: it["response"]["body"]["choices"][0]["text"] for it in done})
    one, moved, other = texts
    assert one == moved
    assert one["free-1"] != one["free-2"] and one["seed-1"] == one["seed-2"]
    assert one["free-1"] != other["free-1"] and one["seed-1"] == other["seed-1"]


def test_the_options_are_what_a_line_leaves_out(place: Path) -> None:
    write_batch(place, [
        request("unset", max_tokens=None, ignore_eos=True),
        request("chat", CHAT, max_tokens=None, ignore_eos=True),
        request("set", max_tokens=4, ignore_eos=True),
    ])  # fmt: skip
    for out, options, lengths in [
        ("out", [], {"unset": 16, "chat": 256 - len("<user>say chat<a>"), "set": 4}),
        ("given", ["sampling.max_tokens=9"], {"unset": 9, "chat": 9, "set": 4}),
    ]:
        run(place, *options, out=out)
        found = {
            it["custom_id"]: it["response"]["body"]["usage"]["completion_tokens"]
            for it in answers(place / out)
        }
        assert found == lengths


def test_the_models_names(place: Path) -> None:
    write_batch(place, [request("alias", model="gpt-4o"), request("none", model=None)])
    run(place, "job.served_model_name=[mine,gpt-4o]")
    bodies = [it["response"]["body"] for it in answers(place / "out")]
    assert {body["model"] for body in bodies} == {"mine"}
    run(place, "job.check_model=false", out="any")
    assert all(it["error"] is None for it in answers(place / "any"))


def test_a_finished_directory_says_so_and_is_left_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_batch(place, [request("a"), "bad"])
    run(place)
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    capsys.readouterr()
    run(place)
    assert "holds all 2 answers already" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    write_batch(place, ["bad", request("b"), request("a")])
    run(place)
    assert [it["custom_id"] for it in answers(place / "out")] == ["a", "b", None]


def test_options_that_differ_are_refused_and_those_of_the_engine_are_not(place: Path) -> None:
    write_batch(place, [request("a")])
    run(place)
    run(place, "engine.max_batch_size=1")
    for option, shown in [
        ("sampling.temperature=0.5", "sampling.temperature: 1.0 -> 0.5"),
        ("job.check_model=false", "job.check_model: true -> false"),
        ("engine.max_kv_size=8", "engine.max_kv_size: null -> 8"),
    ]:
        with pytest.raises(OutputError, match=shown):
            run(place, option)
    assert len(answers(place / "out")) == 1


def test_a_model_is_known_by_its_files_wherever_they_lie(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_batch(place, [request("a")])
    run(place)
    original = (place / "tiny").resolve()
    (place / "tiny").unlink()
    shutil.copytree(original, place / "tiny")
    run(place)
    assert "holds all 1 answers" in capsys.readouterr().out
    weights = place / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(OutputError, match="model.weights: "):
        run(place)


def test_requests_that_fail_wholesale_stop_it_and_bad_lines_do_not(place: Path) -> None:
    write_batch(place, [*["bad"] * 120, request("a")])
    run(place)
    assert len(answers(place / "out")) == 121
    write_batch(place, [request(f"r{i}", model="gpt-4o") for i in range(150)])
    with pytest.raises(StoppedError, match=r"100 of 100 rows .*=0.01 .*'gpt-4o'") as stopped:
        run(place, out="stopped")
    assert "retry" not in str(stopped.value)
    status = read_status(place / "stopped")
    assert (status.state, status.rows, status.errors) == ("stopped", 100, 100)
    run(place, "output.max_error_rate=1", out="stopped")
    assert len(answers(place / "stopped")) == 150


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("data.prompt_column=x", "data.prompt_column means nothing to openai_batch"),
        ("sampling.prompt_logprobs=0", "sampling.prompt_logprobs means nothing to openai_batch"),
        ("output.max_error_rate=2", "max_error_rate=2"),
        ("output.shard_rows=5", "output.shard_rows means nothing to openai_batch"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_options_that_mean_nothing_are_refused(option: str, words: str, place: Path) -> None:
    write_batch(place, [request("a")])
    assert words in refused(*command(), option, cwd=place)
    assert not (place / "out").exists()


def test_another_question_under_an_answered_custom_id_is_refused(place: Path) -> None:
    write_batch(place, [request("a")])
    run(place)
    write_batch(place, [request("b"), request("a", prompt="other")])
    with pytest.raises(DataError, match="'a'"):
        run(place)


def started(place: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *command("engine.max_batch_size=4", *options)],
        cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def stop_among_the_answers(process: "subprocess.Popen[str]", place: Path, size: int) -> None:
    """Halts a run once its output is longer than `size`, so that what follows meets it there."""
    output = place / "out" / "output.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if output.exists() and output.stat().st_size > size:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)


def many() -> list[Any]:
    lines = [request(f"r{i}", max_tokens=40, ignore_eos=True, logprobs=1) for i in range(120)]
    lines[50:50] = ["bad", "bad", request("r3")]
    lines[100] = request("several", prompt=["a", "b", "c"], n=2)
    return lines


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> dict[str, Any]:
    """The answers of a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("straight")
    (place / "tiny").symlink_to(tiny_directory)
    write_batch(place, many())
    run(place)
    return by_id(place / "out")


def test_killed_again_and_again_it_ends_with_every_answer_once(
    place: Path, straight: dict[str, Any]
) -> None:
    write_batch(place, many())
    output = place / "out" / "output.jsonl"
    for torn in (b'{"id": "batch_req_', b'{"id": "x"}\0\0\0\n{"i'):
        size = output.stat().st_size if output.exists() else 0
        process = started(place)
        stop_among_the_answers(process, place, size + 5000)
        process.kill()
        process.communicate()
        with open(output, "ab") as file:
            file.write(torn)
        assert read_status(place / "out").state == "interrupted"
    succeed(*command("engine.max_batch_size=16"), cwd=place)
    assert_same(by_id(place / "out"), straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_commits_says_how_to_go_on_and_does(
    number: signal.Signals, place: Path, straight: dict[str, Any]
) -> None:
    write_batch(place, many())
    process = started(place)
    stop_among_the_answers(process, place, 1000)
    assert read_status(place / "out").state == "running"
    if number == signal.SIGINT:
        assert f"(pid {process.pid})" in refused(*command(), cwd=place)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert "the same command goes on" in printed and "Traceback" not in printed
    num_done = len(answers(place / "out"))
    assert 0 < num_done < 123
    shown = succeed("status", "out", cwd=place)
    assert "interrupted" in shown and f"{num_done} of 123" in shown
    succeed(*command(), cwd=place)
    assert_same(by_id(place / "out"), straight)
    log = (place / "out" / "run.log").read_text()
    assert log.count(" INFO start ") == 2 and log.count(" INFO end ") == 2
    assert "state=interrupted" in log and "state=finished" in log and "say r1" not in log


def test_a_full_disk_stops_it_and_it_goes_on_once_there_is_space(
    place: Path,
) -> None:
    write_batch(place, [request(f"r{i}", logprobs=5, max_tokens=20) for i in range(80)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StoppedError, match=r"output.jsonl: .*the same command goes on"):
            run(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = (place / "out" / "output.jsonl").read_bytes()
    assert kept.endswith(b"\n") and 40_000 < len(kept) <= 50_000
    assert read_status(place / "out").state == "stopped"
    assert read_status(place / "out").rows == len(answers(place / "out")) < 80
    run(place)
    assert (place / "out" / "output.jsonl").read_bytes().startswith(kept)
    assert len(answers(place / "out")) == 80
