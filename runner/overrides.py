"""What was said on the command line, for jobs to refuse what they would not heed."""

from collections.abc import Collection

from hydra.core.hydra_config import HydraConfig

from runner.errors import ParameterError

_ALWAYS = ("job", "hydra", "data=custom")
"""The last one is what the command line makes of a `data.path`."""


def refuse_others(job: str, allowed: Collection[str]) -> None:
    """Raises `ParameterError` for an option on the command line that a job takes no notice of.

    `allowed` has the groups and options that it does; `job` itself may always be set.
    """
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        names = {override, key, key.partition(".")[0]}
        if not names & {*allowed, *_ALWAYS}:
            listed = ", ".join(allowed)
            raise ParameterError(f"{key} means nothing to {job}; it takes {listed} and job")
