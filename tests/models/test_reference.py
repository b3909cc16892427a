"""How a model on the hub is named."""

import pytest

from runner.errors import ModelError, ParameterError
from runner.models.reference import HubReference, parse_reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("o.r-g_1/na.me@v1.0", ("o.r-g_1/na.me", "v1.0", None)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1", None)),
        ("org/name:a.gguf", ("org/name", None, "a.gguf")),
        ("org/name@main:sub/a b.gguf", ("org/name", "main", "sub/a b.gguf")),
    ],
)
def test_reads_a_name_and_writes_it(text: str, expected: tuple[str, str, str]) -> None:
    reference = parse_reference(text)
    assert (reference.repository, reference.revision, reference.file) == expected
    assert str(reference) == text


def test_the_revision_may_be_an_option_of_its_own() -> None:
    assert parse_reference("org/name", revision="v1") == HubReference("org/name", "v1")
    assert parse_reference("org/name@v1", revision="v1").revision == "v1"
    with pytest.raises(ParameterError, match="revision='v2' is not allowed for 'org/name@v1'"):
        parse_reference("org/name@v1", revision="v2")


@pytest.mark.parametrize("text", ["org/name:a.bin", "org/name:../a.gguf", "org/name:a/../b.gguf"])
def test_after_the_colon_comes_a_gguf_file_of_the_repository(text: str) -> None:
    with pytest.raises(ModelError, match="after the colon comes a .gguf file"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["name", "org/name@", "org/name:", "org/name@v 1", "org/n@a@b"])
def test_anything_else_is_no_name(text: str) -> None:
    with pytest.raises(ModelError, match="neither a local path nor a Hugging Face id"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["./name:a.gguf", "../name", "org/file.gguf", "a/b/c", "/a@v"])
def test_what_looks_like_a_path_is_one_that_is_not_there(text: str) -> None:
    with pytest.raises(ModelError, match="does not exist: give a directory or a .gguf file"):
        parse_reference(text)


def test_a_file_in_parts_is_all_of_them() -> None:
    parts = HubReference("org/name", file="q/x-00002-of-00003.gguf").files
    assert parts == [f"q/x-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert HubReference("org/name", file="x.gguf").files == ["x.gguf"]
    assert HubReference("org/name").files == []
