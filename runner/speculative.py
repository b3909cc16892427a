"""The options of speculative decoding, and what the engine makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from runner.models.load import LoadedModel, load_model  # First: it loads the BLAS, then mlx.

# isort: split
from runner.earlier_results import EarlierResults
from runner.engine.draft_model import DraftModelProposer
from runner.engine.gate import Gate
from runner.engine.proposers import NgramProposer, PreviousProposer, Proposer, Scope
from runner.engine.speculation import MOST_DRAFTED, Speculation
from runner.errors import ParameterError

PROPOSERS = ("ngram", "previous", "draft_model")
_MOST_NGRAM = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeOptions:
    """What `SpeculativeConfig` says, under the same names; checked when made.

    Raises:
        ParameterError: a value is not allowed, or would have no effect.
    """

    proposers: tuple[str, ...] = ()
    num_draft_tokens: int = 15
    gate: bool = True
    ngram_min: int = 1
    ngram_max: int = 4
    ngram_scope: Scope = "row"
    previous: str | None = None
    draft_model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "proposers", tuple(self.proposers))
        for name in self.proposers:
            if name not in PROPOSERS or self.proposers.count(name) > 1:
                raise _refused("proposers", list(self.proposers), f"each of {_listed()} once")
        if not 1 <= self.num_draft_tokens <= MOST_DRAFTED:
            raise _refused("num_draft_tokens", self.num_draft_tokens, f"1 to {MOST_DRAFTED}")
        if not 1 <= self.ngram_min <= self.ngram_max <= _MOST_NGRAM:
            given = f"{self.ngram_min} and ngram_max={self.ngram_max}"
            raise _refused("ngram_min", given, f"1 to {_MOST_NGRAM}, the first not above the other")
        if self.ngram_scope not in ("row", "group", "job"):
            raise _refused("ngram_scope", self.ngram_scope, "row, group or job")
        for name, option in (("previous", "from"), ("draft_model", "draft_model")):
            value, is_used = getattr(self, name), name in self.proposers
            if is_used and value is None:
                raise _refused(option, "null", f"{name} is among speculative.proposers; give it")
            if not is_used and value is not None:
                raise _refused(option, value, f"{name} is not among speculative.proposers")
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuses what nothing reads."""
        unread = [] if self.proposers else ["num_draft_tokens", "gate"]
        if not {"ngram", "previous"} & set(self.proposers):
            unread += ["ngram_min", "ngram_max"]
        unread += [] if "ngram" in self.proposers else ["ngram_scope"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                among = ", ".join(self.proposers) or "nothing"
                raise _refused(field.name, value, f"speculative.proposers has {among} to use it")

    def num_spare(self, *, batch_invariant: bool) -> int:
        """Columns for drafts behind each row's last; the order of a ring's sums hangs on them."""
        drafted = self.num_draft_tokens if self.proposers else 0
        return MOST_DRAFTED if batch_invariant else drafted

    def built(self, target: LoadedModel) -> Speculation | None:
        """What an engine of `target` drafts with; None where nothing is drafted.

        Raises:
            ParameterError: what an option names is not there, or does not fit the target.
            ModelError: the draft model cannot be loaded.
        """
        if not self.proposers:
            return None
        return Speculation(
            [_proposer(name, self, target) for name in self.proposers],
            num_draft_tokens=self.num_draft_tokens,
            gate=Gate() if self.gate else None,
        )

    @classmethod
    def of(cls, given: "str | Mapping[str, Any] | None") -> "SpeculativeOptions":
        """Those of a name (`ngram`, `auto` or `none`), or of a mapping with these fields."""
        if given is None or isinstance(given, str):
            named = {None: {}, "none": {}, "ngram": NGRAM, "auto": AUTO}
            if given not in named:
                allowed = "none, ngram, auto, or a mapping with the options of the group"
                raise ParameterError(f"speculative={given!r} is not allowed: {allowed}")
            return cls(**named[given])
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ParameterError(f"speculative.{name} is not there: {', '.join(names)} are")
        return cls(**given)


NGRAM: dict[str, Any] = {"proposers": ("ngram",)}
AUTO: dict[str, Any] = {"proposers": ("ngram",), "ngram_scope": "job"}
"""What the choices of the same names say."""


def _proposer(name: str, options: SpeculativeOptions, target: LoadedModel) -> Proposer:
    sizes = {"least": options.ngram_min, "most": options.ngram_max}
    if name == "ngram":
        return NgramProposer(**sizes, scope=options.ngram_scope)
    if name == "previous":
        assert options.previous is not None, "checked when the options were made"
        return PreviousProposer(EarlierResults(options.previous), **sizes)
    assert options.draft_model is not None, "checked when the options were made"
    loaded = load_model(options.draft_model, max_model_len=None)
    check_vocabulary(target.tokenizer, loaded.tokenizer, options.draft_model)
    return DraftModelProposer(loaded.model)


def check_vocabulary(target: Any, draft: Any, name: str) -> None:
    """Raises ParameterError with the first token that has another id in the draft model."""
    ours, theirs = ({i: token for token, i in it.get_vocab().items()} for it in (target, draft))
    for token_id in sorted(ours.keys() | theirs.keys()):
        if (one := ours.get(token_id)) != (other := theirs.get(token_id)):
            raise ParameterError(
                f"speculative.draft_model={name} is not allowed: token {token_id} is {other!r} "
                f"there and {one!r} in the model; a draft model needs the same vocabulary"
            )


def _listed() -> str:
    return ", ".join(PROPOSERS)


def _refused(name: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"speculative.{name}={value} is not allowed: {allowed}")
