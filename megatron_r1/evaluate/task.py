"""The protocol of an evaluation task.

A task sees a `Subject` (the model, through three questions one can ask it) and never torch: the same task runs against a
megatron-core checkpoint, a Hugging Face folder or a fake in a test. To add a task: its settings in `evaluate/config.py`
(a field of `TaskSettings`), a class with the protocol below in `evaluate/tasks/`, one line in `tasks/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_r1.evaluate.results import Outcome
from megatron_r1.utils.seeding import generator


class Subject(Protocol):
    """The model under test."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy continuations, up to (not including) the first stop token."""

    def token_nats(self, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each window of t tokens the negative log-likelihood (nats) of tokens 1 to t-1 given those before: [t-1]."""


class TextTokenizer(Protocol):
    """What tasks use of data/tokenizer.py."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens."""


@dataclass(frozen=True)
class Bench:
    """Everything a task may use."""

    subject: Subject
    tokenizer: Any
    shards: Any | None
    seed: int
    bootstrap: int = 1000
    allow_code_execution: bool = False
    stop_ids: tuple[int, ...] = field(default=())

    def rng(self, *names: str | int) -> np.random.Generator:
        """Random numbers for the purpose `names`, the same whatever ran before."""
        return generator(self.seed, "evaluate", *names)


class TaskDropped(Exception):
    """The task can not run on this machine or with these settings; the message says why."""


class Task(Protocol):
    """One task; constructed with its settings from TaskSettings."""

    name: str

    def run(self, bench: Bench) -> Outcome:
        """Measure. Raises TaskDropped when something optional is missing; must be deterministic in (subject, seed)."""


def continuation_nats(subject: Subject, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """For (context, continuation) pairs, both not empty: the summed negative log-likelihood of the continuation, in nats."""
    windows = [[*context, *continuation] for context, continuation in pairs]
    scored = subject.token_nats(windows)
    return [float(nats[len(nats) - len(continuation) :].sum()) for nats, (_, continuation) in zip(scored, pairs, strict=True)]
