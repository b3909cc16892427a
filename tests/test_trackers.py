"""The trackers, each with its real package and without a network, in a process of its own."""

import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, refused

from runner.errors import ParameterError
from runner.trackers import NoTracker, TensorBoardTracker, TrackioTracker, WandbTracker

CODE = """
import os, sys
from runner.trackers import {name}
tracker = {name}({options})
tracker.start({{"output.dir": "out", "sampling.temperature": 0.5, "sampling.stop": ["x"]}})
for step in (3, 7):
    tracker.log({{"rows": step, "tokens_per_second": 2.5 * step}}, step=step)
tracker.finish()
"""


def track(place: Path, name: str, options: str = "") -> str:
    """What a tracker prints on stdout that reported two commits from `place`."""
    (place / "out").mkdir()
    # No proxy answers there: what tried to reach a service would fail, and be seen to.
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    home = {"HOME": str(place), "TRACKIO_DIR": str(place / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(name=name, options=options)],
        cwd=place, env={"PATH": "/usr/bin:/bin"} | nowhere | home,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(path: Path) -> bytes:
    """The payloads of a TensorBoard file: length, its checksum, payload, its checksum."""
    content, found = path.read_bytes(), b""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found += content[12 : 12 + length]
        content = content[16 + length :]
    return found


def test_tensorboard_writes_event_files_into_the_directory(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    track(tmp_path, "TensorBoardTracker")
    (file,) = (tmp_path / "out" / "tensorboard").iterdir()
    written = records(file)
    assert written.count(b"tokens_per_second") == 2
    assert struct.pack("<f", 17.5) in written and b"sampling.temperature: 0.5" in written


def test_wandb_writes_a_run_into_the_directory_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    printed = track(tmp_path, "WandbTracker", 'project="p", mode="offline"')
    assert printed == ""
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    written = run.read_bytes()
    assert b"tokens_per_second" in written and b"17.5" in written
    assert b"sampling.temperature" in written


def test_trackio_keeps_a_database_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    assert track(tmp_path, "TrackioTracker", 'project="p", name="n"') == ""
    (database,) = (tmp_path / "trackio").glob("p*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    connection.close()
    assert [(name, step) for name, step, _ in rows] == [("n", 3), ("n", 7)]
    assert "17.5" in str(rows[1][2])


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("wandb", lambda: WandbTracker(project="p"), "wandb"),
        ("tensorboardX", TensorBoardTracker, "tensorboard"),
        ("trackio", lambda: TrackioTracker(project="p"), "trackio"),
    ],
)
def test_a_missing_package_is_told_with_how_to_get_it(module, make, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ParameterError) as refusal:
        make()
    line = f"tracker={extra} needs the package {module}: pip install 'mlx-runner[{extra}]'"
    assert str(refusal.value) == line


def test_reporting_to_nobody_does_nothing() -> None:
    tracker = NoTracker()
    tracker.start({})
    tracker.log({"rows": 1.0}, step=1)
    tracker.finish()


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path: Path) -> None:
    line = refused("generate", "tracker=wand", cwd=tmp_path)
    assert "wandb" in line and "tensorboard" in line
