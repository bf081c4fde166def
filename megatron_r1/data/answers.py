"""Finding the final answer in a model's text, and comparing it with the right one: for evaluation and for rewards.

The order of forms is the one of MATH-style graders (boxed, "#### x", "the answer is x"), so that a model is not punished
for the form it was taught. Only when no such mark is there the last number (numeric questions) or the last line counts.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*[1-9]\d*)?"
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}|(?<=[=:(\[$]){_NUMBER}")
_WHOLE = re.compile(rf"^{_NUMBER}$")
_PHRASE = re.compile(r"(?:final answer|answer)\s*(?:is\s*:?|:|=)\s*(.+)", re.IGNORECASE)
_THINK = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_WRAPPERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))


def extract(text: str, numeric: bool) -> str | None:
    """The final answer in `text`, or None. `numeric`: the question asks for a number.

    >>> extract("6 + 1 = 7, so \\\\boxed{7}. Check: 8", numeric=True)
    '7'
    """
    text = _THINK.sub("", text)
    found, answer = _marked(text, numeric)
    if found:
        return answer
    if numeric:
        numbers = _NUMBERS.findall(text)
        return clean(numbers[-1]) if numbers else None
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return clean(lines[-1]) if lines else None


def marked(text: str, numeric: bool) -> str | None:
    """As `extract`, but only an answer that stands behind a mark: boxed, "#### x" or "the answer is x"."""
    return _marked(_THINK.sub("", text), numeric)[1]


class Verdict(NamedTuple):
    """Whether the answer is the right one, and whether it stands behind a mark."""

    correct: bool
    marked: bool


def verify(text: str, truth: str) -> Verdict:
    """Judge a model's whole text, whatever it is, by the right answer. The question counts as numeric when the right answer is a number."""
    numeric = number(truth) is not None
    return Verdict(same(extract(text, numeric), truth), bool(marked(text, numeric)))


def _marked(text: str, numeric: bool) -> tuple[bool, str | None]:
    """Whether there is a mark, and the answer behind it."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return True, clean(boxed)
    if "####" in text:
        rest = clean(text.rsplit("####", 1)[1].strip().split("\n")[0])
        numbers = _NUMBERS.findall(rest) if numeric and number(rest) is None else []
        return True, clean(numbers[0]) if numbers else rest or None
    phrases = _PHRASE.findall(text)
    if not phrases:
        return False, None
    if numeric:
        # In free text the last number is the answer, after "the answer is" the first one.
        numbers = _NUMBERS.findall(phrases[-1])
        return True, clean(numbers[0]) if numbers else None
    return True, clean(phrases[-1]) or None


def clean(answer: str) -> str:
    """Without white space, wrapping marks and a closing full stop."""
    answer = answer.strip()
    while True:
        before = answer
        answer = answer.rstrip(".").strip() if not answer.endswith("...") else answer
        for left, right in _WRAPPERS:
            if len(answer) > len(left) + len(right) - 1 and answer.startswith(left) and answer.endswith(right):
                answer = answer[len(left) : len(answer) - len(right)].strip()
        if answer == before:
            return answer


def number(text: str) -> Fraction | None:
    """The exact value of "1,234", "-0.5" or "3/4"; None when `text` is not one number."""
    text = clean(text)
    if not _WHOLE.match(text):
        return None
    above, _, below = "".join(text.replace(",", "").split()).partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except ValueError:  # more digits than Python turns into a number
        return None


def same(answer: str | None, truth: str) -> bool:
    """Equal as numbers when both are numbers, else equal as text up to white space, case and wrapping marks."""
    if answer is None:
        return False
    left, right = number(answer), number(truth)
    if left is not None and right is not None:
        return left == right
    return _folded(answer) == _folded(truth)


def _folded(text: str) -> str:
    return " ".join(clean(text).casefold().split())


def _last_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}."""
    start, end = text.rfind("\\boxed{"), len(text)
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for position in range(begin, end):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position]
        # This brace is never closed, so one before it that is closed is closed before it.
        start, end = text.rfind("\\boxed{", 0, start), start
    return None
