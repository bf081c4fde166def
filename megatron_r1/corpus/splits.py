"""Which split a document belongs to: a function of its group alone, so nothing straddles and every corpus step agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from megatron_r1.corpus.config import SplitConfig


class Splitter:
    """Group -> split. Groups in `control` are held out from everything, whatever their hash."""

    def __init__(self, config: SplitConfig, control: Iterable[str] = ()) -> None:
        self.config, self.control = config, frozenset(control)

    def __call__(self, group: str) -> str:
        """train, probe, test or control."""
        if group in self.control:
            return "control"
        digest = hashlib.sha256(f"{self.config.salt}/{group}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.config.probe:
            return "probe"
        return "test" if place < self.config.probe + self.config.test else "train"
