"""Writes the results of a directory in the order of the input, to `merged` in that directory."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from runner.data.manifest import MANIFEST_FILE
from runner.data.merge import MergeFormat
from runner.data.merge import merge as merge_results
from runner.errors import OutputError
from runner.job import CONFIG_FILE, print_merged
from runner.rows import RowNamer
from runner.types import SamplingParams


def merge(config: DictConfig) -> None:
    """Merges `output.dir` as `output.merge_format` and `output.merge_rows` say.

    The data and the sampling parameters, which name the rows, are those of the directory's own
    `config.yaml`.
    """
    directory = Path(config.output.dir)
    own = directory / CONFIG_FILE
    if not (directory / MANIFEST_FILE).exists() or not own.exists():
        raise OutputError(f"{directory}: holds no results: no {MANIFEST_FILE} and {CONFIG_FILE}")
    made = OmegaConf.load(own)
    namer = RowNamer(instantiate(made.data), SamplingParams(**made.sampling), are_unique=True)
    format = MergeFormat(config.output.merge_format, rows=config.output.merge_rows)
    print_merged(merge_results(directory, (row.row_id for row in namer), format))
