"""The probe artifact: which held-out windows stand for each capability, and what each sieve let through."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError

PROBE_FILE = "probe.json"


class Shards(Protocol):
    """What this module needs of a ShardSet."""

    def split(self, source: str, split: str = "train") -> Any:
        """The documents of one split of one source."""
        ...


class ProbeDocument(Frozen):
    """A window of one held-out document."""

    source: str = Field(description="source the document belongs to")
    split: str = Field(description="split it was drawn from; never the training split")
    index: int = Field(ge=0, description="position of the document in its split")
    id: str = Field(description="document id given by the corpus stage")
    start: int = Field(ge=0, description="first token of the window within the document")
    n_tokens: int = Field(
        ge=2, description="tokens in the window; the first is context only, so n_tokens - 1 are predicted"
    )

    def tokens(self, shards: Shards) -> np.ndarray:
        """The window's tokens, [n_tokens]. ArtifactError when the shards hold a different document."""
        tokens = np.asarray(shards.split(self.source, self.split).tokens(self.index))[
            self.start : self.start + self.n_tokens
        ]
        if len(tokens) != self.n_tokens:
            raise ArtifactError(
                expected=f"{self.n_tokens} tokens from {self.start} in {self.source}/{self.split} document "
                f"{self.index}",
                found=f"{len(tokens)} tokens",
                fix="use the probe together with the shards it was made from",
            )
        return tokens


class SieveRecord(Frozen):
    """How many documents of one source a rule received and let through."""

    name: str = Field(description="the rule")
    source: str = Field(description="source it was applied to")
    entered: int = Field(alias="in", description="documents that reached the rule")
    left: int = Field(alias="out", description="documents that passed it")
    threshold: str = Field(default="", description="what a document had to reach, as it was applied; empty for rules without a score")
    relaxed: str = Field(default="", description="why and how the threshold of the settings was relaxed; empty where it was not")

    model_config = {"populate_by_name": True}


class CapabilityProbe(Frozen):
    """The probe set of one capability."""

    documents: list[ProbeDocument] = Field(
        min_length=1, description="windows whose mean loss is the capability's probe loss"
    )
    sieves: list[SieveRecord] = Field(description="counts in and out of each rule, per source, in order of application")
    missing: list[str] = Field(default=[], description="sources the recipe names which the shards do not hold")
    short: dict[str, int] = Field(default={}, description="source -> documents fewer than the recipe asks for")


class JudgeCheck(Frozen):
    """How well the judge's score tells two kinds of documents apart, measured on this run's own documents."""

    name: str = Field(description="the question, and the two kinds of documents")
    auc: float = Field(description="chance that a document of the first kind scores above one of the second; 0.5 is a coin's")
    low: float = Field(description="lower end of the 95 % interval (DeLong)")
    high: float = Field(description="upper end of the 95 % interval")
    first: int = Field(description="documents of the first kind")
    second: int = Field(description="documents of the second kind")
    answered: float = Field(description="mean probability the judge gives to the two answers together")

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "better than chance" if self.low > 0.5 else "worse than chance" if self.high < 0.5 else "no better than chance"


class JudgeRecord(Frozen):
    """The language model that was asked, and how far it can be trusted."""

    model: str = Field(description="package or folder name")
    sha256: dict[str, str] = Field(description="file of weights -> SHA-256")
    precision: str = Field(description="number format of its weights")
    template: str = Field(description="chat: its own chat template; plain: none")
    tokens: int = Field(description="tokens of a window it was shown at most")
    questions: dict[str, str] = Field(description="sieve (and domain) -> question")
    examples: int = Field(default=0, description="answered examples it was shown before every document")
    checks: list[JudgeCheck] = Field(description="the judge measured on documents of this run")


class QualityRecord(Frozen):
    """The classifier that scored quality: the published one, or one trained in the run."""

    kind: str = Field(description="published: a folder of the settings; trained: ridge regression on the judge's answers, in this run")
    name: str = Field(description="the folder's name, or what was trained")
    sha256: dict[str, str] = Field(default={}, description="file of weights -> SHA-256, of a published one")
    labels: int = Field(default=0, description="documents the judge labelled to train it")
    ridge: float | None = Field(default=None, description="ridge penalty chosen by leave-one-out error")
    pearson: float | None = Field(default=None, description="correlation with the judge on labelled documents it was not trained on (5 folds)")
    spearman: float | None = Field(default=None, description="rank correlation, likewise")


class ProbeSet(Frozen):
    """Probe sets of all capabilities of a recipe."""

    capabilities: dict[str, CapabilityProbe] = Field(min_length=1, description="capability -> its probe set")
    shards: str = Field(description="fingerprint of the shards the documents belong to")
    tokenizer: str = Field(description="SHA-256 of the tokenizer the shards were written with")
    tokens_per_document: int = Field(ge=1, description="largest number of predicted tokens in a window")
    checks: dict[str, int] = Field(
        default={}, description="what was verified against the training split: check -> number of collisions (all 0)"
    )
    judge: JudgeRecord | None = Field(default=None, description="the language model that was asked; none: no rule asks one")
    quality: QualityRecord | None = Field(default=None, description="the quality classifier; none: no such sieve")
    notes: list[str] = Field(default=[], description="remarks a reader must know")
    sha256: str = Field(default="", description="hash over every document reference and its tokens")

    def sealed(self, shards: Shards) -> ProbeSet:
        """The same set with `sha256` filled in."""
        return self.model_copy(update={"sha256": self.digest(shards)})

    def digest(self, shards: Shards) -> str:
        """SHA-256 (hex) over references and token contents, capability by capability."""
        total = hashlib.sha256()
        for capability, probe in sorted(self.capabilities.items()):
            for document in probe.documents:
                reference = (
                    capability,
                    document.source,
                    document.split,
                    document.index,
                    document.id,
                    document.start,
                    document.n_tokens,
                )
                total.update("\x1f".join(map(str, reference)).encode("utf-8") + b"\x1e")
                total.update(np.ascontiguousarray(document.tokens(shards), dtype="<i4").tobytes())
        return total.hexdigest()

    def save(self, path: Any) -> None:
        """Write `probe.json`."""
        io.atomic_write_json(path, self.model_dump(mode="json", by_alias=True))


def load_probe(artifact: Artifact) -> ProbeSet:
    """Read a probe artifact. Raises ArtifactError when it is of another kind or does not parse."""
    if artifact.kind != "probe":
        raise ArtifactError(
            expected="a probe artifact",
            found=f"{artifact.path.name} of kind {artifact.kind}",
            fix="point `inputs.probe` at a probe step",
        )
    try:
        return ProbeSet.model_validate(artifact.json(PROBE_FILE))
    except ValidationError as error:
        raise ArtifactError(
            expected=f"a probe set in {artifact.path / PROBE_FILE}",
            found=f"{error.error_count()} wrong or missing fields",
            fix="delete the folder and run the same command again",
        ) from error
