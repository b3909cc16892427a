"""An optimised BLAS under mlx on Linux CPUs.

The CPU wheel of mlx carries the reference BLAS but reaches `cblas_sgemm` through the dynamic
linker, so a library that the process has loaded before, with its symbols global, takes its place.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runner.errors import ParameterError

_PACKAGE = "scipy-openblas32"
_RENAMED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")
_SKYLAKEX_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_CPU_FLAGS_FILE = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Blas:
    """What multiplies the matrices of this process."""

    name: str
    path: str | None = None
    """The library that was loaded; None where mlx brings its own."""
    warning: str | None = None
    """One line for the user where the multiplication is slow, and what to do about it."""


@functools.cache
def load_blas() -> Blas:
    """Loads the best BLAS at hand on a Linux CPU; call it before anything imports mlx.

    Takes the library of the environment variable `RUNNER_BLAS`, else the package
    scipy-openblas32, else one of the system. Raises ParameterError if `RUNNER_BLAS` is of no use.
    """
    if platform.system() == "Darwin":
        return Blas("Accelerate")
    if _has_cuda_backend():
        return Blas("cuBLAS")
    _do_without_compiler()
    if "mlx.core" in sys.modules:
        return Blas(
            "reference BLAS of mlx",
            warning="mlx was imported before runner, so its slow reference BLAS stays in use: "
            "import runner first",
        )
    _name_the_core()
    if asked := os.environ.get("RUNNER_BLAS"):
        return _load_asked(asked)
    return _load_scipy_openblas() or _load_system() or _reference()


def pin_kernels() -> None:
    """Makes OpenBLAS use kernels that round a row alike in a matrix of any size; before it loads.

    On x86 those are Sandybridge's: without fused multiply-add, they sum every element in one order
    at every place of a matrix, where later ones do not at the edges. Takes precedence over
    `OPENBLAS_CORETYPE`. Other processors and libraries are left as they are.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"


def _reference() -> Blas:
    return Blas(
        "reference BLAS of mlx",
        warning="no optimised BLAS found, so matrices multiply 20 to 60 times slower than they "
        "could: pip install 'mlx-runner[cpu]', or install your system's OpenBLAS (libopenblas0)",
    )


def _has_cuda_backend() -> bool:
    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _do_without_compiler() -> None:
    # `mx.compile` on CPU runs g++, by that name, the first time an activation is used.
    if shutil.which("g++") is None:
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


def _name_the_core() -> None:
    # OpenBLAS takes processors newer than itself for Haswell, which halves its speed.
    try:
        flags = _CPU_FLAGS_FILE.read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return
    if _SKYLAKEX_FLAGS.issubset(flags):
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def _load_asked(path: str) -> Blas:
    if not Path(path).is_file():
        raise ParameterError(f"RUNNER_BLAS={path} is not a file: give a BLAS library, or unset it")
    try:
        return _load(path, source=path)
    except OSError as error:
        raise ParameterError(f"RUNNER_BLAS={path} is not a BLAS with cblas: {error}") from error


def _load_scipy_openblas() -> Blas | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    patchelf = _find_patchelf()
    if spec is None or spec.origin is None or patchelf is None:
        return None
    source = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    try:
        return _load(str(_cached_copy(source, patchelf)), source=_PACKAGE)
    except (OSError, subprocess.CalledProcessError):
        return _load_from_temporary_copy(source, patchelf)


def _load_from_temporary_copy(source: Path, patchelf: str) -> Blas | None:
    # A loaded library stays mapped when its file goes, so nothing is left behind.
    with tempfile.TemporaryDirectory() as directory:
        try:
            copy = _copy_without_prefix(source, patchelf, Path(directory) / source.name)
            return _load(str(copy), source=_PACKAGE)
        except (OSError, subprocess.CalledProcessError):
            return None


def _find_patchelf() -> str | None:
    beside_python = os.path.dirname(sys.executable)
    try:
        files = importlib.metadata.files("patchelf") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [os.path.dirname(file.locate()) for file in files if file.name == "patchelf"]
    places = [beside_python, *installed, os.environ.get("PATH", os.defpath)]
    return shutil.which("patchelf", path=os.pathsep.join(places))


def _cached_copy(source: Path, patchelf: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    version = importlib.metadata.version(_PACKAGE)
    copy = cache / "mlx-runner" / "blas" / f"libopenblas-{version}-{platform.machine()}.so"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy_without_prefix(source, patchelf, copy)
    return copy


def _copy_without_prefix(source: Path, patchelf: str, copy: Path) -> Path:
    """Copies the library and gives its `scipy_cblas_?gemm` the names that mlx asks for."""
    with tempfile.TemporaryDirectory(dir=copy.parent) as directory:
        names = Path(directory) / "names"
        names.write_text("".join(f"scipy_{name} {name}\n" for name in _RENAMED))
        unfinished = Path(directory) / copy.name
        shutil.copyfile(source, unfinished)
        command = [patchelf, "--rename-dynamic-symbols", str(names), str(unfinished)]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(unfinished, copy)
    return copy


def _load_system() -> Blas | None:
    inside_environment = os.path.join(sys.prefix, "lib")
    for name in _SYSTEM_LIBRARIES:
        for candidate in (os.path.join(inside_environment, name), name):
            try:
                return _load(candidate, source=name)
            except OSError:
                continue
    return None


def _load(path: str, *, source: str) -> Blas:
    """Loads a library for the whole process; OSError if it cannot be, or lacks `cblas_sgemm`."""
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "cblas_sgemm"):
        raise OSError(f"{path} has no cblas_sgemm")
    return Blas(_describe(library, source), path)


def _describe(library: ctypes.CDLL, source: str) -> str:
    for prefix in ("scipy_", ""):
        if hasattr(library, f"{prefix}openblas_get_config"):
            config = _call_for_text(library, f"{prefix}openblas_get_config")
            core = _call_for_text(library, f"{prefix}openblas_get_corename")
            return f"OpenBLAS {config.split()[1]} {core} ({source})"
    return source


def _call_for_text(library: ctypes.CDLL, name: str) -> str:
    function = library[name]
    function.restype = ctypes.c_char_p
    text = function()
    assert isinstance(text, bytes)
    return text.decode()
