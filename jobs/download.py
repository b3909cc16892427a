"""Fetches a model from the Hugging Face hub, and compares it with what the hub says it is."""

from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from runner.errors import OutputError, ParameterError
from runner.fresh_directory import fresh_directory
from runner.models.provenance import note_source
from runner.models.reference import HubReference, parse_reference
from runner.models.snapshots import clear_traces
from runner.models.snapshots import download as fetch


def download(config: DictConfig, *, cache: bool = False) -> None:
    """Fetches `config.model` to organisation/name in `output.dir`, or into the client's cache.

    An interrupted download goes on with the files that are missing. Raises UsageError.
    """
    if not isinstance(cache, bool):
        raise ParameterError(f"job.cache={cache} is not allowed: true or false")
    model, place = config.model, Path(config.output.dir)
    for name, value, default in (
        ("dtype", model.dtype, "auto"),
        ("max_model_len", model.max_model_len, None),
    ):
        if value != default:
            raise ParameterError(
                f"model.{name}={value} is not allowed: a model is fetched as it is"
            )
    if model.path.startswith("pkg://") or Path(model.path).expanduser().exists():
        raise ParameterError(f"model.path={model.path} is here already: give a Hugging Face id")
    reference = parse_reference(model.path, revision=model.revision)
    if cache:
        found, commit = fetch(reference, None, trust_remote_code=model.trust_remote_code)
        with suppress(OSError):  # Hydra makes it for every job.
            place.rmdir()
    elif reference.file is not None:
        found, commit = _fetch_files(reference, place / reference.repository)
    else:
        found = place / reference.repository
        with fresh_directory(found, resumes=True) as directory:
            _, commit = fetch(reference, directory, trust_remote_code=model.trust_remote_code)
            clear_traces(directory)
            note_source(directory, repository=reference.repository, commit=commit)
    print(f"Downloaded {reference} (commit {commit[:12]}) to {found}.")


def _fetch_files(reference: HubReference, directory: Path) -> tuple[Path, str]:
    """GGUF files, each a model of its own, may share a directory; each comes there when whole."""
    for name in reference.files:
        if (directory / name).exists():
            raise OutputError(f"{directory / name} is there already: remove it")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return fetch(reference, directory)
    finally:
        clear_traces(directory)
        with suppress(OSError):  # Where it holds something it stays.
            directory.rmdir()
            directory.parent.rmdir()
