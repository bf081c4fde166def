"""One measured number, with what is needed to judge it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.evaluate.intervals import bootstrap_ratio, wilson


class Result(Frozen):
    """One line of evaluation.json. (task, metric) is unique within an evaluation."""

    task: str = Field(description="what was asked")
    group: str = Field(description="kind of task: text, generated, answers, knowledge, control, code")
    metric: str = Field(description="accuracy, pass@1 or bits_per_byte")
    value: float = Field(description="the measurement")
    n: int = Field(description="items (documents, questions, problems) behind it")
    low: float = Field(description="lower end of the 95 % confidence interval")
    high: float = Field(description="upper end of the 95 % confidence interval")
    higher_is_better: bool = Field(description="direction")
    chance: float | None = Field(description="value a guesser gets, where that is defined")
    prompt_sha256: str = Field(description="hash of everything the model was shown; two values compare only when it is equal")
    note: str = Field(description="what a reader must know beside the number")


@dataclass(frozen=True)
class Measurement:
    """A result with its items: value = sum(numerators) / sum(denominators). Items allow paired comparisons later."""

    result: Result
    numerators: tuple[float, ...]
    denominators: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"result": self.result.plain(), "numerators": list(self.numerators), "denominators": list(self.denominators)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Measurement:
        """The inverse of `plain`."""
        return cls(Result.model_validate(plain["result"]), tuple(plain["numerators"]), tuple(plain["denominators"]))


@dataclass(frozen=True)
class Outcome:
    """What a task returns: measurements, and one sample record per item."""

    measurements: list[Measurement]
    samples: list[dict[str, Any]]


def prompt_hash(shown: Iterable[Any]) -> str:
    """Hex SHA-256 of the texts (or JSON-able records) the model was shown, in order."""
    return hashlib.sha256(json.dumps(list(shown), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")).hexdigest()


def share(
    task: str, group: str, metric: str, correct: Iterable[bool], chance: float | None, prompt_sha256: str, note: str = ""
) -> Measurement:
    """Share of right answers with its Wilson interval."""
    flags = list(correct)
    low, high = wilson(sum(flags), len(flags))
    result = Result(
        task=task, group=group, metric=metric, value=sum(flags) / len(flags), n=len(flags), low=low, high=high, higher_is_better=True, chance=chance,
        prompt_sha256=prompt_sha256, note=note,
    )
    return Measurement(result, tuple(map(float, flags)), (1.0,) * len(flags))


def bits_per_byte(
    task: str, group: str, nats: Iterable[float], n_bytes: Iterable[int], draws: int, rng: np.random.Generator, prompt_sha256: str, note: str = ""
) -> Measurement:
    """sum(nats) / ln 2 / sum(bytes) over documents, with a bootstrap interval over documents."""
    bits, size = np.asarray(list(nats), float) / np.log(2), np.asarray(list(n_bytes), float)
    low, high = bootstrap_ratio(bits, size, draws, rng)
    result = Result(
        task=task, group=group, metric="bits_per_byte", value=float(bits.sum() / size.sum()), n=len(bits), low=low, high=high, higher_is_better=False,
        chance=None, prompt_sha256=prompt_sha256, note=note,
    )
    return Measurement(result, tuple(bits.tolist()), tuple(size.tolist()))
