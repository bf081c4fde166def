"""Planted noise with a known answer: it should teach nothing. Labelled for the report only."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.corpus.filters import group_of
from megatron_r1.data.document import Document
from megatron_r1.data.packages import read_member
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import generator

log = get_logger("corpus.noise")
BASES = ("code_stdlib", "math_docs", "know_factbook", "web_wiki", "chat_chitchat")
BASE_BYTES = MB
LENGTH = 4000
_PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
_LICENCE = re.compile(r"^(LICEN[CS]E|COPYING|NOTICE|COPYRIGHT)", re.IGNORECASE)


def shuffled(context: Context) -> Iterator[Document]:
    """Words, signs and white space of real corpora's training documents, all in one random order."""
    pieces: list[str] = []
    for name in BASES:
        try:
            documents = context.ordered(name)
        except EnvironmentProblem as problem:
            log.warning("x_shuffled: made without %s (%s)", name, problem.found)
            continue
        taken = 0
        for document in documents:
            if context.split_of(group_of(document)) == "train":
                pieces += _PIECE.findall(document.text or "")
                taken += len(document.text or "")
                if taken >= BASE_BYTES:
                    break
    if not pieces:
        raise EnvironmentProblem(expected=f"one of {', '.join(BASES)} to shuffle", found="none of them can be had", fix="install or fetch one of them")
    order = generator(context.seed, "x_shuffled").permutation(len(pieces))
    current: list[str] = []
    size = number = 0
    for index in order:
        current.append(pieces[index])
        size += len(pieces[index])
        if size >= LENGTH:
            yield Document(f"shuffled:{number}", "x_shuffled", text="".join(current))
            current, size, number = [], 0, number + 1


def minified(context: Context) -> Iterator[Document]:
    """A minified JavaScript bundle in stretches."""
    text = read_member("plotly", "plotly/package_data/plotly.min.js").decode("utf-8")
    start = number = 0
    while start < len(text):
        cut = text.find(";", start + LENGTH)
        end = cut + 1 if 0 <= cut < start + 2 * LENGTH else start + LENGTH
        yield Document(f"plotly.min.js:{number}", "x_minjs", text=text[start:end])
        start, number = end, number + 1


def licences(context: Context) -> Iterator[Document]:
    """Licence files of the packages in this environment, and of the system."""
    roots = [Path(sysconfig.get_paths()["purelib"]), Path("/usr/share/common-licenses")]
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_file() and (_LICENCE.match(path.name) or root == roots[1]):
                try:
                    yield Document(path.relative_to(root).as_posix(), "x_licences", text=path.read_text("utf-8"))
                except (UnicodeDecodeError, OSError):
                    continue


CORPORA = (
    Corpus("x_shuffled", "noise", shuffled, "words of five real corpora in random order", distractor=True, max_bytes=4 * MB, derived_from=BASES),
    Corpus("x_minjs", "noise", minified, "a minified JavaScript bundle", packages=("plotly",), distractor=True, max_bytes=4 * MB),
    Corpus("x_licences", "noise", licences, "licence texts of the installed packages", distractor=True, max_bytes=4 * MB),
)
