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

    model_config = {"populate_by_name": True}


class CapabilityProbe(Frozen):
    """The probe set of one capability."""

    documents: list[ProbeDocument] = Field(
        min_length=1, description="windows whose mean loss is the capability's probe loss"
    )
    sieves: list[SieveRecord] = Field(description="counts in and out of each rule, per source, in order of application")
    missing: list[str] = Field(default=[], description="sources the recipe names which the shards do not hold")
    short: dict[str, int] = Field(default={}, description="source -> documents fewer than the recipe asks for")


class ProbeSet(Frozen):
    """Probe sets of all capabilities of a recipe."""

    capabilities: dict[str, CapabilityProbe] = Field(min_length=1, description="capability -> its probe set")
    shards: str = Field(description="fingerprint of the shards the documents belong to")
    tokenizer: str = Field(description="SHA-256 of the tokenizer the shards were written with")
    tokens_per_document: int = Field(ge=1, description="largest number of predicted tokens in a window")
    checks: dict[str, int] = Field(
        default={}, description="what was verified against the training split: check -> number of collisions (all 0)"
    )
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
