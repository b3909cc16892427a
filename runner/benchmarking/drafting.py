"""The engines with and without drafts that a benchmark compares, on one model in memory."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from runner.benchmarking.engine_side import requests
from runner.data.workloads import Workload
from runner.llm import LLM

_OF_THE_MODEL = ("model", "revision", "dtype", "max_model_len", "speculative")
_EARLIER: dict[str, Any] = {"proposers": ["previous", "ngram"], "num_draft_tokens": 31}


def without_drafts(llm: LLM, options: Mapping[str, Any]) -> LLM:
    """The same model and options, a token per row and step."""
    return LLM(llm.loaded, **_shared(llm, options))


def with_earlier(llm: LLM, options: Mapping[str, Any], workload: Workload) -> LLM:
    """The same, with drafts from the workload's own results, run here once and written to a file.

    The file is read at once and then removed.
    """
    rows = [
        {
            "row_id": done.request_id,
            "sample_index": done.index,
            "prompt_token_ids": workload.prompts[int(done.request_id)],
            "completion_token_ids": done.token_ids,
        }
        for done in llm.engine.run(requests(workload))
    ]
    table = pa.Table.from_pylist(rows)
    with TemporaryDirectory() as directory:
        path = Path(directory, "part-00000.arrow")
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        drafts = _EARLIER | {"previous": str(path)}
        return LLM(llm.loaded, speculative=drafts, **_shared(llm, options))


def _shared(llm: LLM, options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if name not in _OF_THE_MODEL}
    return kept | {"max_batch_size": llm.engine.max_batch_size}
