"""Command lines in forks of one process that has everything imported: a run takes a moment.

As a program, it reads `[directory, argument, ...]` as lines of JSON, runs each as `runner` would be
run in that directory, and answers with the exit code, what was printed and what was complained.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import ROOT


class ForkedCommands:
    """What `command_line` has, for many runs; each still is a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )  # fmt: skip

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """One command line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(cwd), *arguments]) + "\n")
        self._process.stdin.flush()
        code, printed, complained = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, printed, complained)

    def succeed(self, *arguments: str, cwd: Path) -> str:
        """What a run that has to succeed prints on stdout."""
        done = self.run(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str, cwd: Path) -> str:
        """The one line that a run with a user's mistake prints before it leaves with 2."""
        done = self.run(*arguments, cwd=cwd)
        assert done.returncode == 2, (done.returncode, done.stderr)
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        return line

    def close(self) -> None:
        """Ends the process; it has no run left."""
        self._process.communicate()


_STARTED: list[ForkedCommands] = []


def _commands() -> ForkedCommands:
    """One process for all tests of this one, from the first command line on."""
    if not _STARTED:
        _STARTED.append(ForkedCommands())
        atexit.register(_STARTED[0].close)
    return _STARTED[0]


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One command line."""
    return _commands().run(*arguments, cwd=cwd)


def succeed(*arguments: str, cwd: Path) -> str:
    """What a run that has to succeed prints on stdout."""
    return _commands().succeed(*arguments, cwd=cwd)


def refused(*arguments: str, cwd: Path) -> str:
    """The one line that a run with a user's mistake prints before it leaves with 2."""
    return _commands().refused(*arguments, cwd=cwd)


def _run(directory: str, *arguments: str) -> int:
    """Runs a command line here; returns its exit code."""
    from runner.cli import main

    os.chdir(directory)
    sys.argv = ["runner", *arguments]
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def _answer(line: str) -> list[object]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 70
            try:
                code = _run(*json.loads(line))
            finally:
                sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        texts = [file.seek(0) or file.read() for file in (out, err)]
        return [os.waitstatus_to_exitcode(status), *texts]


def import_everything() -> None:
    """What a job imports on its way, mlx too, of which nothing is used before the fork.

    The BLAS is loaded as `engine.batch_invariant` has it.
    """
    from runner.models.blas import load_blas, pin_kernels

    pin_kernels()
    load_blas()
    import pyarrow as pa

    import runner.jobs.generate
    import runner.jobs.merge
    import runner.jobs.perplexity
    import runner.jobs.rollout
    import runner.jobs.score
    import runner.models.weights  # noqa: F401

    # pyarrow imports pandas, where it is installed, with the first conversion.
    pa.RecordBatch.from_pylist([{"text": "x"}]).to_pylist()


if __name__ == "__main__":
    import_everything()
    for request in sys.stdin:
        print(json.dumps(_answer(request)), flush=True)
