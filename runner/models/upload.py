"""Puts a model's directory on the Hugging Face hub; only ever when asked."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from runner.errors import ModelError, ParameterError
from runner.models.snapshots import advice

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_upload(repository: Any) -> None:
    """Raises ParameterError for what cannot become a repository, before the work is done."""
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise ParameterError(f"job.upload_to={repository} is not allowed: organisation/name")
    if constants.HF_HUB_OFFLINE:
        raise ParameterError(f"job.upload_to={repository} is not allowed: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise ParameterError(
            f"job.upload_to={repository} needs a token: run `hf auth login`, or set HF_TOKEN"
        )


def upload(directory: Path, repository: str, *, private: bool) -> str:
    """Makes the repository where it is not there and commits the directory; returns its address.

    Raises ModelError; the directory stays as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        commit = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload a converted model"
        )
    except Exception as error:  # its transport, which changes with its version, has its own errors
        raise ModelError(
            f"{directory} is whole, but job.upload_to={repository} failed: {advice(error)}; "
            f"`hf upload {repository} {directory}` tries again"
        ) from error
    return str(commit.repo_url)
