"""Completes every row of the data: one result row per completion."""

from omegaconf import DictConfig

from runner.certificate import Certificate
from runner.job import RunContext
from runner.models.load import Loader


def generate(
    config: DictConfig,
    *,
    retry_errors: bool = False,
    certify: int = 64,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    `retry_errors` does the rows with an error again; `certify` result rows are scored again at the
    end; `load_model` is the sweep's, if it is in one.
    """
    certificate = Certificate(certify)
    context = RunContext(config, retry_errors=retry_errors, load_model=load_model)
    if context.complete:
        return
    with context:
        for row, output in context.outputs():
            context.write(row, output)
        context.certify(certificate)
