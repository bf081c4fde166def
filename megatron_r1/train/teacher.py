"""Teachers of the distill objective: a train artifact, a Hugging Face folder, or the GGUF a Python package ships.

A Hugging Face teacher is whole on every rank that sees the loss; a trained one is cut along the vocabulary like the student.
Legend: b rows, s tokens, v columns of the vocabulary shard of this rank (all of it without tensor parallelism).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.pretrained import PretrainedConfig, locate
from megatron_r1.data.pretrained import identity as pretrained_identity
from megatron_r1.data.shards import ShardSet
from megatron_r1.model.forward import sharded_logits
from megatron_r1.model.load import load_model
from megatron_r1.model.pretrained import load_language_model
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.train.config import DistillConfig
from megatron_r1.utils.errors import DataError, ParallelError

SETTING = "distill.teacher"
# Texts on which a teacher's tokenizer must agree with the shards' before its logits mean anything.
_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 16, 128


class Teacher(Protocol):
    """A frozen model with `vocab_size` columns of logits."""

    vocab_size: int

    def logits(self, tokens: Tensor, segment_ids: Tensor | None, position_ids: Tensor, shard: VocabShard) -> Tensor:
        """tokens int64[b, s] -> fp32 [b, s, v], the columns of `shard`. `segment_ids` [b, s]: documents that may not see
        each other (None: all one)."""
        ...


class TrainedTeacher:
    """The final checkpoint of a train artifact."""

    def __init__(self, artifact: Artifact, ctx: ParallelContext, precision: str, role: str = "teacher") -> None:
        checkpoints = CheckpointSet.open(artifact)
        if ctx.layout.pipeline > 1:
            raise ParallelError(
                expected=f"pipeline: 1 with a {role} from a train step (it answers in one pass)", found=f"pipeline: {ctx.layout.pipeline}",
                fix="use tensor or data parallelism" + (", or export the teacher and name the folder in distill.teacher.hf_folder" if role == "teacher" else ""),
            )
        self.chunks = load_model(checkpoints.final, ctx, precision="fp32" if precision == "fp32" else "bf16")
        self.vocab_size = int(checkpoints.model["vocab_size"])

    @torch.no_grad()
    def logits(self, tokens: Tensor, segment_ids: Tensor | None, position_ids: Tensor, shard: VocabShard) -> Tensor:
        """See Teacher."""
        batch = {"tokens": tokens} if segment_ids is None else {"tokens": tokens, "segment_ids": segment_ids}
        return sharded_logits(self.chunks, batch).float()


class HuggingFaceTeacher:
    """Any causal language model that transformers can load, on the trainer's device."""

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        files = locate(config, SETTING)
        self.model, self.tokenizer = load_language_model(files.path, files.gguf, config.precision, device)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])

    @torch.no_grad()
    def logits(self, tokens: Tensor, segment_ids: Tensor | None, position_ids: Tensor, shard: VocabShard) -> Tensor:
        """See Teacher. Documents are kept apart by a block-causal mask and their own positions."""
        b, s = tokens.shape
        mask = torch.ones(s, s, dtype=torch.bool, device=tokens.device).tril().expand(b, 1, s, s)
        if segment_ids is not None:
            mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        bias = torch.zeros(mask.shape, dtype=self.model.dtype, device=tokens.device).masked_fill_(~mask, torch.finfo(self.model.dtype).min)
        return self.model(input_ids=tokens, attention_mask=bias, position_ids=position_ids, use_cache=False).logits[..., shard.start : shard.end].float()

    def check_tokenizer(self, shards: ShardSet) -> None:
        """Raise DataError unless the teacher's tokenizer gives the shards' token ids on texts from the shards."""
        ours = shards.tokenizer
        for text in _sample_texts(shards):
            expected, found = ours.encode(text), self.tokenizer.encode(text, add_special_tokens=False)
            if list(expected) != list(found):
                raise DataError(
                    expected=f"a teacher whose tokenizer is the shards' ({text[:40]!r} -> {list(expected)[:8]} ...)", found=f"{list(found)[:8]} ...",
                    fix="write the shards with the teacher's tokenizer, or choose a teacher trained on theirs: logits of another vocabulary mean nothing",
                )


def _sample_texts(shards: ShardSet) -> list[str]:
    info = shards.tokenizer.info
    special = {info.bos_id, info.eos_id, info.pad_id, *info.chat_ids.values()}
    texts = []
    for name in sorted(shards.sources):
        shard = shards.split(name)
        for index in range(min(len(shard), max(1, _SAMPLE_DOCUMENTS // len(shards.sources)))):
            text = shards.tokenizer.decode([int(t) for t in shard.tokens(index)[:_SAMPLE_TOKENS] if int(t) not in special])
            # A document cut in the middle of a character decodes to U+FFFD, which is another text.
            texts.append(text.rstrip("\ufffd"))
    return texts


def identity(config: DistillConfig, artifact: Artifact | None, precision: str) -> dict[str, Any]:
    """JSON-able; changes when the teacher's weights or number format do. Does not load the teacher."""
    if config.teacher is None:
        assert artifact is not None  # TrainConfig checked that there is exactly one teacher
        return {"kind": "checkpoint", "fingerprint": artifact.fingerprint, "precision": precision}
    return {"kind": "huggingface", **pretrained_identity(config.teacher, SETTING)}


def open_teacher(
    config: DistillConfig, artifact: Artifact | None, shards: ShardSet, vocab_size: int, ctx: ParallelContext, precision: str, role: str = "teacher",
) -> Teacher:
    """The teacher of a phase (or another frozen model, `role`), checked against the student's vocabulary and the shards'
    tokenizer. Raises DataError."""
    teacher: Teacher
    if config.teacher is not None:
        teacher = HuggingFaceTeacher(config.teacher, ctx.device)
        teacher.check_tokenizer(shards)
    else:
        assert artifact is not None  # TrainConfig checked that there is exactly one teacher
        tokenizer = CheckpointSet.open(artifact).manifest.tokenizer
        if tokenizer != shards.tokenizer.sha256:
            raise DataError(
                expected=f"a {role} trained on the shards' tokenizer ({shards.tokenizer.sha256[:12]})", found=f"{artifact.name} was trained on {tokenizer[:12]}",
                fix=f"train the {role} on these shards",
            )
        teacher = TrainedTeacher(artifact, ctx, precision, role)
    # A trained teacher is cut along the vocabulary like the student; of another one the columns beyond the student's are dropped.
    if teacher.vocab_size < vocab_size or (isinstance(teacher, TrainedTeacher) and teacher.vocab_size != vocab_size):
        raise DataError(
            expected=f"a {role} with the student's {vocab_size} vocabulary entries", found=f"{teacher.vocab_size}",
            fix=f"set the student's vocab_size to the {role}'s, or choose another {role}",
        )
    return teacher


def documents_apart(reset_documents: bool, segment_ids: Tensor) -> Tensor | None:
    """What a teacher is told about documents: apart exactly when the student's attention is."""
    return segment_ids if reset_documents else None


def top_k(teacher: Teacher, batch: dict[str, Tensor], reset_documents: bool, shard: VocabShard, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities at `temperature` over the student's vocabulary, and their ids: two [b, s, k]."""
    piece = teacher.logits(batch["tokens"], documents_apart(reset_documents, batch["segment_ids"]), batch["position_ids"], shard)
    best = torch.log_softmax(shard.gather(piece) / temperature, dim=-1).topk(k, dim=-1)
    return best.values, best.indices
