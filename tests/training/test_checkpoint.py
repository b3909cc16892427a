"""What a training keeps of each step, and what it takes up again."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny_training import experiences, trainer

from runner.data import durable
from runner.errors import OutputError, StoppedError
from runner.models.adapters import read_adapter
from runner.training.checkpoint import (
    ADAPTER_DIRECTORY,
    CHECKPOINT_FILE,
    METRICS_FILE,
    Checkpoints,
)


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


@pytest.mark.parametrize("content", ["cut", "other"])
def test_a_file_that_is_no_checkpoint_is_said_in_a_line(model, tmp_path, content):
    one = trainer(model)
    Checkpoints(tmp_path, one).save(1, {"step": 0})
    file = tmp_path / CHECKPOINT_FILE
    if content == "cut":
        file.write_bytes(file.read_bytes()[:99])
    else:
        mx.save_safetensors(str(file), {"x": mx.zeros(2)})
    with pytest.raises(OutputError, match="checkpoint.safetensors' (cannot be read|is no check)"):
        Checkpoints(tmp_path, one).restore(1)


def test_a_checkpoint_of_fewer_steps_than_there_are_rows_is_gone_on_from(model, tmp_path):
    """The rows of a step are committed before its checkpoint: a crash between the two."""
    one = trainer(model)
    checkpoints = Checkpoints(tmp_path, one)
    for step in range(2):
        checkpoints.save(step + 1, {"step": step})
    assert Checkpoints(tmp_path, one).restore(3) == 2
    assert Checkpoints(tmp_path, one).restore(1) == 0, "a step without rows is not believed"


def test_metrics_that_are_gone_are_those_of_the_steps_to_come(model, tmp_path):
    one = trainer(model)
    Checkpoints(tmp_path, one).save(1, {"step": 0})
    (tmp_path / METRICS_FILE).unlink()
    again = Checkpoints(tmp_path, one)
    assert again.restore(1) == 1
    for step in (1, 2):
        again.save(step + 1, {"step": step})
    assert steps(tmp_path) == [1, 2]


def test_what_is_saved_beside_it_is_the_adapter_of_that_step(model, tmp_path):
    one = trainer(model, keys=["self_attn.q_proj"])
    one.update(experiences(model))
    Checkpoints(tmp_path, one).save(1, {"step": 0})
    weights = read_adapter(tmp_path / ADAPTER_DIRECTORY)
    assert {path.rpartition("layers.")[2][2:] for path in weights.targets} == {"self_attn.q_proj"}
    for path, low in weights.targets.items():
        assert low.scale == one.shape.scale and low.rank == one.shape.rank
        np.testing.assert_array_equal(low.a, one.arrays[f"{path}.lora_a"])
        np.testing.assert_array_equal(low.b, one.arrays[f"{path}.lora_b"])
