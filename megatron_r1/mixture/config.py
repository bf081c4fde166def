"""Settings of the mixture stage (torch-free)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.artifacts.mixture import Method
from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.config.units import Epochs, Tokens
from megatron_r1.mixture.tables import TABLES

MEASURED = ("influence", "kl")
"""Methods whose weights follow an influence table."""
PROXIES = ("regmix", "doremi")
"""Methods whose weights follow trainings made for them."""


class MixtureInputs(Frozen):
    """The steps a mixture is made from."""

    shards: StepName = Field(description="corpus step whose sources are mixed")
    influence: StepName | list[StepName] | None = Field(
        default=None,
        description="influence step, or a list of them for different capabilities of the same documents (one for each model that is "
        "specialised on a capability); needed by the methods influence and kl and by `filter`. Given to another method, "
        "what it measured is recorded beside the weights, so that mixtures from one table can be compared",
    )
    previous: StepName | None = Field(
        default=None, description="earlier mixture step, to record how far the weights moved"
    )
    base: StepName | None = Field(
        default=None, description="mixture step that method without leaves a source out of; none: the natural shares"
    )
    proxies: list[StepName] = Field(
        default=[],
        description="train steps made for a method: regmix, the proxies (a family, such as proxy-*); doremi, the one "
        "training with objective group_dro",
    )
    checkpoint: StepName | None = Field(
        default=None, description="train step whose final model method perplexity reads the documents with"
    )


class KLConfig(Frozen):
    """How strongly method kl pulls towards the natural shares. Exactly one of the three."""

    tau: float | None = Field(
        default=None,
        gt=0,
        description="tau in: maximise sum w rho - tau KL(w || natural), in the units of rho (see `normalise`); large: "
        "natural shares, small: the best source only",
    )
    effective_sources: float | None = Field(
        default=None,
        ge=1,
        description="the smallest tau that leaves this many effective sources (exponential of the weights' entropy)",
    )
    divergence: float | None = Field(
        default=None, gt=0, description="the smallest tau with KL(w || natural) of at most this many nats"
    )

    @model_validator(mode="after")
    def _one(self) -> KLConfig:
        if sum(value is not None for value in (self.tau, self.effective_sources, self.divergence)) != 1:
            raise ValueError("give exactly one of tau, effective_sources and divergence")
        return self


class RedundancyConfig(Frozen):
    """Near duplicates among the scored documents: the benefit of a cluster is counted once, shared by its copies."""

    ngram: int = Field(default=5, ge=2, le=64, description="length in tokens of the n-grams compared")
    similarity: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="estimated Jaccard similarity of the n-gram sets from which two scored rows count as copies",
    )


class FilterConfig(Frozen):
    """Which documents the trainer gets to see. Needs whole documents scored (influence's score_unit: document)."""

    rule: Literal["none", "paper", "confident"] = Field(
        default="none",
        description="none: all documents; paper: those with benefit above 0 (Eq. 7); confident: all but those whose upper "
        "bound over the probe folds is at or below 0, so that noise of the probe drops nothing",
    )
    unscored: Literal["keep", "drop"] = Field(
        default="keep",
        description="documents that were not scored: kept, or dropped (the paper's reading, where all were scored)",
    )
    control: bool = Field(
        default=False,
        description="keep a random part of the scored documents of the same number of tokens instead, source by source: "
        "the control that tells choosing from mere shrinking. Weights are those of the filtered mixture",
    )


class StopConfig(Frozen):
    """When another round of influence is not worth it. Both rules are judged and recorded; neither stops anything."""

    positive: float = Field(
        default=0.05, ge=0, lt=1, description="paper's rule: stop when fewer than this share of documents have benefit above 0"
    )
    collapse: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="paper's rule: stop when the median |benefit| falls below this share of the previous round's",
    )
    path: float | None = Field(
        default=None,
        gt=0,
        description="learning rate summed over the updates the gain is reckoned for (mean rate times updates): turns the "
        "first-order gain into nats. The gain is linear in it, so over a whole phase it is much too large, which errs "
        "towards going on. Without a path the statistical rule cannot say stop",
    )
    tolerance: float = Field(
        default=0.001,
        gt=0,
        description="statistical rule: predicted gain over the reference mixture, in nats of probe loss, that is not "
        "worth a round",
    )


class SamplingConfig(Frozen):
    """RegMix's random mixtures (arXiv 2407.01492, section 3.1; constants of its code).

    Dirichlet with concentration strength * natural^temperature / sum; strength log-uniform between its bounds. A mixture
    that asks for more passes than max_epochs is drawn again.
    """

    lowest: float = Field(default=0.1, gt=0, description="smallest strength: mixtures of one or two sources")
    highest: float = Field(default=5.0, gt=0, description="largest strength: mixtures near the tempered natural shares")
    temperature: float = Field(
        default=0.5, ge=0, le=1, description="power the natural shares are raised to: 1 as they are, 0 uniform"
    )
    minimum: float = Field(default=2e-4, ge=0, lt=0.1, description="shares below this become 0")

    @model_validator(mode="after")
    def _ordered(self) -> SamplingConfig:
        if self.lowest > self.highest:
            raise ValueError("lowest must not be above highest")
        return self


class RandomConfig(SamplingConfig):
    """Which of the random mixtures."""

    index: int = Field(ge=0, description="number of the mixture: each number is another draw from the same seed")


class RegMixConfig(Frozen):
    """From losses of proxies to a mixture (arXiv 2407.01492)."""

    fit: Literal["linear", "lightgbm"] = Field(
        default="linear",
        description="log of each capability's probe loss on the shares. linear: ridge regression, its penalty chosen by "
        "leaving one proxy out; lightgbm: boosted trees, the paper's choice with 512 proxies (needs the package lightgbm)",
    )
    candidates: int = Field(
        default=100_000, ge=1000, description="mixtures simulated, drawn as the proxies' are (paper: a million)"
    )
    best: int = Field(default=100, ge=1, description="candidates with the lowest foretold loss that are averaged (paper: 100)")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="how candidates are drawn")

    @model_validator(mode="after")
    def _fewer(self) -> RegMixConfig:
        if self.best > self.candidates:
            raise ValueError("best must not be above candidates")
        return self


class PerplexityConfig(Frozen):
    """Which documents count, by the loss a reference model has on them (arXiv 2309.04564, 2405.20541)."""

    keep: float = Field(default=0.5, gt=0, le=1, description="share of all training tokens that is kept (papers: 0.5)")
    band: Literal["middle", "low", "high"] = Field(
        default="middle", description="which perplexities are kept: around the median (default of the first paper), low or high"
    )
    documents: int = Field(
        default=200, ge=2, description="documents read per source, drawn at random; they stand for the whole source"
    )
    tokens_per_document: int = Field(default=512, ge=1, description="predicted tokens read of each document, from its beginning")
    batch_tokens: int = Field(default=16384, ge=1, description="tokens of one forward pass, padding included")


class MixtureConfig(StageConfig):
    """How the training tokens are shared among the sources.

    Rule of method influence (Eq. 6 of arXiv 2509.24945 v1, sign and gaps as documented with the fields):

    1. rho_g = sum over scored documents of the joint benefit / their tokens: mean benefit per token.
    2. rho_g <= 0 counts as 0 ("clipped").
    3. A clipped source whose whole interval lies below 0 is known to harm: its share is 0 (`harmful: zero`).
    4. So is a source the previous mixture knew to harm, unless it is readmitted (`readmit`).
    5. Every other source gets max(floor, lambda * rho_g), at most its cap; lambda makes the shares sum to 1.

    Method kl replaces 2 and 5 by natural shares times exp(rho / tau), within the same floors and caps. All other methods
    are baselines (docs/mixtures.md): they have caps, but no floor.
    """

    stage: Literal["mixture"] = Field(default="mixture", description="Which stage this step runs.")
    inputs: MixtureInputs = Field(description="The steps the mixture reads.")
    method: Method = Field(
        description="influence: Eq. 6; kl: most benefit at a stated distance from the natural shares; uniform: equal "
        "shares; natural: proportional to training tokens; explicit: `weights` as given (also those another method found); "
        "published: the table named by `table`; random: a draw around the natural shares; without: one source left out; "
        "regmix: best by a regression over proxies; doremi: domain weights of a group-DRO training; perplexity: by a "
        "reference model's perplexity of the documents"
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
    origin: str | None = Field(
        default=None,
        description="where the weights of method explicit come from (another method's proxy run, a paper), for the record",
    )
    table: str | None = Field(default=None, description="table of method published: one of " + ", ".join(TABLES))
    kl: KLConfig | None = Field(default=None, description="strength of method kl")
    random: RandomConfig | None = Field(default=None, description="which mixture of method random")
    without: str | None = Field(default=None, description="source that method without leaves out")
    regmix: RegMixConfig | None = Field(default=None, description="settings of method regmix; none: the defaults")
    perplexity: PerplexityConfig | None = Field(default=None, description="settings of method perplexity; none: the defaults")
    shrink: Literal["none", "pooled"] = Field(
        default="none",
        description="pooled: rho of every source is drawn towards the mean of all by what its noise warrants (empirical "
        "Bayes, positive part), which lowers the mean squared error when sources are noisy; none: Eq. 6 as it stands",
    )
    redundancy: RedundancyConfig | None = Field(
        default=None, description="count near duplicates once; null: every scored document counts, as in Eq. 6"
    )
    filter: FilterConfig = Field(default=FilterConfig(), description="which documents are trained on")
    stop: StopConfig = Field(default=StopConfig(), description="when another round is not worth it")
    floor: float = Field(
        default=0.002,
        ge=0,
        lt=1,
        description="smallest share of a source that is not known to harm, so that none disappears by noise (methods "
        "influence and kl)",
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
        if self.method in MEASURED and self.inputs.influence is None:
            raise ValueError(f"inputs.influence must be given with method {self.method}")
        if self.filter.rule != "none" and self.inputs.influence is None:
            raise ValueError(f"inputs.influence must be given with filter.rule {self.filter.rule}")
        if self.filter.control and self.filter.rule == "none":
            raise ValueError("filter.control needs a filter.rule whose size it copies")
        if self.method not in MEASURED and (self.shrink != "none" or self.redundancy is not None):
            raise ValueError("shrink and redundancy belong to the methods influence and kl")
        for name, method in (("weights", "explicit"), ("table", "published"), ("kl", "kl"), ("random", "random"), ("without", "without")):
            if (self.method == method) != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be given with method {method}, and only then")
        for name in ("regmix", "perplexity"):
            if self.method != name and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to method {name}")
        if (self.method in PROXIES) != bool(self.inputs.proxies):
            raise ValueError("inputs.proxies must be given with the methods regmix and doremi, and only then")
        if self.method == "doremi" and len(self.inputs.proxies) != 1:
            raise ValueError("method doremi takes one training with objective group_dro as inputs.proxies")
        if (self.method == "perplexity") != (self.inputs.checkpoint is not None):
            raise ValueError("inputs.checkpoint must be given with method perplexity, and only then")
        if self.inputs.base is not None and self.method != "without":
            raise ValueError("inputs.base belongs to method without")
        if self.origin is not None and self.method != "explicit":
            raise ValueError("origin belongs to the weights of method explicit")
        if self.table is not None and self.table not in TABLES:
            raise ValueError(f"table {self.table!r} is not known; there are {', '.join(TABLES)}")
        if self.weights is not None and (
            any(not (math.isfinite(weight) and weight >= 0) for weight in self.weights.values())
            or not sum(self.weights.values()) > 0
        ):
            raise ValueError("weights must be finite, not negative, and at least one above 0")
        if self.stated is not None and self.sources is not None:
            raise ValueError(f"with method {self.method} the weights name the sources; leave `sources` out")
        if self.max_epochs is not None and (self.budget is None or not self.max_epochs > 0):
            raise ValueError("max_epochs needs a budget (such as budget: 500k tokens) and must be above 0")
        return self

    @property
    def needs_model(self) -> bool:
        """Whether the step runs a model, so that all processes of a job take part."""
        return self.method == "perplexity"

    @property
    def stated(self) -> dict[str, float] | None:
        """Relative shares that the settings state: the weights given, or those of the published table."""
        if self.table is not None:
            return dict(TABLES[self.table].weights) if self.table in TABLES else None
        return self.weights


def describe(config: MixtureConfig) -> str:
    """Return one line that says what this step would do."""
    how = {
        "influence": "share tokens by influence (Eq. 6)",
        "kl": "share tokens by influence, tilted from the natural shares",
        "uniform": "share tokens equally",
        "natural": "share tokens by size of the sources",
        "explicit": f"share tokens as given for {len(config.weights or {})} sources",
        "published": f"share tokens as published ({config.table})",
        "random": f"share tokens by random mixture {config.random.index if config.random else 0} around the natural shares",
        "without": f"share tokens {f'as {config.inputs.base}' if config.inputs.base else 'by size of the sources'}, without {config.without}",
        "regmix": f"share tokens by a {(config.regmix or RegMixConfig()).fit} regression over {len(config.inputs.proxies)} proxies (RegMix)",
        "doremi": "share tokens by the mean domain weights of a group-DRO training (DoReMi)",
        "perplexity": "share tokens by {0.band} perplexity, {0.keep:.0%} of all tokens kept".format(config.perplexity or PerplexityConfig()),
    }[config.method]
    if config.shrink == "pooled":
        how += ", shrunk to the mean"
    if config.redundancy is not None:
        how += ", near duplicates counted once"
    if config.method in MEASURED:
        fate = "dropped" if config.harmful == "zero" else "kept at the floor"
        how += f", floor {config.floor:g}, harmful sources {fate}"
    if config.max_epochs is not None:
        how += f", at most {config.max_epochs}"
    if config.filter.rule != "none":
        how += f"; documents: {'as many at random as' if config.filter.control else 'those'} the rule {config.filter.rule} keeps"
    return how
