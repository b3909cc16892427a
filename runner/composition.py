"""Where configurations come from: this package's `conf`, `./conf` of the working directory, and the
typed schemas."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from runner.config import Config, DataConfig, OutputConfig

SCHEMA = "_schema_"
POSITIONAL = "_positional_"
"""The key of a job's configuration that names the option which a bare word after the job gives, as
in `runner status DIR`."""
USES = "_uses_"
"""The key of a job's configuration that lists the groups and options it heeds, and with a minus
those of a group that it does not; a job without it heeds all."""


class WorkingDirectory(SearchPathPlugin):
    """Adds `./conf`, so that a user's own choices stand beside those of this package."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the directory: a name that this package has already keeps its meaning."""
        for directory in conf_directories()[1:]:
            search_path.append("working-directory", directory.as_uri())


class SweepDirectory(Callback):
    """Lets the directory of a sweep name its job; Hydra resolves it before `${hydra:...}` works."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Gives the resolver the configuration that the sweep starts from."""
        HydraConfig.instance().set_config(config)


def register() -> None:
    """Tells Hydra about the schemas and the working directory; a second call changes nothing."""
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=Config)
    store.store(group="data", name=SCHEMA, node=DataConfig)
    store.store(group="output", name=SCHEMA, node=OutputConfig)
    Plugins.instance().register(WorkingDirectory)


def unknown_keys(config: DictConfig) -> list[str]:
    """Options outside a schema; Hydra lets `+sampling.foo=1` past it."""
    return [
        f"{group!s}.{key}"
        for group, node in config.items()
        if is_dataclass(schema := OmegaConf.get_type(node))
        for key in sorted(set(node) - {field.name for field in fields(schema)})
    ]


def conf_directories() -> list[Path]:
    """This package's `conf`, then the working directory's if it has another one."""
    spec = find_spec("runner.conf")
    assert spec is not None and spec.origin is not None
    own, users = Path(spec.origin).parent, Path.cwd() / "conf"
    return [own, users] if users.is_dir() and not users.samefile(own) else [own]


def choices() -> dict[str, dict[str, Path]]:
    """Every group with its choices and the file behind each."""
    found: dict[str, dict[str, Path]] = {}
    for directory in reversed(conf_directories()):
        for path in sorted(directory.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {})[path.stem] = path
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def positionals(jobs: Mapping[str, Path]) -> dict[str, str]:
    """The option that a bare word after the job gives, for the jobs that say so in their file."""
    found = {
        job: re.search(rf"^ *{POSITIONAL}: *(\S+)$", path.read_text(), re.MULTILINE)
        for job, path in jobs.items()
    }
    return {job: match[1] for job, match in found.items() if match}
