"""What `--help` prints; every description is read from where the thing itself is defined."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from runner import __version__, config
from runner.composition import USES, choices
from runner.overrides import heeds

WIDTH = 80

_PROGRAM = """\
runner {version}: offline batch inference and RL rollouts on MLX.

Usage: runner JOB [GROUP=CHOICE ...] [KEY=VALUE ...]

Examples:
  runner generate data.path=prompts.parquet data.prompt_column=question
  runner rollout model.path=mlx-community/SmolLM2-360M-Instruct sampling.n=16
  runner rollout reward=my_rewards.correct        a function in ./my_rewards.py
  runner rollout sampling.temperature=0.7,1 -m    one run for each value

Jobs:
{jobs}

Groups, each GROUP=CHOICE; a file ./conf/GROUP/NAME.yaml adds a choice:
{groups}

Flags:
  JOB --help       the job's options, with their values
  JOB --cfg job    the whole configuration; nothing runs
  -m, --multirun   runs every combination of comma-separated values
  --version        the version"""


def program_help() -> str:
    """The text of `runner --help`."""
    groups = choices()
    jobs = groups.pop("job")
    width = max(map(len, [*groups, *jobs])) + 2
    return _PROGRAM.format(
        version=__version__,
        jobs="\n".join(_entry(name, description(path), width) for name, path in jobs.items()),
        groups="\n".join(_entry(group, ", ".join(names), width) for group, names in groups.items()),
    )


def job_help(job: str, overrides: list[str]) -> str:
    """The text of `runner JOB --help`: every option with its value for this command line."""
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        composed = hydra.compose("config", overrides, return_hydra_config=True)
    chosen = composed.hydra.runtime.choices
    files = choices()
    uses = composed.job.get(USES)
    parts = [textwrap.fill(f"runner {job}: {description(files['job'][chosen.job])}", WIDTH)]
    for group in ("job", *(name for name in files if name != "job")):
        lines = _options(group, composed[group], files[group][chosen[group]], uses)
        if lines or heeds(uses, group):
            parts.append("\n".join([f"{group}={chosen[group]}", *lines]))
    return "\n\n".join(parts)


def description(path: Path) -> str:
    """The first comment line of a configuration file."""
    found = re.search(r"^# (?!@)(.*)$", path.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _options(
    group: str, node: DictConfig | None, path: Path, uses: Collection[str] | None
) -> list[str]:
    if node is None:
        return []
    documented = _field_docs(OmegaConf.get_type(node)) or _key_comments(path)
    lines: list[str] = []
    for key, value in OmegaConf.to_container(node).items():  # type: ignore[union-attr]
        if not str(key).startswith("_") and heeds(uses, f"{group}.{key!s}"):
            lines.append(_shortened(f"  {group}.{key!s}={json.dumps(value, ensure_ascii=False)}"))
            lines += _wrapped(documented.get(str(key), ""))
    return lines


def _field_docs(schema: Any) -> dict[str, str]:
    """The string under each field of a dataclass of `runner.config`."""
    name = getattr(schema, "__name__", "")
    classes = [
        node
        for node in ast.parse(inspect.getsource(config)).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return {
        field.target.id: ast.literal_eval(text.value)
        for node in classes
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    }


def _key_comments(path: Path) -> dict[str, str]:
    """The comment above each key of a configuration file, of one line or several."""
    found = re.findall(r"((?:^ *# .*\n)+) *(\w+):", path.read_text(), re.MULTILINE)
    return {key: re.sub(r"(?m)^ *# ", "", comment) for comment, key in found}


def _entry(name: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{name:{width}}{text}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * (width + 2),
    )


def _wrapped(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=indent
    )


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
