"""The options of the group `lora`: which adapters a job loads, and which of them a row uses."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import AdapterError, ParameterError
from runner.models.digest import model_digest

_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Adapters by name, and how a row chooses.

    Raises ParameterError for options that do not go together, and AdapterError for a directory
    that is none of an adapter.
    """

    path: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    column: str | None = None
    sweep: bool = False
    watch: str | None = None
    swap: str = "keep"
    max_adapters: int = 8

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LoraOptions":
        """Takes the plain options of the group."""
        given = dict(config)
        adapters = given.pop("adapters") or {}
        if not isinstance(adapters, Mapping):
            raise ParameterError(f"lora.adapters={adapters!r} is not allowed: {{name: directory}}")
        paths = {str(name): str(path) for name, path in adapters.items()}
        return cls(adapters=paths, **given)

    def __post_init__(self) -> None:
        if self.path is not None and self.adapters:
            raise ParameterError("lora.path and lora.adapters: give one of them")
        if self.column is not None and self.sweep:
            raise ParameterError("lora.column and lora.sweep=true: give one of them")
        for option, given in (("column", self.column), ("sweep", self.sweep)):
            if given and not self.adapters:
                raise ParameterError(f"lora.{option}={given} is not allowed without lora.adapters")
        self._check_watch()
        for path in self.paths.values():
            if not (Path(path).expanduser() / _CONFIG_FILE).is_file():
                raise AdapterError(f"{path!r} is not an adapter: it has no {_CONFIG_FILE}")

    def _check_watch(self) -> None:
        if self.swap not in ("keep", "update"):
            raise ParameterError(f"lora.swap={self.swap!r} is not allowed: keep or update")
        if self.swap != "keep" and self.watch is None:
            raise ParameterError(f"lora.swap={self.swap} is not allowed without lora.watch")
        if self.watch is not None and (self.path is not None or self.adapters):
            raise ParameterError("lora.watch is not allowed beside lora.path and lora.adapters")

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises ParameterError where rows have no way to choose among the adapters."""
        if self.adapters and self.column is None and not self.sweep:
            what = "lora.column=NAME says which row uses which, lora.sweep=true takes each for all"
            raise ParameterError(f"lora.adapters is not allowed alone: {what}")
        if self.column is not None and self.column not in columns:
            there = ", ".join(columns)
            raise ParameterError(f"lora.column={self.column} is not a column; there are {there}")

    @property
    def paths(self) -> dict[str, str]:
        """The directory of each adapter, by its name."""
        if self.path is not None:
            return {Path(self.path).expanduser().resolve().name: self.path}
        return dict(self.adapters)

    @property
    def default(self) -> str | None:
        """The adapter of rows that do not choose."""
        if self.watch is not None:
            return Path(self.watch).expanduser().resolve().name
        return next(iter(self.paths)) if self.path is not None else None

    @property
    def is_mixed(self) -> bool:
        """Whether results are of several adapters."""
        return self.column is not None or self.sweep

    def of_row(self, row: Mapping[str, Any]) -> list[str | None]:
        """The adapters that a row is run with, by name; None for the model as it is."""
        if self.sweep:
            return [None, *self.adapters]
        if self.column is None:
            return [self.default]
        value = row[self.column]
        return [None if value is None else str(value)]

    def identity(self) -> dict[str, Any]:
        """What of it decides results: contents, not where they lie."""
        options: dict[str, Any] = {
            f"lora.adapters.{name}": model_digest(Path(path).expanduser())
            for name, path in self.paths.items()
        }
        if self.watch is not None:
            options["lora.watch"] = self.default
        if self.column is not None:
            options["lora.column"] = self.column
        if self.sweep:
            options["lora.sweep"] = True
        return options
