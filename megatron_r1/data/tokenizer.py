"""Text to token ids and back, from a folder that says what it holds.

Two libraries behind one class: `tokenizers` (a tokenizer.json) and SentencePiece (a *.model). The folder's
tokenizer_info.json names the file, its checksum and the ids of the special tokens. Text is only ever text: a document
that contains the letters "<|end_of_text|>" gets the ids of those letters, never the special token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.config.base import Frozen
from megatron_r1.utils.errors import ArtifactError, DataError, EnvironmentProblem
from megatron_r1.utils.io import atomic_write_json, atomic_write_text, read_json

INFO_FILE = "tokenizer_info.json"
LONG = 1 << 18
"""Texts of more characters than this are tokenised in pieces, so that time and memory stay linear in the length."""
PIECE = 1 << 16
TOGETHER = 64
"""Pieces of one long text that are tokenised at once."""


class TokenizerInfo(Frozen):
    """What a tokenizer folder holds."""

    schema_version: int = Field(1, description="version of this record's format")
    backend: Literal["tokenizers", "sentencepiece"] = Field(description="library that reads the file")
    file: str = Field(description="name of the tokenizer file in the folder")
    sha256: str = Field(description="hex SHA-256 of that file")
    vocab_size: int = Field(gt=0, description="largest id + 1: rows the embedding needs")
    bos_id: int | None = Field(None, description="id that begins a text")
    eos_id: int | None = Field(None, description="id that ends a text")
    pad_id: int | None = Field(None, description="id that fills up a batch")
    chat_style: Literal["llama3", "chatml"] | None = Field(None, description="how conversations are written (data/chat.py); None: it has no tokens for them")
    chat_ids: dict[str, int] = Field(default_factory=dict, description="special token of the chat style -> id")
    origin: dict[str, Any] = Field(default_factory=dict, description="how it was made: corpora, package, version")


class Backend(Protocol):
    """What a tokenizer library must do. Ids of special tokens never come out of text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the first character of each."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class FastBackend:
    """`tokenizers`: multi-threaded unless TOKENIZERS_PARALLELISM=false; threads by RAYON_NUM_THREADS."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self.fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                expected=f"a Hugging Face tokenizer.json in {path}", found=f"{type(error).__name__}: {error}", fix="export it with save_pretrained or Tokenizer.save"
            ) from error
        self.fast.encode_special_tokens = True
        self.fast.no_padding()
        self.fast.no_truncation()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.fast.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self.fast.decode(list(ids), skip_special_tokens=False)

    def size(self) -> int:
        """Largest id + 1."""
        return max(self.fast.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int | None:
        """Id of a token by name."""
        return self.fast.token_to_id(token)


class SentencePieceBackend:
    """SentencePiece: unigram or BPE models."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise EnvironmentProblem(
                expected=f"the package sentencepiece, to read {path}", found="it is not installed", fix="pip install sentencepiece"
            ) from error
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(expected=f"a SentencePiece model in {path}", found=str(error), fix="point to the *.model file that SentencePiece trained") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts), out_type=int)

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self.model.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [piece.begin for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(i) for i in ids])

    def size(self) -> int:
        """Number of pieces."""
        return self.model.get_piece_size()

    def token_id(self, token: str) -> int | None:
        """Id of a piece by name."""
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None


BACKENDS: dict[str, type[FastBackend] | type[SentencePieceBackend]] = {"tokenizers": FastBackend, "sentencepiece": SentencePieceBackend}


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Cut a long text into pieces of at most `size` characters whose tokens, put together, are those of the whole text.

    Cuts fall before a space between two letters, or after a line feed before a letter; byte-level BPE pre-tokenizers (GPT-2's,
    Llama-3's, ours) split there in any case. Text without such a place (a million digits) is cut anyway: bounded time
    matters more than one token.
    """
    if len(text) <= size:
        return [text]
    parts, start = [], 0
    while len(text) - start > size:
        end = start + size
        cut = end
        for at in range(end, max(start + 1, end - 4096), -1):
            before, here = text[at - 1], text[at]
            if (here == " " and before.isalpha() and text[at + 1 : at + 2].isalpha()) or (before == "\n" and here.isalpha()):
                cut = at
                break
        parts.append(text[start:cut])
        start = cut
    parts.append(text[start:])
    return parts


class Tokenizer:
    """A tokenizer folder, opened. Attributes: folder, info, backend."""

    def __init__(self, folder: Path, info: TokenizerInfo, backend: Backend) -> None:
        self.folder, self.info, self.backend = folder, info, backend
        self.short: dict[str, list[int]] = {}
        """Ids of role names and the like, which every conversation repeats."""

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Open a tokenizer folder and check its file. Raises ArtifactError or DataError."""
        folder = Path(folder)
        try:
            info = TokenizerInfo.model_validate(read_json(folder / INFO_FILE))
        except ValidationError as error:
            raise ArtifactError(
                expected=f"a tokenizer record in {folder / INFO_FILE}", found=f"{error.error_count()} wrong or missing fields", fix="make the tokenizer again"
            ) from error
        path = folder / info.file
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if found != info.sha256:
            raise DataError(expected=f"{path} with SHA-256 {info.sha256}", found=found, fix="restore the file, or make the tokenizer again")
        return cls(folder, info, BACKENDS[info.backend](path))

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self.info.vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id that begins a text."""
        return self.info.bos_id

    @property
    def eos_id(self) -> int | None:
        """Id that ends a text."""
        return self.info.eos_id

    @property
    def pad_id(self) -> int | None:
        """Id that fills up a batch."""
        return self.info.pad_id

    @property
    def end_of_turn_id(self) -> int | None:
        """Id that ends an assistant's turn, where the tokenizer can write conversations."""
        return self.info.chat_ids.get("end")

    @property
    def sha256(self) -> str:
        """Identity of the tokenizer: two with the same value give the same ids."""
        return self.info.sha256

    @property
    def chat_template(self) -> str | None:
        """Jinja template of the chat style for Hugging Face; None without one."""
        from megatron_r1.data.chat import TEMPLATES

        return TEMPLATES[self.info.chat_style] if self.info.chat_style else None

    @property
    def hf_files(self) -> list[Path]:
        """Files that AutoTokenizer needs."""
        return [path for name in (self.info.file, "tokenizer_config.json") if (path := self.folder / name).is_file()]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no bos, no eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once; long ones in pieces."""
        if all(len(text) <= LONG for text in texts):
            return self.backend.encode_batch(texts)
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts at once, int32 arrays; a long text is tokenised a few megabytes at a time, so memory stays small."""
        found: list[np.ndarray | None] = [None] * len(texts)
        short = [i for i, text in enumerate(texts) if len(text) <= LONG]
        for i, ids in zip(short, self.backend.encode_batch([texts[i] for i in short]), strict=True):
            found[i] = np.asarray(ids, np.int32)
        for i, text in enumerate(texts):
            if found[i] is None:
                parts = pieces(text)
                groups = (self.backend.encode_batch(parts[j : j + TOGETHER]) for j in range(0, len(parts), TOGETHER))
                found[i] = np.concatenate([np.asarray(ids, np.int32) for group in groups for ids in group])
        return found  # type: ignore[return-value]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens by name."""
        return self.backend.decode([int(i) for i in ids])

    def special_name(self, token: int) -> str:
        """Name of a special token."""
        return self.backend.fast.id_to_token(token) if isinstance(self.backend, FastBackend) else self.backend.model.id_to_piece(token)  # type: ignore[attr-defined]


CHAT_TOKENS = {
    "llama3": {"header_start": "<|start_header_id|>", "header_end": "<|end_header_id|>", "end": "<|eot_id|>"},
    "chatml": {"start": "<|im_start|>", "end": "<|im_end|>"},
}
"""Special tokens by role, per chat style; a tokenizer has a style when it has all of its tokens."""

COMMON_NAMES = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
    "pad": ("<|pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]"),
}
"""Names tried, in order, when nobody says which token begins, ends or pads."""


def write_info(
    folder: Path, file: str, backend: Literal["tokenizers", "sentencepiece"], origin: dict[str, Any],
    bos: str | None = None, eos: str | None = None, pad: str | None = None,
) -> Tokenizer:
    """Describe the tokenizer file in `folder` (special tokens by name; None: the common names are tried) and open it.

    Also writes tokenizer_config.json for Hugging Face. Raises DataError when a name given is not in the vocabulary.
    """
    opened = BACKENDS[backend](folder / file)
    names: dict[str, str] = {}
    for role, given in (("bos", bos), ("eos", eos), ("pad", pad)):
        if given is not None and opened.token_id(given) is None:
            raise DataError(expected=f"a {role} token in the vocabulary of {folder / file}", found=f"{given!r} is not in it", fix=f"correct tokenizer.{role}_token")
        for name in (given,) if given is not None else COMMON_NAMES[role]:
            if opened.token_id(name) is not None:
                names[role] = name
                break
    style = next((style for style, tokens in CHAT_TOKENS.items() if all(opened.token_id(token) is not None for token in tokens.values())), None)
    info = TokenizerInfo(
        backend=backend, file=file, sha256=hashlib.sha256((folder / file).read_bytes()).hexdigest(), vocab_size=opened.size(),
        bos_id=opened.token_id(names["bos"]) if "bos" in names else None, eos_id=opened.token_id(names["eos"]) if "eos" in names else None,
        pad_id=opened.token_id(names["pad"]) if "pad" in names else None, chat_style=style,  # type: ignore[arg-type]
        chat_ids={role: opened.token_id(token) for role, token in CHAT_TOKENS[style].items()} if style else {}, origin=origin,  # type: ignore[misc]
    )
    atomic_write_json(folder / INFO_FILE, info.plain())
    tokenizer = Tokenizer(folder, info, opened)
    _write_hf_config(folder, tokenizer, names)
    return tokenizer


def _write_hf_config(folder: Path, tokenizer: Tokenizer, names: dict[str, str]) -> None:
    fast = tokenizer.info.backend == "tokenizers"
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        **{f"{role}_token": name for role, name in names.items()},
        "clean_up_tokenization_spaces": False, "model_max_length": 1 << 30,
    }
    if not fast:
        config |= {"add_bos_token": False, "add_eos_token": False, "legacy": False}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
