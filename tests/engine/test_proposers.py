"""What is drafted: from the row, its group, its job, an earlier run or another model."""

import pytest
from tiny import make_engine, request, run, tiny_model

from runner.engine.draft_model import DraftModelProposer
from runner.engine.proposers import Draft, InOrder, NgramProposer, PreviousProposer
from runner.engine.sequence import Sequence as Row
from runner.engine.speculation import Speculation
from runner.errors import ParameterError

PROMPT = [10, 11, 12, 13, 14, 15, 16]


def row(prompt: list[int], *, index: int = 0, request_id: str = "r") -> Row:
    return Row(request(prompt, request_id), index, max_tokens=50, stop_token_ids=frozenset())


def drafted(proposer: NgramProposer | PreviousProposer, one: Row, count: int = 3) -> list[int]:
    (draft,) = proposer.propose([one], [count])
    return list(draft.token_ids)


def test_what_followed_in_the_prompt_is_drafted():
    one = row([*PROMPT, 50, 11, 12])
    proposer = NgramProposer()
    assert drafted(proposer, one) == [13, 14, 15]
    one.token_ids += [13, 14]
    assert drafted(proposer, one, 9) == [15, 16, 50, 11, 12]
    one.token_ids += [60]
    assert drafted(proposer, one) == []


def test_what_followed_in_the_completion_comes_before_the_prompt():
    one = row([*PROMPT, 50])
    one.token_ids += [11, 12, 77, 78, 11, 12]
    assert drafted(NgramProposer(), one, 2) == [77, 78]


def test_a_row_that_goes_round_is_drafted_further_round():
    one = row(PROMPT)
    one.token_ids += [1, 2, 3, 1, 2, 3, 1]
    assert drafted(NgramProposer(), one, 7) == [2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("scope", ["row", "group", "job"])
def test_the_scope_says_whose_tokens_are_looked_up(scope):
    proposer = NgramProposer(scope=scope)
    mate, stranger = row(PROMPT), row([90, 91], request_id="other")
    mate.token_ids += [70, 71, 72]
    stranger.token_ids += [80, 81, 82]
    proposer.propose([mate, stranger], [3, 3])
    one, also = row(PROMPT, index=1), row(PROMPT, index=2)
    one.token_ids += [70, 71]
    also.token_ids += [80, 81]
    assert drafted(proposer, one) == ([72] if scope != "row" else [])
    assert drafted(proposer, also) == ([82] if scope == "job" else [])
    stranger.token_ids += [83, 84]
    proposer.end(stranger)
    also.token_ids += [82, 83]
    assert drafted(proposer, also) == ([84] if scope == "job" else [])


def test_a_scope_that_is_not_there_is_refused():
    with pytest.raises(ParameterError, match="ngram_scope='all' is not allowed: row, group, job"):
        NgramProposer(scope="all")


def test_nothing_is_kept_of_rows_that_are_gone():
    proposer = NgramProposer(scope="group")
    rows = [row(PROMPT, index=index) for index in range(3)]
    proposer.propose(rows, [3] * 3)
    for one in rows:
        proposer.end(one)
    assert not (proposer._texts or proposer._groups or proposer._num_rows)


@pytest.mark.parametrize("scope", ["row", "group", "job"])
def test_a_row_that_was_never_met_may_end(scope):
    """One that ended with its first token, before anything was drafted for it."""
    for proposer in (NgramProposer(scope=scope), PreviousProposer(lambda request, index: [1])):
        InOrder([proposer]).end(row(PROMPT))
        assert proposer.propose([], []) == []


def test_each_row_has_its_own_count_whichever_proposer_drafts():
    """The first has a draft of one proposer, the others of the next, if any."""
    earlier = {("b", 0): [40, 41, 42, 43]}
    first = PreviousProposer(lambda request, index: earlier.get((request.request_id, index)))
    rows = [
        row([*PROMPT, 50, 11, 12], request_id="a"),
        row([1], request_id="b"),
        row([2], request_id="c"),
        row([*PROMPT, 50, 14, 15], request_id="d"),
    ]
    found = InOrder([first, NgramProposer()]).propose(rows, [1, 3, 2, 2])
    assert [list(draft.token_ids) for draft in found] == [[13], [40, 41, 42], [], [16, 50]]
    assert [draft.source for draft in found] == ["ngram 2", "previous", "", "ngram 2"]


def test_an_earlier_completion_is_followed_left_and_found_again():
    earlier = [20, 21, 22, 23, 24, 25, 26, 27]
    proposer = PreviousProposer(lambda request, index: earlier if index == 0 else None)
    one = row(PROMPT)
    assert drafted(proposer, one) == [20, 21, 22]
    one.token_ids += [20, 21]
    assert drafted(proposer, one) == [22, 23, 24]
    one.token_ids += [60]
    assert drafted(proposer, one) == []
    one.token_ids += [23, 24]
    (draft,) = proposer.propose([one], [9])
    assert (draft.token_ids, draft.source) == ([25, 26, 27], "previous, found again")
    one.token_ids += [25, 26, 27]
    assert drafted(proposer, one) == [], "it has come to its end"
    assert drafted(proposer, row(PROMPT, index=1)) == []


def test_the_first_that_has_a_draft_is_taken():
    both = InOrder([PreviousProposer(lambda request, index: None), NgramProposer()])
    found = both.propose([row([*PROMPT, 50, 11, 12]), row([1])], [2, 2])
    assert found == [Draft([13, 14], "ngram 2"), Draft()]


WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6, "seed": 3}


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["full", "sliding"])
def test_a_draft_model_that_is_the_target_is_right_at_any_temperature(changes):
    requests = [
        request(range(3, 5 + 11 * i), f"r{i}", n=1 + i % 2, max_tokens=14, ignore_eos=True, **more)
        for i, more in enumerate(
            [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.3}, {"top_k": 5}]
        )
    ]
    speculation = Speculation([DraftModelProposer(tiny_model(**changes))], num_draft_tokens=5)
    engine = make_engine(tiny_model(**changes), max_batch_size=3, speculation=speculation)
    run(engine, requests)
    report = speculation.report()
    assert report["num_drafted"] > 50 and report["acceptance_rate"] > 0.95


def test_a_draft_model_that_was_left_behind_catches_up():
    """Its rows lag by more than one chunk after many steps that drafted nothing."""
    model = tiny_model()
    proposer = DraftModelProposer(model)
    proposer.bind(97)
    one = row(PROMPT)
    done = run(make_engine(model), [request(PROMPT, "r", max_tokens=90, ignore_eos=True)])
    tokens = done["r", 0].token_ids
    for count in (0, 1, 4, 80, 82):
        one.token_ids[:] = tokens[:count]
        one.num_launched = count
        (draft,) = proposer.propose([one], [5])
        assert draft.token_ids == tokens[count : count + 5]
    proposer.end(one)
    assert proposer._slots == []
