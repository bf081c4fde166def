"""Settings of the mixture stage (torch-free)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.config.units import Epochs, Tokens


class MixtureInputs(Frozen):
    """The steps a mixture is made from."""

    shards: StepName = Field(description="corpus step whose sources are mixed")
    influence: StepName | None = Field(
        default=None, description="influence step; needed by method influence, refused by the others"
    )
    previous: StepName | None = Field(
        default=None, description="earlier mixture step, to record how far the weights moved"
    )


class MixtureConfig(StageConfig):
    """How the training tokens are shared among the sources.

    Rule of method influence (Eq. 6 of arXiv 2509.24945 v1, sign and gaps as documented with the fields):

    1. rho_g = sum over scored documents of the joint benefit / their tokens: mean benefit per token.
    2. rho_g <= 0 counts as 0 ("clipped").
    3. A clipped source whose whole interval lies below 0 is known to harm: its share is 0 (`harmful: zero`).
    4. So is a source the previous mixture knew to harm, unless it is readmitted (`readmit`).
    5. Every other source gets max(floor, lambda * rho_g), at most its cap; lambda makes the shares sum to 1.
    """

    stage: Literal["mixture"] = Field(default="mixture", description="Which stage this step runs.")
    inputs: MixtureInputs = Field(description="The steps the mixture reads.")
    method: Literal["influence", "uniform", "natural", "explicit"] = Field(
        description="influence: Eq. 6; uniform: equal shares; natural: proportional to training tokens; explicit: "
        "`weights` as given"
    )
    sources: list[str] | None = Field(
        default=None,
        min_length=1,
        description="sources to mix; by default every source of the shards with training tokens",
    )
    weights: dict[str, float] | None = Field(
        default=None,
        min_length=1,
        description="relative shares of method explicit; a source the shards lack is dropped aloud and recorded",
    )
    floor: float = Field(
        default=0.002,
        ge=0,
        lt=1,
        description="smallest share of a source that is not known to harm, so that none disappears by noise (method "
        "influence)",
    )
    harmful: Literal["zero", "floor"] = Field(
        default="zero",
        description="what a source gets whose interval of rho lies wholly below 0: nothing, or the floor",
    )
    readmit: Literal["every", "joint", "anew"] = Field(
        default="every",
        description="when a source that the previous mixture kept out as harmful may come back (inputs.previous): once "
        "its interval lies above 0 for every capability; for the joint benefit; or judged anew, as the paper does. "
        "Scores foretell the very next step only: a model that has not seen a source for a while gains from its word "
        "frequencies at first, even where its tokens are shuffled",
    )
    normalise: Literal["none", "rms", "self"] = Field(
        default="rms",
        description="scale on which capabilities and checkpoints are joined. Scores along P G scale with each probe "
        "gradient (DataInf's do not), "
        "so without this the capability with the largest gradient decides alone. rms: per capability and checkpoint, "
        "the root mean square of the "
        "per-token scores is 1 (robust default); self: 1 = as good as the probe itself; none: raw, for fidelity "
        "studies",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="nominal coverage of the intervals")
    bootstrap: int = Field(
        default=1000, ge=100, description="bootstrap replicates for the intervals of rho and of the weights"
    )
    budget: Tokens | None = Field(
        default=None,
        description="training tokens the mixture is meant for: reports passes over each source; needed by max_epochs",
    )
    max_epochs: Epochs | None = Field(
        default=None,
        description="largest number of passes over any source; off by default, as in the paper (its tables imply up "
        "to 38 passes)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        if (self.method == "influence") != (self.inputs.influence is not None):
            raise ValueError("inputs.influence must be given with method influence, and only then")
        if (self.method == "explicit") != (self.weights is not None):
            raise ValueError("weights must be given with method explicit, and only then")
        if self.weights is not None:
            if (
                any(not (math.isfinite(weight) and weight >= 0) for weight in self.weights.values())
                or not sum(self.weights.values()) > 0
            ):
                raise ValueError("weights must be finite, not negative, and at least one above 0")
            if self.sources is not None:
                raise ValueError("with method explicit the weights name the sources; leave `sources` out")
        if self.max_epochs is not None and (self.budget is None or not self.max_epochs > 0):
            raise ValueError("max_epochs needs a budget (such as budget: 500k tokens) and must be above 0")
        return self


def describe(config: MixtureConfig) -> str:
    """Return one line that says what this step would do."""
    how = {
        "influence": "share tokens by influence (Eq. 6)",
        "uniform": "share tokens equally",
        "natural": "share tokens by size of the sources",
        "explicit": f"share tokens as given for {len(config.weights or {})} sources",
    }[config.method]
    if config.method == "influence":
        fate = "dropped" if config.harmful == "zero" else "kept at the floor"
        how += f", floor {config.floor:g}, harmful sources {fate}"
    if config.max_epochs is not None:
        how += f", at most {config.max_epochs}"
    return how
