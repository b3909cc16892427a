"""Runs a job in this process, as the command line would; for tests with many small runs."""

from pathlib import Path
from typing import Any

import hydra
import polars as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from runner import composition


def run_job(job: str, place: Path, *overrides: str, out: str = "out") -> pl.DataFrame:
    """Runs `job` on the model `place/tiny`; returns its result rows."""
    composition.register()
    options = [f"job={job}", f"model.path={place / 'tiny'}", f"output.dir={place / out}"]
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        config = hydra.compose("config", [*options, "model=custom", *overrides])
    run_config(config)
    return rows_of(place / out)


def run_config(config: DictConfig) -> None:
    """Runs the job of a composed configuration."""
    with open_dict(config.job):
        config.job.pop(composition.USES, None)
    instantiate(config.job)(config)


def rows_of(directory: Path) -> pl.DataFrame:
    """The result rows of a directory."""
    return pl.scan_ipc(directory / "part-*.arrow").collect()


def by_text(rows: pl.DataFrame, column: str = "text") -> dict[str, dict[str, Any]]:
    """Result rows by a column of the input's."""
    return {row[column]: row for row in rows.to_dicts()}
