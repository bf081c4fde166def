"""Quantities that carry their unit: a bare number is never a budget.

Decimal suffixes for counts (k, M, B or G, T), binary and decimal ones for bytes (KiB, MiB, GiB, TiB, kB, MB, GB, TB).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic_core import core_schema

from megatron_r1.utils.errors import ConfigError

COUNT_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTE_SUFFIXES = {
    "B": 1, "bytes": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}
_COUNT = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKMBGT]?)\s+([a-z]+)\s*$")
_BYTES = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*$")


def _exact(number: str, factor: int, text: str, example: str) -> int:
    """number x factor as an integer, without a float's rounding; a fraction of a unit is refused."""
    whole, _, fraction = number.replace("_", "").replace(",", "").partition(".")
    scaled = int(whole + fraction) * factor
    count, rest = divmod(scaled, 10 ** len(fraction))
    if rest:
        raise ConfigError(expected=f"a whole number, such as '{example}'", found=repr(text), fix="give a quantity without a fraction of a unit")
    return count


class _Pydantic:
    """Validation from text or an instance; written back as text."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def _validate(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError(f"expected a quantity with its unit, such as '{cls.example}'; found the bare {type(value).__name__} {value!r}; write the unit")  # type: ignore[attr-defined]
        try:
            return cls.parse(value)  # type: ignore[attr-defined]
        except ConfigError as error:
            raise ValueError(f"expected {error.expected}; found {error.found}; {error.fix}") from error


class Count(_Pydantic, int):
    """Base of whole-number quantities; subclasses name the unit."""

    unit: ClassVar[str] = ""
    example: ClassVar[str] = ""

    @classmethod
    def parse(cls, text: str) -> Count:
        """'2T tokens' -> Tokens(2_000_000_000_000). Raises ConfigError."""
        match = _COUNT.match(text)
        if match is None or match[3] not in (cls.unit, cls.unit.rstrip("s")):
            raise ConfigError(expected=f"a quantity of {cls.unit}, such as '{cls.example}'", found=repr(text), fix=f"write the number and the word {cls.unit}")
        return cls(_exact(match[1], COUNT_SUFFIXES[match[2]], text, cls.example))

    def __str__(self) -> str:
        return f"{int(self)} {self.unit}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self)})"


class Tokens(Count):
    """A number of tokens."""

    unit, example = "tokens", "2T tokens"


class Steps(Count):
    """A number of optimizer steps."""

    unit, example = "steps", "500k steps"


class Samples(Count):
    """A number of samples (sequences or documents, as the field says)."""

    unit, example = "samples", "866k samples"


class Bytes(_Pydantic, int):
    """A number of bytes."""

    unit: ClassVar[str] = "bytes"
    example: ClassVar[str] = "16 MiB"

    @classmethod
    def parse(cls, text: str) -> Bytes:
        """'16 MiB' -> Bytes(16_777_216). Raises ConfigError."""
        match = _BYTES.match(text)
        if match is None or match[2] not in BYTE_SUFFIXES:
            raise ConfigError(expected=f"a size, such as '{cls.example}'", found=repr(text), fix="use one of " + ", ".join(BYTE_SUFFIXES))
        return cls(_exact(match[1], BYTE_SUFFIXES[match[2]], text, cls.example))

    def __str__(self) -> str:
        return f"{int(self)} bytes"

    def __repr__(self) -> str:
        return f"Bytes({int(self)})"


class Epochs(_Pydantic, float):
    """A number of passes over the data; may be fractional."""

    unit: ClassVar[str] = "epochs"
    example: ClassVar[str] = "2 epochs"

    @classmethod
    def parse(cls, text: str) -> Epochs:
        """'2 epochs' -> Epochs(2.0). Raises ConfigError."""
        match = re.match(r"^\s*([0-9]+(?:\.[0-9]+)?)\s+epochs?\s*$", text)
        if match is None:
            raise ConfigError(expected=f"a number of epochs, such as '{cls.example}'", found=repr(text), fix="write the number and the word epochs")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"{float(self):g} epochs"

    def __repr__(self) -> str:
        return f"Epochs({float(self)})"


class Duration(_Pydantic, float):
    """A time in seconds."""

    unit: ClassVar[str] = "seconds"
    example: ClassVar[str] = "23.5 h"

    @classmethod
    def parse(cls, text: str) -> Duration:
        """'90 s', '30 min', '23.5 h' -> Duration(seconds). Raises ConfigError."""
        match = re.match(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)\s*$", text)
        if match is None or not float(match[1]):
            raise ConfigError(expected=f"a time above zero, such as '{cls.example}'", found=repr(text), fix="write the number and s, min, h or d")
        return cls(float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2]])

    def __str__(self) -> str:
        return f"{float(self):g} s"

    def __repr__(self) -> str:
        return f"Duration({float(self):g})"
