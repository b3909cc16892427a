"""`lora.watch`: an adapter that is written into a directory serves once it is whole."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from runner import adapter_watch
from runner.adapter_watch import AdapterWatch
from runner.errors import AdapterError


class Loads:
    """Stands for an `LLM`: notes what it is given to load."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.error: AdapterError | None = None

    def load_adapter(self, name: str, path: Path, mode: str = "keep") -> int:
        if self.error is not None:
            raise self.error
        self.calls.append((name, path.name, mode))
        return len(self.calls)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, a second later at every look."""
    now = [0.0]

    def later() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(adapter_watch.time, "monotonic", later)
    return now


def write(folder: Path, *, age: int, content: str = "weights") -> None:
    folder.mkdir(exist_ok=True)
    for name, text in (("adapters.safetensors", content), ("adapter_config.json", "{}")):
        (folder / name).write_text(text)
        os.utime(folder / name, ns=(age, age))


def watch(folder: Path, llm: Any) -> AdapterWatch:
    one = AdapterWatch(str(folder), "policy")
    one.start(llm)
    return one


@pytest.mark.parametrize("names", [("step-1", "step-2"), ("step-9", "step-10"), ("b", "a")])
def test_the_newest_of_a_directory_serves_first_whatever_its_name(tmp_path, clock, names):
    for age, name in enumerate(names):
        write(tmp_path / name, age=1 + age)
    watch(tmp_path, llm := Loads())
    assert llm.calls == [("policy", names[1], "keep")]


def test_a_directory_may_be_an_adapter_itself(tmp_path, clock):
    write(tmp_path, age=1)
    watch(tmp_path, llm := Loads())
    assert llm.calls == [("policy", tmp_path.name, "keep")]


def test_a_new_one_is_taken_in_once_it_has_stood_unchanged(tmp_path, clock):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    write(tmp_path / "step-2", age=2, content="half")
    one.look(llm, "update")
    write(tmp_path / "step-2", age=3, content="the whole")
    one.look(llm, "update")
    assert len(llm.calls) == 1, "it was still being written"
    one.look(llm, "update")
    assert llm.calls[1:] == [("policy", "step-2", "update")]
    one.look(llm, "update")
    assert len(llm.calls) == 2, "what serves already is not loaded again"


def look(one: AdapterWatch, llm: Any, *, times: int = 3) -> None:
    for _ in range(times):
        one.look(llm, "keep")


def test_looks_that_follow_too_soon_are_left_out(tmp_path, monkeypatch):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    monkeypatch.setattr(adapter_watch.time, "monotonic", lambda: 0.1)
    write(tmp_path / "step-2", age=2)
    look(one, llm, times=5)
    assert len(llm.calls) == 1


def test_one_that_is_older_than_what_serves_is_no_news(tmp_path, clock):
    write(tmp_path / "step-2", age=2)
    one = watch(tmp_path, llm := Loads())
    write(tmp_path / "step-1", age=1)
    look(one, llm)
    assert len(llm.calls) == 1


def test_weights_written_again_in_their_place_are_news(tmp_path, clock):
    """Of the same name: a later time is enough, or another size."""
    write(tmp_path, age=1)
    one = watch(tmp_path, llm := Loads())
    write(tmp_path, age=2)
    look(one, llm)
    write(tmp_path, age=2, content="longer weights")
    look(one, llm)
    assert len(llm.calls) == 3


def test_one_that_does_not_fit_does_not_stop_the_next(tmp_path, clock):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    llm.error = AdapterError("a tensor does not fit")
    write(tmp_path / "step-2", age=2)
    with pytest.warns(UserWarning, match="lora.watch goes on"):
        look(one, llm)
    llm.error = None
    write(tmp_path / "step-3", age=3)
    look(one, llm)
    assert llm.calls[1:] == [("policy", "step-3", "keep")]


def test_one_without_weights_is_no_adapter_yet(tmp_path, clock):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "adapter_config.json").write_text("{}")
    look(one, llm)
    assert len(llm.calls) == 1


def test_one_that_does_not_fit_is_warned_of_once_and_the_old_one_serves_on(tmp_path, clock):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    write(tmp_path / "step-2", age=2)
    llm.error = AdapterError("a tensor does not fit")
    one.look(llm, "keep")
    with pytest.warns(UserWarning, match="adapter of before: a tensor does not fit"):
        one.look(llm, "keep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.look(llm, "keep")


def test_all_that_is_gone_leaves_the_one_that_serves(tmp_path, clock):
    write(tmp_path / "step-1", age=1)
    one = watch(tmp_path, llm := Loads())
    for file in (tmp_path / "step-1").iterdir():
        file.unlink()
    look(one, llm)
    assert len(llm.calls) == 1


def test_an_empty_directory_is_refused_at_the_start(tmp_path):
    with pytest.raises(AdapterError, match="has no adapter yet"):
        AdapterWatch(str(tmp_path), "policy").start(Loads())
