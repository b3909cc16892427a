"""The wheel holds `runner/` and nothing else, and works from wherever it is unpacked."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("runner", "jobs", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=LEFT_OUT)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m runner` from `cwd` with `path` as the only place to find it in."""
    command = [sys.executable, "-m", "runner", *arguments]
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_only_the_package(unpacked: Path) -> None:
    assert sorted(path.name for path in unpacked.iterdir()) == [
        "mlx_runner-0.1.0.dist-info",
        "runner",
    ]


@pytest.mark.parametrize(
    ("source", "target", "pattern"),
    [
        ("conf", "runner/conf", "**/*.yaml"),
        ("conf", "runner/conf", "__init__.py"),
        ("jobs", "runner/jobs", "*.py"),
        ("runner", "runner", "**/*.py"),
        ("runner", "runner", "data/*.jsonl"),
        ("runner", "runner", "py.typed"),
    ],
)
def test_every_file_of_the_checkout_is_in_the_wheel(
    source: str, target: str, pattern: str, unpacked: Path
) -> None:
    there = {str(path.relative_to(ROOT / source)) for path in (ROOT / source).glob(pattern)}
    packed = {
        str(path.relative_to(unpacked / target)) for path in (unpacked / target).glob(pattern)
    }
    assert there and there <= packed


def test_the_wheel_holds_no_tests_and_no_caches(unpacked: Path) -> None:
    names = [str(path.relative_to(unpacked)) for path in unpacked.rglob("*")]
    assert not [name for name in names if "test_" in name or "__pycache__" in name]


def test_the_script_is_called_runner(unpacked: Path) -> None:
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "runner = runner.cli:main" in entry_points.read_text()


@pytest.mark.parametrize("job", sorted(path.stem for path in (ROOT / "conf/job").glob("*.yaml")))
def test_the_unpacked_wheel_composes_every_job(job: str, unpacked: Path, tmp_path: Path) -> None:
    done = run(job, "--cfg", "job", cwd=tmp_path, path=unpacked)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run(job, "--cfg", "job", cwd=tmp_path, path=ROOT).stdout


def test_the_unpacked_wheel_finds_the_jobs_inside_itself(unpacked: Path, tmp_path: Path) -> None:
    code = "import runner, runner.jobs, runner.conf; print(runner.jobs.__file__, *runner.__path__)"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [
        str(unpacked / "runner/jobs/__init__.py"),
        str(unpacked / "runner"),
    ]
