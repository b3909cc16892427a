"""Completes every row of the data: one result row per completion."""

from omegaconf import DictConfig

from runner.certificate import Certificate
from runner.job import RunContext


def generate(config: DictConfig, *, retry_errors: bool = False, certify: int = 64) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    `retry_errors` does the rows with an error again; `certify` result rows are scored again at the
    end.
    """
    certificate = Certificate(certify)
    context = RunContext(config, retry_errors=retry_errors)
    if context.complete:
        return
    with context:
        for row, output in context.outputs():
            context.write(row, output)
        context.certify(certificate)
