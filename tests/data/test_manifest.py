"""The manifest: read back as written, replaced whole, and refused where it is not one."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.durable import replace_file
from runner.data.manifest import MANIFEST_FILE, Manifest, Part
from runner.errors import OutputError

IDENTITY = {"model.path": "tiny", "sampling.seed": 0, "sampling.stop": ("\n",), "reward": None}
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
IDENTITIES = st.dictionaries(st.sampled_from("abcd"), VALUES)


def saved(folder: Path, **changes: Any) -> Path:
    content = {
        "format_version": 1,
        "identity": {},
        "parts": [{"file": "part-00000.arrow", "rows": 2}],
        "complete": False,
        **changes,
    }
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return path


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    parts = [Part(file="part-00000.arrow", rows=3), Part(file="part-00001.arrow", rows=1)]
    manifest = Manifest(identity=IDENTITY, parts=parts, complete=True)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert os.listdir(tmp_path) == [MANIFEST_FILE]


def test_it_is_plain_json(tmp_path: Path) -> None:
    Manifest(identity={"seed": 0}, parts=[Part(file="part-00000.arrow", rows=3)]).save(tmp_path)
    assert json.loads((tmp_path / MANIFEST_FILE).read_text()) == {
        "format_version": 1,
        "identity": {"seed": 0},
        "parts": [{"file": "part-00000.arrow", "rows": 3}],
        "complete": False,
    }


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
    "changes",
    [
        {"identity": []},
        {"complete": "yes"},
        {"parts": None},
        {"parts": [{"file": "part-00000.arrow"}]},
        {"parts": [{"file": "../elsewhere.arrow", "rows": 1}]},
        {"parts": [{"file": "part-00000.arrow", "rows": "many"}]},
        {"parts": ...},
        {"more": 1},
    ],
)
def test_a_manifest_with_other_content_is_refused(tmp_path: Path, changes: Any) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(OutputError, match="not a manifest of results") as raised:
        Manifest.load(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(OutputError, match="not a manifest of results"):
        Manifest.load(tmp_path)


def test_another_format_version_is_named(tmp_path: Path) -> None:
    saved(tmp_path, format_version=2)
    with pytest.raises(OutputError, match="format_version 2, this program knows 1"):
        Manifest.load(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"old") and None)

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
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
