"""Seeds as pure functions of names, so that no draw depends on what ran before it."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`; equal inputs give equal seeds on every machine."""
    text = "\x1f".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator (PCG64) for the stream called `names`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))
