"""The BLAS of a process: found, loaded before mlx, much faster, and said so where it is not."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runner
from runner.errors import ParameterError
from runner.models import blas

_ROOT = Path(runner.__file__).parent.parent
_on_linux_cpu = pytest.mark.skipif(
    platform.system() != "Linux" or blas._has_cuda_backend(), reason="only a Linux CPU needs one"
)
_with_package = pytest.mark.skipif(
    importlib.util.find_spec("scipy_openblas32") is None, reason="needs mlx-runner[cpu]"
)

_MEASURE = """
import json, sys, time
size, load = int(sys.argv[1]), sys.argv[2] == "load"
if load:
    from runner.models.blas import load_blas
    print(load_blas().name, file=sys.stderr)
import mlx.core as mx
import numpy as np
a, b = mx.random.normal((2, size, size))
mx.eval(a, b)
seconds = []
for _ in range(12):
    start = time.perf_counter()
    product = a @ b
    mx.eval(product)
    seconds.append(time.perf_counter() - start)
difference = np.abs(np.array(product) - np.array(a) @ np.array(b)).max()
print(json.dumps({"gflops": 2e-9 * size**3 / min(seconds), "difference": float(difference)}))
"""


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A core that this shell names would stand in for the one that is to be found.
    inherited = {name: os.environ[name] for name in os.environ if name != "OPENBLAS_CORETYPE"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=inherited | environment,
        check=True,
    )


def _measure(size: int, mode: str) -> dict[str, float]:
    measured: dict[str, float] = json.loads(_python(_MEASURE, str(size), mode).stdout)
    return measured


@_on_linux_cpu
@_with_package
def test_multiplies_at_least_20_times_faster_than_the_wheel_and_as_numpy_does() -> None:
    fast, wheel = _measure(2048, "load"), _measure(512, "plain")
    assert fast["gflops"] > 20 * wheel["gflops"], (fast, wheel)
    assert fast["difference"] < 2e-3
    assert wheel["difference"] < 1e-3


@_on_linux_cpu
@_with_package
def test_the_copy_is_made_once_and_kept(tmp_path: Path) -> None:
    code = "from runner.models.blas import load_blas; print(load_blas())"
    first = _python(code, XDG_CACHE_HOME=str(tmp_path)).stdout
    (copy,) = (tmp_path / "mlx-runner" / "blas").iterdir()
    made = copy.stat()
    second = _python(code, XDG_CACHE_HOME=str(tmp_path)).stdout
    assert first == second
    assert "OpenBLAS 0." in first
    assert "scipy-openblas32" in first
    assert copy.stat().st_mtime_ns == made.st_mtime_ns
    assert importlib.metadata.version("scipy-openblas32") in copy.name


@_on_linux_cpu
@_with_package
@pytest.mark.parametrize("state", ["not a directory", "broken copy"])
def test_an_unusable_cache_costs_only_time(tmp_path: Path, state: str) -> None:
    code = "from runner.models.blas import load_blas; print(load_blas().name)"
    if state == "not a directory":
        (tmp_path / "mlx-runner").write_text("in the way")
    else:
        _python(code, XDG_CACHE_HOME=str(tmp_path))
        (copy,) = (tmp_path / "mlx-runner" / "blas").iterdir()
        copy.write_text("not a library")
    assert "OpenBLAS" in _python(code, XDG_CACHE_HOME=str(tmp_path)).stdout


@_on_linux_cpu
def test_comes_too_late_after_mlx() -> None:
    code = (
        "import mlx.core; from runner.models.blas import load_blas; b = load_blas();"
        "print(b.path, b.warning)"
    )
    path, _, warning = _python(code).stdout.strip().partition(" ")
    assert path == "None"
    assert "imported before runner" in warning


@_on_linux_cpu
def test_importing_load_is_enough_and_does_not_import_mlx() -> None:
    code = (
        "import sys, runner.models.load; assert 'mlx.core' not in sys.modules;"
        "import mlx.core; from runner.models.blas import load_blas; print(load_blas().warning)"
    )
    assert "imported before" not in _python(code).stdout


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that seems not to have imported mlx, and an environment that is put back."""
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(blas, "_has_cuda_backend", lambda: False)
    for name in ("MLX_DISABLE_COMPILE", "OPENBLAS_CORETYPE", "RUNNER_BLAS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def _load() -> blas.Blas:
    return blas.load_blas.__wrapped__()


def test_says_what_to_install_where_nothing_is_found(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(blas, "_load_scipy_openblas", lambda: None)
    fresh.setattr(blas, "_SYSTEM_LIBRARIES", ("libno-such-blas.so",))
    found = _load()
    assert found.path is None
    assert found.warning is not None
    assert "mlx-runner[cpu]" in found.warning
    assert "libopenblas0" in found.warning
    assert "\n" not in found.warning


def test_without_patchelf_the_package_is_of_no_use(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(blas, "_find_patchelf", lambda: None)
    assert blas._load_scipy_openblas() is None


def test_a_patchelf_that_fails_is_not_the_end(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setattr(blas, "_find_patchelf", lambda: "false")
    assert blas._load_scipy_openblas() is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_runner_blas_has_to_be_a_file(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("RUNNER_BLAS", str(tmp_path / "missing.so"))
    with pytest.raises(ParameterError, match=r"RUNNER_BLAS=.*missing\.so is not a file"):
        _load()


def test_runner_blas_has_to_be_a_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    fresh.setenv("RUNNER_BLAS", str(tmp_path / "text.so"))
    with pytest.raises(ParameterError, match=r"RUNNER_BLAS=.*text\.so is not a BLAS"):
        _load()


@_on_linux_cpu
def test_a_library_without_cblas_is_refused() -> None:
    with pytest.raises(OSError, match="has no cblas_sgemm"):
        blas._load("libc.so.6", source="libc")


@_on_linux_cpu
@_with_package
def test_runner_blas_comes_first(tmp_path: Path) -> None:
    code = "from runner.models.blas import load_blas; b = load_blas(); print(b.path); print(b.name)"
    copy, _ = _python(code).stdout.split("\n", 1)
    moved = tmp_path / "libmine.so"
    moved.write_bytes(Path(copy).read_bytes() if Path(copy).is_file() else b"")
    path, name = _python(code, RUNNER_BLAS=str(moved)).stdout.splitlines()
    assert path == str(moved)
    assert name.startswith("OpenBLAS")
    assert str(moved) in name


def test_metal_and_cuda_bring_their_own(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(blas, "_has_cuda_backend", lambda: True)
    assert _load() == blas.Blas("cuBLAS")
    fresh.setattr(platform, "system", lambda: "Darwin")
    assert _load() == blas.Blas("Accelerate")


@pytest.mark.parametrize("installed", ["mlx-cuda-12", "mlx-cuda-13", None])
def test_cuda_is_told_by_its_package(
    monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def distribution(name: str) -> None:
        if name != installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert blas._has_cuda_backend() == (installed is not None)


@pytest.mark.parametrize(
    ("flags", "chosen", "core"),
    [
        ("fpu avx2 avx512f avx512bw avx512dq avx512vl", None, "SkylakeX"),
        ("fpu avx2 avx512f", None, None),
        ("fpu avx2 avx512f avx512bw avx512dq avx512vl", "Haswell", "Haswell"),
    ],
)
def test_names_the_core_where_the_user_has_not(
    fresh: pytest.MonkeyPatch, tmp_path: Path, flags: str, chosen: str | None, core: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    fresh.setattr(blas, "_CPU_FLAGS_FILE", tmp_path / "cpuinfo")
    if chosen is not None:
        fresh.setenv("OPENBLAS_CORETYPE", chosen)
    blas._name_the_core()
    assert os.environ.get("OPENBLAS_CORETYPE") == core


def test_knows_no_core_without_a_list_of_flags(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(blas, "_CPU_FLAGS_FILE", tmp_path / "missing")
    blas._name_the_core()
    assert "OPENBLAS_CORETYPE" not in os.environ


@pytest.mark.parametrize("compiler", ["/usr/bin/g++", None])
def test_compiles_only_where_there_is_a_compiler(
    fresh: pytest.MonkeyPatch, compiler: str | None
) -> None:
    def which(name: str, **_: Any) -> str | None:
        return compiler if name == "g++" else None

    fresh.setattr(blas.shutil, "which", which)
    blas._do_without_compiler()
    assert os.environ.get("MLX_DISABLE_COMPILE") == (None if compiler else "1")


@_on_linux_cpu
def test_a_library_of_another_make_goes_by_its_name() -> None:
    assert blas._describe(ctypes.CDLL("libc.so.6"), "libmkl_rt.so.2") == "libmkl_rt.so.2"
