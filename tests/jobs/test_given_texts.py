"""What `score` and `perplexity` have in common: they take texts, and sample and reward nothing."""

from pathlib import Path

import pytest
from command_line import write_jsonl
from forked_cli import refused

JOBS = pytest.mark.parametrize("job", ["score", "perplexity"])


@pytest.fixture
def place(tiny_place: Path) -> Path:
    for name in ("empty.jsonl", "empty.txt"):
        (tiny_place / name).touch()
    write_jsonl(tiny_place / "texts.jsonl", [{"text": "some text", "title": 5}])
    write_jsonl(tiny_place / "numbers.jsonl", [{"prompt": 5}])
    for name, content in (("blank", b" \n"), ("bytes", b"a\xff")):
        (tiny_place / f"{name}.txt").write_bytes(content)
    return tiny_place


@JOBS
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sampling.temperature=0.5", "sampling.temperature means nothing to {job}"),
        ("sampling.top_k=5", "sampling.top_k means nothing to {job}"),
        ("sampling.echo=true", "sampling.echo means nothing to {job}"),
        ("reward=exact_match", "reward means nothing to {job}"),
        ("speculative=ngram", "speculative means nothing to {job}"),
        ("data.path=empty.jsonl", "empty.jsonl: has no rows"),
        ("data.path=empty.txt", "empty.txt: is empty"),
        ("data.path=blank.txt", "is empty"),
        ("data.path=bytes.txt", "is not UTF-8"),
        ("data.path=numbers.jsonl", "has the type int64, not text"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("data.prompt_column=titel", "titel"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(place, job, option, message):
    base = (job, "model.path=tiny", "data.path=texts.jsonl", "output.dir=out")
    assert message.format(job=job) in refused(*base, option, cwd=place)
    assert not (place / "out" / "manifest.jsonl").exists()
