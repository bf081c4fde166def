"""Teachers of the distill objective: a train artifact, a Hugging Face folder, or the GGUF a Python package ships.

A teacher answers on the last pipeline stage and has no stages itself, so neither its layout nor the student's matters to the other. A
trained one is cut over the student's tensor-parallel processes where its sizes allow it; any other one is whole in each of them. All
of them run alike: a forward pass up to the last hidden states, then logits of a few positions at a time.

Legend: b rows, s tokens, n positions of this process (over s first, then b), v columns of this rank's piece of the vocabulary, k entries kept.
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
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import position_logits, positions_here
from megatron_r1.model.load import load_model
from megatron_r1.model.pretrained import HeadApart, load_language_model
from megatron_r1.ops.linear_loss import chunks
from megatron_r1.ops.row_losses import TeacherLogits
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.sequence import context_piece
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.train.config import DistillConfig
from megatron_r1.utils.errors import ConfigError, DataError, ParallelError
from megatron_r1.utils.logging import get_logger

log = get_logger("train.teacher")
SETTING = "distill.teacher"
# Texts on which a teacher's tokenizer must agree with the shards' before its logits mean anything.
_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 16, 128


class Teacher(Protocol):
    """A frozen model with `vocab_size` columns of logits, for sequences up to `max_positions` (None: it names no limit)."""

    vocab_size: int
    max_positions: int | None

    def logits(self, tokens: Tensor, segment_ids: Tensor | None, shard: VocabShard) -> TeacherLogits:
        """Run it on tokens int64[b, s]. `segment_ids` [b, s]: documents that may not see each other (None: all one).

        The answer gives the logits of positions a to b, the columns of `shard`: [b - a, v], made when asked for."""
        ...


class TrainedTeacher:
    """The final checkpoint of a train artifact. Collective: every process loads it, those before the last stage let it go again."""

    def __init__(self, artifact: Artifact, ctx: ParallelContext, precision: str, role: str = "teacher") -> None:
        checkpoints = CheckpointSet.open(artifact)
        model = ModelConfig.model_validate(checkpoints.model)
        place = ctx.unpipelined()
        try:
            place.layout.check_model(model)
        except ParallelError as error:
            place = ctx.unpipelined(whole_matrices=True)
            log.info("%s %s is whole in every process (%s; found %s): it takes its whole memory and time in each", role, artifact.name, error.expected, error.found)
        self.chunks = load_model(checkpoints.final, place, precision="fp32" if precision == "fp32" else "bf16")
        self.vocab_size, self.max_positions = model.vocab_size, model.max_positions

    def logits(self, tokens: Tensor, segment_ids: Tensor | None, shard: VocabShard) -> TeacherLogits:
        """See Teacher."""
        return position_logits(self.chunks, {"tokens": tokens} if segment_ids is None else {"tokens": tokens, "segment_ids": segment_ids})


class HuggingFaceTeacher:
    """Any causal language model that transformers can load, whole on the trainer's device. Raises EnvironmentProblem for a head of
    an unknown kind."""

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        files = locate(config, SETTING)
        model, self.tokenizer = load_language_model(files.path, files.gguf, config.precision, device)
        self.model = HeadApart(model)
        self.vocab_size, self.max_positions = self.model.vocab_size, getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def logits(self, tokens: Tensor, segment_ids: Tensor | None, shard: VocabShard) -> TeacherLogits:
        """See Teacher. Of sequences that are cut over processes every process runs all, and answers for its own positions."""
        states = positions_here(self.model.states(tokens, segment_ids)).flatten(0, 1)
        return lambda a, b: self.model.logits(states[a:b], shard.start, shard.end)

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
    config: DistillConfig, artifact: Artifact | None, shards: ShardSet, vocab_size: int, seq_length: int, ctx: ParallelContext, precision: str,
    role: str = "teacher",
) -> Teacher | None:
    """The teacher of a phase (or another frozen model, `role`), checked against the student's vocabulary, the sequences' length
    and the shards' tokenizer; none on stages that see no loss. Collective. Raises DataError, ConfigError or EnvironmentProblem."""
    teacher: Teacher
    if config.teacher is not None:
        if not ctx.is_last_stage:
            return None
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
    if teacher.max_positions is not None and seq_length > teacher.max_positions:
        raise ConfigError(
            expected=f"seq_length up to the {role}'s longest sequence ({teacher.max_positions})", found=f"{seq_length} tokens",
            fix=f"shorten seq_length, or choose a {role} made for longer ones: beyond its positions its answers mean nothing",
        )
    return teacher if ctx.is_last_stage else None


def documents_apart(reset_documents: bool, segment_ids: Tensor) -> Tensor | None:
    """What a teacher is told about documents: apart exactly when the student's attention is."""
    return segment_ids if reset_documents else None


@torch.no_grad()
def top_k(teacher: Teacher, batch: dict[str, Tensor], reset_documents: bool, shard: VocabShard, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities at `temperature` over the student's vocabulary, and their ids: two [b, s, k], fp32 descending and int64.

    Some positions at a time: the logits never exist as a whole."""
    logits = teacher.logits(batch["tokens"], documents_apart(reset_documents, batch["segment_ids"]), shard)
    here = positions_here(batch["tokens"])
    values, ids = [], []
    for a, b in chunks(here.numel(), logits(0, 1)[0].float()):
        z = logits(a, b).float() / temperature
        top = shard.max(z.amax(-1, keepdim=True))
        total = shard.sum((z - top).exp_().sum(-1, keepdim=True))
        mine = z.topk(min(k, z.shape[-1]), dim=-1)
        # The k largest of all are among the k largest of every piece.
        best = shard.gather(mine.values).topk(k, dim=-1)
        values.append(best.values - top - total.log())
        ids.append(shard.gather(mine.indices + shard.start).gather(-1, best.indices))
    piece = context_piece()
    shaped = [torch.cat(part).view(*here.shape, k) for part in (values, ids)]
    found = [(part if piece is None else piece.gather(part)).transpose(0, 1) for part in shaped]
    return found[0], found[1]
