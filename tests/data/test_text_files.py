"""Plain text as rows: a file each, or its lines."""

from pathlib import Path

import pytest

from runner.data import Dataset
from runner.errors import DataError, ParameterError


def texts(path: Path, **options) -> list[str]:
    return [row["text"] for row in Dataset(path=str(path), **options)]


def test_a_file_is_a_row_and_keeps_every_character(tmp_path):
    content = "\ufeffone\r\n\n two \t\n世界"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path / "a.txt") == [content.removeprefix("\ufeff")]
    assert texts(tmp_path) == [content.removeprefix("\ufeff"), "b"]
    dataset = Dataset(path=str(tmp_path / "*.txt"), offset=1)
    assert list(dataset) == [{"text": "b", "file": "b.txt"}] and dataset.prompt_column == "text"
    assert texts(tmp_path / "a.txt", text_lines=True) == ["one", " two \t", "世界"]


def test_many_lines_are_read_in_batches_and_may_be_shuffled(tmp_path):
    lines = [f"line {number}" for number in range(3000)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    assert texts(tmp_path / "a.txt", text_lines=True) == lines
    shuffled = texts(tmp_path / "a.txt", text_lines=True, shuffle_seed=1, limit=2000)
    assert len(set(shuffled)) == 2000 and shuffled != lines[:2000]


def test_text_beside_rows_is_not_taken_for_rows(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("a licence")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    assert [row["prompt"] for row in Dataset(path=str(tmp_path))] == ["x"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for text_lines in (False, True):
        with pytest.raises(DataError, match=r"a\.txt: is empty"):
            texts(tmp_path / "a.txt", text_lines=text_lines)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: is not UTF-8"):
        texts(tmp_path / "a.txt", text_lines=True)
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8"):
        texts(tmp_path / "a.txt")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ParameterError, match=r"text_lines=True is for \.txt files"):
        texts(tmp_path / "rows.jsonl", text_lines=True)
