"""Byte-level BPE with single digits, trained the same way everywhere: equal texts, equal bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_r1.data.tokenizer import Tokenizer, write_info
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import disk_errors

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama-3's splitting rule with one digit at a time, so that arithmetic sees place values."""
SMALLEST = 256 + len(SPECIALS)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path | str, origin: dict[str, Any] | None = None) -> Tokenizer:
    """Train on `texts` and write a tokenizer folder with exactly `vocab_size` ids.

    When the texts hold too few pairs, the rest of the ids are reserved tokens (as in Llama-3), so that a model built for
    `vocab_size` always fits. Raises DataError when `vocab_size` cannot hold the bytes and special tokens.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    if vocab_size < SMALLEST:
        raise DataError(expected=f"a vocabulary of at least {SMALLEST} (256 bytes and {len(SPECIALS)} special tokens)", found=str(vocab_size), fix="raise tokenizer.vocab_size")
    folder = Path(folder)
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    reserved = vocab_size - fast.get_vocab_size()
    if reserved:
        fast.add_special_tokens([AddedToken(f"<|reserved_special_token_{i}|>", special=True, normalized=False) for i in range(reserved)])
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), "utf-8")
    return write_info(
        folder, "tokenizer.json", "tokenizers", {"kind": "train_bpe", "reserved": reserved, **(origin or {})},
        bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|pad|>",
    )
