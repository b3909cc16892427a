"""SentencePiece vocabularies: words merged by their scores, or the likeliest words (unigram)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from runner.models.tokenizer import Vocabulary, sequence_marks, token_ids, wrap_tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def build_sentencepiece(
    vocabulary: Vocabulary, scores: Sequence[float], *, add_space_prefix: bool
) -> TokenizerWrapper:
    """Builds a tokenizer that merges neighbours into the token with the best score.

    Raises ModelError if the vocabulary is inconsistent, as where a byte has no token.
    """
    build = partial(_merged_by_score, scores=scores, add_space_prefix=add_space_prefix)
    detokenizer = partial(SPMStreamingDetokenizer, trim_space=add_space_prefix)
    return wrap_tokenizer(build, vocabulary, detokenizer)


def build_unigram(
    vocabulary: Vocabulary,
    scores: Sequence[float],
    *,
    add_space_prefix: bool,
    merge_spaces: bool,
    charsmap: bytes | None,
) -> TokenizerWrapper:
    """Builds a tokenizer that finds the likeliest words; a text's characters are mapped before.

    Raises ModelError if the vocabulary is inconsistent.
    """
    build = partial(
        _unigram,
        scores=scores,
        add_space_prefix=add_space_prefix,
        merge_spaces=merge_spaces,
        charsmap=charsmap,
    )
    detokenizer = partial(SPMStreamingDetokenizer, trim_space=add_space_prefix)
    return wrap_tokenizer(build, vocabulary, detokenizer)


def _merged_by_score(
    vocabulary: Vocabulary, *, scores: Sequence[float], add_space_prefix: bool
) -> Tokenizer:
    ids = token_ids(vocabulary)
    lacking = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if lacking:
        raise ValueError(f"{len(lacking)} bytes have no token, {lacking[0]} among them")
    unknown = None if vocabulary.unk_id is None else vocabulary.tokens[vocabulary.unk_id]
    model = models.BPE(
        vocab=ids,
        merges=_merges(ids, vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    return _finished(tokenizer, vocabulary, add_space_prefix=add_space_prefix)


def _merges(
    ids: dict[str, int], vocabulary: Vocabulary, scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best score first.

    SentencePiece knows scores and no pairs. Of the pairs that make the same token it takes the
    leftmost; the one with the longer first half comes first here, which is that one in a run. Of
    two tokens with the same score it takes the leftmost as well, which no order of pairs can say.
    """
    whole = {*vocabulary.special_ids, *vocabulary.added_ids}
    joined = [
        (-scores[id], token) for token, id in ids.items() if len(token) > 1 and id not in whole
    ]
    merges: list[tuple[str, str]] = []
    last: tuple[float, str] | None = None
    for score, token in sorted(joined):
        cuts = range(len(token) - 1, 0, -1)
        pairs = [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in ids]
        pairs = [(first, second) for first, second in pairs if second in ids]
        if pairs:
            if last is not None and last[0] == score:
                raise ValueError(f"the tokens {last[1]!r} and {token!r} have the same score")
            last = (score, token)
        merges += pairs
    return merges


def _unigram(
    vocabulary: Vocabulary,
    *,
    scores: Sequence[float],
    add_space_prefix: bool,
    merge_spaces: bool,
    charsmap: bytes | None,
) -> Tokenizer:
    token_ids(vocabulary)
    pieces = list(zip(vocabulary.tokens, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, vocabulary.unk_id, False))
    steps: list[Any] = [] if charsmap is None else [normalizers.Precompiled(charsmap)]
    if merge_spaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if add_space_prefix or merge_spaces:
        # A text of spaces alone gets none before it.
        steps += [
            normalizers.Prepend(_SPACE),
            normalizers.Replace(Regex(rf"\A{_SPACE}(?= +\z)"), ""),
        ]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    return _finished(tokenizer, vocabulary, add_space_prefix=add_space_prefix)


def _finished(tokenizer: Tokenizer, vocabulary: Vocabulary, *, add_space_prefix: bool) -> Tokenizer:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = sequence_marks(vocabulary)
    return tokenizer
