"""A sweep as the command line sees it: names for its points, and what becomes of each."""

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from runner.config_errors import explain
from runner.errors import StoppedError

_REPORT = "runner.sweeps.sweep.Sweep"
"""By name, because it imports what only a run needs."""
_NAME_RESOLVER = "point_name"
_LONGEST_VALUE, _LONGEST_NAME = 48, 160


@dataclass(frozen=True, kw_only=True)
class NamedPoint:
    """One combination of values."""

    name: str
    """Its directory in that of the sweep."""
    options: dict[str, Any]
    """Every key that the command line overrides, with the value that it has here."""


class Multirun:
    """Runs the points of a sweep one after the other, with one owner of the model they share.

    A point with a mistake is said and left out, and the others go on; the sweep leaves with the
    exit code of the worst in the end. A bug is raised then, and an interrupt ends the sweep.
    """

    def __init__(self, words: Sequence[str], run_job: Callable[..., None]) -> None:
        """Takes the overrides of the command line, and what runs a composed configuration."""
        self._words = [word for word in words if not word.startswith("hydra")]
        self._run_job = run_job
        self._points: dict[tuple[str, ...], NamedPoint] = {}
        self._sweep: Any = None
        self._exit_codes: set[int] = set()

    def run(self, run_hydra: Callable[[Callable[[DictConfig], None]], None]) -> None:
        """Has Hydra compose and run every point, then shows what they say together."""
        OmegaConf.register_new_resolver(
            _NAME_RESOLVER, lambda overrides: self._point(overrides).name, replace=True
        )
        try:
            run_hydra(self._run_point)
        except Exception:
            self._finish()
            raise
        self._finish()
        if self._exit_codes:
            sys.exit(max(self._exit_codes))

    def _finish(self) -> None:
        if self._sweep is not None:
            self._sweep.finish()

    def _run_point(self, config: DictConfig) -> None:
        hydra = HydraConfig.get()
        point = self._point(hydra.overrides.task)
        if self._sweep is None:
            every = [(it.name, it.options) for it in self._points.values()]
            self._sweep = get_class(_REPORT)(Path(hydra.sweep.dir), every)
        self._sweep.begin(point.name, Path(hydra.runtime.output_dir))
        state, message = "interrupted", None
        try:
            self._run_job(config, load_model=self._sweep.load_model)
            state = "finished"
        except Exception as error:
            state, message = "stopped", explain(error)
            if message is None:
                message = f"{type(error).__name__}: {error}"
                # Hydra keeps the error till the end, and with it everything that was loaded.
                traceback.clear_frames(error.__traceback__)
                raise
            state = self._failed(point, error, message)
        finally:
            self._sweep.end(point.name, state, message)

    def _failed(self, point: NamedPoint, error: Exception, message: str) -> str:
        """Says which point it was; the state that it is in."""
        is_stopped = isinstance(error, StoppedError)
        self._exit_codes.add(1 if is_stopped else 2)
        print(f"error: point {point.name}: {message}", file=sys.stderr)
        return "stopped" if is_stopped else "failed"

    def _point(self, overrides: Iterable[str]) -> NamedPoint:
        if not self._points:
            self._points = dict(self._listed())
        key = tuple(word for word in overrides if not word.startswith("hydra"))
        return self._points[key]

    def _listed(self) -> Iterator[tuple[tuple[str, ...], NamedPoint]]:
        """Every point by its overrides, in the order in which Hydra runs them."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(self._words)
        swept = {it.key_or_group for it in parsed if it.is_sweep_override()}
        for words in BasicSweeper.split_arguments(parsed, None)[0]:
            overrides = parser.parse_overrides(words)
            options = {it.key_or_group: it.value() for it in overrides}
            yield tuple(words), NamedPoint(name=_name(overrides, swept), options=options)


def _name(overrides: Sequence[Override], swept: set[str]) -> str:
    """A name for a directory, of what is swept alone: more values later change no other's name.

    The only point of a sweep has nothing to tell it from others: it is 0.
    """
    short = [key.rpartition(".")[2] for key in swept]
    parts = []
    for override in overrides:
        key = override.key_or_group
        if key in swept:
            last = key.rpartition(".")[2]
            shown = last if short.count(last) == 1 else key
            parts.append(f"{_plain(shown)}={_plain(override.get_value_element_as_str())}")
    return _shortened(",".join(parts), _LONGEST_NAME) or "0"


def _plain(value: str) -> str:
    """A value as part of a file's name; a digest keeps apart what else would look the same."""
    last = value.rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^\w.+-]+", "-", last)[:_LONGEST_VALUE]
    return plain if plain == value else f"{plain.strip('-')}-{_digest(value)}"


def _shortened(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[:longest]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
