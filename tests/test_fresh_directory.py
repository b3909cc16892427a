"""A directory that is there whole or not at all."""

from pathlib import Path

import pytest

from runner.errors import OutputError, StoppedError
from runner.fresh_directory import check_fresh, fresh_directory


def test_it_gets_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with fresh_directory(target) as directory:
        (directory / "file").write_text("x")
        assert not target.exists() and directory.parent == target.parent
    assert [it.name for it in target.iterdir()] == ["file"]
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_one_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    check_fresh(target)
    with fresh_directory(target) as directory:
        (directory / "file").write_text("x")
    for taken in (target, target / "file"):
        with pytest.raises(OutputError, match=f"{taken.name} is there already"):
            check_fresh(taken)
        with pytest.raises(OutputError, match="is there already"), fresh_directory(taken):
            pass
    assert (target / "file").read_text() == "x"


@pytest.mark.parametrize("resumes", [False, True])
def test_what_an_error_leaves(tmp_path: Path, resumes: bool) -> None:
    target = tmp_path / "b"
    target.mkdir()
    with pytest.raises(ValueError), fresh_directory(target, resumes=resumes) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
        raise ValueError
    assert not target.exists()
    assert [it.name for it in tmp_path.iterdir()] == ([".b.partial"] if resumes else [])
    with fresh_directory(target, resumes=resumes) as directory:
        assert (directory / "sub" / "file").exists() == resumes
    assert (target / "sub").exists() == resumes


def test_an_error_before_anything_is_written_leaves_nothing(tmp_path: Path) -> None:
    for resumes in (False, True):
        with pytest.raises(ValueError), fresh_directory(tmp_path / "a" / "b", resumes=resumes):
            raise ValueError
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_or_used(tmp_path: Path) -> None:
    for resumes in (False, True):
        left = tmp_path / ".b.partial"
        left.mkdir()
        (left / "half").write_text("x")
        target = tmp_path / f"b{resumes}"
        left.rename(tmp_path / f".{target.name}.partial")
        with fresh_directory(target, resumes=resumes):
            pass
        assert (target / "half").exists() == resumes


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with fresh_directory(target) as directory:
        (directory / "file").write_text("x")
        with (
            pytest.raises(OutputError, match="another process writes there"),
            fresh_directory(target),
        ):
            pass
        assert (directory / "file").exists(), "the second leaves the first alone"
    assert (target / "file").exists()


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    said = pytest.raises(StoppedError, match="cannot be written: No space left")
    with said, fresh_directory(tmp_path / "b"):
        raise OSError(28, "No space left on device")
