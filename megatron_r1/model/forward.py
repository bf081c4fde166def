"""Forward passes over a chunk, wrapped for training or not.

Legend: b rows, s tokens, d hidden size, V vocabulary, p tensor-parallel degree, k stored teacher entries per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron_r1.model.build import R1Model
from megatron_r1.model.loss import topk_rows
from megatron_r1.ops.linear_loss import HeadScores, linear_loss
from megatron_r1.ops.row_losses import CrossEntropyRows, DistillRows, MixedRows, RowLoss, TeacherLogits
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.sequence import context_piece
from megatron_r1.parallel.vocab import vocab_shard
from megatron_r1.utils.errors import ParallelError

Model = nn.Module | Sequence[nn.Module]
Batch = Mapping[str, Tensor]


def token_losses(model: Model, batch: Batch, scores: HeadScores | None = None) -> Tensor:
    """-log p(label | tokens before it) for every position, not masked: fp32 [b, s]; differentiable.

    `batch`: `tokens`, `labels` [b, s]; optionally `segment_ids` [b, s] (attention stays inside equal ids) and `loss_mask`
    [b, s]. The mask is not applied: it tells which sum of the losses will be differentiated, and saves time when that is so
    (without one: the plain sum or mean). `scores`: see `ops.linear_loss`. Under context parallelism the batch holds whole sequences and the losses of other
    processes' positions are 0 here: sums over them are this process's part. On a pipeline stage that is not the last: the stage's
    activations [s, b, d], which the schedule passes on.
    """
    return _losses(model, batch, lambda chunk, labels: CrossEntropyRows(labels, chunk.vocabulary), scores)


def position_logits(model: Model, batch: Batch) -> TeacherLogits:
    """A frozen forward pass. What it returns gives the logits of positions a to b (of this process's, over s first, then b) in this
    rank's piece of the vocabulary: [b - a, V/p], made when asked for. The model must not be pipelined (ParallelError)."""
    chunk = _unpipelined(model)
    bare = unwrap(chunk)
    with torch.no_grad():
        states = _flat(bare.whole_sequence(chunk(batch["tokens"], batch.get("segment_ids"))))
        weight, piece = bare.head_weight().detach(), vocab_shard(bare.vocab_size)
        if bare.vocabulary.whole:
            weight = weight[piece.start : piece.end]
    return lambda a, b: torch.mm(states[a:b], weight.t())


def distill_losses(model: Model, teacher: TeacherLogits, batch: Batch, temperature: float = 1.0, hard_weight: float = 0.0) -> Tensor:
    """`loss.distill_kl` from a teacher at every position, mixed with `hard_weight` times cross-entropy: fp32 [b, s].

    As `token_losses`, and neither the student's nor the teacher's logits ever exist as a whole. `teacher`: as `position_logits`
    returns it; last pipeline stage only. Raises DataError when the vocabularies differ.
    """

    def rows(chunk: R1Model, labels: Tensor) -> RowLoss:
        soft = DistillRows(teacher, float(temperature), chunk.vocabulary)
        return MixedRows(CrossEntropyRows(labels, chunk.vocabulary), soft, hard_weight) if hard_weight else soft

    return _losses(model, batch, rows)


def distill_topk_losses(
    model: Model, indices: Tensor, teacher_logprobs: Tensor, batch: Batch, temperature: float = 1.0, hard_weight: float = 0.0
) -> Tensor:
    """`loss.distill_topk_kl` from stored teacher entries [b, s, k], mixed with cross-entropy: fp32 [b, s]. As `token_losses`."""

    def rows(chunk: R1Model, labels: Tensor) -> RowLoss:
        # Positions run over s first, then b.
        soft = topk_rows(positions_here(indices), positions_here(teacher_logprobs), temperature, chunk.vocabulary, chunk.vocab_size)
        return MixedRows(CrossEntropyRows(labels, chunk.vocabulary), soft, hard_weight) if hard_weight else soft

    return _losses(model, batch, rows)


def logits(model: Model, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Logits over the whole vocabulary [b, s, V]. The model must not be pipelined (ParallelError)."""
    _uncut("logits")
    chunk = _unpipelined(model)
    return unwrap(chunk).vocabulary.gather(chunk(tokens, segment_ids, _logits_head))


def hidden(model: Model, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """States after the final norm [b, s, d]. The model must not be pipelined (ParallelError)."""
    _uncut("hidden states")
    chunk = _unpipelined(model)
    return chunk(tokens, segment_ids, lambda bare, states: bare.whole_sequence(states).transpose(0, 1))


def _losses(model: Model, batch: Batch, rows: Callable[[R1Model, Tensor], RowLoss], scores: HeadScores | None = None) -> Tensor:
    """Run `model` with a chunked head of the row loss `rows(chunk, labels [s*b])`."""

    # Along whole directions every document has to be in one piece: row after row instead of position by position.
    rowwise = scores is not None and isinstance(scores.lines, Tensor)

    def flat(t: Tensor) -> Tensor:
        return (t.t() if rowwise else t).flatten()

    def head(chunk: R1Model, states: Tensor) -> Tensor:
        mask, piece = batch.get("loss_mask"), context_piece()
        labels = positions_here(batch["labels"])
        made = rows(chunk, flat(labels))
        hidden = chunk.to_head(states)
        if rowwise and hidden.requires_grad:
            # megatron-core's sum over tensor-parallel ranks returns a gradient with other strides as it came, not summed.
            hidden.register_hook(Tensor.contiguous)
        hidden = _flat(hidden.transpose(0, 1) if rowwise else hidden)
        expected = None if mask is None else flat(positions_here(mask))
        losses = chunk.with_head_weight(lambda weight: linear_loss(hidden, weight, made, expected, scores))
        losses = losses.view(labels.shape[::-1]).t() if rowwise else losses.view(labels.shape)
        return (losses if piece is None else piece.spread(losses)).transpose(0, 1)

    return _chunk(model)(batch["tokens"], batch.get("segment_ids"), head)


def positions_here(whole: Tensor) -> Tensor:
    """[b, S, ...] of whole sequences -> [s, b, ...] at this process's positions: all of them, but for context parallelism."""
    piece = context_piece()
    return whole.transpose(0, 1) if piece is None else piece.cut(whole.transpose(0, 1))


def mask_here(mask: Tensor) -> Tensor:
    """A loss mask [b, S] of whole sequences, with 0 at the positions of other context-parallel processes: each counts its own tokens."""
    piece = context_piece()
    return mask if piece is None else piece.spread(positions_here(mask)).transpose(0, 1)


def _uncut(what: str) -> None:
    """Raises ParallelError where sequences are cut."""
    if context_piece() is not None:
        raise ParallelError(expected=f"whole sequences for {what}", found="context parallelism", fix="set layout.context to 1")


def _logits_head(chunk: R1Model, states: Tensor) -> Tensor:
    return chunk.output_layer(states, weight=chunk.head_weight())[0].transpose(0, 1)


def _flat(states: Tensor) -> Tensor:
    return states.flatten(0, 1)


def _chunk(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if len(model) == 1:
        return model[0]
    raise ParallelError(
        expected="one model chunk",
        found=f"{len(model)} chunks (virtual pipeline)",
        fix="run an interleaved model through parallel.schedule.forward_backward",
    )


def _unpipelined(model: Model) -> nn.Module:
    chunk = _chunk(model)
    bare = unwrap(chunk)
    if not (bare.pre_process and bare.post_process):
        raise ParallelError(
            expected="a model that is whole along the pipeline",
            found="one pipeline stage",
            fix="load the checkpoint with pipeline: 1 (checkpoints load under any layout), or use parallel.schedule",
        )
    return chunk
