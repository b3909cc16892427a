"""What a training keeps of each step, and what it takes up again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_training import experiences, trainer

from runner.data import durable
from runner.errors import StoppedError
from runner.training.checkpoint import CHECKPOINT_FILE, METRICS_FILE, Checkpoints


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


def steps(directory: Path) -> list[int]:
    lines = (directory / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_training_begins_at_the_first_step(model, tmp_path):
    one = trainer(model)
    before = {name: np.array(array) for name, array in one.arrays.items()}
    assert Checkpoints(tmp_path, one).restore(9) == 0
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_the_next_step_after_a_restore_is_that_of_the_one_before(model, tmp_path):
    given, one = experiences(model), trainer(model)
    checkpoints = Checkpoints(tmp_path, one)
    assert checkpoints.restore(9) == 0
    for step in range(2):
        one.update(given)
        checkpoints.save(step + 1, {"step": step})
    other = trainer(model, seed=5)
    assert Checkpoints(tmp_path, other).restore(2) == 2
    assert one.update(given) == other.update(given)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_metrics_of_a_step_that_was_cut_off_are_written_again(model, tmp_path):
    one = trainer(model)
    checkpoints = Checkpoints(tmp_path, one)
    checkpoints.restore(9)
    checkpoints.save(1, {"step": 0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step":1}\n{"st')
    again = Checkpoints(tmp_path, one)
    assert again.restore(1) == 1
    again.save(2, {"step": 1})
    assert steps(tmp_path) == [0, 1]


def test_a_step_counts_once_its_checkpoint_is_there(model, tmp_path, monkeypatch):
    one = trainer(model)
    checkpoints = Checkpoints(tmp_path, one)
    checkpoints.restore(9)
    checkpoints.save(1, {"step": 0})
    content = (tmp_path / CHECKPOINT_FILE).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "replace", full)
    one.update(experiences(model))
    with pytest.raises(StoppedError, match="No space left"):
        checkpoints.save(2, {"step": 1})
    monkeypatch.undo()
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == content
    assert Checkpoints(tmp_path, trainer(model)).restore(1) == 1


def test_a_checkpoint_without_the_rows_of_its_steps_is_not_believed(model, tmp_path):
    one = trainer(model)
    checkpoints = Checkpoints(tmp_path, one)
    checkpoints.restore(0)
    one.update(experiences(model))
    checkpoints.save(1, {"step": 0})
    fresh = trainer(model)
    before = {name: np.array(array) for name, array in fresh.arrays.items()}
    again = Checkpoints(tmp_path, fresh)
    assert again.restore(0) == 0
    for name, array in fresh.arrays.items():
        np.testing.assert_array_equal(array, before[name])
    again.save(1, {"step": 0})
    assert steps(tmp_path) == [0]
