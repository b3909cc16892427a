"""Scores of the data's texts, completions or choices: one result row for each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from runner.choices import NORMALIZATIONS, ScoreColumns, ScoredRow
from runner.data.score_schemas import SCORE_FIELDS
from runner.data.summary import Moments, Totals
from runner.job import RunContext
from runner.models.load import Loader
from runner.scores import ScoredText, in_order_of_work
from runner.scoring_run import check_nothing_sampled, run_texts


def score(
    config: DictConfig,
    *,
    completion_column: str | None = None,
    choices_column: str | None = None,
    answer_column: str | None = None,
    retry_errors: bool = False,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    The options are those of `runner.choices.ScoreColumns`; `retry_errors` does the rows with
    an error again; `load_model` is the sweep's, if it is in one.
    """
    columns = ScoreColumns(
        completion_column=completion_column,
        choices_column=choices_column,
        answer_column=answer_column,
    )
    context = RunContext(
        config, fields=SCORE_FIELDS, retry_errors=retry_errors, load_model=load_model
    )
    check_nothing_sampled(config, context.params)
    columns.check(context.dataset)
    if context.complete:
        return
    context.summarize = _accuracy
    rows: dict[int, ScoredRow] = {}
    with context:
        for found in run_texts(context, _texts(context, columns, rows), in_order_of_work):
            row = rows[found.index]
            row.scores[found.choice] = found
            if row.is_whole:
                context.write_scores(row.row, rows.pop(found.index).results())


def _texts(
    context: RunContext, columns: ScoreColumns, rows: dict[int, ScoredRow]
) -> Iterator[ScoredText]:
    """What is to be scored; `rows` gets the rows that are on their way."""
    for index, row in enumerate(context.prepared(columns.read)):
        if row.error is not None:
            context.write_scores(row.row, row.results())
            continue
        rows[index] = row
        yield from (replace(text, index=index) for text in row.texts)


def _accuracy(totals: Totals) -> dict[str, Any]:
    """The share of answers that were chosen, of all rows and of those of each adapter."""
    each = {name: {"accuracy": _shares(it)} for name, it in totals.by_adapter.items()}
    return {"accuracy": _shares(totals.columns)} | ({"adapters": each} if each else {})


def _shares(columns: Mapping[str, Moments]) -> dict[str, Any] | None:
    """The share by each way to choose, where there are answers."""
    found = {
        name.removeprefix("_") or "raw": columns.get(f"is_correct{name}", Moments())
        for name in NORMALIZATIONS
    }
    shares = {
        name: {"mean": it.mean, "stderr": it.standard_error, "rows": it.count}
        for name, it in found.items()
        if it.count
    }
    return shares or None
