"""Models from the Hugging Face hub: into its client's cache, or into a directory, and checked."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoFile

from runner.errors import ModelError
from runner.models.hub import one_line
from runner.models.provenance import COMMIT, commit_of
from runner.models.reference import HubReference
from runner.models.safetensors_files import truncated_files

_NEEDED_FILES = (
    "model*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)
_CODE = "*.py"
_DEEPER = "*/*"
"""Other forms of the same weights lie in folders."""
_TIMEOUT_SECONDS = 10.0
_CHUNK = 2**20


def cached_snapshot(reference: HubReference, *, trust_remote_code: bool = False) -> Path:
    """Returns the directory or GGUF file in the cache of the hub's client, fetched if it is not
    there; safetensors that are cut short are fetched once more.

    `HF_HOME` says where the cache is, and a token comes from `HF_TOKEN` or `hf auth login`. Raises
    ModelError.
    """
    fetch = functools.partial(_fetch, reference, trust_remote_code)
    directory: Path | None = None
    if _is_commit(reference):
        # A commit never changes, and without a network the client takes long to give up on one.
        with suppress(errors.LocalEntryNotFoundError):
            directory = fetch(local_files_only=True)
    if directory is None:
        directory = _told(reference, fetch)
    commit = commit_of(directory)
    for name in truncated_files(directory):
        again = functools.partial(_fetch_again, reference, name, revision=commit)
        _told(reference, again)
    return _found(directory, reference)


def download(
    reference: HubReference, directory: Path | None, *, trust_remote_code: bool = False
) -> tuple[Path, str]:
    """Fetches a model into a directory, or without one into the cache; returns it and the commit.

    Every file is compared with the hub's size and digest, and fetched once more where it differs.
    What is there already and whole stays. Raises ModelError.
    """
    fetch = functools.partial(_checked_download, reference, directory, trust_remote_code)
    found, commit = _told(reference, fetch, tries=2)
    return found, commit


def clear_traces(directory: Path) -> None:
    """Removes what the hub's client notes beside the files that it fetches into a directory."""
    shutil.rmtree(directory / ".cache" / "huggingface", ignore_errors=True)
    with suppress(OSError):  # Somebody else's may be there.
        (directory / ".cache").rmdir()


def advice(error: Exception, revision: str | None = None) -> str:
    """What an error of the hub's client means, and what to do, in a line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; check the id, or run `hf auth login` if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if status in (401, 403):
        return f"the hub refuses the token ({status}); run `hf auth login` or check HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache lacks it, or parts of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub cannot be reached and the cache lacks it; give a local directory"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and this asks the hub"
    return one_line(error)


def _told(reference: HubReference, fetch: Callable[[], Any], *, tries: int = 1) -> Any:
    """What `fetch` returns; raises ModelError with what its error means.

    A connection that gave less than was promised is tried again, if there is a try left.
    """
    try:
        return fetch()
    except ModelError:
        raise
    except Exception as error:  # its transport, which changes with its version, has its own errors
        if tries > 1 and "Consistency check failed" in str(error):
            return _told(reference, fetch, tries=tries - 1)
        reason = advice(error, reference.revision)
        name = reference.repository
        raise ModelError(f"model {name!r} cannot be downloaded: {reason}") from error


def _is_commit(reference: HubReference) -> bool:
    return reference.revision is not None and bool(COMMIT.fullmatch(reference.revision))


def _patterns(reference: HubReference, trust_remote_code: bool) -> dict[str, Any]:
    if reference.file is not None:
        return {"allow_patterns": reference.files}
    code = [_CODE] if trust_remote_code else []
    return {"allow_patterns": [*_NEEDED_FILES, *code], "ignore_patterns": [_DEEPER]}


def _is_wanted(
    path: str, *, allow_patterns: list[str], ignore_patterns: Sequence[str] = ()
) -> bool:
    """What the hub's client makes of the patterns."""
    is_allowed = any(fnmatchcase(path, pattern) for pattern in allow_patterns)
    return is_allowed and not any(fnmatchcase(path, pattern) for pattern in ignore_patterns)


def _fetch(reference: HubReference, trust_remote_code: bool, **options: Any) -> Path:
    fetch: Any = snapshot_download  # Typed by what comes back from each of its modes.
    given = {"revision": reference.revision, "etag_timeout": _TIMEOUT_SECONDS} | options
    patterns = _patterns(reference, trust_remote_code)
    return Path(fetch(reference.repository, **given, **patterns))


def _fetch_again(reference: HubReference, name: str, **options: Any) -> None:
    hf_hub_download(reference.repository, name, force_download=True, **options)


def _found(directory: Path, reference: HubReference) -> Path:
    if missing := [name for name in reference.files if not (directory / name).is_file()]:
        raise ModelError(f"model {reference.repository!r} has no file {missing[0]!r}")
    return directory if reference.file is None else directory / reference.file


def _checked_download(
    reference: HubReference, directory: Path | None, trust_remote_code: bool
) -> tuple[Path, str]:
    api = HfApi()
    info = api.repo_info(
        reference.repository, revision=reference.revision, timeout=_TIMEOUT_SECONDS
    )
    commit = str(info.sha)
    options = {} if directory is None else {"local_dir": directory}
    found = _fetch(reference, trust_remote_code, revision=commit, **options)
    _found(found, reference)
    listed = api.list_repo_tree(reference.repository, recursive=True, revision=commit)
    patterns = _patterns(reference, trust_remote_code)
    files = [it for it in listed if isinstance(it, RepoFile) and _is_wanted(it.path, **patterns)]
    if directory is not None and reference.file is None:
        _remove_others(directory, {it.path for it in files})
    for name in damaged_files(found, files):
        _fetch_again(reference, name, revision=commit, **options)
    if bad := damaged_files(found, files):
        for name in bad:
            (found / name).unlink(missing_ok=True)
        raise ModelError(
            f"model {reference.repository!r}: {bad[0]} is not what the hub says it is, twice"
        )
    return _found(found, reference), commit


def _remove_others(directory: Path, names: Collection[str]) -> None:
    """Removes what an interrupted download of another revision left."""
    for path in directory.iterdir():
        if path.is_file() and path.name not in names and not path.name.startswith("."):
            path.unlink()


def damaged_files(directory: Path, listed: Iterable[Any]) -> list[str]:
    """Those of the hub's listing (`huggingface_hub.RepoFile`) of which size or digest differ."""
    return [it.path for it in listed if not _is_whole(directory / it.path, it)]


def _is_whole(file: Path, listed: Any) -> bool:
    """Large files are known by their SHA-256, others by git's own digest."""
    size = file.stat().st_size if file.is_file() else None
    if size is None or size != listed.size:
        return False
    is_large = listed.lfs is not None
    content = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % size)
    with open(file, "rb") as source:
        while chunk := source.read(_CHUNK):
            content.update(chunk)
    digest: str = listed.lfs.sha256 if is_large else listed.blob_id
    return content.hexdigest() == digest
