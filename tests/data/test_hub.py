"""Hub datasets: the same contract as files, on a streamed dataset that is made here."""

from typing import Any

import datasets
import pyarrow as pa
import pytest

from runner.data import Dataset, hub
from runner.errors import DataError

ROWS = [{"prompt": f"p{i}", "answer": i} for i in range(8)]


def streamed(with_features: bool = True) -> Any:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.Value("int64")}
    )
    return datasets.IterableDataset.from_generator(
        lambda: iter(ROWS), features=features if with_features else None
    )


@pytest.fixture(autouse=True)
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that were looked up on a hub that knows them all."""
    asked: list[str] = []
    monkeypatch.setattr("runner.data.hub._look_up", asked.append)
    return asked


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return streamed(with_features=args[1] != "unknown")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_rows_and_schema(asked: list[Any]) -> None:
    rows = Dataset(path="owner/rows", name="main")
    assert asked == [(("owner/rows", "main"), {"split": "train", "streaming": True})]
    assert rows.schema == pa.schema([("prompt", pa.string()), ("answer", pa.int64())])
    assert list(rows) == ROWS
    assert list(rows) == ROWS
    assert rows.num_rows is None


def test_the_schema_is_found_in_the_first_rows_where_the_hub_does_not_say(
    asked: list[Any],
) -> None:
    rows = Dataset(path="owner/rows", name="unknown", split="test")
    assert asked[0][1]["split"] == "test"
    assert rows.columns == ["prompt", "answer"]
    assert list(rows) == ROWS


@pytest.mark.parametrize(("offset", "limit"), [(0, 3), (2, None), (2, 3), (6, 10)])
def test_offset_and_limit(asked: list[Any], offset: int, limit: int | None) -> None:
    rows = Dataset(path="owner/rows", offset=offset, limit=limit)
    assert list(rows) == (ROWS[offset:] if limit is None else ROWS[offset : offset + limit])


def test_shuffling_is_reproducible(asked: list[Any]) -> None:
    first = list(Dataset(path="owner/rows", shuffle_seed=1))
    assert first == list(Dataset(path="owner/rows", shuffle_seed=1))
    assert first != ROWS
    assert sorted(first, key=lambda row: row["answer"]) == ROWS


def test_a_split_that_states_its_size_gives_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = streamed()
    splits = datasets.splits.SplitDict()
    splits.add(datasets.SplitInfo(name="train", num_examples=8))
    stream.info.splits = splits
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    assert Dataset(path="owner/rows", offset=3, limit=10).num_rows == 5


def test_errors_while_asking_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> Any:
        raise ValueError("Unknown split.\nShould be one of ['test']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/rows: .* cannot be read: Unknown split\.$"):
        Dataset(path="owner/rows")


def test_errors_while_reading_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise ConnectionError("gone")

    features = streamed().features
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    with pytest.raises(DataError, match="cannot be read"):
        list(Dataset(path="owner/rows"))


def test_an_id_that_cannot_be_looked_up_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: str) -> None:
        raise ConnectionError("no network")

    def load_dataset(*args: Any, **options: Any) -> None:
        raise AssertionError("retries for half a minute")

    monkeypatch.setattr("runner.data.hub._look_up", fail)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="no network"):
        hub.HubSource("org/name", name=None, split="train")
