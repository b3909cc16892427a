"""Which commit on the hub the files of a model are."""

import json
import re
from pathlib import Path

COMMIT = re.compile("[0-9a-f]{40}")
SOURCE_FILE = ".source"
"""Beside the files of a download: where they come from. It is no part of the model's digest."""


def note_source(directory: Path, *, repository: str, commit: str) -> None:
    """Writes beside a model's files where they come from."""
    content = {"repository": repository, "commit": commit}
    (directory / SOURCE_FILE).write_text(json.dumps(content) + "\n")


def commit_of(path: Path) -> str | None:
    """The commit of a model's file or directory, in the cache of the hub's client or downloaded by
    `runner download`; None where nothing says so."""
    for before, part in zip(path.parts, path.parts[1:], strict=False):
        if before == "snapshots" and COMMIT.fullmatch(part):
            return part
    directory = path if path.is_dir() else path.parent
    try:
        return str(json.loads((directory / SOURCE_FILE).read_text())["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
