"""Numbers and times as a reader wants them: few digits, with a unit."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float) -> str:
    """1,234 up to 9,999; then 12.3 k, 1.23 M, 2.10 T."""
    if abs(value) < 1e4:
        return f"{value:,.0f}"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {unit}"
    raise AssertionError("unreachable: the last factor is below the first test")


def size(nbytes: float) -> str:
    """Bytes in binary units."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= factor:
            return f"{significant(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 0.0123, 1.23, 123, 1,234."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """+1.2 or −1.2 with a real minus sign; a rounded zero has no sign."""
    text = f"{value:+.{decimals}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", MINUS)


def percent(share: float, decimals: int = 1) -> str:
    """0.123 -> 12.3 %; exact zero -> 0 %."""
    return "0 %" if share == 0 else f"{100 * share:.{decimals}f} %"


def power_of_ten(largest: float) -> tuple[int, str]:
    """Exponent e (a multiple of 3) so that largest / 10**e reads well, and its text ("" for e = 0: 0.05 up to 1000)."""
    if not 0 < largest < math.inf or 0.05 <= largest < 1000:
        return 0, ""
    exponent = 3 * math.floor(math.log10(largest) / 3)
    return exponent, f"×10{str(exponent).translate(SUPERSCRIPT)}"


def plural(number: int, singular: str, many: str | None = None) -> str:
    """1 source, 2 sources."""
    return f"{number:,} {singular if number == 1 else many or singular + 's'}"
