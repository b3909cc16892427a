"""The command line: reads the arguments, composes the configuration, calls the job."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from runner import __version__
from runner.arguments import MULTIRUN, Arguments, parse_arguments
from runner.composition import POSITIONAL, USES, choices, positionals, register, unknown_keys
from runner.config_errors import explain
from runner.environment import JOB, beneath, blaming, read_environment
from runner.errors import OutputError, ParameterError, StoppedError, UsageError
from runner.help import job_help, program_help
from runner.models.blas import load_blas, pin_kernels
from runner.multirun import Multirun
from runner.overrides import refuse_others


def main() -> None:
    """Runs `runner`; a usage error is one line on stderr and exit code 2, a stopped run 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.showwarning = _warn_in_one_line
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _dispatch(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output had enough of it; the interpreter would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        _exit_with(error)


def _warn_in_one_line(message: Warning | str, *where: object, **also: object) -> None:
    """What a library warns of is for the user here, not for whoever wrote the calling line."""
    print(f"warning: {message}", file=sys.stderr)


def _dispatch(argv: list[str]) -> None:
    groups = choices()
    arguments = parse_arguments(argv, groups, positionals(groups["job"]))
    register()
    if arguments.version:
        print(f"runner {__version__}")
    elif arguments.help and arguments.job:
        print(job_help(arguments.job, arguments.overrides))
    elif arguments.help:
        print(program_help())
    else:
        _check_place(arguments)
        variables = []
        if arguments.job == JOB:
            variables = read_environment(os.environ, groups["job"][JOB])
        overrides = beneath(variables, arguments.overrides, groups)
        # Hydra reads the process's arguments; flags come after the words or it refuses the rest.
        sys.argv[1:] = overrides + arguments.flags
        _run(overrides, partial(blaming, variables=variables, overrides=arguments.overrides))


def _check_place(arguments: Arguments) -> None:
    """Refuses a directory that is not there before Hydra makes it."""
    if arguments.place == "" and not arguments.flags:
        raise UsageError(f"{arguments.job} needs a directory: runner {arguments.job} DIR")
    if arguments.place and not Path(arguments.place).is_dir():
        raise OutputError(f"{arguments.place}: no such directory")


def _run(overrides: list[str], told: Callable[[str], str]) -> None:
    """`told` has the last word on what a user is told of a mistake."""
    if MULTIRUN not in overrides:
        _run_hydra(lambda config: _run_alone(config, told))
        return
    if any(re.fullmatch(r"(?i)engine\.batch_invariant=.*true.*", word) for word in overrides):
        pin_kernels()  # One BLAS serves all points, and the first would load it without.
    Multirun(overrides, _run_job).run(_run_hydra)


def _run_hydra(task: Callable[[DictConfig], None]) -> None:
    """Composes the configuration of each run and calls `task` with it.

    Raises OutputError where Hydra cannot make the directory of a run.
    """
    main = hydra.main(config_path="pkg://runner.conf", config_name="config", version_base="1.3")
    is_running = False

    def noted(config: DictConfig) -> None:
        nonlocal is_running
        is_running = True
        task(config)
        is_running = False

    try:
        main(noted)()
    except OSError as error:
        if is_running or error.filename is None:  # Some of Hydra's own are OSErrors too.
            raise
        what = f"output.dir: {error.filename} cannot be made: {error.strerror}"
        raise OutputError(what) from error


def _run_alone(config: DictConfig, told: Callable[[str], str]) -> None:
    """Runs one job; it leaves by SystemExit on a usage error, which Hydra does not report again."""
    try:
        _run_job(config, load_model=None)
    except (UsageError, StoppedError, HydraException) as error:
        _exit_with(error, told)


def _run_job(config: DictConfig, **given: Any) -> None:
    """Runs one job; of what is `given`, it gets what it has a parameter for."""
    if config.engine.batch_invariant:
        pin_kernels()
    load_blas()  # A job may import mlx first, and then it would be too late.
    config.output.dir = HydraConfig.get().runtime.output_dir
    try:
        _load_job(config, given)(config)
    except (UsageError, StoppedError, HydraException):
        _remove_if_empty(Path(config.output.dir))
        raise


def _load_job(config: DictConfig, given: Mapping[str, Any]) -> Callable[[DictConfig], Any]:
    """The job as a function of the configuration, which is complete and resolved afterwards."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ParameterError(explain(error)) from error
    if unknown := unknown_keys(config):
        raise ParameterError(f"no option {unknown[0]}; see runner JOB --help")
    if missing:
        raise ParameterError(f"{missing[0]} has no value: give {missing[0]}=...")
    with open_dict(config.job):
        config.job.pop(POSITIONAL, None)
        uses = config.job.pop(USES, None)
    chosen, overrides = HydraConfig.get().runtime.choices["job"], HydraConfig.get().overrides
    if uses is not None:
        refuse_others(chosen, uses, overrides.task)
    job: partial[None] = instantiate(config.job, _partial_=True)
    taken = {name: it for name, it in given.items() if name in signature(job.func).parameters}
    try:
        signature(job.func).bind(*job.args, config, **job.keywords, **taken)
    except TypeError as error:
        raise ParameterError(f"job={chosen}: {error}") from error
    return partial(job, **taken)


def _remove_if_empty(directory: Path) -> None:
    """Removes what Hydra made for a run that never began, up to the working directory."""
    made = [directory, *directory.parents]
    below = [path for path in made if path.is_relative_to(Path.cwd()) and path != Path.cwd()]
    with suppress(OSError):
        # Of a place elsewhere, itself alone; a job that makes none has the working directory.
        for path in below if directory.is_relative_to(Path.cwd()) else made[:1]:
            path.rmdir()


def _exit_with(error: Exception, told: Callable[[str], str] = str) -> NoReturn:
    """Leaves with one line if the user can mend it; anything else is a bug and propagates."""
    message = explain(error)
    if message is None:
        raise error
    print(f"error: {told(message)}", file=sys.stderr)
    sys.exit(1 if isinstance(error, StoppedError) else 2)
