"""Runs a job in processes that are killed, until the results of some jobs are whole.

`python killed_runs.py PLACE KILLS SEED`: the job of PLACE/job.yaml is run in forks of this process,
which has everything imported, so that a run takes a moment. Each gets a SIGKILL at a random
moment, or at a random step inside a write, flush, rename or removal. A directory that is whole is
merged and left; the job then starts in another one. Prints the number of kills and of directories.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from forked_cli import import_everything

import_everything()

from omegaconf import DictConfig, OmegaConf  # noqa: E402

from runner.data import durable  # noqa: E402
from runner.data.manifest import Manifest  # noqa: E402
from runner.jobs.generate import generate  # noqa: E402

STEPS = ("open", "write", "fsync", "ftruncate", "replace", "unlink")


class DeadlyOs:
    """The module `os` for `durable`: at the step of a number, the process kills itself."""

    def __init__(self, last: int) -> None:
        self._left = last

    def __getattr__(self, name: str) -> Any:
        step = getattr(os, name)
        return (lambda *given: self._do(name, step, *given)) if name in STEPS else step

    def _do(self, name: str, step: Any, *given: Any) -> Any:
        self._left -= 1
        if self._left:
            return step(*given)
        if name == "write":
            os.write(given[0], given[1][: len(given[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


def run(config: DictConfig, last_step: int | None) -> None:
    """The job, in a process of its own that ends here."""
    quiet, loud = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if last_step is not None:
        durable.os = DeadlyOs(last_step)
    try:
        generate(config)
    except BaseException:
        os.write(loud, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def attempt(config: DictConfig, choose: random.Random) -> int:
    """Starts a run and kills it; returns how it ended."""
    by_step = choose.random() < 0.5
    last_step = choose.randrange(1, 60) if by_step else None
    config.output.shard_rows = choose.choice([1, 3, 8])
    config.engine.max_batch_size = choose.choice([1, 2, 5])
    child = os.fork()
    if child == 0:
        run(config, last_step)
    if not by_step:
        time.sleep(choose.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(place: Path, kills: int, seed: int) -> None:
    """Kills runs until there were enough, and lets the last directory become whole."""
    choose, killed, directories = random.Random(seed), 0, 0
    os.chdir(place)
    config = OmegaConf.load("job.yaml")
    assert isinstance(config, DictConfig)
    while True:
        config.output.dir = f"out-{directories}"
        if killed >= kills:
            child = os.fork()
            if child == 0:
                run(config, None)
            assert os.waitpid(child, 0)[1] == 0, "the last run comes to its end"
        else:
            status = attempt(config, choose)
            assert status in (0, signal.SIGKILL), f"a run ended with {status}"
            killed += status == signal.SIGKILL
        manifest = Manifest.load(Path(config.output.dir))
        if manifest is not None and manifest.complete:
            directories += 1
            if killed >= kills:
                print(killed, directories)
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
