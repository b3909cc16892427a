"""Times the engine beside its peers, in turn, several rounds."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner.benchmarking.baseline import print_comparison, read_baseline
from runner.benchmarking.engine_side import weights_bytes
from runner.benchmarking.measure import measure, result
from runner.benchmarking.peers import COMPARED, Peers
from runner.benchmarking.picture import check_matplotlib, draw
from runner.benchmarking.table import print_table, unequal_options
from runner.configured import open_llm
from runner.data.workloads import WORKLOADS, Workload
from runner.errors import OutputError, ParameterError
from runner.llm import LLM
from runner.models.load import Loader

_RESULT_FILE = "benchmark.json"


def benchmark(
    config: DictConfig,
    *,
    workloads: Sequence[str],
    rounds: int,
    compare: str | Sequence[str],
    stock_rows: int,
    baseline: str | None,
    picture: bool,
    load_model: Loader | None = None,
) -> None:
    """Runs `workloads`, by name, beside what `compare` names; writes `benchmark.json`.

    `load_model` is the sweep's, if it is in one.
    """
    compare = [compare] if isinstance(compare, str) else list(compare)
    _check(workloads, compare, {"rounds": rounds, "stock_rows": stock_rows})
    if picture:
        check_matplotlib()
    before = read_baseline(baseline) if baseline is not None else None
    file = Path(config.output.dir) / _RESULT_FILE
    if file.exists():
        if load_model is not None and json.loads(file.read_text()).get("command") == _command():
            print(f"{file.parent} holds this benchmark already.")
            return
        raise OutputError(f"{file} is there already: choose another directory")
    llm = open_llm(config, load_model)
    chosen = [_fitting(llm, WORKLOADS[name](llm.tokenizer)) for name in workloads]
    with Peers(llm, compare, options=_options(config), stock_rows=stock_rows) as peers:
        measured = [_measured(llm, peers, workload, rounds) for workload in chosen]
    written = _machine(llm, config) | {"workloads": measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written, indent=2) + "\n")
    if picture:
        draw(written, file.parent)
    print_table(written)
    if before is not None:
        print_comparison(written, before)


def _measured(llm: LLM, peers: Peers, workload: Workload, rounds: int) -> dict[str, Any]:
    sides = peers.sides(workload)
    return result(workload, sides, measure(sides, rounds), weights_bytes=weights_bytes(llm))


def _check(workloads: Sequence[str], compare: Sequence[str], numbers: dict[str, int]) -> None:
    _check_names("workloads", workloads, list(WORKLOADS))
    _check_names("compare", compare, COMPARED)
    for name, number in numbers.items():
        if number < 1:
            raise ParameterError(f"job.{name}={number} is not allowed: at least 1")


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise ParameterError(f"job.{option}=[] is not allowed: name {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ParameterError(f"job.{option}={name} is not there: {', '.join(known)} are")


def _options(config: DictConfig) -> dict[str, Any]:
    """What an `LLM` is made with."""
    options = {str(key): value for key, value in (*config.model.items(), *config.engine.items())}
    options |= {"speculative": OmegaConf.to_container(config.speculative)}
    return {"model": options.pop("path"), "seed": config.sampling.seed} | options


def _fitting(llm: LLM, workload: Workload) -> Workload:
    """Refuses a workload that the model's context does not hold."""
    pairs = zip(workload.prompts, workload.max_tokens, strict=True)
    longest = max(len(prompt) + most for prompt, most in pairs)
    if longest > llm.loaded.max_model_len:
        raise ParameterError(
            f"job.workloads={workload.name} is not allowed: it needs {longest} tokens of context, "
            f"and the model has {llm.loaded.max_model_len}"
        )
    return workload


def _machine(llm: LLM, config: DictConfig) -> dict[str, Any]:
    """Everything that the figures depend on."""
    loaded = llm.loaded
    engine = {str(key): value for key, value in config.engine.items()}
    engine["max_batch_size"] = llm.engine.max_batch_size
    return {
        "command": _command(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": loaded.device,
        "blas": loaded.blas.name,
        "model": loaded.name,
        "dtype": loaded.dtype,
        "weights_bytes": weights_bytes(llm),
        "engine": engine,
        "unequal": unequal_options(engine),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }


def _command() -> str:
    """What repeats it; where the results went does not matter."""
    given = HydraConfig.get().overrides.task
    kept = [it for it in given if not it.startswith(("job=", "output.", "job.baseline="))]
    return " ".join(["runner benchmark", *kept])


def _processor() -> str:
    """The processor's name where Linux tells it, else none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""
