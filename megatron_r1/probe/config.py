"""Settings of the probe stage (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.config.units import Tokens


class ProbeInputs(Frozen):
    """The steps a probe is made from."""

    shards: StepName = Field(description="corpus step whose `probe` split holds the candidates")


class CapabilityConfig(Frozen):
    """Where one capability's probe documents come from."""

    sources: dict[str, float] = Field(
        min_length=1,
        description="source -> share of the capability's probe documents (relative numbers; they need not sum to 1). "
        "Several sources per capability keep one corpus' style from standing for the capability.",
    )

    @field_validator("sources")
    @classmethod
    def _positive(cls, sources: dict[str, float]) -> dict[str, float]:
        if any(not share > 0 for share in sources.values()):
            raise ValueError("every share must be above 0; leave a source out instead of giving it 0")
        return sources


class RulesConfig(Frozen):
    """The sieves, in the order they are applied. Each one's counts in and out are recorded."""

    candidates: int = Field(
        default=4000,
        ge=1,
        description="documents per source drawn from the probe split before any rule; bounds the cost on large corpora",
    )
    min_tokens: int = Field(
        default=64, ge=2, description="shorter documents are left out: a few tokens say little about a capability"
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="longer documents are left out (data files in disguise); no limit by default"
    )
    near_duplicate: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="a window whose estimated Jaccard similarity of token 5-grams to an already kept window reaches "
        "this is dropped",
    )
    ngram: int = Field(
        default=13,
        ge=3,
        le=64,
        description="length in tokens of the n-grams compared with the training and held-out documents",
    )
    max_overlap: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="a window is dropped when more than this share of its n-grams occurs in the training split of "
        "any source, "
        "or in a held-out split (evaluation documents). Templated corpora share phrases between documents, so 0 "
        "would empty them; "
        "benchmark items themselves are removed by the corpus stage at a single shared n-gram.",
    )
    compare: Tokens = Field(
        default=Tokens(1_000_000_000),
        description="tokens per source and split that windows are compared with for overlap; of a larger one its first "
        "tokens, which the result says",
    )


class ProbeConfig(StageConfig):
    """Which held-out documents stand for which capability."""

    stage: Literal["probe"] = Field(default="probe", description="Which stage this step runs.")
    inputs: ProbeInputs = Field(description="The steps the probe reads.")
    capabilities: dict[str, CapabilityConfig] = Field(
        min_length=1, description="capability -> its sources, such as code, math, knowledge"
    )
    documents: int = Field(
        default=64,
        ge=2,
        description="probe windows per capability. Rankings from few windows are noise: 8 of 64 agree with Spearman "
        "0.36, 32 with 0.79",
    )
    tokens_per_document: int = Field(
        default=256, ge=8, description="predicted tokens per window; use the sequence length the model trains with"
    )
    window: Literal["random", "first"] = Field(
        default="random",
        description="random: the window begins anywhere in the document, as training blocks do; first: at its "
        "beginning (headers and licences)",
    )
    rules: RulesConfig = Field(default=RulesConfig(), description="the sieves")

    @field_validator("capabilities")
    @classmethod
    def _names(cls, capabilities: dict[str, CapabilityConfig]) -> dict[str, CapabilityConfig]:
        for name in capabilities:
            if not name or any(mark in name for mark in "@#/"):
                raise ValueError(
                    f"capability name {name!r} must be non-empty and free of '@', '#' and '/': it becomes a column name"
                )
        return capabilities


def describe(config: ProbeConfig) -> str:
    """Return one line that says what this step would do."""
    sources = len({source for capability in config.capabilities.values() for source in capability.sources})
    return (
        f"pick {config.documents} held-out windows of up to {config.tokens_per_document} tokens for each of "
        f"{', '.join(config.capabilities)} from {sources} source{'' if sources == 1 else 's'}"
    )
