"""The table, the picture and the baseline, from figures that are given."""

import copy
import json
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from runner.benchmarking import picture
from runner.benchmarking.baseline import print_comparison, read_baseline, regressions
from runner.benchmarking.measure import spread
from runner.benchmarking.peers import COMPARED, Kind
from runner.benchmarking.table import print_table, unequal_options
from runner.errors import ParameterError

KINDS = {
    "mlx_lm": "loop, our kernels",
    "stock": "mlx-lm from pip",
    "plain": "without drafts",
}


def side(kind, name, speed, rows):
    speeds = spread([speed * 0.97, speed, speed * 1.02])
    return {"kind": kind, "name": name, "rows": rows, "tokens_per_second": speeds}


def workload(name, speed):
    """One in which we are 1, 20 and 300 times as fast as the peers."""
    peers = [
        side(kind, peer, speed / times, 2 if kind == "stock" else 32) | {"ratio": spread([times])}
        for (kind, peer), times in zip(KINDS.items(), (1, 20, 300), strict=True)
    ]
    ours = side("runner", "runner", speed, 32) | {"peak_to_weights_and_cache": 1.25}
    return {"workload": name, "rows": 32, "runner": ours, "peers": peers}


@pytest.fixture
def figures():
    machine = ("machine", "processor", "device", "blas", "model", "dtype")
    return dict.fromkeys(machine, "x") | {
        "cores": 2,
        "unequal": [],
        "workloads": [workload("group", 12345), workload("decode", 200.4)],
    }


def test_the_table_fits_and_says_who_did_only_a_part(figures, capsys):
    figures["unequal"] = ["engine.kv_bits=8", "engine.max_kv_size=1000"]
    print_table(figures)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table, notes = lines[:7], " ".join(" ".join(lines[7:]).split())
    assert [line.split()[0] for line in table] == ["workload"] + ["group"] * 3 + ["decode"] * 3
    assert table[4].split()[-6:] == ["200", "200", "1.00*", "1.00", "to", "1.00"]
    assert table[5].split()[-6:] == ["200", "10", "20.0*", "20.0", "to", "20.0"]
    assert "from pip did 2 of 32 rows of group, 2 of 32 rows of decode; its tokens/s" in notes
    assert "weights and cache: group 1.25, decode 1.25" in notes
    assert "* not equal: only this engine runs with engine.kv_bits=8, engine.max_kv" in notes


def test_nothing_is_marked_where_the_sides_do_equal_work(figures, capsys):
    print_table(figures)
    assert "*" not in capsys.readouterr().out
    assert unequal_options({"kv_bits": None, "max_kv_size": None, "max_batch_size": 7}) == []
    assert unequal_options({"kv_bits": 4, "max_kv_size": None}) == ["engine.kv_bits=4"]


def test_the_picture_holds_every_side_and_stays_inside_its_frame(figures, tmp_path):
    from matplotlib.image import imread

    picture.draw(figures, tmp_path)
    image = imread(tmp_path / "benchmark.png")[..., :3]
    height, width, _ = image.shape
    assert width == 1200 and height > 600
    border = [image[:, :3], image[:, -3:], image[:2], image[-2:]]
    assert all((edge == 1).all() for edge in border), "nothing is cut off"
    ElementTree.parse(tmp_path / "benchmark.svg")
    colors = {tuple(rgb) for rgb in (image[::4, ::4] * 255).round().astype(int).reshape(-1, 3)}
    # The bars of the others are too short to be met.
    wanted = {tuple(bytes.fromhex(picture._COLORS[it][1:])) for it in ("runner", "mlx_lm")}
    assert wanted <= colors


def test_every_kind_of_side_has_a_colour():
    assert set(picture._COLORS) == set(get_args(Kind)) > set(COMPARED)


def test_a_picture_without_matplotlib_is_refused(monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"job.picture=true .* 'mlx-runner\[plots\]'"):
        picture.check_matplotlib()


def test_what_became_slower_is_said(figures, capsys):
    before = copy.deepcopy(figures)
    assert regressions(figures, before) == []
    print_comparison(figures, before)
    assert "nothing is slower" in capsys.readouterr().out
    now = figures["workloads"][1]
    now["runner"]["tokens_per_second"]["median"] = 0.96 * 0.97 * 200.4
    now["peers"][1]["ratio"]["median"] = 0.94 * 20
    assert regressions(figures, before) == [
        "decode, ratio to mlx-lm from pip: 18.8, and 20 to 20 before"
    ]
    now["runner"]["tokens_per_second"]["median"] = 0.94 * 0.97 * 200.4
    assert len(regressions(figures, before)) == 2
    print_comparison(figures, before)
    assert "slower    decode, tokens/s: 183, and 194 to 204 before" in capsys.readouterr().out


def test_speeds_are_compared_on_machines_of_one_kind_only(figures):
    before = copy.deepcopy(figures) | {"processor": "another"}
    slower = figures["workloads"][0]
    slower["runner"]["tokens_per_second"]["median"] = 1
    assert regressions(figures, before) == []
    slower["peers"][0]["ratio"]["median"] = 0.5
    assert len(regressions(figures, before)) == 1


def test_a_baseline_of_other_workloads_says_nothing_about_these(figures, capsys):
    before = copy.deepcopy(figures) | {"workloads": [workload("score", 5)]}
    print_comparison(figures, before)
    assert "nothing in it was measured here" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"workloads": [{"workload": "group"}]}'])
def test_a_baseline_that_is_none_is_refused(text, tmp_path: Path):
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ParameterError, match=r"job.baseline=.*baseline.json is not"):
        read_baseline(str(file))


def test_a_baseline_is_read(figures, tmp_path: Path):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(figures))
    assert read_baseline(str(file)) == figures
