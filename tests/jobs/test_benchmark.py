"""`runner benchmark`: both sides do the same work, and the file says how fast."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, succeed

from runner import LLM
from runner.data.workloads import WORKLOADS, Workload


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    return tmp_path


def test_decode_is_measured_in_turns_and_written_down(place):
    arguments = [
        "benchmark", "model.path=tiny", "job.workloads=[decode]", "job.rounds=2", "output.dir=out",
    ]  # fmt: skip
    printed = succeed(*arguments, cwd=place)
    assert "decode" in printed and "forward loop" in printed
    assert max(map(len, printed.splitlines())) <= 80
    written = json.loads((place / "out" / "benchmark.json").read_text())
    (row,) = written["workloads"]
    assert row["useful_tokens"] == 32 * 64 and written["versions"]["mlx-lm"]
    ours, theirs = (row["sides"][name] for name in ("runner", "forward loop"))
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert row["ratio"]["min"] == pytest.approx(min(ratios))
    assert row["ratio"]["max"] == pytest.approx(max(ratios))
    assert ours["tokens_per_second"] == pytest.approx(2048 / (sum(ours["seconds"]) / 2), rel=0.5)
    assert "there already" in refused(*arguments, cwd=place)


def test_mistakes_are_named(place):
    line = refused("benchmark", "model.path=tiny", "job.workloads=[decod]", cwd=place)
    assert "decod" in line and "group, mixed, decode, score" in line
    assert "rounds=0" in refused("benchmark", "model.path=tiny", "job.rounds=0", cwd=place)


@pytest.mark.parametrize("name", ["run_engine", "run_mlx_lm", "run_forward_loop"])
def test_every_side_gives_exactly_the_tokens_that_are_counted(tiny_directory, name):
    """Each runner asserts it; here on prompts of one length, which the bare loop needs."""
    from importlib import import_module

    run = getattr(import_module("runner.jobs.benchmark"), name)
    workload = Workload("decode", [[5, 6, 7], [8, 9, 10]], 2, [6, 6], 1.0)
    run(LLM(tiny_directory, max_batch_size=2), workload)


@pytest.mark.parametrize("name", ["run_engine", "run_log_softmax"])
def test_both_sides_score_exactly_the_tokens_that_are_counted(tiny_directory, name):
    """Texts of several lengths and more of them than fit one batch."""
    from importlib import import_module

    run = getattr(import_module("runner.jobs.benchmark"), name)
    texts = [[5, 6, 7, 8][: 1 + i % 4] * 3 for i in range(11)]
    workload = Workload("score", texts, 1, [0] * len(texts), 1.0)
    assert workload.is_scored and workload.num_tokens == sum(map(len, texts)) - 11
    run(LLM(tiny_directory, max_batch_size=2), workload)


def test_the_loop_beside_the_engine_gives_the_same_losses(tiny_directory, monkeypatch):
    """The two sides of `score` compute the same numbers."""
    from importlib import import_module

    benchmark = import_module("runner.jobs.benchmark")
    llm, texts = LLM(tiny_directory), [[5, 60, 7, 8, 40], [9, 5, 80, 33, 21]]
    losses = []
    evaluate = benchmark.mx.eval

    def watched(*arrays):
        evaluate(*arrays)
        if len(arrays) == 1:  # Inside a forward, several are evaluated at once.
            losses.append(np.array(arrays[0]))

    with monkeypatch.context() as patched:
        patched.setattr(benchmark.mx, "eval", watched)
        benchmark.run_log_softmax(llm, Workload("score", texts, 1, [0, 0], 1.0))
    scores = llm.score(texts, use_tqdm=False)
    np.testing.assert_allclose(-losses[0], [s.logprobs[1:] for s in scores], atol=1e-4)


@pytest.mark.real_model
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_fixed_and_of_the_size_they_say(smollm2, name):
    one, two = (WORKLOADS[name](smollm2.tokenizer) for _ in range(2))
    assert one == two and one.name == name
    assert one.is_scored == (name == "score")
    if name == "score":
        assert one.num_tokens == sum(map(len, one.prompts)) - 48 and max(one.max_tokens) == 0
    else:
        assert one.num_tokens == one.n * sum(one.max_tokens)
    assert len(one.max_tokens) == len(one.prompts)
    if name == "group":
        assert all(550 <= len(prompt) <= 600 for prompt in one.prompts)
    if name == "mixed":
        assert max(one.max_tokens) > 4 * sorted(one.max_tokens)[24], "the tail is long"
