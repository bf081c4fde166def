"""Text to token ids and back, from a folder that says what it holds.

Two libraries behind one class: `tokenizers` (a tokenizer.json) and SentencePiece (a *.model). The folder's
tokenizer_info.json names the file, its checksum and the ids of the special tokens. Text is only ever text: a document
that contains the letters "<|end_of_text|>" gets the ids of those letters, never the special token.

Who tokenises much text lets `choose_library` put a faster one before them where it gives the same ids (fast_tokenizer.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.config.base import Frozen
from megatron_r1.data.fast_tokenizer import WORDS, Gigatoken, Refused, check_texts, open_fast
from megatron_r1.data.long_text import pieces
from megatron_r1.utils.errors import ArtifactError, DataError, EnvironmentProblem
from megatron_r1.utils.io import atomic_write_json, atomic_write_text, read_json
from megatron_r1.utils.logging import get_logger

log = get_logger("data.tokenizer")
INFO_FILE = "tokenizer_info.json"
LONG = 1 << 18
"""Texts of more characters than this are tokenised in pieces (long_text.py), so that time and memory stay linear in the length."""
TOGETHER = 16
"""Pieces of one long text that are tokenised at once."""
SAMPLED = 2000
"""One document of so many is tokenised by the plain library too, and compared."""
Library = Literal["auto", "plain", "gigatoken"]


class IdsDiffer(DataError):
    """The fast library gave other ids than the plain one: what it wrote must be written again, by the plain one, which the
    tokenizer uses from here on."""


class TokenizerInfo(Frozen):
    """What a tokenizer folder holds."""

    schema_version: int = Field(1, description="version of this record's format")
    backend: Literal["tokenizers", "sentencepiece"] = Field(description="library that reads the file")
    file: str = Field(pattern=r"^[^/\\\x00]{1,100}$", description="name of the tokenizer file in the folder")
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

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the first character of each."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def specials(self) -> list[str]:
        """Names of the tokens that never come out of text."""
        ...


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

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.fast.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self.fast.decode(list(ids), skip_special_tokens=False)

    def specials(self) -> list[str]:
        return [token.content for token in self.fast.get_added_tokens_decoder().values() if token.special]

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

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One by one: the library's own batches use every core of the machine, whatever this process was given.
        return [np.array(self.model.encode(text, out_type=int), np.int32) for text in texts]

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self.model.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [piece.begin for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(i) for i in ids])

    def specials(self) -> list[str]:
        return [self.model.id_to_piece(i) for i in range(self.size()) if self.model.is_control(i) or self.model.is_unknown(i)]

    def size(self) -> int:
        """Number of pieces."""
        return self.model.get_piece_size()

    def token_id(self, token: str) -> int | None:
        """Id of a piece by name."""
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None


BACKENDS: dict[str, type[FastBackend] | type[SentencePieceBackend]] = {"tokenizers": FastBackend, "sentencepiece": SentencePieceBackend}


class Tokenizer:
    """A tokenizer folder, opened. Attributes: folder, info, backend, library (what tokenises, and why; for records)."""

    def __init__(self, folder: Path, info: TokenizerInfo, backend: Backend) -> None:
        self.folder, self.info, self.backend = folder, info, backend
        self.short: dict[str, list[int]] = {}
        """Ids of role names and the like, which every conversation repeats."""
        self.fast: Gigatoken | None = None
        self.library: dict[str, Any] = {"library": f"{info.backend} {metadata.version(info.backend)}"}
        self.seen = self.inexact_cuts = 0
        """Documents tokenised by the fast library; cuts of long texts after which an id may differ from the whole text's."""

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

    def choose_library(self, wanted: Library) -> None:
        """Tokenise with the fast library from here on if it gives the same ids on the texts of a self-check (below a second).

        auto: else with the plain one, and `library` says why; plain: never; gigatoken: raises EnvironmentProblem where it can not.
        """
        self.fast = None
        plain = f"{self.info.backend} {metadata.version(self.info.backend)}"
        self.library = {"library": plain, "reason": "asked for"}
        if wanted == "plain":
            return
        try:
            texts = check_texts(self.backend.specials(), [self.backend.decode([i]) for i in range(0, self.vocab_size, max(1, self.vocab_size // WORDS))])
            self.fast, found = open_fast(self.folder / self.info.file, self.info.backend, self.vocab_size, texts, self.backend.encode)
        except Refused as reason:
            if wanted == "gigatoken":
                raise EnvironmentProblem(
                    expected="gigatoken, because tokenizer.library names it", found=str(reason), fix="pip install gigatoken, or set tokenizer.library to auto or plain"
                ) from reason
            log.info("tokenising with %s: %s", plain, reason)
            self.library = {"library": plain, "reason": str(reason)}
            return
        self.library = {**found, "same_as": plain}
        log.info("tokenising with %s: the ids of %s on %d texts", found["library"], plain, found["checked_texts"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no bos, no eos."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once; long ones in pieces."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts at once, int32 arrays; a long text a megabyte at a time, so that memory stays a few times its size.

        Raises DataError for a lone surrogate, IdsDiffer when the fast library turns out to be wrong (the plain one is used from
        then on: redo what belongs together).
        """
        try:
            short = iter(self._some([text for text in texts if len(text) <= LONG]))
            return [next(short) if len(text) <= LONG else self._long(text) for text in texts]
        except (TypeError, UnicodeEncodeError) as error:
            wrong = [text for text in texts if any("\ud800" <= char <= "\udfff" for char in text)]
            if not wrong:
                raise
            raise DataError(
                expected="text of Unicode characters", found=f"half a surrogate pair in {wrong[0][:40]!r}", fix="decode the text with errors='replace', or drop the document"
            ) from error

    def _some(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts that need no cutting."""
        if self.fast is None:
            return self.backend.encode(texts)
        found: list[np.ndarray] = []
        for text in texts:
            ids = self.fast.encode(text)
            if ids is None:
                ids = self.backend.encode([text])[0]
            elif self.seen % SAMPLED == 0:
                self._compare(text, ids)
            self.seen += 1
            found.append(ids)
        return found

    def _compare(self, text: str, ids: np.ndarray) -> None:
        expected = self.backend.encode([text])[0]
        if np.array_equal(ids, expected):
            return
        used, self.fast = self.library["library"], None
        self.library = {"library": self.library["same_as"], "reason": f"{used} gave other ids in the middle of the work"}
        at = int(np.argmin(ids[: len(expected)] == expected[: len(ids)])) if len(ids) and len(expected) else 0
        raise IdsDiffer(
            expected=f"the ids of {self.library['library']}", found=f"{used} gives {ids[at : at + 8].tolist()} instead of {expected[at : at + 8].tolist()} (token {at} of {text[:60]!r}...)",
            fix="nothing: this part is tokenised again by the plain library; please report the text to gigatoken",
        )

    def _long(self, text: str) -> np.ndarray:
        """Ids of a text in pieces."""
        arrays: list[np.ndarray] = []
        cut = pieces(text, self._some)
        while group := list(islice(cut, TOGETHER)):
            arrays += self._some([piece for piece, _ in group])
            inexact = sum(not exact for _, exact in group)
            if inexact and not self.inexact_cuts:
                log.warning("a text of %d characters has no place to cut that keeps its ids (%r...): cut all the same, one token or two may differ", len(text), group[0][0][:40])
            self.inexact_cuts += inexact
        # Filled from the front while the parts are let go: never twice the ids.
        whole, filled = np.empty(sum(map(len, arrays)), np.int32), 0
        arrays.reverse()
        while arrays:
            part = arrays.pop()
            whole[filled : filled + len(part)] = part
            filled += len(part)
        return whole

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
