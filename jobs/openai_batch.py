"""Answers OpenAI batch files: a response or an error for every line, each of them once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from runner.answerer import Answerer
from runner.configured import open_llm, plain_options
from runner.data.batch_results import ERROR_FILE, OUTPUT_FILE, BatchResults
from runner.data.error_rate import ErrorRate
from runner.data.openai_batch import BadLine, BatchFile, BatchLine, answer_line
from runner.errors import ParameterError, StoppedError
from runner.identity import identity
from runner.interrupt import Interrupt
from runner.lora_options import LoraOptions
from runner.models.load import Loader
from runner.openai.embeddings import EmbeddingRequest
from runner.openai.errors import ApiError
from runner.openai.requests import EMBEDDINGS_URL, KNOWN_URLS, ApiRequest
from runner.openai.responses import usage
from runner.pooling import PoolingParams
from runner.prompt_requests import encoded_requests
from runner.run_log import public_options
from runner.types import ErrorInfo, Pooling, PromptRequest, RequestOutput, SamplingParams
from runner.watch import State, Watch

_DECIDING_GROUPS = ("job", "model", "sampling")


def openai_batch(
    config: DictConfig,
    *,
    check_model: bool = True,
    served_model_name: Sequence[str] = (),
    pooling: Pooling = "mean",
    load_model: Loader | None = None,
) -> None:
    """Answers the lines of `data.path` that have no answer in `output.dir` yet.

    `served_model_name` has further names of the model; `check_model` refuses lines that name
    another. `sampling` has the values of the fields that a line leaves out; `pooling` is that of
    embeddings. `load_model` is the sweep's, if it is in one.
    """
    PoolingParams(pooling=pooling)  # Refuses what it cannot be.
    plain = plain_options(config)
    defaults = _defaults(plain)
    lora = LoraOptions.of(plain["lora"])
    if lora.is_mixed or lora.watch is not None:
        what = "body.model names the adapter of a line, or lora.path that of all"
        raise ParameterError(f"lora.column, sweep and watch mean nothing to openai_batch: {what}")
    error_rate = ErrorRate(plain["output"]["max_error_rate"])
    batch = BatchFile(plain["data"]["path"], urls=KNOWN_URLS)
    identified = identity(plain, _DECIDING_GROUPS) | lora.identity()
    results = BatchResults(Path(plain["output"]["dir"]), identified)
    total, done = results.count(batch)
    if done == total:
        print(f"{results.directory} holds all {total} answers already.")
        return
    llm = open_llm(config, load_model)
    llm.check(defaults)
    names = [*served_model_name, llm.loaded.name, llm.loaded.path, plain["model"]["path"]]
    answerer = Answerer(
        llm, defaults, names, check_model=check_model, adapter=lora.default, pooling=pooling
    )
    tracker = instantiate(config.tracker)
    try:
        results.start()
        results.save("config.yaml", OmegaConf.to_yaml(config, resolve=True))
        model = {"name": names[0], "path": llm.loaded.path, "dtype": llm.loaded.dtype}
        watch = Watch(
            results.directory,
            public_options(plain),
            total=total,
            done=done,
            tracker=tracker,
            model=model,
        )
        _Run(results, answerer, watch, error_rate, model).run(batch)
    finally:
        results.close()


@dataclass
class _Open:
    """A line whose outputs are not all there."""

    line: BatchLine | BadLine
    request: ApiRequest | EmbeddingRequest | None = None
    error: ApiError | None = None
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing."""
        return self.request is None or len(self.outputs) == len(self.request.prompts)


class _Run:
    """One run over a batch file: every line that has no answer gets one, or an interrupt comes."""

    def __init__(
        self,
        results: BatchResults,
        answerer: Answerer,
        watch: Watch,
        error_rate: ErrorRate,
        model: Mapping[str, Any],
    ) -> None:
        self._results = results
        self._answerer = answerer
        self._watch = watch
        self._error_rate = error_rate
        self._model = model
        self._open: dict[str, _Open] = {}

    def run(self, batch: BatchFile) -> None:
        """Answers; leaves by SystemExit after an interrupt.

        Raises StoppedError where the disk takes no more, or too many requests fail.
        """
        state: State = "stopped"
        with Interrupt() as interrupt:
            try:
                llm = self._answerer.llm
                requests = encoded_requests(self._requests(batch), llm.tokenizer)
                outputs = llm.run(requests, interrupted=interrupt.is_requested)
                for output in outputs:
                    self._take(output)
                state = "interrupted" if interrupt.is_requested() else "finished"
                self._commit(state)
            except KeyboardInterrupt:
                state = "interrupted"
                raise
            except Exception:
                # A full disk may refuse this as well.
                with suppress(StoppedError):
                    self._commit(state)
                raise
            finally:
                self._watch.close(state)
        self._report()
        interrupt.exit_if_requested()

    def _requests(self, batch: BatchFile) -> Iterator[PromptRequest | RequestOutput]:
        for number, line in enumerate(batch):
            if not self._results.is_done(line):
                yield from self._asked(str(number), line)

    def _asked(self, name: str, line: BatchLine | BadLine) -> list[Any]:
        """The requests that a line makes; one that cannot be asked is its own, failed output."""
        opened = self._open[name] = _Open(line)
        try:
            if isinstance(line, BatchLine):
                request = self._understood(line)
                asked = request.prompt_requests(
                    name,
                    key=f"custom_id/{line.custom_id}",
                    adapter=self._answerer.adapter_of(request),
                )
                opened.request = request
                return asked
        except ApiError as error:
            opened.error = error
        except RecursionError:
            opened.error = ApiError("The body is nested too deeply.", code="invalid_value")
        failed = ErrorInfo("ApiError", "")
        return [
            RequestOutput(request_id=f"{name}/0", prompt=None, prompt_token_ids=[], error=failed)
        ]

    def _understood(self, line: BatchLine) -> ApiRequest | EmbeddingRequest:
        if line.url == EMBEDDINGS_URL:
            return self._answerer.understand_embedding(line.body)
        return self._answerer.understand(line.url, line.body)

    def _take(self, output: RequestOutput) -> None:
        name, _, place = output.request_id.rpartition("/")
        opened = self._open[name]
        opened.outputs[int(place)] = output
        if not opened.is_whole:
            return
        del self._open[name]
        answer, num_tokens = _answered(self._answerer, opened)
        error = answer["error"]
        is_committed = self._results.write(answer)
        self._watch.row(num_tokens, error=error["code"] if error else None)
        if is_committed:
            self._commit("running")
        if isinstance(opened.line, BatchLine):
            self._error_rate.add(
                {"type": error["code"], "message": error["message"]} if error else None
            )

    def _commit(self, state: State) -> None:
        """Commits, and says so to whoever watches."""
        self._results.commit()
        self._watch.committed(self._results.num_lines)
        self._summarize(state)

    def _summarize(self, state: State) -> None:
        results = self._results
        numbers = self._watch.numbers(state) | {
            "rows": results.num_lines,
            "errors": dict(results.errors.most_common()),
            "complete": state == "finished",
            "model": self._model,
        }
        results.save("summary.json", json.dumps(numbers, indent=2) + "\n")

    def _report(self) -> None:
        """Prints what the directory holds."""
        results, run = self._results, self._watch.numbers("finished")["run"]
        tokens = f"{run['completion_tokens']} in {run['seconds']:.1f} s"
        print(f"\n  answers   {results.num_answers} in {results.directory / OUTPUT_FILE}")
        print(f"  errors    {results.errors.total()} in {results.directory / ERROR_FILE}")
        print(f"  tokens    {tokens}: {run['tokens_per_second']:.0f} tokens/s")


def _answered(answerer: Answerer, done: _Open) -> tuple[dict[str, Any], int]:
    """The line of the output file or the error file, and the tokens it took."""
    if isinstance(done.line, BadLine):
        return done.line.answer, 0
    outputs = [output for _, output in sorted(done.outputs.items())]
    try:
        if done.request is None:
            assert done.error is not None, "a line is asked or refused"
            raise done.error
        if isinstance(done.request, EmbeddingRequest):
            body = answerer.embedding_body(done.request, outputs)
        else:
            body = answerer.body(done.request, outputs, name=_hex(done.line.id))
    except ApiError as error:
        told = {"code": error.code, "message": error.message, "param": error.param}
        return _answer(done.line, error.status, error.body, told), 0
    return _answer(done.line, 200, body, None), usage(outputs)["completion_tokens"]


def _answer(
    line: BatchLine, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{_hex(line.id)}", "body": body}
    return answer_line(line.id, line.custom_id, response=response, error=error)


def _hex(line_id: str) -> str:
    return line_id.rpartition("_")[2]


def _defaults(plain: Mapping[str, Any]) -> SamplingParams:
    for name, nothing in (("prompt_logprobs", None), ("echo", False)):
        if plain["sampling"][name] is not nothing:
            what = "a line asks for its prompt with echo, and for logprobs of it with logprobs too"
            raise ParameterError(f"sampling.{name} means nothing to openai_batch: {what}")
    return SamplingParams(**plain["sampling"])
