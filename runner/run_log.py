"""`run.log`: when a run began and with which options, what it committed, how it ended."""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOG_FILE = "run.log"

_SECRET = re.compile(r"(?i)key|secret|password|passwd|token$|auth|credential")
_TEXTS = frozenset({"data.prompt_template", "data.system_prompt"})
"""Options that are prompts, or parts of them."""


def public_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a composed configuration, flat, as others may see them.

    Without prompts, without what its name says is a secret, and without what is not set.
    """
    return {
        key: value for key, value in _flat(config, "") if key not in _TEXTS and not is_secret(key)
    }


def is_secret(key: str) -> bool:
    """Whether an option is named like something that nobody else may see."""
    return _SECRET.search(key.rpartition(".")[2]) is not None


def _flat(node: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != [] and not name.startswith("_"):
            found.append((f"{prefix}{name}", value))
    return found


class RunLog:
    """Appends lines to `run.log` of a directory: time (UTC), level, event and its values.

    It never holds what a row asks or what it was answered. A line that cannot be written is left
    out: the results matter more.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOG_FILE

    def info(self, event: str, values: Mapping[str, Any] | None = None) -> None:
        """Adds a line about something that happened."""
        self._write("INFO", event, values or {})

    def warning(self, text: str) -> None:
        """Adds a line about something that the user should know."""
        self._write("WARNING", " ".join(text.split()), {})

    def _write(self, level: str, event: str, values: Mapping[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        shown = [f"{key}={_shown(value)}" for key, value in values.items()]
        # A full disk is for whoever writes the results to tell.
        with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(" ".join([now, level, event, *shown]) + "\n")


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return repr(text) if re.search(r"\s", text) or not text else text
