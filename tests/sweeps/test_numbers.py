"""The numbers of a point: read from its files, typed in a table, drawn with their reach."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.errors import OutputError
from runner.sweeps import kept_model
from runner.sweeps.columns import typed_table, write_parquet
from runner.sweeps.kept_model import KeptModel
from runner.sweeps.numbers import read_numbers
from runner.sweeps.paired import Pair, Ratio
from runner.sweeps.picture import _panel, _shortened, _wrapped
from runner.sweeps.view import Line, Panel, View, view


def summary(directory: Path, **content: Any) -> dict[str, Any]:
    (directory / "summary.json").write_text(json.dumps(content))
    return read_numbers(directory)


def test_of_no_files_there_are_no_numbers(tmp_path):
    assert read_numbers(tmp_path) == {}
    assert summary(tmp_path) == {}


def test_errors_are_counted_of_all_kinds(tmp_path):
    found = summary(tmp_path, rows=9, errors={"PromptError": 3, "RewardError": 2}, run={})
    assert (found["rows"], found["errors"]) == (9, 5)
    assert found["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("run", "speed"),
    [
        ({"completion_tokens": 80, "scored_tokens": 10, "seconds": 2.0}, 40.0),
        ({"completion_tokens": 0, "scored_tokens": 10, "seconds": 2.0}, 5.0),
        ({"completion_tokens": 0, "scored_tokens": 0, "seconds": 2.0}, None),
        ({"completion_tokens": 80, "seconds": 0}, None),
    ],
    ids=["samples", "scores", "nothing to do", "no time"],
)
def test_the_speed_is_of_the_tokens_that_the_job_is_for(tmp_path, run, speed):
    assert summary(tmp_path, rows=1, run=run)["tokens_per_second"] == speed


def test_of_a_perplexity_the_numbers_are_columns_and_the_definition_is_not(tmp_path):
    found = summary(tmp_path, rows=1, perplexity={"token_perplexity": 9.5, "mode": "document"})
    assert found["token_perplexity"] == 9.5 and "mode" not in found


@pytest.mark.parametrize("content", ["{", '{"rows": ', "\udc80"])
def test_a_broken_summary_is_named(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match="summary.json: cannot be read"):
        read_numbers(tmp_path)


def test_a_file_that_is_no_mapping_has_none(tmp_path):
    (tmp_path / "summary.json").write_text("[1]")
    assert read_numbers(tmp_path) == {}


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 3], pa.int64(), [1, None, 3]),
        ([1, 0.5], pa.float64(), [1.0, 0.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([0, False, None], pa.string(), ["0", "false", None]),
        ([1, "x"], pa.string(), ["1", "x"]),
        (["a", [1, "b"], {"c": None}], pa.string(), ["a", '[1, "b"]', '{"c": null}']),
        ([None, None], pa.string(), [None, None]),
    ],
)
def test_a_column_has_one_type_or_what_was_written(values, kind, expected):
    table = typed_table([{"key": value} for value in values])
    assert table.schema.field("key").type == kind and table["key"].to_pylist() == expected


def test_a_key_that_a_point_lacks_is_null_there(tmp_path):
    table = typed_table([{"a": 1}, {"b": 2, "a": None}])
    assert table.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    write_parquet(tmp_path / "x.parquet", table)
    assert pq.read_table(tmp_path / "x.parquet").equals(table)
    assert [it.name for it in tmp_path.iterdir()] == ["x.parquet"], "nothing else is left"


def line(name: str, value: float, stderr: float | None, **numbers: float) -> Line:
    values: dict[str, Ratio | None] = {
        "bits_per_byte": Ratio(value=value, stderr=stderr, documents=4)
    }
    return Line(name=name, state="finished", numbers=numbers, values=values, to_first={})


def test_a_bar_reaches_as_far_as_95_percent(tmp_path):
    change = Pair(documents=4, left_out=0, value_a=1.0, value_b=1.5, difference=0.5, stderr=0.2)
    later = line("b", 1.5, 0.1)
    later = Line(**vars(later) | {"to_first": {"bits_per_byte": change}})
    values, differences = view([line("a", 1.0, 0.1), later]).panels
    assert values.bars == [pytest.approx((0.804, 1, 1.196)), pytest.approx((1.304, 1.5, 1.696))]
    assert differences.bars == [None, pytest.approx((0.108, 0.5, 0.892))]
    assert differences.is_difference and not values.is_difference
    (alone,) = view([line("a", 1.0, None)]).panels
    assert alone.bars == [(1.0, 1.0, 1.0)], "one document has no error bar"


def test_of_many_ratios_three_are_drawn_and_all_are_in_the_table():
    names = [f"w{i}_ratio_peer" for i in range(5)]
    numbers = {f"{name}{end}": 2.0 for name in names for end in ("", "_min", "_max")}
    lines = [Line(name=n, state="finished", numbers=numbers, values={}, to_first={}) for n in "ab"]
    found = view(lines)
    assert len(found.panels) == 3 and len(found.columns) == 5
    assert [panel.title for panel in found.panels] == [f"w{i}: times peer" for i in range(3)]


class Axes:
    """Notes what is written where; takes anything else."""

    def __init__(self) -> None:
        self.said: dict[float, str] = {}
        self.lines: list[tuple[Any, Any]] = []
        self.zero = False
        self.spines = _Spines()

    def annotate(self, label: str, place: tuple[float, float], **_: Any) -> None:
        self.said[place[1]] = label

    def text(self, _: float, place: float, label: str, **__: Any) -> None:
        self.said[place] = label

    def plot(self, xs: Any, ys: Any, *_: Any, **__: Any) -> None:
        self.lines.append((xs, ys))

    def axvline(self, *_: Any, **__: Any) -> None:
        self.zero = True

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _Spines:
    def __getitem__(self, _: Any) -> Any:
        return SimpleNamespace(set_visible=lambda _: None)


@pytest.mark.parametrize("is_difference", [False, True])
def test_every_point_has_its_own_number_or_its_state(is_difference):
    bars = [(0.5, 1.0, 1.5), None, (-2.5, -2.0, -1.5), None]
    panel = Panel(title="t", bars=bars, labels=["1.0", "", "-2.0", ""], is_difference=is_difference)
    states = ["finished", "failed", "finished", "finished"]
    axes = Axes()
    shown = View(names="abcd", states=states, columns=[], panels=[panel], notes=[])
    _panel(axes, panel, shown)
    minus = "\N{MINUS SIGN}"
    assert axes.said == {0: "1.0", 1: "failed", 2: f"{minus}2.0", 3: ""}
    assert [1.0] in [xs for xs, _ in axes.lines] and [-2.5, -1.5] in [xs for xs, _ in axes.lines]
    assert axes.zero == is_difference


def test_a_long_name_is_cut_behind_commas_and_keeps_its_ends():
    name = "path=" + "x" * 50 + "end,kv_bits=8"
    assert _wrapped(name).endswith("\nkv_bits=8")
    assert max(map(len, _wrapped(name).splitlines())) <= 34
    short = _shortened("path=" + "x" * 50 + "end")
    assert short.startswith("path=x") and short.endswith("xend") and len(short) == 33
    assert _shortened("kv_bits=8") == "kv_bits=8"


@pytest.fixture
def loads(monkeypatch) -> dict[str, Any]:
    """A loader without models: what it was asked, and the digest that files have now."""
    found: dict[str, Any] = {"asked": [], "digest": "1", "alive": []}

    def load(path: str, **options: Any) -> SimpleNamespace:
        found["asked"].append((path, options))
        return SimpleNamespace(path=path)

    monkeypatch.setattr(kept_model, "load_model", load)
    monkeypatch.setattr(kept_model, "resolve_model", lambda path, **_: path)
    monkeypatch.setattr(kept_model, "model_digest", lambda path: found["digest"])
    return found


def test_the_same_model_is_loaded_once(loads):
    kept = KeptModel()
    one = kept.load("a", dtype="float32", max_model_len=None)
    assert kept.load("a", max_model_len=None, dtype="float32") is one
    assert len(loads["asked"]) == 1


@pytest.mark.parametrize(
    "change", [{"path": "b"}, {"revision": "r"}, {"dtype": "float16"}, {"digest": "2"}]
)
def test_another_path_revision_option_or_content_is_another_model(loads, change):
    kept, given = KeptModel(), {"path": "a", "revision": None, "dtype": "float32"}
    one = kept.load(**given)
    loads["digest"] = change.pop("digest", "1")
    other = kept.load(**(given | change))
    assert other is not one and len(loads["asked"]) == 2
    assert kept.load(**(given | change)) is other
    loads["digest"] = "1"
    assert kept.load(**given) is not one, "two are never kept"


def test_each_run_says_how_much_memory_it_took(loads):
    import mlx.core as mx

    kept = KeptModel()
    kept.load("a")
    mx.eval(mx.zeros((1 << 20,)))
    assert mx.get_peak_memory() >= 4 << 20
    kept.load("a")
    assert mx.get_peak_memory() < 4 << 20


def test_a_model_that_cannot_be_loaded_leaves_none_behind(loads, monkeypatch):
    kept = KeptModel()
    kept.load("a")
    plain = kept_model.load_model

    def fails(path: str, **options: Any) -> Any:
        raise OSError("no such file")

    monkeypatch.setattr(kept_model, "load_model", fails)
    with pytest.raises(OSError, match="no such file"):
        kept.load("b")
    monkeypatch.setattr(kept_model, "load_model", plain)
    kept.load("b")
    kept.load("a")
    assert [path for path, _ in loads["asked"]] == ["a", "b", "a"]
