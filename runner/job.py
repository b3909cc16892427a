"""What every job that runs rows has in common: rows in, requests out, result rows committed."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from runner.data import Dataset, ResultWriter
from runner.data.schemas import passthrough_names, result_schema
from runner.errors import DataError, PromptError
from runner.interrupt import Interrupt
from runner.llm import LLM
from runner.prompts import PromptBuilder, prompt_digest
from runner.report import print_report, summary
from runner.run_log import public_options
from runner.types import (
    Completion,
    ErrorInfo,
    Prompt,
    PromptRequest,
    RequestOutput,
    SamplingParams,
)
from runner.watch import State, Watch

_DECIDING_GROUPS = ("job", "model", "data", "sampling", "reward")
"""The groups whose options decide results; `engine` and `output` do not."""

Row = Mapping[str, Any]


class RunContext:
    """One run of a job: the rows it reads, the model that answers, the directory it fills.

    Opening checks everything that can be checked before the model is loaded. Used as a context:
    leaving it commits what was written, whatever happened.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.directory = Path(config.output.dir)
        self.params = SamplingParams(**_plain(config.sampling))
        self.dataset: Dataset = instantiate(config.data)
        self.prompts = _prompt_builder(self.dataset)
        self.writer: ResultWriter = instantiate(config.output)(
            schema=result_schema(self.dataset.schema), identity=_identity(config)
        )
        self._tracker = instantiate(config.tracker)
        self._names = passthrough_names(self.dataset.columns)
        self._seen: Counter[str] = Counter()
        self._in_flight: dict[str, Row] = {}
        self._interrupt = Interrupt()
        self._finished = False

    @property
    def complete(self) -> bool:
        """Whether the directory holds all results already; says so."""
        if self.writer.complete:
            print(f"{self.directory} holds all {self.writer.num_rows} results already.")
        return self.writer.complete

    def __enter__(self) -> "RunContext":
        options = _plain(self.config.model) | _plain(self.config.engine)
        self.llm = LLM(options.pop("path"), seed=self.config.sampling.seed, **options)
        self.llm.check(self.params)
        self.writer.start()
        (self.directory / "config.yaml").write_text(OmegaConf.to_yaml(self.config, resolve=True))
        self._watch = self._watched()
        self._started = time.monotonic()
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.writer.close(complete=self._finished and error is None)
        self._watch.committed(len(self.writer.done_rows))
        self._watch.close(self._state(error))
        self._interrupt.__exit__(kind, error, traceback)
        if error is None:
            self._report()

    def outputs(self) -> Iterator[tuple[Row, RequestOutput]]:
        """Runs every row that has no result yet; yields each with its input as it finishes."""
        for output in self.llm.run(self._requests(), interrupted=self._interrupt.is_requested):
            self._watch.output(output)
            yield self._in_flight.pop(output.request_id), output
        self._finished = not self._interrupt.is_requested()

    def write(
        self,
        row: Row,
        output: RequestOutput,
        scores: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Writes the result rows of one input row; `scores` adds columns by sample index."""
        shared = {self._names[name]: value for name, value in row.items()} | {
            "row_id": output.request_id,
            "group_id": output.request_id,
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "temperature": self.params.temperature,
            "seed": self.params.seed,
            "model": self.llm.loaded.name,
        }
        before = self.writer.num_rows
        if output.error is not None:
            failed = {"sample_index": 0, "finish_reason": "error", "error": asdict(output.error)}
            self.writer.write([shared | failed])
        else:
            self.writer.write(
                [
                    shared | sample_columns(sample) | dict((scores or {}).get(sample.index, {}))
                    for sample in output.outputs
                ]
            )
        if self.writer.num_rows != before:
            self._watch.committed(len(self.writer.done_rows))

    def _requests(self) -> Iterator[PromptRequest | RequestOutput]:
        """The rows that have no result yet; one without a usable prompt as its own output."""
        for row in self.dataset:
            prompt: Prompt | None = None
            error: PromptError | None = None
            try:
                prompt = self.prompts(row)
            except PromptError as failure:
                error = failure
            row_id = self._row_id(row, prompt)
            if row_id in self.writer.done_rows:
                continue
            self._in_flight[row_id] = row
            if prompt is None:
                info = ErrorInfo(type(error).__name__, str(error))
                yield RequestOutput(request_id=row_id, prompt=None, prompt_token_ids=[], error=info)
            else:
                yield PromptRequest(
                    request_id=row_id, prompt=prompt, params=self.params, key=row_id
                )

    def _row_id(self, row: Row, prompt: Prompt | None) -> str:
        """The value of the id column, or the digest of the prompt and its occurrence number.

        Never the row's place, so that its random draws and its results stay its own when rows are
        added, removed or reordered.
        """
        column = self.dataset.id_column
        if column is None:
            content = prompt or Prompt(text=json.dumps(row, sort_keys=True, default=str))
            name = prompt_digest(content)
            self._seen[name] += 1
            return f"{name}-{self._seen[name] - 1}"
        name = str(row[column])
        if row[column] is None or self._seen[name]:
            raise DataError(f"id_column={column}: {row[column]!r} does not name one row alone")
        self._seen[name] += 1
        return name

    def _watched(self) -> Watch:
        loaded = self.llm.loaded
        return Watch(
            self.directory,
            public_options(_plain(self.config)),
            total=self.dataset.num_rows,
            done=len(self.writer.done_rows),
            tracker=self._tracker,
            model={"name": loaded.name, "dtype": loaded.dtype, "blas": loaded.blas.name},
        )

    def _state(self, error: BaseException | None) -> State:
        """How the run ended."""
        if self._interrupt.is_requested() or isinstance(error, KeyboardInterrupt):
            return "interrupted"
        return "finished" if self._finished and error is None else "stopped"

    def _report(self) -> None:
        seconds = time.monotonic() - self._started
        numbers = summary(self.directory, self.writer, self.llm, seconds=seconds)
        numbers |= {"state": self._state(None), "total_rows": self.dataset.num_rows}
        (self.directory / "summary.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print_report(numbers, self.directory)
        self._interrupt.exit_if_requested()


def sample_columns(sample: Completion) -> dict[str, Any]:
    """The columns of one finished sample."""
    columns: dict[str, Any] = {
        "sample_index": sample.index,
        "completion_token_ids": sample.token_ids,
        "text": sample.text,
        "logprobs": sample.processed_logprobs,
        "raw_logprobs": sample.raw_logprobs,
        "finish_reason": sample.finish_reason,
        "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
    }
    if sample.finish_reason == "error":
        message = "a logprob is not a number: the model's own, or the options left no token"
        columns["error"] = asdict(ErrorInfo("ModelOutputError", message))
    return columns


def _plain(node: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict), "a group of options is a mapping"
    return {str(key): value for key, value in content.items()}


def _prompt_builder(dataset: Dataset) -> PromptBuilder:
    return PromptBuilder(
        prompt_column=dataset.prompt_column,
        messages_column=dataset.messages_column,
        token_ids_column=dataset.token_ids_column,
        template=dataset.prompt_template,
        chat=dataset.chat,
        system_prompt=dataset.system_prompt,
        chat_template_kwargs=dataset.chat_template_kwargs,
    )


def _identity(config: DictConfig) -> dict[str, Any]:
    """The options that decide results, flat: `sampling.temperature` and so on."""
    return {
        f"{group}.{key}": value
        for group in _DECIDING_GROUPS
        if config[group] is not None
        for key, value in _plain(config[group]).items()
    }
