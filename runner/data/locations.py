"""What a path names: local files, files inside an installed package, or a Hugging Face id."""

import glob
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from runner.data.formats import ArrowRows, ParquetRows, RowFile
from runner.data.jsonl import JsonlRows
from runner.data.manifest import MANIFEST_FILE
from runner.data.sources import FileSource, Source
from runner.data.text_files import TEXT_SUFFIX, TextRows
from runner.errors import DataError, ParameterError

PACKAGE_SCHEME = "pkg://"

_OPENERS: dict[str, Callable[[Path], RowFile]] = {
    ".parquet": ParquetRows,
    ".jsonl": JsonlRows,
    ".jsonl.gz": JsonlRows,
    ".arrow": ArrowRows,
}
_SUFFIXES = ", ".join([*_OPENERS, TEXT_SUFFIX])
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]+$")


def open_rows(path: Path, *, text_lines: bool = False) -> RowFile:
    """Opens a file by its suffix; raises `DataError` for one that is not known."""
    if path.suffix == TEXT_SUFFIX:
        return TextRows(path, are_lines=text_lines)
    if text_lines:
        raise ParameterError(f"text_lines=True is for {TEXT_SUFFIX} files, and {path} is none")
    for suffix, opener in _OPENERS.items():
        if path.name.endswith(suffix):
            return opener(path)
    raise DataError(f"{path}: unknown suffix {path.suffix!r}; use one of {_SUFFIXES}")


def _is_rows_file(path: Path) -> bool:
    is_rows = path.name.endswith(tuple(_OPENERS)) and path.name != MANIFEST_FILE
    return is_rows and not path.name.startswith(".")


def open_source(
    path: str, *, name: str | None, split: str | None, text_lines: bool = False
) -> Source:
    """Opens what `path` names; raises `DataError` where there is nothing to read."""
    files = package_files(path) if path.startswith(PACKAGE_SCHEME) else local_files(path)
    if files is not None:
        for option, value in (("name", name), ("split", split)):
            if value is not None:
                raise ParameterError(f"{option}={value!r} is for Hugging Face ids, {path} is local")
        return FileSource([open_rows(file, text_lines=text_lines) for file in files])
    if text_lines:
        raise ParameterError(f"text_lines=True is for {TEXT_SUFFIX} files, and {path} is none")
    from runner.data.hub import HubSource

    return HubSource(path, name=name, split=split or "train")


def package_files(path: str) -> list[Path]:
    """Finds `pkg://package/file` without importing the package."""
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
    parts = PurePosixPath(inside).parts
    if not package.isidentifier() or not parts or ".." in parts or inside.startswith("/"):
        raise DataError(f"{path}: not of the form pkg://package/folder/file.jsonl")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise DataError(
            f"{path}: the package {package!r} is not installed; "
            f"`pip install {package.replace('_', '-')}` may bring it"
        )
    candidates = [Path(folder, inside) for folder in spec.submodule_search_locations or ()]
    found = [file for file in candidates if file.is_file()]
    if not found:
        raise DataError(f"{path}: the installed package {package!r} has no file {inside}")
    return found[:1]


def local_files(path: str) -> list[Path] | None:
    """Lists the files of a path, directory or glob; None where it can only be a hub id."""
    where = Path(path).expanduser()
    if where.is_file():
        return [where]
    if where.is_dir():
        # Text beside rows is about them: a README, a licence.
        texts = [file for file in where.iterdir() if file.suffix == TEXT_SUFFIX]
        found = sorted(filter(_is_rows_file, where.iterdir())) or sorted(texts)
    else:
        matches = map(Path, glob.glob(str(where), recursive=True))
        found = sorted(file for file in matches if file.is_file())
    if not found and not where.is_dir() and _could_be_hub_id(path):
        return None
    if not found:
        raise DataError(
            f"{path}: {'holds no file' if where.is_dir() else 'no such file, directory or match'} "
            f"of {_SUFFIXES} (a Hugging Face id is `name` or `owner/name`)"
        )
    return found


def _could_be_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not _FILE_SUFFIX.search(path)
