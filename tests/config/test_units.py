"""Quantities with units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from megatron_r1.config.base import Frozen
from megatron_r1.config.units import Bytes, Epochs, Steps, Tokens
from megatron_r1.utils.errors import ConfigError


class Sample(Frozen):
    budget: Tokens | Steps | Epochs = Field(description="how long")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2T tokens", 2 * 10**12), ("4.2M tokens", 4_200_000), ("2,048 tokens", 2048), ("1 token", 1),
        ("500k steps", 500_000), ("3 epochs", 3.0), ("0.5 epochs", 0.5),
    ],
)  # fmt: skip
def test_parses(text: str, value: float) -> None:
    assert Sample(budget=text).budget == value


@pytest.mark.parametrize(("text", "value"), [("16 MiB", 2**24), ("16MB", 16_000_000), ("1.5 KiB", 1536), ("7 B", 7)])
def test_bytes(text: str, value: int) -> None:
    assert Bytes.parse(text) == value


@pytest.mark.parametrize("bad", [2048, 2048.0, "2048", "2k", "fast", "1.5 tokens", "-3 tokens", True, None, "16 MiB"])
def test_a_bare_or_wrong_quantity_is_refused(bad: object) -> None:
    with pytest.raises(ValidationError, match=r"unit|quantity|whole number|number of epochs"):
        Sample(budget=bad)


def test_the_unit_decides_the_type() -> None:
    assert isinstance(Sample(budget="5 steps").budget, Steps)
    assert isinstance(Sample(budget="5 tokens").budget, Tokens)


@given(st.integers(min_value=0, max_value=10**18))
def test_round_trip(number: int) -> None:
    assert Tokens.parse(str(Tokens(number))) == number
    assert Sample.model_validate(Sample(budget=Tokens(number)).plain()).budget == number


def test_no_float_rounding() -> None:
    assert Tokens.parse("4.123456789012T tokens") == 4_123_456_789_012


def test_error_has_three_parts() -> None:
    with pytest.raises(ConfigError) as caught:
        Tokens.parse("many")
    assert caught.value.expected.startswith("a quantity of tokens")
    assert caught.value.found == "'many'"
    assert "tokens" in caught.value.fix
