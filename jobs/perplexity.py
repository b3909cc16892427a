"""Perplexity of the data's texts: every token scored once, one result row per document."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from omegaconf import DictConfig

from runner.data import Dataset
from runner.data.score_schemas import PERPLEXITY_FIELDS
from runner.data.summary import Totals
from runner.documents import Document, Stream, read_documents
from runner.errors import ParameterError
from runner.job import RunContext
from runner.llm import LLM
from runner.models.load import Loader
from runner.perplexity import Definition, PerplexityOptions, Tokens, perplexity_numbers
from runner.scores import ScoredText
from runner.scoring_run import check_nothing_sampled, run_texts
from runner.types import Score


def perplexity(
    config: DictConfig,
    *,
    preset: str | None = None,
    mode: str | None = None,
    prefix: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    retry_errors: bool = False,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    The options are those of `runner.perplexity.PerplexityOptions`; `retry_errors` does the
    documents with an error again; `load_model` is the sweep's, if it is in one.
    """
    options = PerplexityOptions(
        preset=preset, mode=mode, prefix=prefix, window=window, stride=stride
    )
    context = RunContext(
        config,
        fields=PERPLEXITY_FIELDS,
        is_corpus=True,
        retry_errors=retry_errors,
        load_model=load_model,
    )
    check_nothing_sampled(config, context.params)
    _check_texts(context.dataset)
    if context.complete:
        return
    run = _Run(context, options)
    context.on_loaded = run.define
    context.summarize = run.summarize
    with context:
        run.score()


def _check_texts(dataset: Dataset) -> None:
    """Refuses what is no text as such."""
    if dataset.chat or dataset.messages_column is not None:
        what = "the perplexity is that of texts: give prompt_column, prompt_template or"
        given = "chat=true" if dataset.chat else f"messages_column={dataset.messages_column}"
        raise ParameterError(f"data.{given} is not allowed: {what} token_ids_column")


def _tokens(llm: LLM) -> Tokens:
    """What decides the prefix and the window."""
    tokenizer = llm.tokenizer
    bos = tokenizer.bos_token_id
    return Tokens(
        bos=bos,
        eos=tokenizer.eos_token_id,
        adds_bos=bos is not None and list(tokenizer.encode("a"))[:1] == [bos],
        max_model_len=llm.loaded.max_model_len,
    )


class _Run:
    """Streams whose windows are on their way."""

    def __init__(self, context: RunContext, options: PerplexityOptions) -> None:
        self._context = context
        self._options = options
        self._streams: dict[int, Stream] = {}
        self._num_left: dict[int, int] = {}

    def define(self, llm: LLM) -> None:
        """Takes what the model decides into the definition, and that into every result file."""
        self._definition: Definition = self._options.definition(_tokens(llm))
        writer = self._context.writer
        metadata = {"perplexity": json.dumps(self._definition.as_json())}
        writer.schema = writer.schema.with_metadata(metadata)

    def summarize(self, totals: Totals) -> dict[str, Any]:
        """What `summary.json` says of the results so far."""
        numbers = perplexity_numbers(totals.columns, self._definition)
        each = {
            name: perplexity_numbers(columns, self._definition)
            for name, columns in totals.by_adapter.items()
        }
        found = {"definition": self._definition.as_json(), "perplexity": numbers}
        return found | ({"adapters": each} if each else {})

    def score(self) -> None:
        """Scores every document without a result; writes each as it is whole."""
        for score in run_texts(self._context, self._texts(), _longest_first):
            self._take(score)

    def _texts(self) -> Iterator[ScoredText]:
        for index, documents in enumerate(self._groups()):
            stream = Stream(index, documents, self._definition)
            # Those of which nothing is scored: they have an error, or no context at all.
            self._write(it for it in documents if it.is_wanted and it.num_missing == 0)
            texts = list(stream.texts())
            if texts:
                self._streams[index], self._num_left[index] = stream, len(texts)
            yield from texts

    def _groups(self) -> Iterator[list[Document]]:
        """The documents of each stream."""
        is_concat = self._definition.mode == "concat"
        read = partial(read_documents, is_done=self._context.is_done)
        # In one stream, what is done is context of what comes after it.
        documents = self._context.prepared(read, with_done=is_concat)
        if is_concat:
            of_adapter: dict[str | None, list[Document]] = {}
            for document in documents:
                of_adapter.setdefault(document.row.adapter, []).append(document)
            yield from of_adapter.values()
        else:
            yield from ([document] for document in documents)

    def _take(self, score: Score) -> None:
        self._write(self._streams[score.index].take(score))
        self._num_left[score.index] -= 1
        if self._num_left[score.index] == 0:
            del self._streams[score.index], self._num_left[score.index]

    def _write(self, documents: Iterable[Document]) -> None:
        for document in documents:
            self._context.write_scores(document.row, [document.result(self._definition)])


def _longest_first(texts: list[ScoredText]) -> list[ScoredText]:
    return sorted(texts, key=lambda text: -len(text.token_ids))
