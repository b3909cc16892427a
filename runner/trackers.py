"""Where a run may report its numbers to: Weights & Biases, TensorBoard or trackio."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from runner.errors import ParameterError


class Tracker(Protocol):
    """Takes the numbers of one run."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins a run with these options, flat: `sampling.temperature` and so on."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes numbers as they are once `step` rows are done."""
        ...

    def finish(self) -> None:
        """Ends the run."""
        ...


class NoTracker:
    """Reports to nobody."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class WandbTracker:
    """Reports to Weights & Biases; its files lie in the output directory."""

    def __init__(self, *, project: str, name: str | None = None, mode: str | None = None) -> None:
        """`mode` is wandb's own: online, offline or disabled; None follows WANDB_MODE."""
        self._wandb = _imported("wandb", "wandb")
        self._options = {"project": project, "name": name, "mode": mode}

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins a run, named by the output directory unless it has a name."""
        options = self._options | {"name": self._options["name"] or _name(config)}
        # Left to itself it would copy what the bar prints into a file of its own.
        settings = self._wandb.Settings(console="off", silent=True)
        self._run = self._wandb.init(
            **options, config=dict(config), dir=config["output.dir"], settings=settings
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes numbers as they are once `step` rows are done."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Ends the run, which sends what was not sent yet."""
        self._run.finish()


class TensorBoardTracker:
    """Writes TensorBoard's event files."""

    def __init__(self, *, log_dir: str | None = None) -> None:
        """`log_dir` is where they lie; None is `tensorboard` in the output directory."""
        self._module = _imported("tensorboardX", "tensorboard")
        self._log_dir = log_dir

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins a file, with the options as a text in it."""
        where = self._log_dir or str(Path(config["output.dir"]) / "tensorboard")
        self._writer = self._module.SummaryWriter(where)
        options = "\n".join(f"    {key}: {value}" for key, value in config.items())
        self._writer.add_text("options", options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes numbers as they are once `step` rows are done."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()


class TrackioTracker:
    """Reports to trackio, which keeps a database on this machine."""

    def __init__(
        self, *, project: str, name: str | None = None, space_id: str | None = None
    ) -> None:
        """`space_id` is the Hugging Face Space to report to; None keeps everything here."""
        self._trackio = _imported("trackio", "trackio")
        self._options = {"project": project, "name": name, "space_id": space_id}

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins a run, named by the output directory unless it has a name."""
        options = self._options | {"name": self._options["name"] or _name(config)}
        # What it prints for people is not among the results, which may go into a pipe.
        with redirect_stdout(sys.stderr):
            self._trackio.init(
                **options, config=dict(config), resume="allow", embed=False, auto_log_gpu=False
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes numbers as they are once `step` rows are done."""
        self._trackio.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Ends the run."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


def _name(config: Mapping[str, Any]) -> str:
    return Path(config["output.dir"]).name


def _imported(module: str, extra: str) -> ModuleType:
    """An optional package, or a ParameterError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ParameterError(
            f"tracker={extra} needs the package {module}: pip install 'mlx-runner[{extra}]'"
        ) from error
