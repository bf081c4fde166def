"""The mixture artifact: the share of training tokens each source gets, with where the share comes from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError

MIXTURE_FILE = "mixture.json"
KEPT_FOLDER = "kept"
SUM_TOLERANCE = 1e-9
Interval = tuple[float, float]
Method = Literal[
    "influence", "kl", "uniform", "natural", "explicit", "published", "random", "without", "regmix", "doremi", "perplexity"
]


class PaperStop(Frozen):
    """The paper's words as a rule: no document helps any more, or the scores have collapsed towards 0."""

    positive: float = Field(description="share of scored documents with joint benefit above 0")
    positive_below: float = Field(description="stop when `positive` is below this")
    median: float = Field(
        description="median over documents of |joint benefit per token|, in nats of probe loss per unit of learning rate"
    )
    previous_median: float | None = Field(default=None, description="the same of the previous mixture; null without one")
    collapse_below: float = Field(description="stop when `median` is below this share of `previous_median`")
    stop: bool = Field(description="what the rule says")


class StatisticalStop(Frozen):
    """Stop when no source is shown to help and re-weighting is foretold to gain next to nothing."""

    p_values: dict[str, float] = Field(
        description="source -> p-value of mean benefit <= 0 (t test, one-sided), corrected for all sources by Holm"
    )
    lower: dict[str, float] = Field(
        description="source -> lower bound of its mean benefit at the level Holm gives it; absent where nothing is known"
    )
    helping: list[str] = Field(description="sources shown to help: corrected p-value below 1 - confidence")
    reference: Literal["previous", "natural"] = Field(description="mixture the gain is over: the previous one, or natural shares")
    gain_rate: float = Field(
        description="first-order gain of these weights over the reference: nats of mean probe loss per unit of learning "
        "rate. Weights and gain come from the same scores, so it is too high rather than too low"
    )
    path: float | None = Field(default=None, description="learning rate summed over the updates it is meant for")
    gain: float | None = Field(default=None, description="gain_rate times path, nats; null without a path")
    tolerance: float = Field(description="gain that is not worth a round, nats")
    stop: bool | None = Field(description="what the rule says; null: no source is shown to help, but the gain is not known")


class Decision(Frozen):
    """Is another round worth it? Two rules, their numbers and what would follow; nothing acts on it."""

    paper: PaperStop = Field(description="the paper's rule")
    statistical: StatisticalStop = Field(description="the statistical rule")
    follows: str = Field(description="what would follow from both, in a sentence")


class Redundancy(Frozen):
    """Near duplicates among the scored documents, whose benefit was counted once."""

    ngram: int = Field(description="tokens per n-gram")
    similarity: float = Field(description="estimated Jaccard similarity from which two documents count as copies")
    clusters: int = Field(description="clusters of two or more documents")
    documents: int = Field(description="documents in them")
    counted: dict[str, float] = Field(description="source -> documents counted / documents scored; 1 = no copies found")
    between: dict[str, int] = Field(
        default={}, description="`a + b` -> clusters with documents of both sources"
    )
    seen: dict[str, float] = Field(
        description="source -> scored documents / training documents: copies outside of the scored ones are not seen"
    )


class KeptDocuments(Frozen):
    """Which documents are trained on; the numbers themselves lie in `kept/<source>.npy`."""

    rule: Literal["paper", "confident"] = Field(description="paper: benefit above 0; confident: not shown to be <= 0")
    control: bool = Field(description="whether a random part of the same size was kept instead of what the rule keeps")
    unscored: Literal["keep", "drop"] = Field(description="what became of documents that were not scored")
    scored: dict[str, int] = Field(description="source -> documents scored")
    passed: dict[str, int] = Field(description="source -> scored documents that the rule keeps")
    documents: dict[str, int] = Field(description="source -> documents trained on")
    tokens: dict[str, int] = Field(description="source -> tokens trained on")
    emptied: list[str] = Field(default=[], description="sources of which nothing is left; they get no share")


class CapabilityFit(Frozen):
    """How well shares foretell a probe loss: of one capability, in nats per token; or jointly, the mean over capabilities of
    the loss divided by the proxies' geometric mean (1 = an average proxy)."""

    error: float = Field(description="root mean square error on proxies left out of the fit")
    spread: float = Field(description="standard deviation of the proxies' losses: what no fit at all would err by")
    spearman: float | None = Field(description="rank correlation of foretold and real loss, over proxies left out of the fit")
    foretold: float = Field(description="loss foretold for the weights of this mixture")
    lowest: float = Field(description="lowest loss of any proxy")


class Regression(Frozen):
    """RegMix: what was fitted to which proxies (arXiv 2407.01492)."""

    fit: Literal["linear", "lightgbm"] = Field(description="kind of regression of log loss on shares")
    proxies: list[str] = Field(description="train steps fitted to")
    tokens: int = Field(description="training tokens of each proxy")
    penalty: dict[str, float] = Field(default={}, description="capability -> ridge penalty chosen by leaving one proxy out")
    slopes: dict[str, dict[str, float]] = Field(
        default={}, description="capability -> source -> change of the log loss per share, relative to the mean source; negative helps"
    )
    capabilities: dict[str, CapabilityFit] = Field(description="capability, and `joint` -> quality of the fit")
    candidates: int = Field(description="mixtures simulated within the caps")
    best: int = Field(description="of these averaged")


class GroupDRO(Frozen):
    """DoReMi: the training that domain weights were averaged over (arXiv 2305.10429, Algorithm 1)."""

    proxy: str = Field(description="train step with objective group_dro")
    reference: str = Field(description="train step the excess losses are over")
    steps: int = Field(description="updates of the weights averaged over")
    step_size: float = Field(description="eta of the exponentiated gradient")
    smoothing: float = Field(description="c: share of the uniform mixture mixed in after every update")


class PerplexityRecord(Frozen):
    """What a reference model's perplexity kept of each source."""

    model: str = Field(description="train step of the reference model")
    keep: float = Field(description="share of all tokens kept")
    band: Literal["middle", "low", "high"] = Field(description="which perplexities were kept")
    low: float | None = Field(description="lowest mean loss kept, nats per token; null: no lower bound")
    high: float | None = Field(description="highest mean loss kept, nats per token; null: no upper bound")
    documents: dict[str, int] = Field(description="source -> documents read")
    loss: dict[str, float] = Field(description="source -> mean loss of the tokens read, nats per token")
    kept: dict[str, float] = Field(description="source -> share of its tokens kept")


class Mixture(Frozen):
    """Weights of the sources and their provenance. Shares are of *tokens*."""

    method: Method = Field(description="how the weights were made")
    weights: dict[str, float] = Field(
        min_length=1, description="source -> share of training tokens; the shares sum to 1"
    )
    natural: dict[str, float] = Field(description="source -> share proportional to its training tokens (baseline)")
    uniform: dict[str, float] = Field(description="source -> equal share (baseline)")
    floor: float = Field(ge=0, lt=1, description="smallest share of a source that is not known to harm")
    tokens: dict[str, int] = Field(default={}, description="source -> tokens in its training split")
    intervals: dict[str, Interval] | None = Field(
        default=None, description="source -> interval of its share, see `interval_covers`"
    )
    interval_covers: list[str] = Field(
        default=[], description="what was resampled for the intervals; what is not named is not covered"
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
    origin: str | None = Field(default=None, description="where weights that do not follow influence come from, in words")
    table: str | None = Field(default=None, description="name of the published table")
    tau: float | None = Field(default=None, description="strength of the pull towards natural shares (method kl)")
    effective_sources: float | None = Field(default=None, description="exponential of the entropy of the weights")
    divergence: float | None = Field(default=None, description="KL(weights || natural) in nats")
    shrunk: dict[str, float] = Field(
        default={}, description="source -> rho after shrinkage, which the weights follow; empty without shrinkage"
    )
    shrinkage: dict[str, float] = Field(
        default={}, description="source -> how far rho was drawn to the pooled mean: 0 not at all, 1 all the way"
    )
    pooled: float | None = Field(default=None, description="the pooled mean of rho that shrinkage draws to")
    redundancy: Redundancy | None = Field(default=None, description="near duplicates that were counted once")
    kept: KeptDocuments | None = Field(default=None, description="documents trained on; null: all of them")
    decision: Decision | None = Field(default=None, description="whether another round is worth it")
    strength: float | None = Field(default=None, description="strength of the Dirichlet distribution drawn from (method random)")
    without: str | None = Field(default=None, description="source left out (method without)")
    base: dict[str, float] | None = Field(default=None, description="shares before the source was left out (method without)")
    regression: Regression | None = Field(default=None, description="fit and its quality (method regmix)")
    group_dro: GroupDRO | None = Field(default=None, description="training the weights come from (method doremi)")
    perplexity: PerplexityRecord | None = Field(default=None, description="what was read and kept (method perplexity)")
    notes: list[str] = Field(default=[], description="remarks a reader must know")

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


def write_kept(folder: Path, source: str, documents: np.ndarray) -> None:
    """Write the numbers (ascending, in the training split) of the documents of a source that are trained on."""
    path = folder / KEPT_FOLDER / f"{source}.npy"
    with io.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.asarray(documents, "<i8"), allow_pickle=False)


def load_kept(artifact: Artifact, mixture: Mixture) -> dict[str, np.ndarray] | None:
    """source -> numbers of the documents trained on, int64 ascending; None when a mixture keeps all.

    Raises ArtifactError when a list does not hold what the record says.
    """
    if mixture.kept is None:
        return None
    found = {}
    for source, count in mixture.kept.documents.items():
        path = artifact.file(f"{KEPT_FOLDER}/{source}.npy")
        with io.disk_errors(path):
            numbers = np.load(path, allow_pickle=False)
        if len(numbers) != count or (np.diff(numbers) <= 0).any() or (count and numbers[0] < 0):
            raise ArtifactError(
                expected=f"{count} ascending document numbers in {path}",
                found=f"{len(numbers)}, not all ascending" if len(numbers) == count else f"{len(numbers)}",
                fix="delete the mixture's folder and run the same command again",
            )
        found[source] = numbers.astype(np.int64)
    return found
