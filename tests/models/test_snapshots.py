"""Models from a stand-in for the hub: what is fetched, what is refused, what is done again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn, serving
from tiny_files import save_tiny_model

from runner.errors import ModelError
from runner.models.hub import resolve_model
from runner.models.load import load_model
from runner.models.reference import HubReference
from runner.models.snapshots import clear_traces, download

NAME = HubReference("org/name")
UNUSED = {
    "pytorch_model.bin": b"weights in another form",
    "consolidated.safetensors": b"and in yet another",
    "onnx/config.json": b"{}",
    "tok.py": b"raise RuntimeError",
    "README.md": b"# Read me",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as its author has it."""
    return save_tiny_model(tmp_path_factory.mktemp("author") / "model")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub on this machine, and a cache with nothing in it."""
    from huggingface_hub import constants

    with serving() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # Between tries of its client.
        yield hub


def names(found: Path) -> set[str]:
    return {str(it.relative_to(found)) for it in found.rglob("*") if it.is_file()}


def test_only_the_needed_files_are_fetched_and_only_once(hub: HubStandIn, directory: Path) -> None:
    commit = hub.publish(directory, **UNUSED)
    found = resolve_model("org/name")
    assert found.name == commit
    assert names(found) == names(directory)
    assert sorted(hub.names()) == sorted(names(directory))
    assert resolve_model("org/name") == found
    assert len(hub.names()) == len(names(directory))
    assert names(resolve_model("org/name", trust_remote_code=True)) == names(directory) | {"tok.py"}


def test_a_revision_is_a_branch_or_a_commit(hub: HubStandIn, directory: Path) -> None:
    old = hub.publish(directory, branch="refs/pr/1")
    new = hub.publish(directory, **{"added.json": b"{}"})
    assert old != new
    assert resolve_model("org/name@refs/pr/1").name == old
    assert resolve_model(f"org/name@{old}").name == old
    assert resolve_model("org/name", revision=new).name == new
    loaded = load_model(f"org/name@{old}")
    assert (loaded.name, loaded.revision) == ("org/name", old)
    with pytest.raises(ModelError, match="'org/name' cannot be downloaded: it has no revision 'v'"):
        resolve_model("org/name@v")


def test_one_gguf_file_or_all_of_its_parts(hub: HubStandIn, directory: Path) -> None:
    parts = {f"sub/x-0000{part}-of-00002.gguf": b"GGUF%d" % part for part in (1, 2)}
    hub.publish(directory, **{"a.gguf": b"GGUF", "b.gguf": b"GGUF!"}, **parts)
    found = resolve_model("org/name:a.gguf")
    assert (found.name, found.read_bytes(), hub.names()) == ("a.gguf", b"GGUF", ["a.gguf"])
    first = resolve_model("org/name:sub/x-00001-of-00002.gguf")
    assert names(first.parent) == {"x-00001-of-00002.gguf", "x-00002-of-00002.gguf"}
    with pytest.raises(ModelError, match="model 'org/name' has no file 'c.gguf'"):
        resolve_model("org/name:c.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "it is gated; accept its terms"),
        ("absent", "the hub has no such model; check the id"),
        ("private", r"the hub refuses the token \(401\); run `hf auth login` or check HF_TOKEN"),
        ("forbidden", r"the hub refuses the token \(403\); run `hf auth login` or check HF_TOKEN"),
    ],
)
def test_a_refusal_is_one_line_in_a_download(hub: HubStandIn, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"'org/{name}' cannot be downloaded: {said}") as caught:
        download(HubReference(f"org/{name}"), None)
    assert "\n" not in str(caught.value)


def test_offline_takes_what_the_cache_has_whole(
    hub: HubStandIn, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.publish(directory)
    found = resolve_model("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/name") == found
    for path in ("org/other", "org/name@v2"):
        with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set and the cache lacks it"):
            resolve_model(path)
    (found / "config.json").unlink()
    with pytest.raises(ModelError, match="or parts of it"):
        resolve_model("org/name")


def test_weights_that_were_cut_short_are_fetched_again(hub: HubStandIn, directory: Path) -> None:
    hub.publish(directory)
    weights = resolve_model("org/name") / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (len(whole) - 1, 100, 3, 0):
        weights.resolve().write_bytes(whole[:kept])
        assert (resolve_model("org/name") / "model.safetensors").read_bytes() == whole
    assert hub.names().count("model.safetensors") == 5


@pytest.mark.parametrize("into_cache", [True, False])
def test_a_download_compares_every_file_with_the_hub(
    hub: HubStandIn, directory: Path, tmp_path: Path, into_cache: bool
) -> None:
    commit = hub.publish(directory)
    place = None if into_cache else tmp_path / "place"
    assert download(NAME, place)[1] == commit
    found, _ = download(NAME, place)
    assert len(hub.names()) == len(names(directory)), "what is whole stays"
    for name, spoil in (
        ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("tokenizer.json", lambda content: content[:-1]),
        ("config.json", lambda content: content.replace(b"1", b"2", 1)),
    ):
        whole = (found / name).read_bytes()
        (found / name).resolve().write_bytes(spoil(whole))
        download(NAME, place)
        assert (found / name).read_bytes() == whole
        assert hub.names().count(name) == 2


def test_a_connection_that_ends_early_goes_on_where_it_was(
    hub: HubStandIn, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.publish(directory)
    hub.cut["model.safetensors"] = 1000
    found, _ = download(NAME, tmp_path / "place")
    ranges = [asked for name, asked in hub.fetched if name == "model.safetensors"]
    assert ranges[0] is None and ranges[1] == "bytes=1000-"
    weights = "model.safetensors"
    assert (found / weights).read_bytes() == (directory / weights).read_bytes()


def test_what_the_hub_sends_wrong_twice_is_refused_and_removed(
    hub: HubStandIn, directory: Path, tmp_path: Path
) -> None:
    hub.publish(directory)
    hub.spoiled["model.safetensors"] = 1
    download(NAME, tmp_path / "once")
    hub.spoiled["model.safetensors"] = 2
    with pytest.raises(ModelError, match=r"model.safetensors is not what the hub says it is"):
        download(NAME, tmp_path / "twice")
    assert not (tmp_path / "twice" / "model.safetensors").exists()


def test_the_traces_of_the_client_go(hub: HubStandIn, directory: Path, tmp_path: Path) -> None:
    hub.publish(directory)
    found, _ = download(NAME, tmp_path / "place")
    assert (found / ".cache").exists()
    clear_traces(found)
    assert names(found) == names(directory) and not (found / ".cache").exists()
