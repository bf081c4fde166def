"""Finding the final answer in a model's text, and comparing it with the right one.

The order of forms is the one of MATH-style graders (boxed, "#### x", "the answer is x"), so that a model is not punished
for the form it was taught. Only when no such mark is there the last number (numeric questions) or the last line counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

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
    boxed = _last_boxed(text)
    if boxed is not None:
        return clean(boxed)
    if "####" in text:
        rest = clean(text.rsplit("####", 1)[1].strip().split("\n")[0])
        numbers = _NUMBERS.findall(rest) if numeric and number(rest) is None else []
        return clean(numbers[0]) if numbers else rest or None
    phrases = _PHRASE.findall(text)
    if phrases:
        text = phrases[-1]
    if numeric:
        numbers = _NUMBERS.findall(text)
        # After "the answer is" the first number is the answer; in free text the last one is.
        return clean(numbers[0 if phrases else -1]) if numbers else None
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return clean(lines[0 if phrases else -1]) if lines else None


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
    return Fraction(text.replace(",", "").replace(" ", ""))


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
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position]
        start = text.rfind("\\boxed{", 0, start)
    return None
