"""What a family of proxy trainings tells: the shares each was trained on and the probe losses it ended with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact, Parent
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.utils.errors import ArtifactError, ConfigError

PROBE_CURVE = "probe/"
SPARE = 2
"""Proxies beyond the number of sources that a regression needs at least: what is left to tell fit from noise."""


@dataclass(frozen=True)
class Proxies:
    """Legend: n proxies, k sources, C capabilities."""

    names: list[str]
    sources: list[str]
    capabilities: list[str]
    shares: np.ndarray  # [n, k], rows sum to 1
    losses: np.ndarray  # [n, C], nats per token
    tokens: int  # of each training


def read_proxies(artifacts: Sequence[Artifact], shards: Artifact, sources: Sequence[str]) -> Proxies:
    """Read the proxies of a mixture over `sources`.

    Raises ConfigError for too few of them, ArtifactError when one was trained on other shards, on other sources, in another
    way than the first, or without measuring the probe.
    """
    needed = len(sources) + SPARE
    if len(sources) < 2:
        raise ConfigError(expected="at least two sources to mix", found=", ".join(sources), fix="one source needs no proxies: use method natural")
    if len(artifacts) < needed:
        raise ConfigError(
            expected=f"at least {needed} proxies for {len(sources)} sources (one per source and {SPARE} to tell fit from noise)",
            found=f"{len(artifacts)}",
            fix=f"set repeat: {needed} or more on the proxies' steps; the paper has 512 for 17 sources",
        )
    opened = [CheckpointSet.open(artifact) for artifact in artifacts]
    for checkpoints in opened:
        require_trained_here(checkpoints, shards, sources)
        _require_alike(checkpoints, opened[0])
    losses = [_probe_losses(checkpoints) for checkpoints in opened]
    capabilities = sorted(losses[0])
    for checkpoints, found in zip(opened, losses):
        if sorted(found) != capabilities:
            raise ArtifactError(
                expected=f"probe losses of the same capabilities ({', '.join(capabilities)})",
                found=f"{', '.join(sorted(found))} of {checkpoints.artifact.name}",
                fix="measure all proxies on one probe step",
            )
    shares = [[checkpoints.manifest.sources.get(name, 0.0) for name in sources] for checkpoints in opened]
    return Proxies(
        names=[checkpoints.artifact.name for checkpoints in opened],
        sources=list(sources),
        capabilities=capabilities,
        shares=np.array(shares) / np.array(shares).sum(axis=1, keepdims=True),
        losses=np.array([[found[name] for name in capabilities] for found in losses]),
        tokens=opened[0].manifest.tokens,
    )


def require_trained_here(checkpoints: CheckpointSet, shards: Artifact, sources: Sequence[str]) -> None:
    """Raise ArtifactError unless a training read these shards and no other sources than these."""
    name, manifest = checkpoints.artifact.name, checkpoints.manifest
    if manifest.shards != shards.fingerprint:
        raise ArtifactError(
            expected=f"proxies trained on the shards that are mixed ({shards.name}, {shards.fingerprint[:8]})",
            found=f"{name} was trained on {manifest.shards[:8]}",
            fix="train the proxies on the corpus step of this mixture; weights do not carry over to other text or tokens",
        )
    unknown = sorted(source for source, share in manifest.sources.items() if share > 0 and source not in sources)
    if unknown:
        raise ArtifactError(
            expected=f"proxies trained on the mixed sources only ({', '.join(sources)})",
            found=f"{name} was also trained on {', '.join(unknown)}",
            fix="name the same `sources` for this mixture and for those of its proxies",
        )


def _way(checkpoints: CheckpointSet) -> dict[str, Any]:
    """Everything that must not differ between proxies: all but the mixture and the seeds."""
    manifest, parents = checkpoints.manifest, checkpoints.artifact.manifest.parents
    probe, start = parents.get("probe"), parents.get("checkpoint")
    return {
        "model": checkpoints.model,
        "objective": manifest.objective,
        "tokens": manifest.tokens,
        "global_batch": manifest.global_batch,
        "seq_length": manifest.seq_length,
        "optimizer": manifest.optimizer,
        "precision": manifest.precision,
        "checkpoint it starts from": start.fingerprint if isinstance(start, Parent) else None,
        "probe": probe.fingerprint if isinstance(probe, Parent) else None,
        "validation": checkpoints.artifact.manifest.config.get("validation"),
    }


def _require_alike(checkpoints: CheckpointSet, first: CheckpointSet) -> None:
    mine, other = _way(checkpoints), _way(first)
    differing = [name for name in mine if mine[name] != other[name]]
    if differing:
        raise ArtifactError(
            expected=f"proxies that differ in their mixture only, as {first.artifact.name}",
            found=f"{checkpoints.artifact.name} differs in {', '.join(differing)}",
            fix="make the proxies one family of a recipe (repeat:), or leave this one out",
        )


def _probe_losses(checkpoints: CheckpointSet) -> dict[str, float]:
    """Capability -> probe loss after the last step, nats per token. Raises ArtifactError when there is none."""
    last: Mapping[str, Any] = next((r for r in reversed(checkpoints.metrics()) if r["step"] == checkpoints.manifest.steps), {})
    found = {
        curve.removeprefix(PROBE_CURVE): value for curve, value in (last.get("validation") or {}).items() if curve.startswith(PROBE_CURVE)
    }
    bad = sorted(name for name, value in found.items() if value is None or not 0 < value < float("inf"))
    if bad or not found:
        raise ArtifactError(
            expected=f"probe losses of {checkpoints.artifact.name} after its last step",
            found=f"numbers that are none for {', '.join(bad)}" if bad else "none",
            fix="give the proxies inputs.probe and a validation.tokens above 0" if not bad else "a proxy diverged: lower its learning rate",
        )
    return {name: float(value) for name, value in found.items()}
