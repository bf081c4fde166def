"""Learning rate as a pure function of the step: no state to save, no state to get wrong."""

from __future__ import annotations

import math

from megatron_r1.train.config import LRConfig, TrainConfig


def learning_rate(step: int, total: int, warmup: int, config: LRConfig) -> float:
    """Learning rate of update number `step` (the first is 0) in a phase of `total` updates.

    Warm-up: peak * (step + 1) / warmup for step < warmup; the peak is reached by the last warm-up update.
    Then with x = (step + 1 - warmup) / (total - warmup) in (0, 1] and r = final_ratio:
      linear    peak * (1 - (1 - r) x)                      MobileLLM-R1 section 3.2: 2k warm-up, linear to 10 %
      cosine    peak * (r + (1 - r) (1 + cos(pi x)) / 2)
      constant  peak
      wsd       peak, then linear to r over the last decay_ratio * total updates
    The last update (step = total - 1) runs at exactly peak * r, except in `constant`. With r = 0 the last update would
    not move the weights, so x then counts total - warmup + 1 updates: a decay to zero *after* the last update.
    """
    if step < warmup:
        return config.peak * (step + 1) / warmup
    ratio = config.final_ratio
    shift = 1 if ratio == 0.0 else 0
    if config.schedule == "constant":
        return config.peak
    if config.schedule == "wsd":
        span = max(1, min(math.ceil(config.decay_ratio * total), total - warmup))
        done = step + 1 - (total - span)
        return config.peak * (1.0 - (1.0 - ratio) * max(0, done) / (span + shift))
    x = (step + 1 - warmup) / (max(1, total - warmup) + shift)
    if config.schedule == "linear":
        return config.peak * (1.0 - (1.0 - ratio) * x)
    return config.peak * (ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * x)))


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Length of the warm-up in a phase of `total` steps; never longer than the phase."""
    return min(config.in_steps(config.lr.warmup, total) or 0, total)
