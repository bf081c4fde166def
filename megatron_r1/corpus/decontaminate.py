"""Documents that contain evaluation items: found by long word sequences they share."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from megatron_r1.corpus.filters import stretches
from megatron_r1.data.packages import PACKAGES, humaneval_records
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.decontaminate")
_WORD = re.compile(r"\w+")


class Overlap:
    """Word n-grams of the evaluation items; `name(text)` says which item a text shares one with.

    Words are runs of letters, digits and underscores, in lower case: punctuation and layout do not hide a copy.
    """

    def __init__(self, ngram: int = 13) -> None:
        self.ngram = ngram
        self.items = 0
        self.short = 0
        """Items with fewer than n words, which can not be found."""
        self._grams: dict[tuple[str, ...], str] = {}
        self._vocabulary: set[str] = set()

    def add(self, name: str, text: str) -> None:
        """Register an item; one with fewer than n words can not be found, and is counted in `short`."""
        words = _WORD.findall(text.lower())
        self.items += 1
        self.short += len(words) < self.ngram
        for i in range(len(words) - self.ngram + 1):
            self._grams.setdefault(tuple(words[i : i + self.ngram]), name)
            self._vocabulary.update(words[i : i + self.ngram])

    def digest(self) -> str:
        """Equal for the same items."""
        digest = hashlib.sha256(f"{self.ngram}".encode())
        for gram, name in self._grams.items():
            digest.update(" ".join((name, *gram)).encode("utf-8"))
        return digest.hexdigest()

    def name(self, text: str) -> str | None:
        """The first item the text shares n words in a row with, or None. Linear in the text."""
        if not self._grams:
            return None
        n, words = self.ngram, list[str]()
        for part in stretches(text):
            words = words[len(words) - n + 1 :] + _WORD.findall(part.lower()) if len(words) >= n else words + _WORD.findall(part.lower())
            # A shared n-gram consists of words of the items only, so most texts never get as far as a look-up.
            known = bytes(map(self._vocabulary.__contains__, words))
            at = known.find(b"\1" * n)
            while at >= 0:
                if (found := self._grams.get(tuple(words[at : at + n]))) is not None:
                    return found
                at = known.find(b"\1" * n, at + 1)
        return None


def load(name: str, overlap: Overlap) -> dict[str, str | int]:
    """Register the evaluation items called `name` (human_eval, or a file); returns a record of what was loaded.

    Raises EnvironmentProblem when HumanEval can not be had, DataError for a file that can not be read.
    """
    before, short = overlap.items, overlap.short
    if name == "human_eval":
        for item in humaneval_records():
            overlap.add(item["task_id"], f"{item['prompt']}\n{item['canonical_solution']}")
        return {"name": name, "items": overlap.items - before, **PACKAGES["human-eval"].origin}
    path = Path(name).expanduser()
    try:
        lines = path.read_text("utf-8-sig").split("\n") if path.suffix == ".jsonl" else [path.read_text("utf-8-sig")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            expected=f"evaluation items (UTF-8 .jsonl or .txt) at {name}, or the name human_eval", found=f"{type(error).__name__}: {error}",
            fix="correct decontaminate.against",
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            overlap.add(f"{path.name}:{number}", _all_text(line) if path.suffix == ".jsonl" else line)
    found: dict[str, str | int] = {"name": path.name, "items": overlap.items - before}
    if overlap.short > short:
        log.warning("%s: %d of %d evaluation items have fewer than %d words: copies of them are not found", name, overlap.short - short, found["items"], overlap.ngram)
        found["shorter_than_ngram"] = overlap.short - short
    return found


def _all_text(line: str) -> str:
    """Every string of a JSON line, or the line itself when it is not JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also a number of more digits than Python reads
        return line
    parts, stack = [], [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            parts.append(item)
        else:
            stack += reversed(list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else [])
    return "\n".join(parts)
