"""Every block of the README runs, in order, in one working directory."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import which_fields
from tiny_adapters import ATTENTION, random_adapter, save_mlx

from runner import LLM
from runner.server.openapi import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
YAML_FILES = re.findall(r"`(conf/\w+/\w+\.yaml)`.*?```yaml\n(.*?)```", README, re.DOTALL)
SERVING = README.partition("## Serving\n")[2].partition("\n## ")[0]
SERVED = re.findall(r"^```bash\n(.*?)^```", SERVING, re.DOTALL | re.MULTILINE)
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
        if kind in ("bash", "python") and code not in INSTALLS + SERVED
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
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_fields_is_that_of_the_program() -> None:
    assert which_fields.table() in SERVING and f": {which_fields.neutral()}.\n" in SERVING


@contextmanager
def server(command: str, place: Path) -> Iterator[str]:
    """Starts what the README starts, on the tiny model and a free port; gives host and port."""
    program = f"{sys.executable} -m runner serve"
    words = re.sub(r"(model|server\.port)=\S+", "", command).strip()
    words = words.replace("runner serve", f"exec {program}") + " model.path=tiny server.port=0"
    # The assignments before a command come before its `exec` as well.
    words = re.sub(r"((?:\w+=\S+ )+)exec", r"export \1&& exec", words)
    process = subprocess.Popen(
        ["bash", "-euc", words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at http://(127\.0\.0\.1:\d+) ", line)
        try:
            assert found is not None, line
            yield found[1]
        finally:
            process.terminate()
    assert process.returncode in (0, -signal.SIGTERM)


def test_the_server_answers_every_call(tiny_place: Path, llm: LLM) -> None:
    _, adapted = random_adapter(llm.model, 0, keys=ATTENTION)
    save_mlx(tiny_place / "adapters" / "poems", adapted, rank=4, keys=ATTENTION)
    first, calls, second, adapter_calls = SERVED
    called = set()
    for start, lines in ((first, calls), (second, adapter_calls)):
        with server(start, tiny_place) as address:
            for line in lines.splitlines():
                called.add(re.findall(r"localhost:8000(\S+)", line)[0])
                done = subprocess.run(
                    ["bash", "-euc", line.replace("localhost:8000", address)],
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0 and done.stdout, (line, done.stderr)
                assert "error" not in done.stdout.partition("# HELP")[0], (line, done.stdout)
    named = {it.path.replace("/{name}", "") for it in OPERATIONS}
    assert called == named
    logged = (tiny_place / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in logged] == [None, "poems", None]
