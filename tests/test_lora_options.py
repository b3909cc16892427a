"""The options of the group `lora`: what goes together, and which adapter a row uses."""

from pathlib import Path
from typing import Any

import pytest

from runner.errors import AdapterError, ParameterError
from runner.lora_options import LoraOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("french", "german"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapters.safetensors").write_text(name)
    return tmp_path


def both(folder: Path) -> dict[str, str]:
    return {"a": str(folder / "french"), "b": str(folder / "german")}


def test_without_options_every_row_has_the_model_as_it_is():
    options = LoraOptions.of({"adapters": None})
    assert options.of_row({"x": 1}) == [None]
    assert options.identity() == {} and options.paths == {} and not options.is_mixed


def test_one_path_is_for_every_row_by_the_name_of_its_directory(folder):
    options = LoraOptions(path=str(folder / "french"))
    assert options.of_row({}) == ["french"] == list(options.paths)


def test_a_column_chooses_and_null_is_the_model_as_it_is(folder):
    options = LoraOptions(adapters=both(folder), column="language")
    options.check_columns(["text", "language"])
    rows = [{"language": "a"}, {"language": None}, {"language": 3}]
    # A name that is not there is the row's own error, later.
    assert [options.of_row(row) for row in rows] == [["a"], [None], ["3"]]


def test_a_sweep_runs_every_row_with_each_and_with_none(folder):
    options = LoraOptions(adapters=both(folder), sweep=True)
    assert options.of_row({"language": "a"}) == [None, "a", "b"] and options.is_mixed


def test_what_decides_is_the_content_and_not_the_place(folder):
    before = LoraOptions(adapters=both(folder), sweep=True).identity()
    moved = (folder / "german").rename(folder / "deutsch")
    same = {"a": str(folder / "french"), "b": str(moved)}
    assert LoraOptions(adapters=same, sweep=True).identity() == before
    (moved / "adapters.safetensors").write_text("german, corrected")
    after = LoraOptions(adapters=same, sweep=True).identity()
    assert {name for name in before if before[name] != after[name]} == {"lora.adapters.b"}


def test_a_directory_that_is_watched_decides_by_its_name(folder):
    options = LoraOptions(watch=str(folder))
    assert options.of_row({}) == [folder.name]
    assert options.identity() == {"lora.watch": folder.name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "french", "adapters": True}, "lora.path and lora.adapters: give one"),
        ({"adapters": True, "column": "x", "sweep": True}, "lora.column and lora.sweep=true"),
        ({"column": "x"}, "lora.column=x is not allowed without lora.adapters"),
        ({"sweep": True}, "lora.sweep=True is not allowed without lora.adapters"),
        ({"swap": "now"}, "lora.swap='now' is not allowed: keep or update"),
        ({"swap": "update"}, "lora.swap=update is not allowed without lora.watch"),
        ({"watch": ".", "path": "french"}, "lora.watch is not allowed beside lora.path"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    if given.get("adapters"):
        given = given | {"adapters": both(folder)}
    with pytest.raises(ParameterError, match=message):
        LoraOptions(**given)


def test_adapters_without_a_way_to_choose_are_refused(folder):
    options = LoraOptions(adapters=both(folder))
    with pytest.raises(ParameterError, match="lora.adapters is not allowed alone"):
        options.check_columns(["text"])


def test_a_column_that_is_not_there_is_named_with_those_that_are(folder):
    options = LoraOptions(adapters=both(folder), column="lang")
    with pytest.raises(ParameterError, match="lang is not a column; there are text, language"):
        options.check_columns(["text", "language"])


def test_a_list_of_adapters_is_refused(folder):
    with pytest.raises(ParameterError, match=r"lora.adapters=\['a'\] is not allowed"):
        LoraOptions.of({"adapters": ["a"]})


def test_a_directory_without_an_adapter_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(AdapterError, match="is not an adapter: it has no adapter_config.json"):
        LoraOptions(path=str(folder / "empty"))


def test_how_a_row_chooses_decides_results_too(folder):
    """Each of them gives other rows, so that a run may not go on with another."""
    given = both(folder)
    found = [
        LoraOptions(),
        LoraOptions(path=given["a"]),
        LoraOptions(adapters=given, column="one"),
        LoraOptions(adapters=given, column="other"),
        LoraOptions(adapters=given, sweep=True),
        LoraOptions(watch=str(folder)),
    ]
    identities = [options.identity() for options in found]
    assert all(one not in identities[:place] for place, one in enumerate(identities))
    assert [options.is_mixed for options in found] == [False, False, True, True, True, False]
    same = LoraOptions(adapters=given, sweep=True, max_adapters=2)
    assert same.identity() == identities[4], "how many are held at once changes no result"


def test_a_path_of_dots_has_the_name_of_the_directory_itself(folder, monkeypatch):
    monkeypatch.chdir(folder / "french")
    assert LoraOptions(path=".").default == "french"
    assert LoraOptions(path="../german/").default == "german"
    assert LoraOptions(watch="..").default == folder.name


def test_names_and_directories_may_be_written_as_yaml_reads_them(folder):
    options = LoraOptions.of({"adapters": {1: folder / "french"}, "column": "step"})
    assert options.paths == {"1": str(folder / "french")}
    assert options.of_row({"step": 1}) == ["1"]
