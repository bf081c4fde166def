"""Scores that cost a model's forward: computed in parts, each a file that is whole or absent, so that a killed run goes on.

A part is a fixed set of windows, read in batches that depend on nothing else: whatever was interrupted, the numbers are the same.
Under torchrun the processes share the parts.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_r1.config.base import fingerprint
from megatron_r1.utils.io import atomic_write_bytes
from megatron_r1.utils.logging import progress

PART = 32
"""Windows of a part: what a kill can cost. Seconds, for a judge on two cores."""


class Together(Protocol):
    """The processes that share the work."""

    data_rank: int
    data_size: int

    def barrier(self) -> None: ...


class Scores:
    """Computed scores under a folder, by what was asked of which windows."""

    def __init__(self, folder: Path, together: Together) -> None:
        self.folder, self.together = folder, together

    def of(self, label: str, asked: Any, windows: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], part_size: int | None = None) -> np.ndarray:
        """What `compute` says of every window, [n, ...]. Collective.

        asked: JSON-able, everything besides the windows that the numbers depend on. windows int64 [n, k]: what tells a window from
        another. compute: numbers of windows -> [those, ...], for one part at a time; not called for parts that are there.
        """
        key = fingerprint({"asked": asked})[:16]
        size = part_size or PART
        parts = [np.arange(first, min(first + size, len(windows))) for first in range(0, len(windows), size)]
        files = [self.folder / label.replace(" ", "_") / f"{key}-{hashlib.sha256(np.ascontiguousarray(windows[part]).tobytes()).hexdigest()[:24]}.npy" for part in parts]
        with progress(f"probe: {label}", len(windows), "documents") as bar:
            for first in range(0, len(parts), self.together.data_size):
                mine = first + self.together.data_rank
                if mine < len(parts) and not files[mine].exists():
                    content = io.BytesIO()
                    np.save(content, compute(parts[mine]))
                    atomic_write_bytes(files[mine], content.getvalue())
                # Every round: a single barrier at the end would outlast the process group's timeout.
                self.together.barrier()
                bar.advance(sum(len(part) for part in parts[first : first + self.together.data_size]))
        return np.concatenate([np.load(file) for file in files])
