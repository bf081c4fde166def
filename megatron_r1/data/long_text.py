"""A text of any length in pieces whose ids, put together, are the ids of the whole.

No tokenizer promises where a text may be cut. So a place is tried: the text around it (WINDOW characters on either side) is
tokenised in one and in two, and the cut is taken where the ids agree. Places are preferred where byte-level and SentencePiece
vocabularies split in any case, before a space between two letters. Libraries that put a space before every text (SentencePiece's
dummy prefix) get the second piece without its space.

A text that can not be cut so (ten million times the same letter) is cut anyway: time and memory stay linear in its length, and
the cut is counted as inexact. Only a pre-token longer than WINDOW can make a tried cut wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

PIECE = 1 << 16
"""Characters of a piece, at most."""
WINDOW = 256
BACK = 4096
"""How far before the end of a piece a place to cut is looked for."""
TRIES = 12
Encode = Callable[[Sequence[str]], list[np.ndarray]]


def pieces(text: str, encode: Encode | None, size: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `size` characters, and whether the cut after each keeps the ids. `encode`: texts -> ids; None: the
    first likely place is taken, untried."""
    start = 0
    while len(text) - start > size:
        end, following, exact = _cut(text, start, start + size, encode)
        yield text[start:end], exact
        start = following
    yield text[start:], True


def _cut(text: str, start: int, end: int, encode: Encode | None) -> tuple[int, int, bool]:
    """End of the piece that begins at `start`, beginning of the next, and whether the ids stay."""
    for at in _places(text, max(start + 1, end - BACK), end):
        if encode is None:
            return at, at, False
        left, right = text[max(start, at - WINDOW) : at], text[at : at + WINDOW]
        whole, first, second, *rest = encode([left + right, left, right, *([right[1:]] if right.startswith(" ") else [])])
        for skipped, other in enumerate((second, *rest)):
            if len(first) + len(other) == len(whole) and np.array_equal(whole[: len(first)], first) and np.array_equal(whole[len(first) :], other):
                return at, at + skipped, True
    return end, end, False


def _places(text: str, first: int, last: int) -> Iterator[int]:
    """Places worth trying, the best kind first, then from the end; TRIES of each kind."""
    for kind in (_between_words, _after_a_sign):
        tried = 0
        for at in range(last, first - 1, -1):
            if kind(text[at - 1], text[at], text[at + 1 : at + 2]):
                yield at
                tried += 1
                if tried == TRIES:
                    break


def _between_words(before: str, here: str, after: str) -> bool:
    return here == " " and before.isalpha() and after.isalpha()


def _after_a_sign(before: str, here: str, after: str) -> bool:
    """Anywhere where a word, a number or a line begins."""
    return here.isalnum() and not before.isalnum()
