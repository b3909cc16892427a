"""What every job that runs rows has in common: rows in, requests out, result rows committed."""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from runner.data import Dataset, ResultWriter, WriteBehind, read_ahead
from runner.data.durable import replace_file, stopping
from runner.data.merge import Merged, merge
from runner.data.schemas import RESULT_FIELDS, passthrough_names, result_schema
from runner.data.summary import Totals
from runner.errors import ParameterError, StoppedError
from runner.interrupt import Interrupt
from runner.llm import LLM
from runner.models.digest import model_digest
from runner.models.hub import resolve_model
from runner.progress import Progress
from runner.report import print_report, summary
from runner.rows import (
    NamedRow,
    Row,
    RowNamer,
    are_done,
    check_ids,
    corpus_digest,
    prompt_builder,
)
from runner.types import Completion, ErrorInfo, PromptRequest, RequestOutput, SamplingParams

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
_DECIDING_GROUPS = ("job", "model", "data", "sampling", "reward")
"""The groups whose options decide results; those of `output` do not."""

_DECIDING_ENGINE_OPTIONS = ("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size")
"""What of `engine` decides results as well."""

_NOT_DECIDING = ("model.path", "model.revision")
"""Where the weights lie decides nothing: `model.weights`, their digest, stands for them."""


class RunContext:
    """One run of a job: the rows it reads, the model that answers, the directory it fills.

    Opening checks everything that can be checked before the model is loaded. Used as a context:
    leaving it commits what was written, whatever happened.

    `fields` are the columns of its results before those of the input. With `is_corpus` the numbers
    are about all rows together, so that a run goes on with the same rows only.
    """

    def __init__(
        self,
        config: DictConfig,
        *,
        fields: Sequence[pa.Field] = RESULT_FIELDS,
        is_corpus: bool = False,
    ) -> None:
        self.config = config
        self.directory = Path(config.output.dir)
        self.params = _sampling_params(config)
        self.dataset: Dataset = instantiate(config.data)
        prompt_builder(self.dataset)  # Refuses options that no row could have a prompt with.
        corpus = {"data.content": corpus_digest(self.dataset)} if is_corpus else {}
        self.writer: ResultWriter = instantiate(config.output)(
            schema=result_schema(self.dataset.schema, fields), identity=_identity(config) | corpus
        )
        self.on_loaded: Callable[[LLM], None] = lambda llm: None
        """Called once the model is there, before anything is written."""
        self.summarize: Callable[[Totals], Mapping[str, Any]] = lambda totals: {}
        """What `summary.json` holds besides what every job's does."""
        self._names = passthrough_names(self.dataset.columns, fields)
        self._in_flight: dict[str, Row] = {}
        self._interrupt = Interrupt()
        self._finished = False
        self._summarized_rows = 0
        self._fingerprint = self.dataset.fingerprint

    @property
    def complete(self) -> bool:
        """Whether the directory holds all results already; says so.

        Where the files of the input are not those of the run that completed it, they are read to
        see whether a row has come.
        """
        if not self.writer.complete:
            return False
        is_same = self.writer.input == self._fingerprint
        if not is_same and not are_done(self._rows(), self.writer.done_rows):
            return False
        print(f"{self.directory} holds all {self.writer.num_rows} results already.")
        if self.writer.merge:
            self._merge()
        return True

    def __enter__(self) -> "RunContext":
        self.writer.lock()
        try:
            if self.dataset.id_column is not None and self.dataset.is_local:
                check_ids(self.dataset)
            options = _plain(self.config.model) | _plain(self.config.engine)
            self.llm = LLM(options.pop("path"), seed=self.config.sampling.seed, **options)
            self.llm.check(self.params)
            self.on_loaded(self.llm)
            self._behind = WriteBehind(self.writer)
            self._behind.start()
            self._save(CONFIG_FILE, OmegaConf.to_yaml(self.config, resolve=True))
        except BaseException:
            self.writer.close(complete=False)
            raise
        self._progress = Progress(self.dataset.num_rows, initial=len(self.writer.done_rows))
        self._started = time.monotonic()
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._progress.close()
        # A second interrupt leaves at once: what is committed is whole, the rest is made again.
        if kind is KeyboardInterrupt:
            return
        is_done = self._finished and error is None
        try:
            self._behind.close(complete=is_done, input=self._fingerprint if is_done else None)
        finally:
            self._interrupt.__exit__(kind, error, traceback)
        if error is None:
            self._report()
        elif isinstance(error, StoppedError):
            with suppress(StoppedError):
                self._save_summary()

    def outputs(self) -> Iterator[tuple[Row, RequestOutput]]:
        """Runs every row that has no result yet; yields each with its input as it finishes."""
        with closing(read_ahead(self._rows())) as rows:
            for output in self.run(self._requests(rows)):
                self._progress.update(output)
                yield self._in_flight.pop(output.request_id), output

    def run(self, requests: Iterable[PromptRequest | RequestOutput]) -> Iterator[RequestOutput]:
        """Runs requests of a job's own making, however many make a row."""
        yield from self.llm.run(requests, interrupted=self._interrupt.is_requested)
        self._finished = not self._interrupt.is_requested()

    def rows(self) -> Generator[NamedRow]:
        """Every row of the input, read ahead; some may have results already."""
        with closing(read_ahead(self._rows())) as rows:
            yield from rows

    def is_done(self, row: NamedRow) -> bool:
        """Whether a row has its results on disk."""
        return row.row_id in self.writer.done_rows

    def write_scores(self, row: NamedRow, scores: Sequence[Mapping[str, Any]]) -> None:
        """Writes the result rows of one input row, which only has been scored."""
        shared = {self._names[name]: value for name, value in row.row.items()}
        shared |= {"row_id": row.row_id, "model": self.llm.loaded.name}
        self._behind.write([{**shared, **score} for score in scores])
        self._progress.count(sum(score.get("num_scored") or 0 for score in scores))
        if self.writer.num_rows != self._summarized_rows:
            self._save_summary()

    def write(
        self,
        row: Row,
        output: RequestOutput,
        scores: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Writes the result rows of one input row; `scores` adds columns by sample index."""
        scored = output.prompt_token_logprobs
        shared = {self._names[name]: value for name, value in row.items()} | {
            "row_id": output.request_id,
            "group_id": output.request_id,
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "prompt_logprobs": scored.with_nulls() if scored is not None else None,
            "temperature": self.params.temperature,
            "seed": self.params.seed,
            "model": self.llm.loaded.name,
        }
        if output.error is not None:
            failed = {"sample_index": 0, "finish_reason": "error", "error": asdict(output.error)}
            self._behind.write([shared | failed])
        else:
            self._behind.write(
                [
                    shared | sample_columns(sample) | dict((scores or {}).get(sample.index, {}))
                    for sample in output.outputs
                ]
            )
        if self.writer.num_rows != self._summarized_rows:
            self._save_summary()

    def _rows(self) -> RowNamer:
        return RowNamer(self.dataset, self.params, are_unique=self.dataset.is_local)

    def _requests(self, rows: Iterator[NamedRow]) -> Iterator[PromptRequest | RequestOutput]:
        """The rows that have no result yet; one without a usable prompt as its own output."""
        for named in rows:
            row_id = named.row_id
            if row_id in self.writer.done_rows:
                continue
            self._in_flight[row_id] = named.row
            if named.prompt is None:
                info = ErrorInfo(type(named.error).__name__, str(named.error))
                yield RequestOutput(request_id=row_id, prompt=None, prompt_token_ids=[], error=info)
            else:
                yield PromptRequest(
                    request_id=row_id, prompt=named.prompt, params=self.params, key=named.key
                )

    def _save(self, name: str, text: str) -> None:
        with stopping(self.directory):
            replace_file(self.directory / name, lambda file: _write(file, text))

    def _save_summary(self) -> dict[str, Any]:
        self._summarized_rows = self.writer.num_rows
        seconds = time.monotonic() - self._started
        numbers = summary(self.writer, self.llm, total=self.dataset.num_rows, seconds=seconds)
        numbers |= dict(self.summarize(self.writer.totals))
        self._save(SUMMARY_FILE, json.dumps(numbers, indent=2) + "\n")
        return numbers

    def _report(self) -> None:
        print_report(self._save_summary(), self.directory)
        if self._finished and self.writer.merge:
            self._merge()
        self._interrupt.exit_if_requested()

    def _merge(self) -> None:
        row_ids = (row.row_id for row in self._rows())
        print_merged(merge(self.directory, row_ids, self.writer.merge_format))


def print_merged(merged: Merged) -> None:
    """Says in one line what a merge wrote, and what it did not."""
    missing = f"; {merged.missing} rows have no result yet" if merged.missing else ""
    gone = f"; left out {merged.left_out} that the input no longer has" if merged.left_out else ""
    print(f"Merged {merged.rows} rows into {merged.paths[0].parent}{missing}{gone}.")


def _write(file: Any, text: str) -> None:
    file.write(text.encode())


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


def _sampling_params(config: DictConfig) -> SamplingParams:
    params = SamplingParams(**_plain(config.sampling))
    if params.prompt_logprobs:
        what = "a job writes no alternatives: 0 for the prompt's own tokens, or null"
        raise ParameterError(f"prompt_logprobs={params.prompt_logprobs} is not allowed: {what}")
    return params


def _identity(config: DictConfig) -> dict[str, Any]:
    """The options that decide results, flat: `sampling.temperature` and so on."""
    groups = {name: _plain(config[name]) for name in _DECIDING_GROUPS if config[name] is not None}
    groups["engine"] = {name: config.engine[name] for name in _DECIDING_ENGINE_OPTIONS}
    options = {
        f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()
    }
    found = resolve_model(config.model.path, revision=config.model.revision)
    weights = {"model.weights": model_digest(found)}
    return {key: options[key] for key in options if key not in _NOT_DECIDING} | weights
