"""What was said on the command line, to refuse what a job would not heed."""

from collections.abc import Collection, Iterable

from runner.errors import ParameterError

_ALWAYS = ("job", "hydra", "data=custom")
"""The last one is what the command line makes of a `data.path`."""


def heeds(uses: Collection[str] | None, name: str) -> bool:
    """Whether a job heeds a group or an option; `uses` is the list in its configuration."""
    group, _, rest = name.partition(".")
    if uses is None or group == "job":
        return True
    option = f"{group}.{rest.partition('.')[0]}"
    return f"-{option}" not in uses and bool({name, option, group} & {*uses})


def refuse_others(job: str, uses: Collection[str], overrides: Iterable[str]) -> None:
    """Raises `ParameterError` for an override that a job takes no notice of."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if not {override, key.partition(".")[0]} & {*_ALWAYS} and not heeds(uses, key):
            listed = ", ".join(name for name in uses if not name.startswith("-"))
            raise ParameterError(f"{key} means nothing to {job}; it takes {listed} and job")
