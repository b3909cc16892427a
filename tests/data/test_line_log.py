"""A log of lines: what was committed stays, what was torn goes, and nothing is taken for whole."""

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.line_log import LineLog
from runner.errors import OutputError, StoppedError

LINES = [b"one", b"two", b"three"]


def written(path: Path, lines: list[bytes]) -> LineLog:
    log = LineLog(path)
    list(log.read())
    log.open()
    for line in lines:
        log.append(line)
    return log


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    written(tmp_path / "log", LINES).close()
    assert list(LineLog(tmp_path / "log").read()) == LINES


def test_there_is_nothing_to_read_before_the_first_line(tmp_path: Path) -> None:
    assert list(LineLog(tmp_path / "log").read()) == []


def test_reading_makes_no_file(tmp_path: Path) -> None:
    list(LineLog(tmp_path / "log").read())
    assert list(tmp_path.iterdir()) == []


@given(cut=st.integers(0, len(b"one\ntwo\nthree\n")))
def test_cut_anywhere_the_whole_lines_count_and_appending_goes_on_after_them(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(b"one\ntwo\nthree\n"[:cut])
    whole = [line for end, line in zip((4, 8, 14), LINES, strict=True) if cut >= end]
    assert list(LineLog(path).read()) == whole
    written(path, [b"four"]).close()
    assert list(LineLog(path).read()) == [*whole, b"four"]
    assert path.read_bytes() == b"".join(line + b"\n" for line in [*whole, b"four"])


def test_zeros_of_a_lost_page_and_what_follows_them_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw\0\0\0\0\0\nthree\n")
    assert list(LineLog(path).read()) == [b"one"]
    written(path, [b"two"]).close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_what_another_wrote_since_the_reading_is_not_overlooked(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "log")
    assert list(log.read()) == []
    written(tmp_path / "log", LINES).close()
    with pytest.raises(OutputError, match="start again"):
        log.open()
    assert list(LineLog(tmp_path / "log").read()) == LINES


def test_what_the_disk_refuses_is_taken_back_and_the_lines_before_stay(tmp_path: Path) -> None:
    log = written(tmp_path / "log", LINES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(StoppedError, match="log: .*the same command goes on"):
            log.append(b"longer than the six bytes that are left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(LineLog(tmp_path / "log").read()) == LINES
    log.append(b"four")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\nfour\n"
