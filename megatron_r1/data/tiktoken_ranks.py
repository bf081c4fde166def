"""A tiktoken rank file (base64 bytes and a rank a line, as Llama-3's tokenizer.model) as a tokenizer.json, with proof.

The file holds merges only; how text is split into words and which special tokens there are stand in the code that reads it:
ENCODINGS has them for the published ones, others are given. tiktoken joins whichever two neighbours make the token of the lowest
rank, so every split of a token into two tokens becomes a merge, in the order of the ranks; a word that is a token is taken
whole. Two ways to make one token that overlap could still differ in order: the result is compared with tiktoken itself.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_r1.data.fast_tokenizer import byte_letters, check_texts
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Encoding:
    """What a rank file does not say."""

    pattern: str
    specials: Mapping[str, int]
    """Name -> id."""


def _llama3() -> dict[str, int]:
    named = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
        "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>",
    ]
    named += [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(named))]
    return {name: 128000 + i for i, name in enumerate(named)}


ENCODINGS = {
    "llama3": Encoding(LLAMA3, _llama3()),
    "r50k_base": Encoding(GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(LLAMA3, {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k_base": Encoding(O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
"""Encodings known by name. cl100k's pattern splits as Llama-3's does."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes -> rank. Raises DataError for a file of another kind, or one whose ranks have gaps or lack a byte."""
    ranks: dict[bytes, int] = {}
    try:
        for line in filter(None, path.read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise DataError(
            expected=f"a tiktoken rank file in {path}: base64 and a rank on every line", found=f"{line[:40]!r} ({error})", fix="point tokenizer.path to the rank file (*.tiktoken, Llama-3's tokenizer.model)"
        ) from error
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(
            expected=f"ranks 0 to {len(ranks) - 1} in {path}, all 256 single bytes among them",
            found=f"no rank for the byte 0x{lacking[0]:02X}" if lacking else "ranks that repeat or leave gaps", fix="use the file as it was published",
        )
    return ranks


def convert(path: Path, pattern: str, specials: Mapping[str, int]) -> tuple[Any, dict[str, Any]]:
    """A `tokenizers.Tokenizer` with the ids of tiktoken, and what was compared.

    Ids between the ranks and the special tokens that nobody names become <|reserved_special_token_id_N|>. Raises DataError for a
    file or special tokens that are wrong, or where an id differs; EnvironmentProblem without tiktoken.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = read_ranks(path)
    taken = {token: i for token, i in specials.items() if i < len(ranks)}
    if taken or len(set(specials.values())) < len(specials):
        raise DataError(
            expected=f"special tokens with ids of their own from {len(ranks)} on, for {path}", found=f"{taken or 'an id given twice'}", fix="correct tokenizer.encoding or tokenizer.special_tokens"
        )
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:cut]], token[:cut], token[cut:])
        for token, rank in ranks.items() for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks
    )
    made = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()}, [(spelled[a], spelled[b]) for *_, a, b in merges], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    names = {i: token for token, i in specials.items()}
    every = [names.get(i, f"<|reserved_special_token_id_{i}|>") for i in range(len(ranks), max(names, default=-1) + 1)]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in every])
    return made, _prove(made, path.name, pattern, ranks, dict(specials))


def _prove(made: Any, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> dict[str, Any]:
    """Compare with tiktoken on the texts of the self-check. Raises DataError at the first difference."""
    try:
        import tiktoken
    except ImportError as error:
        raise EnvironmentProblem(
            expected="the package tiktoken, which proves that a converted rank file gives its ids", found=str(error), fix="pip install tiktoken"
        ) from error
    try:
        oracle = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except ValueError as error:
        raise ConfigError(expected="a splitting pattern that tiktoken reads", found=str(error), fix="correct tokenizer.pattern") from error
    made.encode_special_tokens = True
    texts = check_texts(list(specials), [token.decode("utf-8", "replace") for token in ranks])
    count = 0
    for text, found in zip(texts, made.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        expected = oracle.encode_ordinary(text)
        if found.ids != expected:
            raise DataError(
                expected=f"tiktoken's ids for {text[:60]!r}: {expected[:12]}", found=f"{found.ids[:12]} from the converted tokenizer",
                fix="this rank file can not be converted exactly; use the tokenizer.json of its publisher (kind huggingface)",
            )
        count += len(expected)
    made.encode_special_tokens = False
    return {"library": f"tiktoken {metadata.version('tiktoken')}", "texts": len(texts), "ids": count}

