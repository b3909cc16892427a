"""Completes every row of the data: one result row per completion."""

from omegaconf import DictConfig

from runner.job import RunContext


def generate(config: DictConfig, *, retry_errors: bool = False) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    `retry_errors` does the rows with an error again.
    """
    context = RunContext(config, retry_errors=retry_errors)
    if context.complete:
        return
    with context:
        for row, output in context.outputs():
            context.write(row, output)
