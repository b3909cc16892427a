"""Options of `runner serve` as environment variables: RUNNER_SERVER_PORT for server.port.

The command line wins over the environment, which wins over the configuration files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import config
from runner.arguments import quoted_text
from runner.composition import USES
from runner.config_errors import nearest
from runner.errors import ParameterError
from runner.overrides import heeds

PREFIX = "RUNNER_"
JOB = "serve"
"""The job that looks at the environment."""

_SCHEMAS: Mapping[str, type] = {
    "server": config.ServerConfig,
    "model": config.ModelConfig,
    "engine": config.EngineConfig,
    "sampling": config.SamplingConfig,
    "lora": config.LoraConfig,
    "speculative": config.SpeculativeConfig,
}
_NO_OPTIONS = ("RUNNER_API_KEYS", "RUNNER_BLAS")
"""Variables of this program that stand for no option."""
_FOREIGN = re.compile(
    "RUNNER_(ARCH|DEBUG|ENVIRONMENT|NAME|OS|PERFLOG|TEMP|TEMP_PROJECT_DIR|TOOL_CACHE|TRACKING_ID"
    "|USER|WORKSPACE)"
)
"""Variables that GitHub's and GitLab's own runners set for whatever they start."""
_TELLING = 6
"""Characters of a value that stands in a message by no accident."""


@dataclass(frozen=True)
class Variable:
    """An option that the environment gives."""

    name: str
    option: str
    """As the command line spells it."""
    override: str
    """The option with its value, in Hydra's grammar."""
    value: str

    def is_told_of(self, message: str) -> bool:
        """Whether a message is about this option, or about a value that can only be its own."""
        is_named = re.search(rf"\b{re.escape(self.option.partition('.')[2])}=", message)
        return bool(is_named) or (len(self.value) >= _TELLING and self.value in message)


def read_environment(environment: Mapping[str, str], job_file: Path) -> list[Variable]:
    """The options that some environment variables give.

    `job_file` is the configuration of the job, which says what it heeds. Raises ParameterError for
    a variable that is none of them, or whose value its option cannot have.
    """
    uses = OmegaConf.load(job_file).job[USES]
    options = {
        f"{PREFIX}{group}_{field.name}".upper(): (group, field.name, field.type)
        for group, schema in _SCHEMAS.items()
        for field in fields(schema)
        if heeds(uses, group) and heeds(uses, f"{group}.{field.name}")
    }
    found = []
    for name in sorted(environment):
        if name in options:
            found.append(_variable(name, environment[name], *options[name]))
        elif name.startswith(PREFIX) and name not in _NO_OPTIONS and not _FOREIGN.fullmatch(name):
            hint = nearest(name, [*options, *_NO_OPTIONS])
            raise ParameterError(f"{name}: {JOB} has no option of this name{hint}")
    return found


def beneath(
    variables: Iterable[Variable],
    overrides: Sequence[str],
    groups: Mapping[str, Mapping[str, Path]],
) -> list[str]:
    """The overrides of a command line behind those of the environment, so that they win.

    A choice on the command line, such as `sampling=greedy`, wins in what its file says. `groups`
    has the file of each choice.
    """
    chosen = dict(word.split("=", 1) for word in overrides if word.partition("=")[0] in groups)
    said = {
        option
        for group, choice in chosen.items()
        if group in _SCHEMAS and choice in groups[group]
        for option in _said(group, groups[group][choice])
    }
    kept = [variable for variable in variables if variable.option not in said]
    options = {variable.option for variable in kept}
    own_model = ["model=custom"] if "model.path" in options and "model" not in chosen else []
    return [*own_model, *(variable.override for variable in kept), *overrides]


def blaming(message: str, variables: Iterable[Variable], overrides: Iterable[str]) -> str:
    """What is wrong with a configuration, with the variables that gave what is wrong.

    `overrides` are those of the command line, which win over a variable.
    """
    given = {word.partition("=")[0] for word in overrides}
    names = [it.name for it in variables if it.option not in given and it.is_told_of(message)]
    return f"{', '.join(names)}: {message}" if names else message


def _said(group: str, choice: Path) -> list[str]:
    """The options that the file of a choice gives."""
    content = OmegaConf.to_container(OmegaConf.load(choice))
    assert isinstance(content, dict), "a choice is a mapping"
    return [f"{group}.{key!s}" for key, value in content.items() if value != config.MISSING]


def _variable(name: str, value: str, group: str, option: str, kind: Any) -> Variable:
    if not value:
        raise ParameterError(f"{name} is empty: unset it, or give {group}.{option} a value")
    is_text = kind in (str, str | None) and value != "null"
    override = f"{group}.{option}={quoted_text(value) if is_text else value}"
    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.is_sweep_override():
            raise ParameterError(f"{name}={value}: several values; write a list as [a,b]")
        OmegaConf.update(OmegaConf.structured(_SCHEMAS[group]), option, parsed.value())
    except (HydraException, OmegaConfBaseException) as error:
        why = str(error).strip().splitlines()[0]
        raise ParameterError(f"{name}={value} is not allowed: {why}") from error
    return Variable(name, f"{group}.{option}", override, value)
