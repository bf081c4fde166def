"""The input of a source cut into partitions: the units any number of workers read independently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import InputFile


class Partition(Frozen):
    """A byte range of one stored file: the lines (paragraphs, row groups of Parquet) that begin in it."""

    source: str = Field(description="source name")
    number: int = Field(description="place among the partitions of the source, from 0; documents of partition 0 come first")
    file: str = Field(description="name of the input file")
    start: int = Field(description="first byte")
    end: int = Field(description="byte after the last")


def splittable(source: SourceConfig, file: InputFile) -> bool:
    """Whether parts of the file can be read without reading what is before them."""
    return source.kind == "parquet" or (not file.suffix and (source.kind == "jsonl" or (source.kind == "text" and source.document != "file")))


def plan_partitions(name: str, source: SourceConfig, files: Sequence[InputFile], target_bytes: int) -> list[Partition]:
    """Partitions of about `target_bytes` (stored bytes, at least half of it), in order. A pure function of the files' names and sizes: no file is opened."""
    plan: list[Partition] = []
    for file in files:
        pieces = max(1, -(-file.size // target_bytes)) if splittable(source, file) else 1
        cuts = [file.size * i // pieces for i in range(pieces + 1)]
        plan += [Partition(source=name, number=len(plan) + i, file=file.name, start=start, end=end) for i, (start, end) in enumerate(pairwise(cuts))]
    return plan
