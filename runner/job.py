"""What every job that runs rows has in common: rows in, requests out, result rows committed."""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from runner.adapter_watch import AdapterWatch
from runner.certificate import Certificate
from runner.configured import open_llm, plain_options
from runner.data import Dataset, ResultWriter, WriteBehind, read_ahead
from runner.data.durable import replace_file, stopping
from runner.data.merge import Merged, merge
from runner.data.schemas import ECHO_FIELDS, RESULT_FIELDS, passthrough_names, result_schema
from runner.data.score_schemas import by_adapter
from runner.data.summary import Totals
from runner.engine.stats import EngineStats
from runner.errors import ParameterError, StoppedError
from runner.identity import identity
from runner.interrupt import Interrupt
from runner.llm import LLM
from runner.lora_options import LoraOptions
from runner.models.load import Loader
from runner.reading import Item, prepared_rows
from runner.report import print_report, summary
from runner.result_rows import result_rows
from runner.rows import (
    NamedRow,
    Row,
    RowNamer,
    are_done,
    check_ids,
    corpus_digest,
    encode_rows,
    prompt_builder,
)
from runner.run_log import public_options
from runner.types import ErrorInfo, PromptRequest, RequestOutput, SamplingParams
from runner.watch import State, Watch

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
_DECIDING_GROUPS = ("job", "model", "data", "sampling", "reward")
"""The groups whose options decide results."""


class RunContext:
    """One run of a job: the rows it reads, the model that answers, the directory it fills.

    Opening checks everything that can be checked before the model is loaded. Used as a context:
    leaving it commits what was written, whatever happened.

    `fields` are the columns of its results before those of the input; without them it completes
    prompts. With `is_corpus` the numbers are about all rows together, so that a run goes on with
    the same rows only. `retry_errors`
    does the rows with an error again; each stays until its replacement is committed. `load_model`
    gives the model in place of reading its files. `total` is how many rows there will be, where it
    is not one for each of the input.
    """

    def __init__(
        self,
        config: DictConfig,
        *,
        fields: Sequence[pa.Field] | None = None,
        is_corpus: bool = False,
        retry_errors: bool = False,
        total: int | None = None,
        load_model: Loader | None = None,
    ) -> None:
        if not isinstance(retry_errors, bool):
            raise ParameterError(f"job.retry_errors={retry_errors!r} is not allowed: true or false")
        self.config = config
        self.directory = Path(config.output.dir)
        self.params = _sampling_params(config)
        if self.params.max_tokens == 0 and config.speculative.proposers:
            given = f"speculative.proposers={list(config.speculative.proposers)}"
            raise ParameterError(f"{given} is not allowed: this job samples nothing to draft")
        fields = fields or (ECHO_FIELDS if self.params.echo else RESULT_FIELDS)
        self.dataset: Dataset = instantiate(config.data)
        self.lora = LoraOptions.of(plain_options(config.lora))
        self.lora.check_columns(self.dataset.columns)
        fields = by_adapter(fields) if self.lora.is_mixed else fields
        prompt_builder(self.dataset)  # Refuses options that no row could have a prompt with.
        corpus = {"data.content": corpus_digest(self.dataset)} if is_corpus else {}
        self.writer: ResultWriter = instantiate(config.output)(
            schema=result_schema(self.dataset.schema, fields),
            identity=identity(plain_options(config), _DECIDING_GROUPS)
            | self.lora.identity()
            | corpus,
            retry_errors=retry_errors,
        )
        self._tracker = instantiate(config.tracker)
        self._load_model = load_model
        self.on_loaded: Callable[[LLM], None] = lambda llm: None
        """Called once the model is there, before anything is written."""
        self.summarize: Callable[[Totals], Mapping[str, Any]] = lambda totals: {}
        """What `summary.json` holds besides what every job's does."""
        self._certified: dict[str, Any] = {}
        self._names = passthrough_names(self.dataset.columns, fields)
        self._in_flight: dict[str, Row] = {}
        self._reading = ExitStack()
        self._interrupt = Interrupt()
        self._finished = False
        self._fingerprint = self.dataset.fingerprint
        self._total = total

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
            self.llm = open_llm(self.config, self._load_model)
            self._adapter_watch = self._started_watch()
            self.llm.check(self.params)
            self.on_loaded(self.llm)
            self._behind = WriteBehind(self.writer, committed=self._save_summary)
            self._behind.start()
            self._save(CONFIG_FILE, OmegaConf.to_yaml(self.config, resolve=True))
            self._watch = self._watched()
        except BaseException:
            self.writer.close(complete=False)
            raise
        self._started = time.monotonic()
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A second interrupt leaves at once: what is committed is whole, the rest is made again.
        if kind is KeyboardInterrupt:
            self._reading.close()
            self._watch.close("interrupted")
            return
        is_done = self._finished and error is None
        state = self._state(is_done=False)
        try:
            self._reading.close()
            self._behind.close(complete=is_done, input=self._fingerprint if is_done else None)
            state = self._state(is_done=is_done)
        finally:
            self._interrupt.__exit__(kind, error, traceback)
            numbers = self._end(state)
        if error is None:
            self._report(numbers)

    def outputs(self) -> Iterator[tuple[Row, RequestOutput]]:
        """Runs every row that has no result yet; yields each with its input as it finishes."""
        for output in self.run(self._requests(self.prepared(encode_rows))):
            self._watch.output(output)
            yield self._in_flight.pop(output.request_id), output

    def run(self, requests: Iterable[PromptRequest | RequestOutput]) -> Iterator[RequestOutput]:
        """Runs requests of a job's own making, however many make a row."""
        yield from self.llm.run(requests, interrupted=self._after_step)
        self._finished = not self._interrupt.is_requested()

    @property
    def is_interrupted(self) -> bool:
        """Whether the run is to end after the current step."""
        return self._interrupt.is_requested()

    def count(self, output: RequestOutput) -> None:
        """Shows a finished row to whoever watches; `outputs` does so by itself."""
        self._watch.output(output)

    def commit(self) -> None:
        """Waits until all that was written is on disk for good."""
        self._behind.commit()

    def _started_watch(self) -> AdapterWatch | None:
        if self.lora.watch is None or self.lora.default is None:
            return None
        watch = AdapterWatch(self.lora.watch, self.lora.default)
        watch.start(self.llm)
        return watch

    def _after_step(self) -> bool:
        """Whether the run is to end now; takes in a new adapter where one is watched for."""
        if self._adapter_watch is not None:
            self._adapter_watch.look(self.llm, self.lora.swap)
        return self._interrupt.is_requested()

    def certify(self, certificate: Certificate) -> None:
        """Scores a sample of the results again, for `summary.json`, once every row is committed.

        Does nothing in a run that was interrupted; interrupted here, the run is not complete, and
        the next one does it.
        """
        if not self._finished:
            return
        self._behind.commit()
        with self._aside():
            found = certificate.numbers(
                self.writer.part_paths, self.llm, interrupted=self._interrupt.is_requested
            )
        self._finished = not self._interrupt.is_requested()
        self._certified["certificate"] = found if self._finished else None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens inside counts neither in the run's time nor in its tokens."""
        stats, started = self.llm.engine.stats, time.monotonic()
        self.llm.engine.stats = EngineStats()
        try:
            yield
        finally:
            self.llm.engine.stats = stats
            self._started += time.monotonic() - started

    def rows(self) -> Generator[NamedRow]:
        """Every row of the input, read ahead; some may have results already."""
        with closing(read_ahead(self._rows())) as rows:
            yield from rows

    def prepared(
        self,
        prepare: Callable[[list[NamedRow], Any], list[Item]],
        *,
        with_done: bool = False,
    ) -> Generator[Item]:
        """What `prepare` makes of the rows without a result, or of all, in a thread of its own.

        It gets some rows at a time, and that thread's tokenizer. The thread ends with the run.
        """
        rows = prepared_rows(
            self._rows(),
            prepare,
            self.llm.tokenizer,
            is_wanted=lambda row: with_done or not self.is_done(row),
        )
        return self._reading.enter_context(closing(rows))

    def is_done(self, row: NamedRow) -> bool:
        """Whether a row has its results on disk."""
        return row.row_id in self.writer.done_rows

    def write_scores(self, row: NamedRow, scores: Sequence[Mapping[str, Any]]) -> None:
        """Writes the result rows of one input row, which only has been scored or embedded."""
        shared = {self._names[name]: value for name, value in row.row.items()}
        shared |= {"row_id": row.row_id, "model": self.llm.loaded.name, "adapter": row.adapter}
        if row.adapter in self.llm.adapters:
            shared["adapter_digest"] = self.llm.adapters[row.adapter]
        self._behind.write([{**shared, **score} for score in scores])
        errors = [score["error"]["type"] for score in scores if score.get("error")]
        useful = (it.get("num_scored", it.get("num_tokens")) for it in scores)
        num_tokens = sum(count or 0 for count in useful)
        self._watch.row(num_tokens, error=errors[0] if errors else None)

    def write(
        self,
        row: Row,
        output: RequestOutput,
        scores: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Writes the result rows of one input row; `scores` adds columns by sample index."""
        shared = {self._names[name]: value for name, value in row.items()} | {
            "temperature": self.params.temperature,
            "seed": self.params.seed,
            "model": self.llm.loaded.name,
        }
        self._behind.write(result_rows(shared, output, scores))

    @property
    def _num_rows(self) -> int | None:
        """Rows of the job: those of the input, each once for every adapter of a sweep."""
        if self._total is not None:
            return self._total
        count = self.dataset.num_rows
        return None if count is None else count * (1 + len(self.lora.adapters) * self.lora.sweep)

    def _rows(self) -> RowNamer:
        return RowNamer(
            self.dataset,
            self.params,
            are_unique=self.dataset.is_local,
            adapters=self.lora.of_row,
        )

    def _requests(self, rows: Iterator[NamedRow]) -> Iterator[PromptRequest | RequestOutput]:
        """Requests of rows; one without a usable prompt as its own output."""
        for named in rows:
            row_id = named.row_id
            self._in_flight[row_id] = named.row
            if named.prompt is None:
                info = ErrorInfo(type(named.error).__name__, str(named.error))
                yield RequestOutput(
                    request_id=row_id,
                    prompt=None,
                    prompt_token_ids=[],
                    error=info,
                    adapter=named.adapter,
                )
            else:
                yield PromptRequest(
                    request_id=row_id,
                    prompt=named.prompt,
                    params=self.params,
                    key=named.key,
                    adapter=named.adapter,
                    encoded=named.encoded,
                )

    def _save(self, name: str, text: str) -> None:
        with stopping(self.directory):
            replace_file(self.directory / name, lambda file: _write(file, text))

    def _save_summary(self, state: State = "running") -> dict[str, Any]:
        """Tells of a commit, in the thread that made it."""
        seconds = time.monotonic() - self._started
        total, rows = self._num_rows, self._watch.num_rows
        numbers = summary(self.writer, self.llm, total=total, num_rows=rows, seconds=seconds)
        numbers |= {"state": state} | dict(self.summarize(self.writer.totals)) | self._certified
        self._save(SUMMARY_FILE, json.dumps(numbers, indent=2) + "\n")
        reward = numbers["reward"]
        self._watch.committed(numbers["rows"], {"reward": reward["mean"]} if reward else None)
        return numbers

    def _end(self, state: State) -> dict[str, Any]:
        """Tells how the run ended; where something stopped it, that is told already."""
        try:
            return self._save_summary(state)
        except StoppedError:
            if state != "stopped":
                raise
            return {}
        finally:
            self._watch.close(state)

    def _watched(self) -> Watch:
        loaded = self.llm.loaded
        return Watch(
            self.directory,
            public_options(plain_options(self.config)),
            total=self._num_rows,
            done=len(self.writer.done_rows),
            tracker=self._tracker,
            model={"name": loaded.name, "dtype": loaded.dtype, "blas": loaded.blas.name},
        )

    def _state(self, *, is_done: bool) -> State:
        if is_done:
            return "finished"
        return "interrupted" if self._interrupt.is_requested() else "stopped"

    def _report(self, numbers: dict[str, Any]) -> None:
        print_report(numbers, self.directory)
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


def _sampling_params(config: DictConfig) -> SamplingParams:
    params = SamplingParams(**plain_options(config.sampling))
    if params.prompt_logprobs:
        what = "a job writes no alternatives: 0 for the prompt's own tokens, or null"
        raise ParameterError(f"prompt_logprobs={params.prompt_logprobs} is not allowed: {what}")
    # Results always hold the logprobs of what their text holds.
    return replace(params, prompt_logprobs=0) if params.echo else params
