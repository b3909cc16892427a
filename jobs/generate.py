"""Completes every row of the data: one result row per completion."""

from omegaconf import DictConfig

from runner.job import RunContext


def generate(config: DictConfig) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes."""
    context = RunContext(config)
    if context.complete:
        return
    with context:
        for row, output in context.outputs():
            context.write(row, output)
