"""Embeddings of the data's texts: one result row for each, with a vector or an error."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from runner.data.score_schemas import embedding_fields
from runner.data.summary import Moments, Totals
from runner.embeddings import as_embedding, embedding_request
from runner.job import RunContext
from runner.llm import LLM
from runner.models.load import Loader
from runner.pooling import PoolingParams
from runner.rows import NamedRow, encode_rows
from runner.scoring_run import check_nothing_sampled
from runner.types import Embedding, ErrorInfo, Pooling, PromptRequest


def embed(
    config: DictConfig,
    *,
    pooling: Pooling = "mean",
    normalize: bool = True,
    dimensions: int | None = None,
    retry_errors: bool = False,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    The options are those of `runner.pooling.PoolingParams`; `retry_errors` does the rows with an
    error again; `load_model` is the sweep's, if it is in one.
    """
    params = PoolingParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
    context = RunContext(
        config,
        fields=embedding_fields(asdict(params)),
        retry_errors=retry_errors,
        load_model=load_model,
    )
    check_nothing_sampled(config, context.params)
    if context.complete:
        return
    run = _Run(context, params)
    context.on_loaded = run.check
    context.summarize = run.summarize
    with context:
        for embedding, row in run.embeddings():
            context.write_scores(row, [_columns(embedding)])


class _Run:
    """Rows whose embeddings are on their way."""

    def __init__(self, context: RunContext, params: PoolingParams) -> None:
        self._context = context
        self._params = params
        self._size = 0
        self._rows: dict[str, NamedRow] = {}

    def check(self, llm: LLM) -> None:
        """Refuses a model that gives no such embeddings, before anything is written."""
        self._size = llm.engine.admission.embedding_size
        self._params.check(self._size)

    def summarize(self, totals: Totals) -> dict[str, Any]:
        """What `summary.json` says of the results so far."""
        tokens = totals.columns.get("num_tokens", Moments())
        size = self._params.dimensions or self._size
        counts = {"rows": tokens.count, "tokens": round(tokens.total), "size": size}
        return {"embedding": asdict(self._params) | counts}

    def embeddings(self) -> Iterator[tuple[Embedding, NamedRow]]:
        """Embeds every row without a result; yields each as it is there."""
        for output in self._context.run(self._requests()):
            yield as_embedding(0, output, self._params), self._rows.pop(output.request_id)

    def _requests(self) -> Iterator[PromptRequest]:
        for row in self._context.prepared(encode_rows):
            if row.prompt is None:
                error = ErrorInfo(type(row.error).__name__, str(row.error))
                self._context.write_scores(row, [{"error": asdict(error)}])
                continue
            self._rows[row.row_id] = row
            yield embedding_request(
                row.row_id, row.prompt, self._params, adapter=row.adapter, encoded=row.encoded
            )


def _columns(embedding: Embedding) -> dict[str, Any]:
    """The columns of a result row that are the job's own."""
    if embedding.error is not None:
        return {"error": asdict(embedding.error)}
    return {"embedding": embedding.vector, "num_tokens": embedding.num_tokens}
