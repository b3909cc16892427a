"""The curve of a training."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from runner.training.picture import draw

matplotlib = pytest.importorskip("matplotlib")


def metrics(*rewards: float | None) -> list[dict[str, float | None]]:
    return [{"reward_mean": reward} for reward in rewards]


def drawn(runs: dict[str, list[dict[str, float | None]]], folder: Path) -> tuple[set[str], str]:
    """The colours of the lines in the SVG, and its text."""
    png, svg = draw(runs, folder)
    assert matplotlib.image.imread(png).ndim == 3
    text = svg.read_text()
    ElementTree.fromstring(text)
    return {it[:7] for it in text.split("stroke: ")[1:] if it.startswith("#")}, text


def test_one_run_has_one_line_and_no_names(tmp_path):
    colors, text = drawn({"": metrics(0.1, 0.4, 0.9)}, tmp_path)
    assert "#0072b2" in colors
    assert "legend" not in text


def test_each_of_several_runs_has_a_line_and_its_name(tmp_path):
    runs = {f"seed {i}": metrics(*np.linspace(0, 1, 8)) for i in range(3)}
    colors, text = drawn(runs, tmp_path)
    assert {"#1f77b4", "#ff7f0e", "#2ca02c"} <= colors
    assert "legend" in text


def test_a_step_without_a_reward_is_a_gap(tmp_path):
    drawn({"": metrics(None, None, 0.3, None, 0.4)}, tmp_path)


def test_a_training_without_any_reward_is_drawn_all_the_same(tmp_path):
    drawn({"": metrics(None)}, tmp_path)


def test_the_picture_of_the_same_numbers_is_the_same(tmp_path):
    runs = {"": metrics(0.2, 0.5)}
    (tmp_path / "again").mkdir()
    one, other = draw(runs, tmp_path)[0], draw(runs, tmp_path / "again")[0]
    assert one.read_bytes() == other.read_bytes()
