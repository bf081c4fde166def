"""Every loss of the project, once: next-token prediction, distillation, distillation from stored top-k.

Training, influence and evaluation all take their numbers from here. The formulas and their derivatives are in
`ops.row_losses`; `model.forward` applies them chunk by chunk without ever holding the logits, the functions below to logits
that are there. Each works on this rank's piece of the vocabulary (`VocabShard`); without tensor parallelism that is all.

Legend: b rows, s tokens, V vocabulary, p tensor-parallel degree, k stored teacher entries per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.ops.linear_loss import logits_loss
from megatron_r1.ops.row_losses import CrossEntropyRows, DistillRows, DistillTopKRows
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.utils.errors import DataError


def masked_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses [b, s] where the mask [b, s] is 1, and how many there are (int32): what `schedule` asks for."""
    return (losses * loss_mask).sum(), loss_mask.sum().round().to(torch.int32)


def next_token(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of the losses [b, s] over the positions whose mask [b, s] is 1: a scalar; 0 when there is none."""
    total, count = masked_sum(losses, loss_mask)
    return total / count.clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor, shard: VocabShard | None = None) -> Tensor:
    """-log softmax(logits)[label] at every position: logits [b, s, V/p], labels [b, s] (whole-vocabulary ids) -> fp32 [b, s]."""
    return logits_loss(logits, CrossEntropyRows(labels.flatten(), shard or _whole(logits)))


def distill_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, shard: VocabShard | None = None) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student) at every position: fp32 [b, s].

    T^2 * sum_v softmax(t/T)_v * (log softmax(t/T)_v - log softmax(s/T)_v), logits [b, s, V/p] both.
    The factor T^2 keeps gradients at the size they have at T = 1 (arXiv 1503.02531, section 2); MobileLLM-R1 trains on
    this divergence alone (arXiv 2509.24945, section 3.2; direction, T = 1 and the absence of a cross-entropy term are our
    reading). Differentiable with respect to the student; the teacher is a constant.
    `shard`: this rank's piece when the logits are cut along the vocabulary.
    Raises DataError when the two vocabularies differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise DataError(
            expected=f"teacher logits of the student's shape {tuple(student_logits.shape)}",
            found=f"{tuple(teacher_logits.shape)}",
            fix="distil from a teacher with the same tokenizer and vocabulary, on the same batch",
        )
    rows = teacher_logits.detach().flatten(0, -2)
    return logits_loss(student_logits, DistillRows(lambda a, b: rows[a:b], float(temperature), shard or _whole(student_logits)))


def distill_topk_kl(
    student_logits: Tensor, indices: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0, shard: VocabShard | None = None
) -> Tensor:
    """Forward KL from a teacher of which only the k likeliest tokens are known: fp32 [b, s].

    indices int64 [b, s, k] (whole-vocabulary ids, distinct) and teacher_logprobs [b, s, k], the teacher's log softmax at the
    same temperature. What is left of the teacher's probability is one more event, "any other token", and the student's
    probability of it is 1 minus that of the k tokens. Merging events can only lower a KL, so this is a lower bound of
    `distill_kl`, equal to it when k = V. (Renormalising the k instead would push the student's other tokens to zero.)
    Times T^2, as above. `shard`: as above; indices stay whole-vocabulary ids.
    """
    shard = shard or _whole(student_logits)
    return logits_loss(student_logits, topk_rows(indices, teacher_logprobs, temperature, shard, student_logits.shape[-1] * shard.parts))


def topk_rows(indices: Tensor, teacher_logprobs: Tensor, temperature: float, shard: VocabShard, vocab_size: int) -> DistillTopKRows:
    """The row loss of `distill_topk_kl` for [b, s, k] tensors."""
    return DistillTopKRows(indices.flatten(0, -2).long(), teacher_logprobs.detach().flatten(0, -2), float(temperature), shard, vocab_size)


def _whole(logits: Tensor) -> VocabShard:
    return VocabShard(0, logits.shape[-1], 1)
