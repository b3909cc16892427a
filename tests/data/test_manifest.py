"""The manifest: a line a commit, read back as written, whatever a crash left at its end."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.durable import append_line, replace_file
from runner.data.manifest import MANIFEST_FILE, OLD_MANIFEST_FILE, Manifest, Part, part_name
from runner.errors import OutputError

IDENTITY = {"model.weights": "ab", "sampling.seed": 0, "sampling.stop": ("\n",), "reward": None}
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
IDENTITIES = st.dictionaries(st.sampled_from("abcd"), VALUES)
HEADER = {"format_version": 2, "identity": {}}
PART = {
    "file": "part-00000.arrow", "rows": 2, "groups": 1, "bytes": 9, "digest": "00", "totals": {},
}  # fmt: skip


def part(number: int, rows: int = 3) -> Part:
    return Part(file=part_name(number), rows=rows, groups=rows, bytes=9, digest="00")


def saved(folder: Path, *lines: Any) -> Path:
    path = folder / MANIFEST_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def written(folder: Path) -> Manifest:
    """Three commits, the last of which takes the place of the first, and a job that is done."""
    manifest = Manifest(identity=IDENTITY)
    manifest.create(folder)
    manifest.commit(folder, [part(0)])
    manifest.commit(folder, [part(1)])
    manifest.commit(folder, [part(2), part(3, 1)], ["part-00000.arrow"])
    manifest.finish(folder, complete=True, input=[["rows.jsonl", 5, 7]])
    return manifest


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [it.file for it in manifest.parts] == [part_name(i) for i in (1, 2, 3)]
    assert manifest.complete and manifest.input == [["rows.jsonl", 5, 7]]
    assert os.listdir(tmp_path) == [MANIFEST_FILE]
    manifest.commit(tmp_path, [part(4)])
    assert not manifest.complete and manifest.input is None


def test_it_is_a_line_of_json_for_each_commit(tmp_path: Path) -> None:
    manifest = Manifest(identity={"seed": 0})
    manifest.create(tmp_path)
    manifest.commit(tmp_path, [Part(**PART)])
    manifest.finish(tmp_path, complete=True)
    lines = (tmp_path / MANIFEST_FILE).read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"format_version": 2, "identity": {"seed": 0}},
        {"add": [PART], "drop": []},
        {"complete": True, "input": None},
    ]


def test_a_commit_writes_no_more_than_its_line(tmp_path: Path) -> None:
    manifest = Manifest(identity=IDENTITY)
    manifest.create(tmp_path)
    sizes = [manifest.size]
    for number in range(50):
        manifest.commit(tmp_path, [part(number)])
        sizes.append((tmp_path / MANIFEST_FILE).stat().st_size)
    grown = {after - before for before, after in zip(sizes, sizes[1:], strict=False)}
    assert len(grown) == 1, "the rest is left as it is"


@pytest.mark.parametrize("tail", [b"", b"\0" * 7, b"\0" * 7 + b"\n", b'{"add":[', b"\xff\n\n"])
def test_wherever_it_is_cut_the_lines_before_count(tmp_path: Path, tail: bytes) -> None:
    written(tmp_path)
    path = tmp_path / MANIFEST_FILE
    content = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(ends[0], len(content) + 1):
        path.write_bytes(content[:cut] + (tail if cut not in ends or tail else b""))
        manifest = Manifest.load(tmp_path)
        assert manifest is not None
        assert manifest.size == max(end for end in ends if end <= cut), cut


def test_a_torn_tail_is_overwritten_by_the_next_commit(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / MANIFEST_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"add":[{"file":"part-00004.arrow","rows":123456789,' + b"x" * 999)
    manifest = Manifest.load(tmp_path)
    manifest.commit(tmp_path, [part(4)])
    assert path.read_bytes().startswith(whole) and b"x" not in path.read_bytes()
    assert Manifest.load(tmp_path) == manifest


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    assert manifest.next_number == 4
    manifest.commit(tmp_path, [], ["part-00003.arrow"])
    assert manifest.next_number == Manifest.load(tmp_path).next_number == 4


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path) is None
    assert Manifest.load(tmp_path / "nowhere") is None


def test_differences_name_key_old_and_new_value() -> None:
    other = {**IDENTITY, "sampling.seed": 1, "data.limit": 5}
    del other["reward"]
    assert Manifest(identity=IDENTITY).differences(other) == [
        "data.limit: not set -> 5",
        "reward: null -> not set",
        "sampling.seed: 0 -> 1",
    ]
    assert Manifest(identity=IDENTITY).differences(IDENTITY) == []


@given(one=IDENTITIES, other=IDENTITIES)
def test_there_are_differences_exactly_where_identities_differ(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    keys = {line.partition(":")[0] for line in Manifest(identity=one).differences(other)}
    # As JSON, because 1 == True in Python and not in a manifest.
    shown = [{key: json.dumps(value) for key, value in x.items()} for x in (one, other)]
    assert keys == {k for k in "abcd" if shown[0].get(k) != shown[1].get(k)}


@pytest.mark.parametrize(
    "lines",
    [
        [{"identity": {}}],
        [{**HEADER, "identity": []}],
        [HEADER, {"complete": "yes", "input": None}],
        [HEADER, {"add": None, "drop": []}],
        [HEADER, {"add": [PART], "drop": ["part-00007.arrow"]}],
        [HEADER, {"add": [{"file": "part-00000.arrow"}], "drop": []}],
        [HEADER, {"add": [PART | {"file": "../elsewhere.arrow"}], "drop": []}],
        [HEADER, {"add": [PART | {"rows": "many"}], "drop": []}],
        [HEADER, {"add": [PART | {"rows": True}], "drop": []}],
        [HEADER, {"more": 1}],
        [HEADER, []],
    ],
)
def test_a_manifest_with_other_content_is_refused(tmp_path: Path, lines: Any) -> None:
    path = saved(tmp_path, *lines)
    with pytest.raises(OutputError, match="not a manifest of results") as raised:
        Manifest.load(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"null\n", b"\xff\n", b"\n\n"])
def test_a_manifest_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(OutputError, match="not a manifest of results"):
        Manifest.load(tmp_path)
    assert Manifest.load(tmp_path, tolerant=True).by_file == {}


def test_damage_before_a_line_that_counts_is_no_torn_tail(tmp_path: Path) -> None:
    path = saved(tmp_path, HEADER, {"add": [PART], "drop": []}, {"complete": True, "input": None})
    path.write_bytes(path.read_bytes().replace(b'{"add"', b'{"a\0d"'))
    with pytest.raises(OutputError, match="not a manifest of results"):
        Manifest.load(tmp_path)


def test_another_format_version_is_named(tmp_path: Path) -> None:
    saved(tmp_path, HEADER | {"format_version": 3})
    with pytest.raises(OutputError, match="format_version 3, this program knows 2"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / OLD_MANIFEST_FILE).write_text("{}")
    with pytest.raises(OutputError, match=r"json: format_version 1, .*output\.overwrite=true"):
        Manifest.load(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"old") and None)

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], "and frees its space"
    replace_file(path, lambda file: file.write(b"new") and None)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_file_and_directory_are_flushed_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    replace_file(tmp_path / "file", lambda file: file.write(b"x") and None)
    assert events == ["sync", "rename", "sync"]
    append_line(tmp_path / "file", b"y\n", size=1)
    assert events[3:] == ["sync"] and (tmp_path / "file").read_bytes() == b"xy\n"
