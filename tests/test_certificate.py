"""What a certificate says of logprobs that differ, and which result rows it takes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_files import CONTEXT

from runner import LLM, SamplingParams
from runner.certificate import Certificate, mismatch
from runner.data.parts import arrow_bytes
from runner.data.schemas import result_schema
from runner.errors import ParameterError

SCHEMA = result_schema(pa.schema([]))
NAMES = ("row_id", "sample_index", "prompt_token_ids", "completion_token_ids", "raw_logprobs")


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> LLM:
    return LLM(tiny_directory)


def row(name: str, prompt: list[int], ids: list[int], logprobs: Any, **more: Any) -> dict[str, Any]:
    values = (name, 0, prompt, ids, logprobs)
    return dict(zip(NAMES, values, strict=True)) | {"finish_reason": "length"} | more


def written(folder: Path, *parts: list[dict[str, Any]]) -> list[Path]:
    """Part files of these rows."""
    paths = []
    for number, rows in enumerate(parts):
        paths.append(folder / f"part-{number:05d}.arrow")
        paths[-1].write_bytes(arrow_bytes(pa.Table.from_pylist(rows, schema=SCHEMA)))
    return paths


def sampled(llm: LLM, prompts: list[str], **options: Any) -> list[dict[str, Any]]:
    """Result rows of an `LLM`."""
    params = SamplingParams(**({"max_tokens": 9, "ignore_eos": True, "seed": 3} | options))
    return [
        row(output.prompt, output.prompt_token_ids, it.token_ids, it.raw_logprobs)
        | {"sample_index": it.index}
        for output in llm.generate(prompts, params, use_tqdm=False)
        for it in output.outputs
    ]


def numbers(llm: LLM, paths: list[Path], num_rows: int = 64) -> dict[str, Any] | None:
    return Certificate(num_rows).numbers(paths, llm, interrupted=lambda: False)


def test_the_numbers_are_those_of_the_definitions():
    found = mismatch([np.array([[-1.0, -2.0], [-1.0, -2.5]]), np.array([[-3.0], [-2.0]])])
    ratios = [1.0, math.exp(-0.5), math.exp(1.0)]
    expected = sum(ratio - math.log(ratio) - 1 for ratio in ratios) / 3
    assert found["mismatch_kl"] == pytest.approx(expected)
    assert (found["max_difference"], found["mean_difference"]) == (1.0, 0.5)
    assert (found["tokens"], found["share_bit_equal"]) == (3, pytest.approx(1 / 3))


def test_the_divergence_estimates_that_of_the_distributions_drawn_from():
    """By a sum over all outcomes: k3 has the mean sum p log(p/q) where p is what is drawn from."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.25, 0.35])
    means = [mismatch([np.log([[a], [b]])])["mismatch_kl"] for a, b in zip(p, q, strict=True)]
    assert np.dot(p, means) == pytest.approx(np.sum(p * np.log(p / q)))


def test_numbers_that_do_not_exist_are_null():
    nothing = mismatch([])
    assert (nothing["tokens"], nothing["max_difference"]) == (0, 0.0)
    assert (
        nothing["mean_difference"] is nothing["mismatch_kl"] is nothing["share_bit_equal"] is None
    )
    same = mismatch([np.array([[-math.inf, -1.0], [-math.inf, -1.0]])])
    assert (same["max_difference"], same["mismatch_kl"], same["share_bit_equal"]) == (0, 0, 1)
    far = mismatch([np.array([[-math.inf], [-1.0]])])
    assert far["max_difference"] is far["mismatch_kl"] is None and far["share_bit_equal"] == 0
    assert mismatch([np.array([[-2000.0], [-1.0]])])["mismatch_kl"] is None


OPTIONS = [
    {}, {"temperature": 0.6, "top_k": 5, "n": 3}, {"temperature": 0.0},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "logit_bias": {9: 4.0}, "min_tokens": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_was_sampled_scores_as_it_was_sampled(llm, tmp_path, options):
    """Raw logprobs are of the model's own distribution, whatever was drawn from."""
    rows = sampled(llm, ["some text", "x", "some text that is longer"], **options)
    found = numbers(llm, written(tmp_path, rows[:1], rows[1:]))
    assert found is not None and found["rows"] == len(rows)
    assert found["tokens"] == sum(len(it["completion_token_ids"]) for it in rows)
    assert found["mean_difference"] <= found["max_difference"] <= 1e-4
    assert 0 <= found["mismatch_kl"] < 1e-8 and found["errors"] == 0


def test_logprobs_that_are_not_the_models_are_found(llm, tmp_path):
    rows = sampled(llm, ["some text"])
    rows[0]["raw_logprobs"] = [*rows[0]["raw_logprobs"][:-1], rows[0]["raw_logprobs"][-1] - 0.5]
    found = numbers(llm, written(tmp_path, rows))
    assert found["max_difference"] == pytest.approx(0.5, abs=1e-4)
    assert found["mismatch_kl"] == pytest.approx((math.exp(0.5) - 1.5) / 9, rel=1e-3)
    assert found["share_bit_equal"] <= 8 / 9


def test_a_cache_that_holds_something_else_is_found(llm, tmp_path):
    """What is kept of prompts is not used again: it may be what is wrong."""
    text = "a prompt of more than sixteen tokens"
    paths = written(tmp_path, sampled(llm, [text]))
    assert numbers(llm, paths)["max_difference"] <= 1e-4
    llm.generate([text], SamplingParams(max_tokens=2), use_tqdm=False)
    (entry,) = llm.engine._runner._prefix_cache._entries.values()
    for past in entry.pasts:
        past[0][:] = 0
    assert numbers(llm, paths)["max_difference"] <= 1e-4
    llm.engine.clear_prefix_cache()


def test_rows_without_a_whole_completion_are_left_out(llm, tmp_path):
    good = sampled(llm, ["a"])[0]
    bad = [
        row("error", [5], [6], [-9.0], finish_reason="error"),
        row("none", [5], [], []),
        row("null", [5], None, None, finish_reason="error"),
    ]
    rewarded = good | {"error": {"type": "RewardError", "message": "x"}, "finish_reason": "stop"}
    found = numbers(llm, written(tmp_path, [*bad, good, rewarded]))
    assert (found["rows"], found["errors"]) == (2, 0) and found["max_difference"] <= 1e-4
    assert numbers(llm, written(tmp_path, bad)) is None and numbers(llm, []) is None


def test_a_row_that_cannot_be_scored_is_counted(llm, tmp_path):
    long = row("long", [5] * CONTEXT, [6], [-1.0])
    found = numbers(llm, written(tmp_path, [long]))
    assert (found["rows"], found["errors"], found["tokens"]) == (0, 1, 0)
    found = numbers(llm, written(tmp_path, [long, *sampled(llm, ["a"])]))
    assert (found["rows"], found["errors"], found["tokens"]) == (1, 1, 9)


class Recorder:
    """In place of an `LLM`: notes what it is asked, answers nothing."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.engine = SimpleNamespace(clear_prefix_cache=lambda: None)

    def run(self, requests, *, interrupted):
        self.asked += [list(request.prompt.token_ids) for request in requests]
        return iter(())


def chosen(paths: list[Path], num_rows: int) -> set[int]:
    recorder = Recorder()
    Certificate(num_rows).numbers(paths, recorder, interrupted=lambda: False)  # type: ignore[arg-type]
    assert len(recorder.asked) == len({tuple(ids) for ids in recorder.asked})
    return {ids[-1] for ids in recorder.asked}


def test_the_same_rows_are_taken_wherever_they_stand_and_each_is_as_likely(tmp_path):
    rows = [row(f"r{number}", [5], [number], [-1.0]) for number in range(1000)]
    one = chosen(written(tmp_path, rows), 100)
    assert one == chosen(written(tmp_path, rows[500:][::-1], rows[:10], rows[10:500]), 100)
    assert len(one) == 100 and 400 < sum(one) / 100 < 600
    assert (
        chosen(written(tmp_path, rows), 10) < one and len(chosen(written(tmp_path, rows), 9)) == 9
    )
    assert chosen(written(tmp_path, rows), 0) == set()


@pytest.mark.parametrize("value", [-1, 1.5, "many", True, None])
def test_what_is_no_number_of_rows_is_refused(value):
    with pytest.raises(ParameterError, match=f"job.certify={value} is not allowed: a number of"):
        Certificate(value)


def test_an_interrupt_ends_it(llm, tmp_path):
    paths = written(tmp_path, sampled(llm, ["a", "b"]))
    found = Certificate(2).numbers(paths, llm, interrupted=lambda: True)
    assert found is not None and found["rows"] == 0 and not llm.engine.has_unfinished


def test_rows_of_weights_that_are_gone_are_left_out_and_counted(llm, tmp_path):
    rows = sampled(llm, ["one", "two"])
    gone = rows[0] | {"row_id": "gone", "adapter": "gone", "adapter_digest": "0"}
    swapped = rows[1] | {
        "row_id": "swapped",
        "weight_versions": [
            {"version": 0, "start": 0, "end": 4},
            {"version": 1, "start": 4, "end": 9},
        ],
    }
    found = Certificate(8).numbers(
        written(tmp_path, [*rows, gone, swapped]), llm, interrupted=lambda: False
    )
    assert found is not None
    assert (found["rows"], found["of_other_weights"], found["errors"]) == (2, 2, 0)
    assert found["max_difference"] < 1e-4
