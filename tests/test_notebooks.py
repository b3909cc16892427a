"""Every notebook runs from its first cell to its last, and is stored without outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


# Jupyter's own event loop and sockets warn at exit.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.real_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RL_LOOP_STEPS", "2")
    notebook = read(path)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
