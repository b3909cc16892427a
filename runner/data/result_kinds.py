"""What kind of job wrote results, by the columns that they begin with."""

from typing import Literal, TypeAlias

import pyarrow as pa

ResultKind: TypeAlias = Literal["samples", "scores", "texts"]

_KINDS: dict[str, ResultKind] = {"group_id": "samples", "choice": "scores", "token_ids": "texts"}
"""By the column behind `row_id`."""


def result_kind(schema: pa.Schema) -> ResultKind | None:
    """That of generate and rollout, of score, or of perplexity; None for any other rows.

    A job's own columns come before those of its input, which may be results too: of those that
    are scored again, `completion_token_ids` and `reward` are not what this job made.
    """
    first = schema.names[:2]
    return _KINDS.get(first[1]) if first[:1] == ["row_id"] and len(first) == 2 else None
