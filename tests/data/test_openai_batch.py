"""Lines of a batch file: each is a request or says why it is none, under an id of its content."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from runner.data.openai_batch import BadLine, BatchFile, BatchLine
from runner.errors import DataError

URLS = ("/v1/completions", "/v1/embeddings")


def line(custom_id: Any = "a", **changes: Any) -> dict[str, Any]:
    whole = {"custom_id": custom_id, "method": "POST", "url": URLS[0], "body": {"prompt": "hi"}}
    return {key: value for key, value in (whole | changes).items() if value is not ...}


def read(place: Path, *lines: Any) -> list[BatchLine | BadLine]:
    raw = [it if isinstance(it, bytes) else json.dumps(it).encode() for it in lines]
    (place / "batch.jsonl").write_bytes(b"\n".join(raw))
    return list(BatchFile(str(place / "batch.jsonl"), urls=URLS))


def test_a_request_is_read_as_it_stands(tmp_path: Path) -> None:
    (found,) = read(tmp_path, line())
    assert isinstance(found, BatchLine)
    assert (found.custom_id, found.url, found.body) == ("a", URLS[0], {"prompt": "hi"})


@pytest.mark.parametrize(
    ("content", "code", "param", "custom_id"),
    [
        (b"{", "invalid_json_line", None, None),
        (b"\xff\xfe", "invalid_json_line", None, None),
        (b"[1]", "invalid_json_line", None, None),
        (b'"text"', "invalid_json_line", None, None),
        (b'{"custom_id": "a", "body": NaN}', "invalid_json_line", None, None),
        (b'{"custom_id": "a", "body": 1e999}', "invalid_json_line", None, None),
        (b'{"custom_id": "a", "body": "\\ud800"}', "invalid_json_line", None, None),
        (b"[" * 100_000, "invalid_json_line", None, None),
        (line(...), "missing_required_parameter", "custom_id", None),
        (line(None), "missing_required_parameter", "custom_id", None),
        (line(7), "invalid_type", "custom_id", None),
        (line(""), "invalid_type", "custom_id", None),
        (line(method="GET"), "invalid_method", "method", "a"),
        (line(method=...), "invalid_method", "method", "a"),
        (line(url="/v1/images"), "invalid_url", "url", "a"),
        (line(url=["/v1/completions"]), "invalid_url", "url", "a"),
        (line(body=...), "invalid_request", "body", "a"),
        (line(body=[1]), "invalid_request", "body", "a"),
        (line(priority=1), "unknown_parameter", "priority", "a"),
    ],
)
def test_a_bad_line_says_why_and_the_others_go_on(
    content: Any, code: str, param: str | None, custom_id: str | None, tmp_path: Path
) -> None:
    before, bad, after = read(tmp_path, line("x"), content, line("y"))
    assert isinstance(before, BatchLine) and isinstance(after, BatchLine)
    assert isinstance(bad, BadLine)
    assert (bad.code, bad.param, bad.custom_id, bad.number) == (code, param, custom_id, 2)
    answer = bad.answer
    assert list(answer) == ["id", "custom_id", "response", "error"] and answer["response"] is None
    assert answer["error"] == {
        "code": code, "message": bad.message, "param": param, "line": 2,
    }  # fmt: skip
    json.dumps(answer, allow_nan=False)


def test_of_lines_with_one_custom_id_the_first_counts(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, line(), line(), line(body={"prompt": "other"}))
    assert isinstance(first, BatchLine)
    for other in (second, third):
        assert isinstance(other, BadLine)
        assert (other.code, other.custom_id) == ("duplicate_custom_id", "a")
    assert len({first.id, second.id, third.id}) == 3


def test_a_bad_line_does_not_take_a_custom_id_away(tmp_path: Path) -> None:
    bad, good = read(tmp_path, line(method="GET"), line())
    assert isinstance(bad, BadLine) and isinstance(good, BatchLine)


def test_ids_follow_the_content_and_not_the_place(tmp_path: Path) -> None:
    lines = [line("a"), line("b"), b"bad", line("c", body={"prompt": "x", "n": 2}), b"bad"]
    ids = [it.id for it in read(tmp_path, *lines)]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("batch_req_") and len(name) == 42 for name in ids)
    moved = read(tmp_path, lines[3], b"", lines[2], lines[1], line("new"), lines[4], lines[0])
    assert {it.id for it in moved} > set(ids)
    assert read(tmp_path, line("a", body={"prompt": "other"}))[0].id not in ids
    assert read(tmp_path, line("a", url=URLS[1]))[0].id not in ids
    spaced = b'{ "body": {"n": 2,"prompt":"x"}, "url":"/v1/completions", "method": "POST", '
    (same,) = read(tmp_path, spaced + b'"custom_id": "c"}\r')
    assert same.id == ids[3]


def test_blank_lines_a_byte_order_mark_and_gzip_are_no_matter(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r\n\r\n  \n"
    (tmp_path / "a.jsonl").write_bytes(content)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(content)
    plain, packed = (
        list(BatchFile(str(tmp_path / name), urls=URLS)) for name in ("a.jsonl", "a.jsonl.gz")
    )
    assert plain == packed and isinstance(plain[0], BatchLine) and len(plain) == 1


def test_it_can_be_read_again(tmp_path: Path) -> None:
    read(tmp_path, line("a"), line("a"), b"bad", b"bad")
    batch = BatchFile(str(tmp_path / "batch.jsonl"), urls=URLS)
    assert list(batch) == list(batch)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere.jsonl", "no such file"), ("rows.parquet", "a .jsonl"), ("torn.jsonl.gz", "read")],
)
def test_a_path_that_is_no_batch_file_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps(line()).encode())[:-9])
    with pytest.raises(DataError, match=words):
        list(BatchFile(str(tmp_path / name), urls=URLS))
