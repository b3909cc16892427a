"""Puts what Hydra and OmegaConf say about a wrong configuration into one line."""

import difflib
import re
from collections.abc import Iterable

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from runner.composition import SCHEMA
from runner.errors import StoppedError, UsageError


def explain(error: BaseException) -> str | None:
    """What is wrong with the configuration, in one line; None if `error` is something else."""
    match error:
        case UsageError() | StoppedError():
            return str(error)
        case MissingConfigException():
            return _unknown_choice(error)
        case OverrideParseException():
            reason = str(error).removeprefix(f"Error parsing override '{error.override}'").strip()
            return f"{error.override!r} cannot be read as key=value: {reason.splitlines()[0]}"
        case InstantiationException():
            return _target_error(error)
        case ConfigCompositionException():
            return _composition_error(error)
        case OmegaConfBaseException():
            return f"{error.full_key}: {_first_line(error)}"
        case HydraException() | YAMLError():
            return _one_line(str(error))
    return None


def nearest(word: str, names: Iterable[str]) -> str:
    """A clause that offers the name closest to `word`, or nothing."""
    names = list(names)
    close = difflib.get_close_matches(word, names, n=1)
    close = close or [name for name in names if word and name.startswith(word)]
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = [option for option in error.options or () if option != SCHEMA]
    if not options:
        return _first_line(error)
    listed = ", ".join(options)
    return f"{group}={name}: no such {group}{nearest(name, options)} (choose from {listed})"


def _target_error(error: InstantiationException) -> str | None:
    """A target that does not exist, or that refused its arguments; a bug inside one is None."""
    cause = error.__cause__
    if isinstance(cause, UsageError):
        return str(cause)
    found = re.match(r"Error locating target '([^']*)'", str(error))
    reason = cause.__cause__ if cause else None
    if found is None or not _is_absence(reason, found[1]):
        return None
    where = re.search(r"full_key: (\S+)", str(error))
    key = f"{where[1]}._target_" if where else "_target_"
    return f"{key}={found[1]} cannot be imported: {reason}"


def _is_absence(reason: BaseException | None, target: str) -> bool:
    if isinstance(reason, ModuleNotFoundError):
        return f"{target}.".startswith(f"{reason.name}.")
    return isinstance(reason, AttributeError)


def _composition_error(error: ConfigCompositionException) -> str:
    message = str(error)
    cause = error.__cause__ or error.__context__
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", message):
        return f"{ambiguous[1]}: several values; add -m to run each, or write a list as [a,b]"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(message, cause)
    if isinstance(cause, OmegaConfBaseException):
        return f"{_place(message, cause)}: {_first_line(cause)}"
    return _one_line(message)


def _unknown_key(message: str, error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    parent = error.parent_node
    names = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    options = [name for name in names if name != "hydra" and not name.startswith("_")]
    listed = f" (choose from {', '.join(options)})" if options else ""
    is_open = OmegaConf.get_type(parent) is dict and "_target_" in names
    added = f"; to pass it on, write +{key}=" if is_open else ""
    name = key.rpartition(".")[2]
    return f"{_place(message, error)}: no option {key}{nearest(name, options)}{listed}{added}"


def _place(message: str, error: OmegaConfBaseException) -> str:
    """The override, or the file and key, that a message is about."""
    override = re.search(r"(?:use \+|override )([^'\s].*)$", message)
    if override:
        return override[1]
    file = re.match(r"In '([^']*)'", message)
    return f"conf/{file[1]}.yaml: {error.full_key}" if file else str(error.full_key)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())
