"""Rows of figures: appended to benchmarks/results, shown as a table in a document. Used by the scripts beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end of table -->"
Rows = list[dict[str, Any]]


def read(results: Path) -> Rows:
    """All rows so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def write_table(results: Path, docs: Path, begin: str, table: Callable[[Rows], str]) -> None:
    """Replace what stands in `docs` between the line `begin` and the next END by the table of the stored rows. Raises SystemExit
    when the line is not there."""
    before, found, rest = docs.read_text("utf-8").partition(begin)
    if not found or END not in rest:
        raise SystemExit(f"expected the lines {begin} and {END} in {docs.relative_to(ROOT)}; put them where the table belongs")
    docs.write_text(f"{before}{begin}\n\n{table(read(results)).strip()}\n\n{END}{rest.partition(END)[2]}", "utf-8")


def store(rows: Iterable[dict[str, Any]], results: Path, docs: Path, begin: str, table: Callable[[Rows], str]) -> None:
    """Append rows, rewrite the table, and say so."""
    lines = [json.dumps(row) + "\n" for row in rows]
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as stream:
        stream.writelines(lines)
    write_table(results, docs, begin, table)
    print(f"appended {len(lines)} rows to {results.relative_to(ROOT)} and rewrote the table in {docs.relative_to(ROOT)}")
