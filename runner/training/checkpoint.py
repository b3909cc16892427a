"""What lets a training go on where it was: one file for each step, and a line of its metrics."""

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

from runner.data.durable import append_line, replace_file, stopping
from runner.errors import OutputError
from runner.models.safetensors import read_safetensors
from runner.training.grpo import GRPOTrainer

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
ADAPTER_DIRECTORY = "adapter"
_ADAPTER, _OPTIMIZER, _STEP = "adapter.", "optimizer.", "step"


class Checkpoints:
    """The latest state of a trainer in the directory of a job.

    A step counts once its checkpoint is there: it comes after the step's rows, and after its line
    of metrics, of which those beyond the checkpoint are dropped when the job goes on.
    """

    def __init__(self, directory: Path, trainer: GRPOTrainer) -> None:
        self._directory, self._trainer = directory, trainer
        self._size = 0

    def restore(self, num_whole: int) -> int:
        """Brings the trainer to where it was; the first step that is left to do.

        `num_whole` steps have their rows. A checkpoint beyond these is of results that were
        removed or damaged: training begins anew, and comes by the same way. Raises OutputError for
        a file that is none.
        """
        step = self._read(num_whole)
        file = self._directory / METRICS_FILE
        lines = file.read_bytes().splitlines(keepends=True)[:step] if file.exists() else []
        self._size = sum(map(len, lines))
        return step

    def _read(self, num_whole: int) -> int:
        file = self._directory / CHECKPOINT_FILE
        if not file.exists():
            return 0
        arrays, metadata = read_safetensors(file, OutputError)
        if not metadata.get(_STEP, "").isdecimal():
            raise OutputError(f"{str(file)!r} is no checkpoint: without it, training begins anew")
        if int(metadata[_STEP]) > num_whole:
            return 0
        parts = [
            {name.removeprefix(kind): it for name, it in arrays.items() if name.startswith(kind)}
            for kind in (_ADAPTER, _OPTIMIZER)
        ]
        self._trainer.restore(*parts)
        return int(metadata[_STEP])

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        """Notes that `step` steps are done, and what the last of them measured.

        Raises StoppedError where the disk refuses.
        """
        line = json.dumps(metrics).encode() + b"\n"
        arrays = {
            kind + name: np.array(array)
            for kind, part in (
                (_ADAPTER, self._trainer.arrays),
                (_OPTIMIZER, self._trainer.state),
            )
            for name, array in part.items()
        }
        with stopping(self._directory):
            (self._directory / METRICS_FILE).touch()
            append_line(self._directory / METRICS_FILE, line, size=self._size)
            self._size += len(line)
            self._trainer.save(self._directory / ADAPTER_DIRECTORY)
            content = save(arrays, metadata={_STEP: str(step)})
            replace_file(self._directory / CHECKPOINT_FILE, lambda file: _write(file, content))


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
