"""The train artifact, read without torch: which checkpoints it holds, of what model, on which tokenizer.

    model.json        ModelConfig
    train.json        TrainManifest below
    tokenizer/        the tokenizer of the shards it was trained on
    checkpoints/step-00000100/   one folder per kept checkpoint (format: parallel/checkpoint.py)
    metrics.jsonl     one record per logged step
    scores/           scores of documents made while training (optional; artifacts/training_scores.py)
    ledger.jsonl      one record per step: which samples, from which sources
    journal.jsonl     one record per decision about a step that went wrong: none is the usual
    views/<source>-<hash>.npy  lists of documents the cursors refer to, one bit per document (optional)
    tensorboard/      the same metrics as event files (optional)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.training_scores import TrainingScores
from megatron_r1.config.base import Frozen
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, CheckpointError

MODEL_FILE, TRAIN_FILE, METRICS_FILE, LEDGER_FILE = "model.json", "train.json", "metrics.jsonl", "ledger.jsonl"
JOURNAL_FILE = "journal.jsonl"
TOKENIZER_FOLDER, CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, VIEWS_FOLDER = "tokenizer", "checkpoints", "tensorboard", "views"
_FOLDER = re.compile(r"^step-(\d{8,})$")


class CheckpointRecord(Frozen):
    """One kept checkpoint."""

    step: int = Field(ge=0, description="optimizer steps of this phase done when it was saved")
    tokens: int = Field(ge=0, description="tokens of this phase consumed when it was saved")
    path: str = Field(description="folder, relative to the artifact")


class DomainWeights(Frozen):
    """What a group-DRO training found out about its sources (arXiv 2305.10429, Algorithm 1)."""

    weights: dict[str, float] = Field(description="source -> domain weight, mean over the updates; sums to 1")
    last: dict[str, float] = Field(description="source -> domain weight after the last update")
    excess: dict[str, float] = Field(description="source -> its last excess loss over the reference, nats per token, clipped at 0 token by token")
    updates: int = Field(ge=0, description="updates of the weights")
    step_size: float = Field(description="eta of the exponentiated gradient")
    smoothing: float = Field(description="c: share of the uniform mixture mixed in after every update")
    reference: str = Field(description="train step of the reference model")


class Leg(Frozen):
    """A part of a source's running epoch that was read with one list of documents and one sequence length."""

    view: str = Field("", description="hash of the list of documents that were read (views/<source>-<hash>.npy); empty: all documents")
    seq_length: int = Field(gt=0, description="tokens per sequence")
    blocks: int = Field(ge=0, description="blocks this leg would have had to its end")
    taken: int = Field(ge=0, description="of these, blocks consumed")


class SourceCursor(Frozen):
    """Where training stands in a source, in numbers that say which tokens of the running epoch were consumed."""

    epoch: int = Field(ge=0, description="passes completed")
    legs: list[Leg] = Field(default=[], description="of the running epoch, in order; empty at its beginning")


class TrainManifest(Frozen):
    """Content of train.json."""

    objective: str = Field(description="next_token, distill, sft, group_dro or grpo")
    checkpoints: list[CheckpointRecord] = Field(description="kept checkpoints, ascending by step")
    final: int = Field(description="index in `checkpoints` of the last step")
    steps: int = Field(description="optimizer steps of the phase")
    tokens: int = Field(description="tokens of the phase, padding included")
    tokens_before: int = Field(description="tokens of all earlier phases this one continues")
    seq_length: int = Field(description="tokens per sequence")
    global_batch: int = Field(description="tokens per optimizer step")
    optimizer: dict[str, Any] = Field(description="AdamW constants: beta1, beta2, eps, weight_decay, clip, and the lr settings under `lr`")
    data_cursors: dict[str, SourceCursor | int] = Field(
        description="per source: where training stands, over this phase and those it continues (a number, as older releases wrote it: blocks consumed)"
    )
    data_seed: int = Field(description="seed that keys the data order; carried on together with the cursors")
    data_order: str = Field(default="", description="fingerprint of the data order of this phase, which its sample numbers and ledger refer to")
    data_views: dict[str, str] = Field(
        default={}, description="as older releases wrote it: source -> hash of the list of documents its cursor counts blocks of; absent: all documents"
    )
    shards: str = Field(description="fingerprint of the shards the cursors belong to")
    tokenizer: str = Field(description="SHA-256 of the tokenizer")
    sources: dict[str, float] = Field(description="share of every source asked for")
    skipped_steps: list[int] = Field(description="steps whose update was skipped or that a rollback left out, because a loss or gradient was not finite or leapt")
    layout: dict[str, Any] = Field(description="parallel layout it was trained on; loading does not depend on it")
    precision: str = Field(description="fp32, bf16 or fp8")
    scores: TrainingScores | None = Field(default=None, description="scores of the documents made while training, in short; rows in scores/")
    group_dro: DomainWeights | None = Field(default=None, description="domain weights, objective group_dro only")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where one checkpoint lies."""

    step: int
    tokens: int
    path: Path
    model: dict[str, Any] | None = None
    """The ModelConfig dump (of the artifact it belongs to)."""


class CheckpointSet:
    """A train artifact opened for reading.

    Attributes: artifact; model (dict: ModelConfig dump); manifest (TrainManifest); checkpoints (ascending); optimizer.
    """

    def __init__(self, artifact: Artifact, model: dict[str, Any], manifest: TrainManifest) -> None:
        self.artifact, self.model, self.manifest = artifact, model, manifest
        self.tokenizer_folder: Path = artifact.path / TOKENIZER_FOLDER
        self.optimizer: dict[str, Any] = manifest.optimizer
        self.checkpoints = [CheckpointInfo(item.step, item.tokens, artifact.path / item.path, model) for item in manifest.checkpoints]
        self.final: CheckpointInfo = self.checkpoints[manifest.final]

    @classmethod
    def open(cls, artifact: Artifact) -> CheckpointSet:
        """Read model.json and train.json. Raises ArtifactError when the artifact is of another kind or damaged."""
        if artifact.kind != "checkpoint":
            raise ArtifactError(
                expected="a checkpoint artifact (made by a train step)", found=f"{artifact.path.name} is of kind {artifact.kind}",
                fix="point this input at a train step",
            )
        try:
            manifest = TrainManifest.model_validate(artifact.json(TRAIN_FILE))
        except ValidationError as error:
            raise ArtifactError(
                expected=f"the fields of a train artifact in {artifact.path / TRAIN_FILE}",
                found=f"{error.error_count()} wrong or missing fields ({', '.join(str(e['loc'][0]) for e in error.errors()[:4])})",
                fix="make the artifact again with this release",
            ) from error
        if not manifest.checkpoints or not 0 <= manifest.final < len(manifest.checkpoints):
            raise ArtifactError(
                expected=f"at least one checkpoint listed in {artifact.path / TRAIN_FILE}", found=f"{len(manifest.checkpoints)} and final = {manifest.final}",
                fix="delete the artifact folder and run the same command again",
            )
        return cls(artifact, artifact.json(MODEL_FILE), manifest)

    def at(self, step: int) -> CheckpointInfo:
        """The checkpoint of exactly this step; CheckpointError naming the steps there are."""
        for info in self.checkpoints:
            if info.step == step:
                return info
        raise CheckpointError(
            expected=f"a checkpoint of step {step} in {self.artifact.path.name}", found=f"steps {[info.step for info in self.checkpoints]}",
            fix="choose one of these, or train with checkpoints.evenly set so that it is kept",
        )

    def metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl, ascending by step."""
        return io.read_jsonl(self.artifact.file(METRICS_FILE))

    def ledger(self) -> list[dict[str, Any]]:
        """Records of ledger.jsonl, one per step."""
        return io.read_jsonl(self.artifact.file(LEDGER_FILE))

    def journal(self) -> list[dict[str, Any]]:
        """Records of journal.jsonl; artifacts of older releases have none."""
        return io.read_jsonl(self.artifact.path / JOURNAL_FILE)


def write_view(root: Path, name: str, keep: np.ndarray) -> None:
    """Write a list of documents, bool[documents], under an artifact's folder."""
    path = root / VIEWS_FOLDER / f"{name}.npy"
    with io.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.packbits(keep), allow_pickle=False)


def read_view(artifact: Artifact, name: str, documents: int) -> np.ndarray:
    """A list of documents, bool[documents]. Raises ArtifactError when the file is missing or of another length."""
    path = artifact.file(f"{VIEWS_FOLDER}/{name}.npy")
    with io.disk_errors(path):
        packed = np.load(path, allow_pickle=False)
    if packed.dtype != np.uint8 or len(packed) != -(-documents // 8):
        raise ArtifactError(
            expected=f"one bit for each of {documents} documents in {path}", found=f"{packed.dtype}[{len(packed)}]",
            fix="go on with the shards the checkpoint was trained on, or set carry_cursors: false",
        )
    return np.unpackbits(packed, count=documents).astype(bool)


def checkpoint_folder(root: Path, step: int) -> Path:
    """`checkpoints/step-00000100` under an artifact or workspace."""
    return root / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def checkpoint_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint under an artifact or workspace, ascending; not verified."""
    folder = root / CHECKPOINTS_FOLDER
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ()) if (match := _FOLDER.match(path.name))]
    return sorted(found)


def truncate_journal(path: Path, last_step: int) -> None:
    """Drop the records of `path` with a step above `last_step` (a run that resumes there writes them again)."""
    if path.exists():
        io.write_jsonl(path, _up_to(io.read_jsonl(path), last_step))


def _up_to(records: Iterable[dict[str, Any]], last_step: int) -> list[dict[str, Any]]:
    return [record for record in records if record["step"] <= last_step]
