"""`runner grpo`: a loop that closes, on a tiny model, and goes on after an interrupt."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import polars as pl
import pytest
from command_line import refused, results, run_cli, succeed, write_jsonl

from runner.errors import ParameterError
from runner.jobs.grpo import Schedule, check_sampling
from runner.types import SamplingParams

REWARDS = """
import contextlib
import os
import signal

def even(text, row):
    return float(len(text) % 2)

def stopping(text, row):
    if row["prompt"] == "count 3":
        # Rewards run in threads: the first that takes the file away sends the signal.
        with contextlib.suppress(FileNotFoundError):
            os.remove("stop")
            os.kill(os.getpid(), signal.SIGINT)
    return even(text, row)

def failing(text, row):
    if row["prompt"] == "count 1":
        raise ValueError("not this one")
    return even(text, row)
"""
_TIMES = ("rollout_seconds", "update_seconds", "swap_seconds")


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"count {i}"} for i in range(5)])
    return tmp_path


def arguments(*overrides: str, out: str = "out") -> list[str]:
    return [
        "grpo", "model.path=tiny", "data=custom", "data.path=prompts.jsonl",
        "data.prompt_column=prompt", f"output.dir={out}", "sampling.max_tokens=6", "sampling.n=4",
        "reward=my_rewards.even", "job.steps=3", "job.prompts_per_step=2", "job.num_layers=-1",
        "job.learning_rate=0.01", "job.picture=false", *overrides,
    ]  # fmt: skip


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Of every step, without the times it took."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: it for name, it in line.items() if name not in _TIMES} for line in lines]


def test_every_step_samples_from_what_the_step_before_learned(place):
    succeed(*arguments(), cwd=place)
    rows, steps = results(place / "out"), metrics(place / "out")
    assert rows.height == 3 * 2 * 4
    assert [it["step"] for it in steps] == [0, 1, 2]
    assert max(it["first_ratio_deviation"] for it in steps if it["updates"]) < 1e-4
    assert rows["adapter"].unique().to_list() == ["policy"]
    for step in range(3):
        at = rows.filter(pl.col("step") == step)
        assert at.height == 8 and at["group_id"].n_unique() == 2
        # What a step learned serves from the next one on.
        if step:
            assert at["adapter_digest"].unique().to_list() == [steps[step - 1]["adapter_digest"]]
        assert {span["end"] for spans in at["weight_versions"] for span in spans} == {6}
        assert steps[step]["reward_mean"] == pytest.approx(at["reward"].mean())
    assert rows["adapter_digest"].n_unique() == 1 + sum(bool(it["updates"]) for it in steps[:2])
    # All five prompts came before one came again.
    assert rows.filter(pl.col("step") < 2)["prompt"].n_unique() == 4


def test_the_adapter_is_one_that_mlx_lm_loads(place):
    from mlx_lm.utils import load_adapters, load_model

    from runner import LLM, SamplingParams

    succeed(*arguments("job.steps=1"), cwd=place)
    llm = LLM(str(place / "tiny"))
    llm.load_adapter("learned", place / "out" / "adapter")
    params = SamplingParams(temperature=0, max_tokens=8)
    ours = llm.generate("count 1", params, adapter="learned", use_tqdm=False)[0]
    model, _ = load_model(place / "tiny")
    adapted = load_adapters(model, str(place / "out" / "adapter"))
    tokens = list(ours.prompt_token_ids)
    for token_id in ours.outputs[0].token_ids:
        assert int(mx.argmax(adapted(mx.array([tokens]))[0, -1])) == token_id
        tokens.append(token_id)


def test_an_interrupted_training_ends_like_one_that_was_not(place):
    succeed(*arguments("reward=my_rewards.stopping"), cwd=place)
    (place / "stop").touch()
    again = arguments("reward=my_rewards.stopping", out="again")
    first = run_cli(*again, cwd=place)
    assert first.returncode == 130 and "goes on from here" in first.stderr
    assert len(metrics(place / "again")) < 3
    succeed(*again, cwd=place)
    assert metrics(place / "again") == metrics(place / "out")
    # The counter of versions is one of a process; the digest names what it counts.
    rows = [results(place / it).drop("weight_versions") for it in ("again", "out")]
    assert rows[0].equals(rows[1])
    one, other = ((place / it / "adapter/adapters.safetensors") for it in ("again", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert "already" in succeed(*again, cwd=place)


def test_results_that_are_gone_are_made_again_by_the_same_way(place):
    succeed(*arguments(), cwd=place)
    rows, before = results(place / "out").drop("weight_versions"), metrics(place / "out")
    (place / "out" / "part-00001.arrow").unlink()
    succeed(*arguments(), cwd=place)
    assert results(place / "out").drop("weight_versions").equals(rows)
    assert metrics(place / "out") == before
    succeed(*arguments("output.overwrite=true", "job.learning_rate=0.02"), cwd=place)
    assert results(place / "out").height == rows.height
    assert metrics(place / "out")[:1] != before[:1], "it began anew"


def test_the_reference_is_the_model_without_adapter(place):
    succeed(*arguments("job.kl_coefficient=0.1", "job.updates_per_step=2"), cwd=place)
    first, *later = metrics(place / "out")
    assert first["updates"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(update["kl"] > 1e-5 for step in later for update in step["updates"])
    assert all(len(step["updates"]) == 2 for step in later)
    assert all(step["updates"][1]["ratio_deviation"] > 1e-3 for step in later)


def test_a_reward_that_fails_leaves_its_completion_out(place):
    succeed(*arguments("reward=my_rewards.failing", "output.max_error_rate=1"), cwd=place)
    rows = results(place / "out")
    failed = rows.filter(pl.col("prompt") == "count 1")
    assert failed.height and failed["advantage"].null_count() == failed.height
    assert {error["type"] for error in failed["error"]} == {"RewardError"}


def test_the_curve_is_drawn(place):
    succeed(*arguments("job.steps=2", "job.picture=true"), cwd=place)
    assert (place / "out" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (place / "out" / "reward.svg").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.n=1", "sampling.n=1 is not allowed"),
        ("job.prompts_per_step=6", "job.prompts_per_step=6 is not allowed: the input has 5"),
        ("job.keys=[nothing]", "job.keys=['nothing'] is not allowed"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(place, override, message):
    assert message in refused(*arguments(override), cwd=place)
    assert not (place / "out" / "manifest.jsonl").exists()


def test_a_reward_is_needed(place):
    given = [it for it in arguments() if not it.startswith("reward=")]
    assert "grpo needs a reward" in refused(*given, "reward=none", cwd=place)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.0}, "sampling.temperature=0.0"),
        ({"top_p": 0.9}, "sampling.top_p=0.9"),
        ({"top_k": 5}, "sampling.top_k=5"),
        ({"min_p": 0.1}, "sampling.min_p=0.1"),
        ({"repetition_penalty": 1.1}, "sampling.repetition_penalty=1.1"),
        ({"presence_penalty": 0.1}, "sampling.presence_penalty=0.1"),
        ({"min_tokens": 2}, "sampling.min_tokens=2"),
        ({"temperature": 0.5}, "job.kl_coefficient=0.1"),
    ],
)
def test_only_the_models_own_distribution_is_learned_from(params, message):
    given = SamplingParams(**({"n": 4, "max_tokens": 4} | params))
    with pytest.raises(ParameterError, match=message):
        check_sampling(given, kl_coefficient=0.1)


def test_a_number_of_steps_is_needed():
    with pytest.raises(ParameterError, match="job.steps=0 is not allowed"):
        Schedule(steps=0, prompts_per_step=1, updates_per_step=1)
