"""`runner rollout`: groups, rewards, advantages; on a tiny model, and once on the real one."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import results, write_jsonl
from forked_cli import refused, succeed

ROWS = [{"prompt": f"count {i}", "answer": str(i)} for i in range(3)]

MY_REWARDS = """
import asyncio

def length(text, row):
    return len(text) + int(row["answer"])

async def slow(text, row):
    await asyncio.sleep(0.01)
    return length(text, row)

def picky(text, row):
    if row["answer"] == "1":
        raise ValueError("not this one")
    return length(text, row)
"""


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return tmp_path


def arguments(*overrides: str, out: str = "out") -> list[str]:
    return [
        "rollout", "model.path=tiny", "data.path=prompts.jsonl", f"output.dir={out}",
        "sampling.max_tokens=8", "sampling.n=4", *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize("reward", ["my_rewards.length", "my_rewards.slow"])
def test_groups_have_rewards_and_advantages(place, reward):
    succeed(*arguments(f"reward={reward}"), cwd=place)
    rows = results(place / "out")
    assert rows.height == 12
    for _, group in rows.group_by("group_id"):
        assert group["sample_index"].sort().to_list() == [0, 1, 2, 3]
        assert group["prompt_token_ids"].n_unique() == 1
        assert group["completion_token_ids"].n_unique() == 4
        wanted = [len(t) + int(a) for t, a in zip(group["text"], group["answer"], strict=True)]
        assert group["reward"].to_list() == wanted
        centred = np.array(wanted) - np.mean(wanted)
        expected = centred / (np.std(wanted) + 1e-4)
        np.testing.assert_allclose(group["advantage"], expected, atol=1e-9)
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert summary["reward"]["mean"] == pytest.approx(rows["reward"].mean())


def test_advantages_can_be_left_in_units_of_the_reward(place):
    succeed(*arguments("reward=my_rewards.length", "job.normalize_advantage=false"), cwd=place)
    for _, group in results(place / "out").group_by("group_id"):
        centred = group["reward"].to_numpy() - group["reward"].mean()
        np.testing.assert_allclose(group["advantage"], centred, atol=1e-9)


def test_a_reward_that_fails_is_an_error_row_and_the_others_go_on(place):
    printed = succeed(*arguments("reward=my_rewards.picky"), cwd=place)
    rows = results(place / "out")
    failed = rows.filter(rows["answer"] == "1")
    assert failed["reward"].null_count() == failed["advantage"].null_count() == 4
    assert {e["type"] for e in failed["error"]} == {"RewardError"}
    assert all("not this one" in e["message"] for e in failed["error"])
    assert failed["text"].null_count() == 0
    assert rows.filter(rows["answer"] != "1")["error"].null_count() == 8
    assert "4 errors" in printed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward=none"], ["a rollout needs a reward"]),
        (["reward.answer_column=solution"], ["answer_column=solution", "prompt, answer"]),
        (["reward=my_rewards.nothing"], ["my_rewards.nothing"]),
        (["reward=no_such_module.reward"], ["no_such_module"]),
    ],
)
def test_a_reward_that_cannot_be_is_refused(place, overrides, words):
    line = refused(*arguments(*overrides), cwd=place)
    assert all(word in line for word in words), line
    assert not (place / "out").exists()


@pytest.mark.real_model
def test_the_default_rollout_is_reproducible_and_neither_hopeless_nor_solved(tmp_path):
    for out in ("one", "two"):
        command = ["job=rollout", "data.limit=16", "sampling.n=4", f"output.dir={out}"]
        succeed(*command, cwd=tmp_path)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.height == 64
    for _, group in one.group_by("group_id"):
        assert group.height == 4 and group["prompt_token_ids"].n_unique() == 1
        # Not 4: a short answer that the model is sure of may well be drawn twice.
        assert group["completion_token_ids"].n_unique() > 1
    assert one.equals(two)
    assert 0.05 < one["reward"].mean() < 0.95
    command = ["rollout", "data.limit=2", "sampling.n=4", "sampling.seed=1", "output.dir=three"]
    succeed(*command, cwd=tmp_path)
    three = results(tmp_path / "three")
    same_rows = one.filter(one["question"].is_in(three["question"].to_list()))
    drawn = [set(map(tuple, it["completion_token_ids"].to_list())) for it in (same_rows, three)]
    assert same_rows.height == three.height == 8 and drawn[0] != drawn[1]
