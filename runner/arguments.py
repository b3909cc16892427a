"""The command line's own rules, applied before Hydra sees it."""

import argparse
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from runner.errors import UsageError

MULTIRUN = "hydra.mode=MULTIRUN"
"""The override that makes a sweep of a command line."""

_TEXTS = ("data.prompt_template", "data.system_prompt", "reward.pattern")
"""Options whose value is free text, with braces, commas and quotes."""

_ALIASES = {"speculative.from": "speculative.previous"}
"""Options by a name that no field of a Python class can have."""


@dataclass
class Arguments:
    """A parsed command line."""

    help: bool
    version: bool
    job: str | None
    """The job as a bare word; None if there is none."""
    overrides: list[str]
    """What Hydra is to override, the job included."""
    flags: list[str]
    """Flags that go to Hydra as they are."""
    place: str | None = None
    """What a job works on that takes it as a bare word; None for a job that takes none."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see runner --help")


def _parser() -> _Parser:
    parser = _Parser(prog="runner", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--config-dir")
    for flag in ("--resolve", "--hydra-help", "--info", "--shell-completion"):
        parser.add_argument(flag, action="store_true")
    return parser


def parse_arguments(
    argv: list[str],
    groups: Mapping[str, Collection[str]],
    positional: Mapping[str, str] = MappingProxyType({}),
) -> Arguments:
    """Reads a command line, flags and words in any order.

    `groups` has the choices of each group, `positional` the option of each job that is given as a
    bare word after the job. Raises UsageError on an unknown flag.
    """
    parsed = _parser().parse_intermixed_args(argv)
    bare = [word for word in parsed.words if "=" not in word and word[:1] != "~"]
    job = next(iter(bare), None)
    words = [f"job={job}" if word is job else _spelled(word) for word in parsed.words]
    place = None
    if option := positional.get(job or ""):
        places = [word for word in parsed.words if word in bare[1:] or _is_path(word)]
        words = [f"{option}={word}" if word in places[:1] else word for word in words]
        place = _value(option, words)
    if parsed.multirun:
        words.append(MULTIRUN)
    texts = {*_TEXTS, option} if option else set(_TEXTS)
    quoted = [_quoted(word, groups, texts) for word in words]
    return Arguments(
        help=parsed.help,
        version=parsed.version,
        job=job,
        overrides=_with_custom_choices(quoted, groups["reward"]),
        flags=_hydra_flags(parsed),
        place=place,
    )


def _is_path(word: str) -> bool:
    """Whether a word with a `=` is a path all the same, as those of the points of a sweep."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" in key and not key.startswith(("hydra/", "+", "~"))


def _spelled(word: str) -> str:
    """A word with its option as the configuration names it."""
    key, equals, value = word.partition("=")
    return _ALIASES.get(key, key) + equals + value


def _value(option: str, words: list[str]) -> str:
    """The value that an option has in the end, empty where it has none."""
    given = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return given[-1] if given else ""


def _quoted(word: str, groups: Collection[str], texts: Collection[str]) -> str:
    """Makes a string of what Hydra would read as something else.

    `reward=null` and `sampling=5` name choices; `data.prompt_template={{ question }}, please` is a
    text, unless it comes in quotes of its own, as the texts of a sweep do. `texts` are the options
    of the latter kind.
    """
    key, _, value = word.partition("=")
    if key in texts and value[:1] not in ("'", '"') and value != "null":
        return f"{key}={quoted_text(value)}"
    is_name = key not in groups or not re.fullmatch(r"(?i)null|true|false|[\d.+-]+", value)
    return word if is_name else f"{key}='{value}'"


def quoted_text(text: str) -> str:
    """A text as Hydra's grammar has it, whatever characters it holds."""
    # In Hydra's quotes a backslash is itself, but before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), text)
    return f"'{escaped}'"


def _with_custom_choices(words: list[str], rewards: Collection[str]) -> list[str]:
    """Spells out what a path of one's own or a function as the reward implies.

    rewards: the names that `reward=` chooses; another one with a dot is a function.
    """
    implied = [
        f"{group}=custom"
        for group in ("data", "model")
        if any(word.startswith(f"{group}.path=") for word in words)
        and not any(word.startswith(f"{group}=") for word in words)
    ]
    for word in words:
        key, _, value = word.partition("=")
        is_function = key == "reward" and "." in value and value not in rewards
        implied += ["reward=custom", f"reward._target_={value}"] if is_function else [word]
    return implied


def _hydra_flags(parsed: argparse.Namespace) -> list[str]:
    """The flags Hydra handles, spelled the one way that may follow the words."""
    flags = [
        f"--{name}={value}"
        for name in ("cfg", "package", "config-dir")
        if (value := getattr(parsed, name.replace("-", "_"))) is not None
    ]
    switches = ("resolve", "hydra-help", "info", "shell-completion")
    return flags + [f"--{name}" for name in switches if getattr(parsed, name.replace("-", "_"))]
