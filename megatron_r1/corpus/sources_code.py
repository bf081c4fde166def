"""Code: Python's standard library, and tasks with input, output and a program."""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.data.document import Document
from megatron_r1.data.packages import read_member

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"}
LONGEST_ANSWER = 900
LONGEST_QUESTION = 900


def stdlib(context: Context) -> Iterator[Document]:
    """Every module of the running Python's standard library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield Document(relative.as_posix(), "code_stdlib", text=text, group=f"stdlib:{relative.as_posix()}")


def _codeio() -> Iterator[tuple[str, dict[str, Any]]]:
    """Both files of the package; the "-hq" one is a JSON array in spite of its name."""
    for name in ("codeio-hq", "codeio"):
        text = gzip.decompress(read_member("reasoning-gym", f"reasoning_gym/data/{name}.jsonl.gz")).decode("utf-8")
        records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
        for number, record in enumerate(records):
            yield f"{name}:{number}", record


def _group(record: dict[str, Any]) -> str:
    words = " ".join(record["task_description"].split())
    return "codeio:" + hashlib.sha256(words.encode("utf-8")).hexdigest()[:24]


def codeio(context: Context) -> Iterator[Document]:
    """Task, input and output, program."""
    for identity, record in _codeio():
        text = f"# Task\n{record['task_description'].strip()}\n\n# Specification\n{record['input_output_spec'].strip()}\n\n# Program\n{record['code_sample'].strip()}\n"
        yield Document(identity, "code_codeio", text=text, group=_group(record))


def sft_code(context: Context) -> Iterator[Document]:
    """Task -> program, short ones."""
    for identity, record in _codeio():
        question = f"{record['task_description'].strip()}\n\n{record['input_output_spec'].strip()}"
        code = record["code_sample"].strip()
        if len(code) <= LONGEST_ANSWER and len(question) <= LONGEST_QUESTION:
            messages = ({"role": "user", "content": question}, {"role": "assistant", "content": f"```python\n{code}\n```"})
            yield Document(identity, "sft_code", messages=messages, group=_group(record))


CORPORA = (
    Corpus("code_stdlib", "code", stdlib, "standard library of the running Python, without its tests", python=True, max_bytes=6 * MB),
    Corpus("code_codeio", "code", codeio, "programming tasks with specification and program", packages=("reasoning-gym",), max_bytes=6 * MB),
    Corpus("sft_code", "code", sft_code, "short programming tasks as conversations", packages=("reasoning-gym",), format="chat", max_bytes=2 * MB),
)
