"""What `import runner` offers: it imports, it is documented, and it is cheap to name."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import runner

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", runner.__all__)
def test_every_public_name_imports_and_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(runner, name))


@pytest.mark.parametrize("name", runner.__all__)
def test_every_public_method_has_a_docstring(name: str) -> None:
    members = inspect.getmembers(getattr(runner, name), inspect.isfunction)
    bare = [method for method, it in members if method[0] != "_" and not inspect.getdoc(it)]
    assert bare == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runner.nothing


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, runner; print(*{'mlx', 'datasets', 'pyarrow', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_version_is_the_distributions() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{runner.__version__}"' in text
