"""Times a job of very many rows whose model is a stub: all that is measured is the runner itself.

`python million_rows.py PLACE ROWS` prints, as JSON, rows per second of a run, the seconds of a run
that finds everything done, of one that reads the input to see that, and of a merge, and the memory
of each and of a run over `FEW` rows: the most that was anonymous, which only a swap would free.
Where it was measured, that was 129 MiB for 10,000 and for 1,000,000 rows.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runner.models.blas import load_blas

load_blas()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from tiny_files import save_tiny_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from runner import composition, configured  # noqa: E402
from runner.engine.stats import EngineStats  # noqa: E402
from runner.jobs.generate import generate  # noqa: E402
from runner.jobs.merge import merge  # noqa: E402
from runner.models.load import LoadedModel  # noqa: E402
from runner.types import (  # noqa: E402
    Completion,
    PromptRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

FEW = 10_000
"""Rows that fill every buffer."""


class StubLLM:
    """Answers every prompt with four tokens at once, as late as a batch of 64 would.

    Scored again, they are as likely as they were.
    """

    def __init__(self, path: str, **options: Any) -> None:
        blas = SimpleNamespace(name="none", warning=None)
        memory = SimpleNamespace(num_bytes=0)
        self.engine = SimpleNamespace(
            stats=EngineStats(), max_batch_size=64, memory=memory, clear_prefix_cache=lambda: None,
            speculation=None,
        )  # fmt: skip
        self.batch_size_choice = None
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.adapters: dict[str, str] = {}
        self.loaded = LoadedModel(
            model=None, tokenizer=self.tokenizer, name="stub", path=path, dtype="float32",
            max_model_len=256, blas=blas, device="cpu",
        )  # fmt: skip

    def check(self, params: SamplingParams) -> None:
        """Takes any."""

    def run(
        self,
        requests: Iterable[PromptRequest | RequestOutput],
        *,
        interrupted: Callable[[], bool],
    ) -> Iterator[RequestOutput]:
        """Yields an output for each request, 64 behind."""
        waiting: list[RequestOutput] = []
        for request in requests:
            assert isinstance(request, PromptRequest)
            assert request.prompt.token_ids or request.encoded, "it is encoded ahead"
            waiting.append(_answer(request))
            self.engine.stats.num_requests += 1
            if len(waiting) == 64:
                yield from reversed(waiting)
                waiting = []
        yield from waiting


def _answer(request: PromptRequest) -> RequestOutput:
    sample = Completion(
        request_id=request.request_id, index=0, token_ids=[1, 2, 3, 4], text="four",
        raw_logprobs=[-0.5] * 4, processed_logprobs=[-0.25] * 4, finish_reason="length",
    )  # fmt: skip
    again = None
    if request.params.prompt_logprobs is not None:
        again = TokenLogprobs(
            start=5, logprobs=[-0.5] * 4, ranks=[1] * 4, top_token_ids=[[]] * 4,
            top_logprobs=[[]] * 4,
        )  # fmt: skip
    return RequestOutput(
        request_id=request.request_id, prompt=request.prompt.text,
        prompt_token_ids=[5, 6, 7, 8, 9], outputs=[sample], prompt_token_logprobs=again,
    )  # fmt: skip


def timed(work: Callable[[DictConfig], None], config: DictConfig) -> dict[str, float]:
    """Runs a job in a fork, so that its memory is its own; its seconds and its most MiB."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        memory: list[float] = []
        threading.Thread(target=_watch, args=(memory,), daemon=True).start()
        started = time.monotonic()
        work(config)
        taken = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time()}
        found = taken | {"mib": max(memory)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as result:
        content = result.read()
    assert os.waitpid(child, 0)[1] == 0, "the job came to its end"
    return dict(json.loads(content))


def _watch(memory: list[float]) -> None:
    """Notes the MiB of anonymous memory, twenty times a second."""
    while True:
        memory.append(_anonymous_mib())
        time.sleep(0.05)


def _anonymous_mib() -> float:
    """Where the system does not tell, all that was ever resident."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def main(place: Path, num_rows: int) -> None:
    """Writes the input, runs the job over a few rows and over all, and prints what it took."""
    configured.LLM = StubLLM  # type: ignore[assignment,misc]
    model = save_tiny_model(place / "tiny")
    with open(place / "rows.jsonl", "w") as file:
        for number in range(num_rows):
            file.write(json.dumps({"prompt": f"What is {number}?", "answer": str(number)}) + "\n")
    composition.register()

    def config(out: str, *overrides: str) -> DictConfig:
        options = [f"model.path={model}", f"data.path={place / 'rows.jsonl'}", "job=generate"]
        with hydra.initialize_config_module("runner.conf", version_base="1.3"):
            given = ["data=custom", *options, *overrides, f"output.dir={place / out}"]
            return hydra.compose("config", given)

    few = timed(generate, config("few", f"data.limit={FEW}"))
    whole = timed(generate, config("out"))
    again = timed(generate, config("out"))
    os.utime(place / "rows.jsonl")
    looked = timed(generate, config("out"))
    merged = timed(merge, config("out"))
    numbers = {
        "rows": num_rows,
        "rows_per_second": num_rows / whole["seconds"],
        "rows_per_cpu_second": num_rows / whole["cpu_seconds"],
        "seconds_to_find_all_done": again["seconds"],
        "seconds_to_find_all_done_in_a_touched_input": looked["seconds"],
        "seconds_to_merge": merged["seconds"],
        "cpu_share_of_finding_all_done": again["cpu_seconds"] / whole["cpu_seconds"],
        "cpu_share_of_finding_all_done_in_a_touched_input": looked["cpu_seconds"]
        / whole["cpu_seconds"],
        "mib_of_few": few["mib"],
        "mib_of_all": whole["mib"],
        "mib_of_finding_all_done": again["mib"],
        "mib_of_finding_all_done_in_a_touched_input": looked["mib"],
        "mib_of_merging": merged["mib"],
    }
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
