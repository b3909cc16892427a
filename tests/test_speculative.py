"""The options of speculative decoding, in Python and on the command line."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from command_line import results, write_jsonl
from forked_cli import ForkedCommands

from runner import LLM, SamplingParams
from runner.earlier_results import EarlierResults
from runner.errors import ParameterError
from runner.speculative import SpeculativeOptions, check_vocabulary
from runner.types import Request

PROMPTS = ["abcabcabcab", "one two one two one", "hello hello hello", "x"]
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def commands():
    found = ForkedCommands()
    yield found
    found.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_directory: Path) -> Path:
    place = tmp_path_factory.mktemp("speculative")
    (place / "tiny").symlink_to(tiny_directory)
    write_jsonl(place / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    write_jsonl(place / "plain.jsonl", [{"prompt": "a", "text": "b"}])
    columns = {"row_id": ["a"], "sample_index": [0], "prompt_token_ids": ["x"]}
    table = pa.table(columns | {"completion_token_ids": [[1]]})
    with pa.ipc.new_file(str(place / "odd.arrow"), table.schema) as writer:
        writer.write_table(table)
    return place


def command(out: str, *options: str) -> list[str]:
    return [
        "generate", "model.path=tiny", "data.path=prompts.jsonl", f"output.dir={out}",
        "sampling.max_tokens=20", "sampling.ignore_eos=true", "sampling.n=2", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(place, commands):
    commands.succeed(*command("plain"), cwd=place)
    return results(place / "plain")


DECIDED = ("row_id", "sample_index", "completion_token_ids", "text", "finish_reason")


@pytest.mark.parametrize(
    "options",
    [
        ("speculative=ngram", "speculative.ngram_min=1", "speculative.gate=false"),
        ("speculative=auto",),
        ("speculative=previous", "speculative.from=plain", "speculative.gate=false"),
        ("speculative=draft_model", "speculative.draft_model=tiny", "speculative.gate=false"),
    ],
    ids=lambda options: options[0],
)
def test_a_job_gives_what_it_gives_without(place, commands, plain, options):
    out = options[0].partition("=")[2]
    printed = commands.succeed(*command(out, *options), cwd=place)
    done = results(place / out)
    assert done.select(DECIDED).equals(plain.select(DECIDED))
    summary = json.loads((place / out / "summary.json").read_text())["run"]["speculative"]
    drafted, accepted = done["num_drafted"].sum(), done["num_accepted"].sum()
    assert (summary["num_drafted"], summary["num_accepted"]) == (drafted, accepted)
    assert sum(plain["num_drafted"]) == 0 and "drafts" in printed
    if "speculative.gate=false" in options:
        assert drafted > 0 and len(summary["acceptance_rate_by_position"]) > 1
    if "ngram" not in options[0] and "auto" not in options[0]:
        assert summary["acceptance_rate"] == 1.0


def test_a_run_goes_on_with_other_drafts(place, commands):
    commands.succeed(*command("resumed"), cwd=place)
    said = commands.succeed(*command("resumed", "speculative=ngram"), cwd=place)
    assert "holds all 8 results already" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["speculative=ngrm"], ["ngrm", "ngram"]),
        (["speculative=ngram", "speculative.num_draft_tokens=0"], ["tokens=0", "1 to 32"]),
        (["speculative=ngram", "speculative.num_draft_tokens=33"], ["33", "1 to 32"]),
        (["speculative=ngram", "speculative.ngram_min=5"], ["ngram_min=5", "ngram_max=4"]),
        (["speculative=ngram", "speculative.ngram_scope=all"], ["ngram_scope=all", "group"]),
        (["speculative.proposers=[ngram,ngram]"], ["proposers", "once"]),
        (["speculative.proposers=[magic]"], ["magic", "draft_model"]),
        (["speculative.num_draft_tokens=4"], ["num_draft_tokens=4", "nothing"]),
        (["speculative=ngram", "speculative.from=plain"], ["from=plain", "previous"]),
        (["speculative=previous"], ["speculative.from=null", "give it"]),
        (["speculative=draft_model"], ["speculative.draft_model=null", "give it"]),
        (["speculative=previous", "speculative.from=nowhere.arrow"], ["from=nowhere.arrow"]),
        (["speculative=previous", "speculative.from=plain.jsonl"], ["no column row_id", "text"]),
        (["speculative=previous", "speculative.from=odd.arrow"], ["prompt_token_ids", "string"]),
        (["speculative=draft_model", "speculative.draft_model=nowhere"], ["nowhere"]),
        (["sampling.max_tokens=0", "sampling.n=1", "sampling.prompt_logprobs=0",
          "speculative=ngram"], ["proposers=['ngram']", "samples nothing"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_one_line(place, commands, options, words):
    line = commands.refused(*command("refused", *options), cwd=place)
    assert all(word in line for word in words), line
    assert not (place / "refused").exists()


def test_a_vocabulary_that_differs_is_refused_with_the_first_token():
    class Tokens:
        def __init__(self, *tokens: str) -> None:
            self._ids = {token: i for i, token in enumerate(tokens)}

        def get_vocab(self) -> dict[str, int]:
            return self._ids

    check_vocabulary(Tokens("a", "b"), Tokens("a", "b"), "x")
    with pytest.raises(ParameterError, match="draft_model=x .* token 1 is 'c' there and 'b' in"):
        check_vocabulary(Tokens("a", "b", "c"), Tokens("a", "c", "b"), "x")
    with pytest.raises(ParameterError, match="token 2 is None there and 'c' in the model"):
        check_vocabulary(Tokens("a", "b", "c"), Tokens("a", "b"), "x")


@pytest.mark.parametrize("given", ["auto", {"proposers": ["ngram"], "ngram_min": 1, "gate": False}])
def test_the_same_in_python(tiny_directory, given):
    plain = LLM(tiny_directory)
    drafting = LLM(plain.loaded, speculative=given)
    ours, theirs = (it.generate(PROMPTS, PARAMS, use_tqdm=False) for it in (drafting, plain))
    assert [it.outputs[0].text for it in ours] == [it.outputs[0].text for it in theirs]
    with pytest.raises(ParameterError, match="speculative='fast' is not allowed: none, ngram"):
        LLM(plain.loaded, speculative="fast")
    with pytest.raises(ParameterError, match="speculative.k is not there: proposers, "):
        LLM(plain.loaded, speculative={"k": 3})


def test_a_choice_says_the_same_in_python_and_in_its_file():
    from runner.composition import choices

    for name, path in choices()["speculative"].items():
        text = path.read_text()
        if name in ("none", "ngram", "auto"):
            options = SpeculativeOptions.of(name)
            assert f"proposers: [{', '.join(options.proposers)}]" in text
            assert ("scope: job" in text) == (options.ngram_scope == "job")


def test_earlier_results_are_found_by_row_and_by_prompt(tmp_path):
    rows = [
        {"row_id": "a", "sample_index": i, "prompt_token_ids": [1, 2], "completion_token_ids": [i]}
        for i in range(2)
    ]
    rows += [rows[1] | {"row_id": "c", "prompt_token_ids": [1, 2, 3], "completion_token_ids": [8]}]
    failed = {"row_id": "b", "sample_index": 0, "prompt_token_ids": [7]}
    write_jsonl(tmp_path / "rows.jsonl", [*rows, failed | {"completion_token_ids": None}])
    earlier = EarlierResults(str(tmp_path / "rows.jsonl"))

    def found(name: str, prompt: list[int], index: int) -> list[int] | None:
        params = SamplingParams(seed=0)
        asked = Request(request_id=name, prompt_token_ids=prompt, params=params, key=name)
        tokens = earlier(asked, index)
        return None if tokens is None else list(tokens)

    assert len(earlier) == 3
    assert found("other", [1, 2, 3], 1) == [8] and found("other", [1, 2, 3], 0) is None
    assert found("a", [9], 1) == [1] and found("other", [1, 2], 0) == [0]
    assert found("a", [9], 2) is None and found("b", [7], 0) is None


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_columns_are_kept_for_what_is_drafted(batch_invariant):
    """As many in every run where the order of a ring's sums may not change."""
    none, some = SpeculativeOptions(), SpeculativeOptions.of("ngram")
    few = SpeculativeOptions.of({"proposers": ["ngram"], "num_draft_tokens": 3})
    found = [it.num_spare(batch_invariant=batch_invariant) for it in (none, some, few)]
    assert found == ([32, 32, 32] if batch_invariant else [0, 15, 3])


@pytest.mark.parametrize("name", ["ngram_min", "ngram_max", "ngram_scope"])
@pytest.mark.parametrize("proposer", ["ngram", "previous", "draft_model"])
def test_an_option_that_no_proposer_reads_is_refused(name, proposer):
    source = {"previous": {"previous": "x"}, "draft_model": {"draft_model": "x"}}.get(proposer, {})
    value = {"ngram_min": 2, "ngram_max": 3, "ngram_scope": "group"}[name]
    given = {"proposers": [proposer], name: value} | source
    reads = {"ngram": True, "previous": name != "ngram_scope", "draft_model": False}[proposer]
    if reads:
        assert getattr(SpeculativeOptions.of(given), name) == value
        return
    with pytest.raises(ParameterError, match=f"{name}={value} is not allowed: .*{proposer} to use"):
        SpeculativeOptions.of(given)


@pytest.mark.parametrize(("least", "most", "ok"), [(1, 16, True), (16, 16, True), (1, 17, False),
                                                   (0, 4, False), (5, 4, False)])  # fmt: skip
def test_the_bounds_of_what_is_looked_up(least, most, ok):
    given = {"proposers": ["ngram"], "ngram_min": least, "ngram_max": most}
    if ok:
        assert SpeculativeOptions.of(given).ngram_max == most
        return
    with pytest.raises(ParameterError, match=f"ngram_min={least} and ngram_max={most} is not allo"):
        SpeculativeOptions.of(given)
