"""The key-value part of a GGUF file, and what every refusal of one looks like."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import ModelError


@dataclass(frozen=True)
class Metadata:
    """The key-value part of a file."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` where the file does not have it."""
        return self.values.get(key, default)

    def require(self, key: str) -> Any:
        """The value of a key. Raises ModelError where the file does not have it."""
        if key not in self.values:
            raise self.refuse(f"it lacks the metadata {key!r}")
        return self.values[key]

    @property
    def architecture(self) -> str:
        """What the model is: the keys that describe it begin with this word."""
        return str(self.require("general.architecture"))

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture: `context_length` is `llama.context_length`."""
        return self.get(f"{self.architecture}.{key}", default)

    def require_own(self, key: str) -> Any:
        """The value of a key of the architecture. Raises ModelError."""
        return self.require(f"{self.architecture}.{key}")

    def refuse(self, why: str) -> ModelError:
        """An error that says why the file cannot be loaded."""
        return ModelError(f"{self.path.name} cannot be loaded: {why}")


def listed(names: list[str]) -> str:
    """The first three names in order, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
