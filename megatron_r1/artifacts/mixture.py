"""The mixture artifact: the share of training tokens each source gets, with where the share comes from."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.utils.errors import ArtifactError

MIXTURE_FILE = "mixture.json"
SUM_TOLERANCE = 1e-9
Interval = tuple[float, float]


class Mixture(Frozen):
    """Weights of the sources and their provenance. Shares are of *tokens*."""

    method: Literal["influence", "uniform", "natural", "explicit"] = Field(description="how the weights were made")
    weights: dict[str, float] = Field(
        min_length=1, description="source -> share of training tokens; the shares sum to 1"
    )
    natural: dict[str, float] = Field(description="source -> share proportional to its training tokens (baseline)")
    uniform: dict[str, float] = Field(description="source -> equal share (baseline)")
    floor: float = Field(ge=0, lt=1, description="smallest share of a source that is not known to harm")
    tokens: dict[str, int] = Field(default={}, description="source -> tokens in its training split")
    intervals: dict[str, Interval] | None = Field(
        default=None, description="source -> interval of its share (bootstrap over scored documents)"
    )
    rho: dict[str, float] = Field(
        default={}, description="source -> benefit per token, Eq. 6 before normalisation; may be negative"
    )
    rho_intervals: dict[str, Interval] = Field(default={}, description="source -> interval of rho")
    rho_capability: dict[str, dict[str, float]] = Field(
        default={}, description="source -> capability -> benefit per token (normalised scale)"
    )
    clipped: list[str] = Field(default=[], description="sources whose rho is not positive, counted as 0 in Eq. 6")
    harmful: list[str] = Field(default=[], description="clipped sources whose interval of rho lies wholly below 0")
    kept_out: list[str] = Field(
        default=[],
        description="sources with no share because an earlier mixture knew them to harm and they are not readmitted",
    )
    capped: list[str] = Field(default=[], description="sources whose share is bound by max_epochs")
    epochs: dict[str, float] = Field(default={}, description="source -> passes over its tokens that the budget implies")
    budget: int | None = Field(default=None, description="training tokens the epochs refer to")
    confidence: float | None = Field(default=None, description="nominal coverage of the intervals")
    normalise: str | None = Field(default=None, description="how capabilities were brought to one scale before joining")
    missing: list[str] = Field(default=[], description="sources the recipe names which the shards do not hold")
    change: float | None = Field(default=None, description="total variation distance to the previous mixture, 0..1")
    influence_sha256: str | None = Field(default=None, description="fingerprint of the influence artifact used")

    @model_validator(mode="after")
    def _shares(self) -> Mixture:
        total = math.fsum(self.weights.values())
        if (
            any(not math.isfinite(weight) or weight < 0 for weight in self.weights.values())
            or abs(total - 1) > SUM_TOLERANCE
        ):
            raise ValueError(f"weights must be non-negative and sum to 1; they sum to {total!r}")
        return self


def load_mixture(artifact: Artifact) -> Mixture:
    """Read a mixture artifact. Raises ArtifactError when it is of another kind or does not parse."""
    if artifact.kind != "mixture":
        raise ArtifactError(
            expected="a mixture artifact",
            found=f"{artifact.path.name} of kind {artifact.kind}",
            fix="point `inputs.mixture` at a mixture step",
        )
    try:
        return Mixture.model_validate(artifact.json(MIXTURE_FILE))
    except ValidationError as error:
        raise ArtifactError(
            expected=f"a mixture in {artifact.path / MIXTURE_FILE}",
            found=f"{error.error_count()} wrong or missing fields",
            fix="delete the folder and run the same command again",
        ) from error
