"""A comparison over several seeds, made outside of a run (`benchmarks/evidence.py`), for the page.

One run has one seed, and gaps between its trainings can be chance. The file is one JSON object; what the page shows of it is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, R1Error

UNITS = {"probe": "nats per token on the probe", "held_out": "bits per byte on held-out text"}
MEAN = "mean"


@dataclass(frozen=True)
class Arm:
    """One kind of training. `gain`: what the one compared against gains on it; None for that one itself."""

    name: str
    levels: tuple[float, ...]
    mean: float
    gain: tuple[float, float, float] | None
    wins: int


@dataclass(frozen=True)
class Group:
    """All trainings by one kind of loss, the lowest mean first."""

    unit: str
    streams: tuple[str, ...]
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Agreement:
    """Leave-one-out: rank correlation of truth and prediction, both averaged over the seeds; per capability value, low and high."""

    prediction: str
    ranks: dict[str, tuple[float | None, float | None, float | None]]
    between: float | None


@dataclass(frozen=True)
class Seeds:
    """A whole comparison."""

    date: str
    command: str
    against: str
    seeds: tuple[str, ...]
    groups: tuple[Group, ...]
    agreements: tuple[Agreement, ...]


def read_seeds(path: str | Path) -> Seeds:
    """Raises ArtifactError when the file is absent or not such a comparison."""
    try:
        row = io.read_json(path)
        against = row["against"]
        groups = tuple(_group(kind, row["compared"], against) for kind in UNITS)
        agreements = tuple(_agreement(name, found) for name, found in row["leave_one_out"].items())
        return Seeds(row["date"], row["command"], against, tuple(row["seeds"]), groups, agreements)
    except (OSError, R1Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            expected=f"a comparison over seeds in {path}", found=f"{type(error).__name__}: {error}",
            fix="give the file that benchmarks/evidence.py names at its end, or leave out the report's `seeds`",
        ) from error


def _group(kind: str, compared: dict[str, Any], against: str) -> Group:
    streams = tuple(name for name in compared[against][kind]["level"] if name != MEAN)
    arms = []
    for name, found in compared.items():
        level, gain = found[kind]["level"], found[kind].get("gain", {}).get(MEAN)
        interval = None if gain is None else (float(gain["mean"]), float(gain["low"]), float(gain["high"]))
        arms.append(Arm(name, tuple(float(level[s]) for s in streams), float(level[MEAN]), interval, 0 if gain is None else int(gain["wins"])))
    return Group(UNITS[kind], streams, tuple(sorted(arms, key=lambda arm: arm.mean)))


def _agreement(name: str, found: dict[str, Any]) -> Agreement:
    return Agreement(name, {c: (r["value"], r["low"], r["high"]) for c, r in found["spearman"].items()}, found["truth_between_seeds"])
