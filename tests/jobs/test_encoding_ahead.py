"""Jobs encode in the thread that reads ahead, only what is to be done, with the same results."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import write_jsonl
from in_process import run_job

from runner import encoding, job, text_engine
from runner.data import background
from runner.job import RunContext
from runner.rows import NamedRow
from runner.types import Prompt

ROWS: list[dict[str, Any]] = [
    {"id": str(n), "text": f"row {n} of many", "more": [" and", f" or {n}"], "ids": [n + 2, 5]}
    for n in range(70)
]
ODD = [{"text": ""}, {"text": "x" * 300}, {"text": "</s> 👍"}, {"text": None}, {"more": []}]
for number, odd in enumerate(ODD):
    ROWS[10 * number + 5] |= odd
JOBS: dict[str, list[str]] = {
    "generate": ["sampling.max_tokens=2", "sampling.seed=0", "job.certify=0"],
    "rollout": [
        "sampling.max_tokens=2", "sampling.seed=0", "job.certify=0", "sampling.n=2",
        "reward=word_limit",
    ],
    "embed": [],
    "score": ["job.choices_column=more"],
    "perplexity": [],
}  # fmt: skip


@pytest.fixture
def run(tiny_place: Path) -> Callable[..., Any]:
    write_jsonl(tiny_place / "rows.jsonl", ROWS)
    data = [f"data.path={tiny_place / 'rows.jsonl'}", "data=custom", "data.id_column=id"]

    def run(name: str, *options: str, out: str = "out") -> Any:
        return run_job(name, tiny_place, *data, *JOBS[name], *options, out=out)

    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The texts that are encoded, each with whether it was in the engine's thread."""
    found: list[tuple[str, bool]] = []
    plain = encoding._encode

    def encode(texts: list[str], tokenizer: Any, *, special: bool) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        found.extend((text, is_main) for text in texts)
        return plain(texts, tokenizer, special=special)

    monkeypatch.setattr(encoding, "_encode", encode)
    return found


@pytest.mark.parametrize("name", JOBS)
def test_the_engines_thread_encodes_nothing(run, name, encoded, monkeypatch):
    def as_token_ids(prompt: Prompt, tokenizer: Any) -> Any:
        assert prompt.token_ids is not None, "the engine's thread encodes"
        return None, prompt.token_ids

    monkeypatch.setattr(text_engine, "encode_prompt", as_token_ids)
    assert len(run(name, "data.prompt_column=text")) >= len(ROWS)
    assert len(encoded) > 50 and not any(is_main for _, is_main in encoded)


def in_order(rows: Any) -> Any:
    """Rows are written as their rewards come, in any order."""
    return rows.sort([it for it in ("row_id", "sample_index", "choice") if it in rows.columns])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [(name, "data.prompt_column=text") for name in JOBS]
    + [
        ("generate", "data.prompt_column=text data.chat=true"),
        ("score", "data.token_ids_column=ids"),
    ],
)
def test_results_are_what_they_are_row_by_row(run, name, prompt, monkeypatch):
    options = prompt.split()
    whole = in_order(run(name, *options))
    monkeypatch.setattr(background, "_ITEMS", 1)
    assert in_order(run(name, *options, out="one")).equals(whole)
    errors = whole.filter(whole["error"].is_not_null())
    assert len(errors) == 0 or len(set(errors["row_id"])) < 5
    if name in ("generate", "rollout"):
        # As it was: the engine's thread encodes a prompt when it takes it.
        def as_it_is(rows: list[NamedRow], tokenizer: Any) -> list[NamedRow]:
            return rows

        monkeypatch.setattr(job, "encode_rows", as_it_is)
        assert in_order(run(name, *options, out="late")).equals(whole)


@pytest.mark.parametrize("name", sorted(JOBS.keys() - {"perplexity"}))
def test_a_row_that_is_done_is_not_encoded_again(run, name, encoded, tiny_place):
    before = run(name, "data.prompt_column=text")
    write_jsonl(tiny_place / "rows.jsonl", [*ROWS, ROWS[0] | {"id": "new", "text": "a new row"}])
    encoded.clear()
    after = run(name, "data.prompt_column=text")
    assert len(after) > len(before) and encoded
    assert all(text.startswith("a new row") for text, _ in encoded)


def test_a_document_that_is_done_is_encoded_where_it_is_context(run, encoded):
    for mode, is_context in (("document", False), ("concat", True)):
        options = ("data.prompt_column=text", f"job.mode={mode}")
        before = run("perplexity", *options, out=mode)
        num_encoded = len(encoded)
        encoded.clear()
        again = run("perplexity", *options, "job.retry_errors=true", out=mode)
        assert again.sort("row_id").equals(before.sort("row_id"))
        assert len(encoded) == num_encoded * is_context and num_encoded > 60
        encoded.clear()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["generate", "rollout", "embed"])
def test_the_thread_ends_with_a_run_that_fails(run, name, failure, monkeypatch):
    def fail(*given: Any, **named: Any) -> None:
        raise failure("no more")

    monkeypatch.setattr(background, "_ITEMS", 1)
    monkeypatch.setattr(RunContext, "write", fail)
    monkeypatch.setattr(RunContext, "write_scores", fail)
    # What is caught holds the frames of the run, and so what they read from.
    with pytest.raises(failure, match="no more"):
        run(name, "data.prompt_column=text", "engine.max_batch_size=2")
    assert background.READING_THREAD not in [thread.name for thread in threading.enumerate()]
