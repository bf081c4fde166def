"""The answer matcher: forms, traps, and an independent oracle for numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.answers import clean, extract, marked, number, same, verify

NUMERIC = [
    ("7", "7"),
    ("6 + 1 = 7", "7"),
    ("6 + 1 = 7.", "7"),
    ("so \\boxed{7}. Check: 8", "7"),
    ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{unclosed and 12", "12"),
    ("#### 1,234", "1,234"),
    ("3 apples #### 12\n99", "12"),
    ("####", None),
    ("#### 12 apples and 3 pears", "12"),
    ("#### none", "none"),
    ("The answer is 12, because 3 x 4 = 12 and 5", "12"),
    ("Final answer: -3", "-3"),
    ("The answer is $-0.5$.", "-0.5"),
    ("x=-4", "-4"),
    ("10-4", "4"),
    ("4 - -6", "-6"),
    ("3/4", "3/4"),
    ("no number here", None),
    ("", None),
    ("<think>maybe 99</think> 5", "5"),
    ("<think>never closed 99", None),
    ("version2 has 3", "3"),
]


@pytest.mark.parametrize(("text", "answer"), NUMERIC)
def test_numeric_extraction(text, answer):
    assert extract(text, numeric=True) == answer


TEXTUAL = [("olleh", "olleh"), ("Reversed:\n olleh \n\n", "olleh"), ("The answer is: **Paris**.", "Paris"), ("\\boxed{Yes}", "Yes"), ("#### No\nmore", "No"), ("  ", None)]


@pytest.mark.parametrize(("text", "answer"), TEXTUAL)
def test_text_extraction(text, answer):
    assert extract(text, numeric=False) == answer


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("7", "7.0", True), ("1,234", "1234", True), ("0.5", "1/2", True), ("7", "8", False), ("-7", "7", False), ("Yes", "yes", True), ("Paris.", "Paris", True),
        ("a  b", "a b", True), ("a b", "ab", False), (None, "7", False), ("", "7", False), ("7 apples", "7", False), ("0.3333", "1/3", False), ("$12$", "12", True), ("1.5/2", "0.75", True),
        ("3 /\t4", "0.75", True), ("9" * 5000, "9" * 5000, True), ("9" * 5000, "1", False),
    ],
)
def test_same(answer, truth, equal):
    assert same(answer, truth) is equal


@settings(max_examples=80, deadline=None)
@given(st.fractions(), st.sampled_from(["The answer is {}.", "#### {}", "so \\boxed{{{}}} holds", "a = {}", "{}"]))
def test_any_number_survives_any_form(value, form):
    text = f"{value.numerator}/{value.denominator}" if value.denominator > 1 else str(value.numerator)
    found = extract(form.format(text), numeric=True)
    assert same(found, text)
    assert number(found) == Fraction(value)
    assert not same(found, str(value + 1))


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_nothing_crashes_and_clean_is_stable(text, numeric):
    found = extract(text, numeric)
    assert found is None or clean(found) == found


@pytest.mark.parametrize(
    ("text", "truth", "correct", "has_mark"),
    [
        ("3 + 4 = 7\n#### 7", "7", True, True), ("so \\boxed{7.0}", "7", True, True), ("it is 7", "7", True, False), ("#### 8", "7", False, True), ("", "7", False, False),
        ("####", "7", False, False), ("\\boxed{}", "7", False, False), ("#### Monday", "monday", True, True), ("Monday", "Monday", True, False),
        ("\\boxed{1} and \\boxed{ {", "1", True, True),
    ],
)
def test_a_verdict(text, truth, correct, has_mark):
    assert verify(text, truth) == (correct, has_mark)


pieces = st.sampled_from(["\\boxed{", "}", "{", "####", "answer is", "<think>", "</think>", "1/0", "-", "/", ".", ",", "9" * 4400, "\u0663", "\u00b2", "\ufffd", "$", "\n", "\r", "NaN", "1e9"])


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces | st.text(max_size=5), max_size=12).map("".join), st.sampled_from(["7", "x", "1/2"]))
def test_whatever_a_model_writes_has_a_verdict(text, truth):
    verdict = verify(text, truth)
    assert verdict.marked == bool(marked(text, number(truth) is not None))
    assert not verdict.correct or extract(text, number(truth) is not None) is not None


def test_ten_thousand_open_boxes_are_read_once():
    assert marked("\\boxed{3}" + "\\boxed{" * 10_000, numeric=True) == "3"
