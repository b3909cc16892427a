"""What a model said of one input row -> its result rows."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from runner.types import Completion, RequestOutput


def result_rows(
    shared: Mapping[str, Any],
    output: RequestOutput,
    scores: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """A row for each sample, or one with the error.

    `shared` has the columns that are alike in all of them, `scores` more columns by sample index.
    """
    scored = output.prompt_token_logprobs
    alike = dict(shared) | {
        "row_id": output.request_id,
        "group_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "adapter": output.adapter,
        "prompt_logprobs": scored.with_nulls() if scored is not None else None,
    }
    if output.error is not None:
        failed = {"sample_index": 0, "finish_reason": "error", "error": asdict(output.error)}
        return [alike | failed]
    return [
        alike | _sample_columns(sample) | dict((scores or {}).get(sample.index, {}))
        for sample in output.outputs
    ]


def _sample_columns(sample: Completion) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "sample_index": sample.index,
        "completion_token_ids": sample.token_ids,
        "text": sample.text,
        "logprobs": sample.processed_logprobs,
        "raw_logprobs": sample.raw_logprobs,
        "finish_reason": sample.finish_reason,
        "num_drafted": sample.num_drafted,
        "num_accepted": sample.num_accepted,
        "adapter_digest": sample.adapter_digest,
        "weight_versions": [asdict(span) for span in sample.weight_versions],
        "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
    }
    if sample.echoed is not None:
        columns["text_offsets"] = sample.echoed.text_offsets
    if sample.error is not None:
        columns["error"] = asdict(sample.error)
    return columns
