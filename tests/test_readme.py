"""Every block of the README runs, in order, in one working directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
YAML_FILES = re.findall(r"`(conf/\w+/\w+\.yaml)`.*?```yaml\n(.*?)```", README, re.DOTALL)
INSTALLS = [code for kind, code in BLOCKS if kind == "bash" and code.startswith("pip install")]


def run_block(kind: str, code: str, place: Path) -> None:
    """Runs one block; a Python block that names a file becomes that file."""
    named = re.match(r"# (\w+\.py)\n", code)
    if named:
        (place / named[1]).write_text(code)
        return
    command = (
        ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.real_model
def test_every_block_runs(tmp_path: Path) -> None:
    for name, code in YAML_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    ran = [
        run_block(kind, code, tmp_path)
        for kind, code in BLOCKS
        if kind in ("bash", "python") and code not in INSTALLS
    ]
    assert len(ran) == 16, "a block was added or lost: is it run here or in .ci/run?"
    answers = pl.scan_ipc(tmp_path / "answers" / "part-*.arrow").collect()
    assert "Paris" in answers.filter(pl.col("level") == 1)["text"][0]
    groups = pl.scan_ipc(tmp_path / "rollouts" / "part-*.arrow").collect()
    assert groups.height == 32
    assert (tmp_path / "batch" / "output.jsonl").read_text().count("\n") == 1
    points = sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir())
    assert points == ["kv_bits=8", "kv_bits=null"]
    assert (tmp_path / "sweep" / "sweep.png").exists()
    assert (tmp_path / "smollm2-8bit" / "model.safetensors").stat().st_size < 150e6


def test_the_installation_lines_are_those_that_ci_runs() -> None:
    assert len(INSTALLS) == 3 and len(YAML_FILES) == 2
    script = (ROOT / ".ci" / "run").read_text()
    for line in INSTALLS:
        assert line.split(" && ")[-1].split()[0] in script
    assert "README.md" in script


def test_the_columns_of_the_table_are_those_of_the_schema() -> None:
    from runner.data.schemas import ECHO_FIELDS

    section = README.partition("## What a row of results holds")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {field.name for field in ECHO_FIELDS}


def test_every_file_that_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
