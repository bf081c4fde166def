"""A SentencePiece model as a tokenizer.json, so that AutoTokenizer gives the same ids without guessing a model family.

Follows SentencePiece's own pipeline (arXiv 1808.06226, section 3): normalisation by the model's character map, white-space
rules, the escape "▁", then BPE or unigram over the whole text (no pre-tokenizer), unknown characters as bytes where the
model says so. The parity proof compares the result with the SentencePiece library. One known difference: a user-defined symbol at
the very beginning of a text gets no dummy prefix before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1.utils.errors import DataError, EnvironmentProblem

_ESCAPE = "▁"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def convert(model_file: Path) -> Any:
    """A `tokenizers.Tokenizer` equal to the model. Raises DataError for word and character models, EnvironmentProblem without protobuf."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = _read(model_file)
    pieces, settings = [(p.piece, p.score) for p in proto.pieces], proto.trainer_spec
    if settings.model_type == _UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=settings.unk_id, byte_fallback=settings.byte_fallback))
    elif settings.model_type == _BPE:
        # A control token must not come out of a merge, as in the library, where only normal pieces take part.
        normal = {p.piece: (i, p.score) for i, p in enumerate(proto.pieces) if p.type not in (_CONTROL, _USER_DEFINED)}
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocabulary, _merges(normal), unk_token=settings.unk_piece, fuse_unk=True, byte_fallback=settings.byte_fallback))
    else:
        raise DataError(
            expected="a SentencePiece unigram or BPE model", found=f"model type {settings.model_type} in {model_file}",
            fix="export with a tokenizer.json tokenizer, or train the SentencePiece model as unigram or bpe",
        )
    rules = proto.normalizer_spec
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_ESCAPE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _ESCAPE)])
    undo = [decoders.Replace(_ESCAPE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else undo)
    for p in proto.pieces:
        if p.type in (_CONTROL, _USER_DEFINED):
            token = AddedToken(p.piece, normalized=False, special=p.type == _CONTROL)
            tokenizer.add_special_tokens([token]) if p.type == _CONTROL else tokenizer.add_tokens([token])
    return tokenizer


def _merges(normal: dict[str, tuple[int, float]]) -> list[tuple[str, str]]:
    """Pairs in the order in which the library prefers them: by the score of the piece they make, then by the ids of the halves."""
    found = []
    for piece, (_, score) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-score, normal[left][0], normal[right][0], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _read(model_file: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise EnvironmentProblem(
            expected=f"the packages sentencepiece and protobuf, to describe {model_file} to transformers", found=str(error), fix="pip install sentencepiece protobuf"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    return proto
