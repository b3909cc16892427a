"""`runner download` as a user runs it, with HF_ENDPOINT on a stand-in for the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run_cli
from hub_stand_in import HubStandIn, serving
from omegaconf import OmegaConf
from tiny_files import save_tiny_model

from runner.errors import ModelError, OutputError, ParameterError
from runner.jobs import download as job
from runner.models.digest import model_digest
from runner.models.load import load_model

DEFAULTS = {"dtype": "auto", "max_model_len": None}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as its author has it."""
    return save_tiny_model(tmp_path_factory.mktemp("author") / "model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A hub on this machine."""
    from huggingface_hub import constants

    with serving() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def download(path: str, place: Path, *, revision: str | None = None, **options: Any) -> None:
    model = {"path": path, "revision": revision, "trust_remote_code": False}
    model |= {name: options.pop(name, other) for name, other in DEFAULTS.items()}
    job.download(OmegaConf.create({"model": model, "output": {"dir": str(place)}}), **options)


def test_the_command_fetches_a_model_that_then_runs(tmp_path: Path, directory: Path) -> None:
    with serving() as hub:
        commit = hub.publish(directory, branch="v1")
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
        done = run_cli("download", "model.path=org/name@v1", cwd=tmp_path, **home)
        assert done.returncode == 0, done.stderr
        found = tmp_path / "models" / "org" / "name"
        assert f"Downloaded org/name@v1 (commit {commit[:12]}) to {found}." in done.stdout
        assert "%" in done.stderr, "its progress is shown"
        again = run_cli("download", "model.path=org/name@v1", cwd=tmp_path, **home)
        assert (again.returncode, again.stderr) == (
            2,
            f"error: {found} is there already: remove it, or choose another output.dir\n",
        )
        place = tmp_path / "elsewhere"
        place.mkdir()
        gated = run_cli("download", "model.path=org/gated", cwd=place, **home)
        assert gated.returncode == 2 and "it is gated; accept its terms" in gated.stderr
        assert list(place.iterdir()) == [], "nothing is left of it"
    loaded = load_model(str(found))
    assert (loaded.name, loaded.revision) == ("name", commit)
    assert loaded.digest == model_digest(directory), "wherever a model lies it is the same"
    assert list((tmp_path / "models" / "org").iterdir()) == [found]


def test_an_interrupted_download_goes_on_and_never_has_half_a_model(
    hub: HubStandIn, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(directory, **{"old.json": b"{}"})
    fetch = job.fetch

    def interrupted(*of: Any, **options: Any) -> None:
        fetch(*of, **options)
        (of[1] / "tokenizer.json").unlink()
        raise KeyboardInterrupt

    place = tmp_path / "models"
    with monkeypatch.context() as patch:
        patch.setattr(job, "fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download("org/name", place)
    assert not (place / "org" / "name").exists()
    before, commit = len(hub.fetched), hub.publish(directory)
    download("org/name", place)
    assert hub.names()[before:] == ["tokenizer.json"]
    found = place / "org" / "name"
    assert {it.name for it in found.iterdir()} - {it.name for it in directory.iterdir()} == {
        ".source"
    }
    source = json.loads((found / ".source").read_text())
    assert source == {"repository": "org/name", "commit": commit}


def test_a_download_into_the_cache_mends_what_is_damaged_there(
    hub: HubStandIn, directory: Path, tmp_path: Path, capsys: Any
) -> None:
    commit = hub.publish(directory)
    (tmp_path / "models").mkdir()
    download("org/name", tmp_path / "models", cache=True)
    assert not (tmp_path / "models").exists()
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / commit
    assert str(snapshot) in capsys.readouterr().out
    tokenizer = snapshot / "tokenizer.json"
    whole = tokenizer.read_bytes()
    tokenizer.resolve().write_bytes(whole[:100])
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be loaded"):
        load_model("org/name")
    download("org/name", tmp_path / "models", cache=True)
    assert tokenizer.read_bytes() == whole
    assert load_model("org/name").revision == commit


def test_gguf_files_share_a_directory(hub: HubStandIn, directory: Path, tmp_path: Path) -> None:
    hub.publish(directory, **{"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    place = tmp_path / "models"
    for name in ("a.gguf", "b.gguf"):
        download(f"org/name:{name}", place)
        with pytest.raises(OutputError, match=f"{name} is there already: remove it"):
            download(f"org/name:{name}", place)
    hub.publish(directory, **{"a.gguf": b"GGUF, another", "c.gguf": b"GGUF c"})
    download("org/name:c.gguf", place)
    found = {it.name: it.read_bytes() for it in (place / "org" / "name").iterdir()}
    assert found.pop("c.gguf") == b"GGUF c"
    assert found == {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("pkg://package/x.gguf", {}, ParameterError, "is here already: give a Hugging Face id"),
        ("here", {}, ParameterError, "is here already: give a Hugging Face id"),
        ("./there", {}, ModelError, "does not exist"),
        ("org/name@v2", {}, ModelError, "it has no revision 'v2'"),
        ("org/absent", {}, ModelError, "the hub has no such model"),
        ("org/name:c.gguf", {}, ModelError, "has no file 'c.gguf'"),
        ("org/name", {"dtype": "float32"}, ParameterError, "model.dtype=float32 is not allowed"),
        ("org/name", {"max_model_len": 5}, ParameterError, "model.max_model_len=5 is not allowed"),
        ("org/name", {"cache": 1}, ParameterError, "job.cache=1 is not allowed: true or false"),
    ],
)
def test_what_cannot_be_is_refused(
    hub: HubStandIn, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    path: str, options: dict[str, Any], error: type, message: str,
) -> None:  # fmt: skip
    hub.publish(directory)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(error, match=message) as caught:
        download(path, tmp_path / "models", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("models/org/[!.]*/*"))
