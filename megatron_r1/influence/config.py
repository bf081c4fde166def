"""Settings of the influence stage (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.config.units import Tokens
from megatron_r1.parallel.config import LayoutConfig

PARAMETER_KINDS = 4  # embedding, attention, ffn, norm: influence.groups


class InfluenceInputs(Frozen):
    """The steps influence is measured from."""

    shards: StepName = Field(description="corpus step whose training documents are scored")
    probe: StepName = Field(description="probe step with the held-out windows of each capability")
    checkpoint: StepName = Field(description="train step whose checkpoints the documents are scored at")


class ValidityConfig(Frozen):
    """The receipt: do the scores predict what a real step does to the probe loss?"""

    batches: int = Field(
        default=12, ge=0, description="random document batches to take one real step on; 0 leaves the receipt out"
    )
    documents: int = Field(default=8, ge=1, description="scored documents per batch")
    probe_documents: int = Field(
        default=256,
        ge=1,
        description="probe windows per capability to measure on: every k-th of a larger probe. The forecast is "
        "of the whole probe, so a part adds noise to the comparison",
    )
    step: float = Field(
        default=1e-4,
        gt=0,
        lt=0.1,
        description="length of the real step relative to the norm of the weights: above fp32 noise, yet short enough "
        "for a first-order forecast. "
        "On a nano model the rank correlation was 0.99 at 1e-4, 0.92 at 1e-3 and 0.65 at 1e-2, where curvature decides",
    )
    optimizer: Literal["trainer", "sgd"] | None = Field(
        default=None,
        description="whose step is taken. trainer: the gradient scaled by the checkpoint's own second moment, what its AdamW "
        "does; sgd: the gradient itself. null: trainer, unless preconditioner is none",
    )


class CurvatureConfig(Frozen):
    """What the approximate inverse Hessians (preconditioner datainf or ekfac) are estimated from."""

    documents: int = Field(
        default=16,
        ge=1,
        description="documents per scored source, one random window each, drawn by a keyed permutation of the training "
        "split that is not the one of the scored documents; a source with fewer gives all it has. The curvature is that "
        "of equal shares of documents, not of the mixture trained on",
    )
    damping: float = Field(
        default=0.1,
        gt=0,
        description="lambda of each parameter tensor, relative to the mean eigenvalue of its curvature. With datainf 0.1 is "
        "the paper's lambda (0.1 times the mean squared gradient entry); with ekfac it is the usual choice too",
    )


class InfluenceConfig(StageConfig):
    """How documents are scored.

    Score of a document = <its gradient, P G>, P the preconditioner and G the gradient of a capability's probe loss, over every
    parameter. Positive = benefit.
    """

    stage: Literal["influence"] = Field(default="influence", description="Which stage this step runs.")
    inputs: InfluenceInputs = Field(description="The steps influence reads.")
    sources: list[str] | None = Field(
        default=None, min_length=1, description="sources to score; by default every source of the shards"
    )
    capabilities: list[str] | None = Field(
        default=None,
        min_length=1,
        description="capabilities of the probe to score for; by default all. With a model specialised on each, an influence step for "
        "each, and a mixture reads them together (inputs.influence: [a, b, c])",
    )
    documents: int = Field(
        default=48,
        ge=1,
        description="documents scored per source (Eq. 6's representative subset), drawn by a keyed permutation of "
        "the training split",
    )
    tokens_per_document: int = Field(
        default=256,
        ge=8,
        description="predicted tokens per row; longer documents are cut (see score_unit), shorter ones padded",
    )
    min_tokens: int = Field(default=8, ge=2, description="documents with fewer tokens are not drawn")
    score_unit: Literal["window", "document"] = Field(
        default="window",
        description="window: one window per document; document: all windows of the document, summed (needed to "
        "filter documents; costs its whole length)",
    )
    window: Literal["random", "first"] = Field(
        default="random",
        description="with score_unit window: where the window begins; random is what training blocks see",
    )
    checkpoints: int = Field(
        default=2,
        ge=1,
        description="how many of the run's checkpoints to score at; by default evenly spaced and ending at the last; weight "
        "alpha proportional to the step (Eq. 5)",
    )
    checkpoint_choice: Literal["evenly", "probe_loss"] = Field(
        default="evenly",
        description="which checkpoints: evenly spaced, or those with the lowest probe loss (mean over the scored capabilities), after "
        "AutoMixer's task-selected checkpoints (arXiv 2506.21910); for a choice of its own a capability needs an influence step of its own",
    )
    preconditioner: Literal["none", "adam", "datainf", "ekfac"] = Field(
        default="adam",
        description="adam: the trainer's own second moment, bias correction and eps, which predicts an AdamW step "
        "far better than none; datainf: the paper's closed form of an inverse Hessian; ekfac: another one, by layers "
        "(docs/influence.md, Preconditioners)",
    )
    curvature: CurvatureConfig = Field(
        default=CurvatureConfig(), description="what datainf and ekfac are estimated from; not used by the others"
    )
    parameters: Literal["all", "embeddings"] | list[str] = Field(
        default="all",
        min_length=1,
        description="whose gradients are compared. all; embeddings: token embedding and output head, AutoMixer's choice "
        "(arXiv 2506.21910; one tensor where they are tied); or patterns with * and ? of parameter names, such as "
        "[decoder.layers.3.*, '*layernorm*']. What is left out can change the ranking: see `score_shares` of a full table",
    )
    eps: float | None = Field(
        default=None,
        gt=0,
        description="eps in 1/(sqrt(v)+eps); by default the trainer's. A tiny eps lets rarely seen embedding rows "
        "carry the score (watch `ess`); "
        "raising it damps them, at the price of predicting another optimizer",
    )
    engine: Literal["ghost", "finite_differences"] = Field(
        default="ghost",
        description="ghost: all directions from one forward and backward of packed documents; finite_differences: two forwards "
        "per direction, of a model whose layers need not be known. They agree to the differences' error (`agreement`)",
    )
    directions_per_pass: int = Field(
        default=8,
        ge=1,
        description="with ghost, directions (capabilities, and their probe folds) scored in one pass: each takes as much memory as "
        "the weights, and saves a forward and half a backward",
    )
    fd_epsilon: float = Field(
        default=3e-4,
        gt=0,
        lt=0.1,
        description="finite-difference step relative to |weights|/|P G|. Measured in fp32: 3e-4 gives 1e-4 relative "
        "error, 1e-2 gives 0.12",
    )
    fd_check_documents: int = Field(
        default=8,
        ge=0,
        description="rows scored a second time as a check, recorded for every direction. With ghost by finite differences, "
        "extrapolated from two steps (`agreement`), with finite_differences at twice the step (`truncation`, the error from curvature); 0 leaves the check out",
    )
    share_documents: int = Field(
        default=24,
        ge=0,
        description="rows rescored along each kind of parameter alone (embedding, attention, ffn, norm), for its share of "
        "the scores; 0 leaves the shares out",
    )
    probe_weighting: Literal["documents", "tokens"] = Field(
        default="documents",
        description="documents: the probe loss is the mean over windows of their mean token loss (recipe default); "
        "tokens: mean over all tokens",
    )
    probe_folds: int = Field(
        default=1,
        ge=1,
        description="probe folds with their own direction, so that intervals also cover the choice of probe windows; "
        "8 is a good number, 2 say next to nothing. A document scored along F folds costs F products with the weights' gradients "
        "(finite_differences: F times the forwards), see fold_documents. 1: intervals cover scored documents only, and say so",
    )
    fold_documents: int | None = Field(
        default=None,
        ge=1,
        description="documents per source that are scored along every probe fold (the first of those drawn); the others "
        "are scored along the whole probe only. Noise of the probe shows on a part of the documents: of 40 documents "
        "and 8 folds, 10 by fold take 2.75 products per token where all take 8. null: all documents",
    )
    normalise: Literal["none", "rms", "self"] = Field(
        default="rms", description="scale of the summary and of Eq. 5: see artifacts.influence.InfluenceTable.benefits"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="nominal coverage of the intervals")
    bootstrap: int = Field(default=1000, ge=100, description="bootstrap replicates")
    batch: Tokens = Field(default=Tokens(4096), description="padded tokens per forward")
    partition_documents: int = Field(
        default=256,
        ge=1,
        description="documents per resumable partition: an interrupted run loses at most the partition in work",
    )
    keep_gradients: bool = Field(
        default=False,
        description="keep every capability's probe gradient G at every checkpoint in the artifact (gradients/, safetensors, one file for each process "
        "of a model copy): as large as the weights each. Their hashes are recorded in any case",
    )
    validity: ValidityConfig = Field(default=ValidityConfig(), description="the receipt")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="type of the weights. bf16 (ghost only): half the memory; scores are rounded as training in bf16 rounds its "
        "gradients, and nothing can be checked by moving weights: needs fd_check_documents: 0 and validity: {batches: 0}",
    )
    layout: LayoutConfig = Field(
        default=LayoutConfig(),
        description="tensor, sequence, pipeline and context parallelism of one model copy; copies share the partitions. Any layout loads any "
        "checkpoint and gives the same scores. Cut models: preconditioner none or adam, parameters: all",
    )

    @property
    def moves_weights(self) -> bool:
        """Whether finite differences are needed: to score, to check, or for the receipt."""
        return self.engine == "finite_differences" or self.fd_check_documents > 0 or self.validity.batches > 0

    def scoring_forwards(self, directions: int) -> int:
        """Forwards per token that scoring along so many directions takes. A product with all weights is one: a backward that leaves
        out the weights' gradients has one of them, and each direction adds one."""
        if self.engine == "finite_differences":
            return 2 * directions
        return 2 * -(-directions // self.directions_per_pass) + directions

    def check_forwards(self, capabilities: int) -> int:
        """Forwards per token that the second scoring takes."""
        if self.engine == "finite_differences":
            return 4 * capabilities * self.probe_folds
        return self.scoring_forwards(capabilities) + 4 * capabilities

    @model_validator(mode="after")
    def _engine(self) -> InfluenceConfig:
        if self.precision == "bf16" and (self.engine != "ghost" or self.fd_check_documents or self.validity.batches):
            raise ValueError(
                "precision bf16: differences of bf16 weights are rounding; set engine: ghost, fd_check_documents: 0 and "
                "validity: {batches: 0}, or use fp32"
            )
        if self.layout.distributed_optimizer or self.layout.overlap:
            raise ValueError("layout: distributed_optimizer and overlap are for training; scoring has no optimizer")
        if self.layout.model_parallel() > 1 and (self.parameters != "all" or self.preconditioner not in ("none", "adam")):
            raise ValueError(
                f"layout: preconditioner {self.preconditioner} with parameters {self.parameters} is built for a model that is whole in "
                "every process; use none or adam with parameters: all, or tensor, pipeline and context: 1"
            )
        return self

    @model_validator(mode="after")
    def _batch(self) -> InfluenceConfig:
        if self.fold_documents is not None and (self.probe_folds == 1 or self.fold_documents > self.documents):
            raise ValueError(
                f"fold_documents ({self.fold_documents}) needs probe_folds above 1 and may not exceed documents "
                f"({self.documents})"
            )
        if self.eps is not None and self.preconditioner != "adam":
            raise ValueError(f"eps ({self.eps}) belongs to preconditioner adam, which is {self.preconditioner}; see curvature.damping")
        if self.batch < self.tokens_per_document:
            raise ValueError(
                f"batch ({self.batch}) must hold at least one row of tokens_per_document ({self.tokens_per_document})"
            )
        return self

    def share_forwards(self, capabilities: int) -> int:
        """Forwards per token that scoring along every kind of parameter alone takes."""
        return self.scoring_forwards(PARAMETER_KINDS * capabilities)

    def curvature_forwards(self, directions: int) -> int:
        """Forwards per token of the curvature's documents that estimating P and applying it to so many gradients take (a
        backward counts as two)."""
        return {"datainf": 3 * (1 + directions), "ekfac": 1 + 2 * 3}.get(self.preconditioner, 0)

    @property
    def receipt_optimizer(self) -> Literal["trainer", "sgd"]:
        """Whose step the receipt takes."""
        return self.validity.optimizer or ("sgd" if self.preconditioner == "none" else "trainer")


def describe(config: InfluenceConfig) -> str:
    """Return one line that says what this step would do."""
    folds = f", {config.probe_folds} probe folds" if config.probe_folds > 1 else ""
    part = "" if config.parameters == "all" else f" of {config.parameters}" if isinstance(config.parameters, str) else f" of {', '.join(config.parameters)}"
    which = "every source" if config.sources is None else f"{len(config.sources)} sources"
    return (
        f"score {config.documents} documents of {which}, up to {config.tokens_per_document} tokens each, at "
        f"{config.checkpoints} "
        f"checkpoint{'' if config.checkpoints == 1 else 's'} (preconditioner {config.preconditioner}{part}{folds}, engine "
        f"{config.engine}, {config.precision})"
    )
