"""Prints how far the job of a directory is, whether it runs or not."""

from pathlib import Path

from omegaconf import DictConfig

from runner.status import as_json, as_lines, read_status


def status(config: DictConfig, *, json: bool = False) -> None:
    """Reads `output.dir`; `json` prints one line for programs instead of a table."""
    found = read_status(Path(config.output.dir))
    print(as_json(found) if json else "\n".join(as_lines(found)))
