"""Every loss of the project, once: next-token prediction, distillation, distillation from stored top-k.

Training, influence and evaluation all take their numbers from here. Each function works on this rank's piece of the
vocabulary (`VocabShard`); without tensor parallelism the piece is everything.

Legend: b rows, s tokens, V vocabulary, p tensor-parallel degree, k stored teacher entries per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_r1.parallel.vocab import VocabShard


def masked_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses [b, s] where the mask [b, s] is 1, and how many there are (int32): what `schedule` asks for."""
    return (losses * loss_mask).sum(), loss_mask.sum().round().to(torch.int32)


def next_token(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of the losses [b, s] over the positions whose mask [b, s] is 1: a scalar; 0 when there is none."""
    total, count = masked_sum(losses, loss_mask)
    return total / count.clamp(min=1)


def distill_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, shard: VocabShard | None = None) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student) at every position: fp32 [b, s].

    T^2 * sum_v softmax(t/T)_v * (log softmax(t/T)_v - log softmax(s/T)_v), logits [b, s, V/p] both.
    The factor T^2 keeps gradients at the size they have at T = 1 (arXiv 1503.02531, section 2); MobileLLM-R1 trains on
    this divergence alone (arXiv 2509.24945, section 3.2; direction, T = 1 and the absence of a cross-entropy term are our
    reading). Differentiable with respect to the student; the teacher is a constant.
    `shard`: this rank's piece when the logits are cut along the vocabulary.
    """
    return _DistillKL.apply(student_logits, teacher_logits.detach(), float(temperature), shard or _whole(student_logits))


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
    return _DistillTopK.apply(student_logits, indices, teacher_logprobs.detach(), float(temperature), shard or _whole(student_logits))


def mix(hard: Tensor, soft: Tensor, hard_weight: float) -> Tensor:
    """hard_weight * hard + (1 - hard_weight) * soft, elementwise. MobileLLM-R1's mid-training has hard_weight 0."""
    if hard_weight == 0.0:
        return soft
    return hard_weight * hard + (1.0 - hard_weight) * soft


def _whole(logits: Tensor) -> VocabShard:
    return VocabShard(0, logits.shape[-1], 1)


def _log_partition(logits: Tensor, shard: VocabShard) -> Tensor:
    """log sum_v exp(logits_v) over the whole vocabulary: [..., V/p] -> [..., 1]."""
    if shard.whole:
        return torch.logsumexp(logits, dim=-1, keepdim=True)
    top = shard.max(logits.amax(dim=-1, keepdim=True))
    return shard.sum((logits - top).exp_().sum(dim=-1, keepdim=True)).log_() + top


class _DistillKL(torch.autograd.Function):
    """d KL / d s_v = T^2 * (softmax(s/T)_v - softmax(t/T)_v) / T."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, shard: VocabShard) -> Tensor:
        s = student.float() / temperature if temperature != 1.0 else student.float()
        t = teacher.float() / temperature if temperature != 1.0 else teacher.float()
        log_zs, log_zt = _log_partition(s, shard), _log_partition(t, shard)
        p = (t - log_zt).exp_()
        gap = shard.sum(torch.linalg.vecdot(p, t - s).unsqueeze(-1))
        ctx.save_for_backward(s, log_zs, p)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return (gap - log_zt + log_zs).squeeze(-1) * temperature**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        s, log_zs, p = ctx.saved_tensors
        d = (s - log_zs).exp_().sub_(p).mul_(grad.unsqueeze(-1) * ctx.temperature)
        return d.to(ctx.dtype), None, None, None


class _DistillTopK(torch.autograd.Function):
    """With q the student, K the stored tokens, r the teacher's rest: d KL / d s_v = q_v - p_v for v in K, and
    q_v - r * q_v / (1 - sum_K q) otherwise (times T)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, indices: Tensor, logprobs: Tensor, temperature: float, shard: VocabShard) -> Tensor:
        s = student.float() / temperature if temperature != 1.0 else student.float()
        here = (indices >= shard.start) & (indices < shard.end)
        local = (indices - shard.start).where(here, torch.zeros_like(indices))
        # Entries of other ranks' pieces must not touch ours: send them to a spare column at the end.
        stored = torch.zeros(*s.shape[:-1], s.shape[-1] + 1, dtype=torch.bool, device=s.device)
        stored.scatter_(-1, local.where(here, torch.full_like(local, s.shape[-1])), True)
        stored = stored[..., :-1]
        log_p = logprobs.float()
        p = log_p.exp()
        stated = p.sum(-1, keepdim=True)
        rest = (1.0 - stated).clamp_(min=0.0)
        log_z = _log_partition(s, shard)
        log_z_rest = _log_partition(s.masked_fill(stored, float("-inf")), shard) if indices.shape[-1] < shard.parts * s.shape[-1] else None
        picked = shard.sum(s.gather(-1, local).masked_fill_(~here, 0.0))
        kl = (p * (log_p - picked + log_z)).sum(-1, keepdim=True)
        if log_z_rest is not None:
            kl = kl + torch.xlogy(rest, rest) - rest * (log_z_rest - log_z)
        ctx.save_for_backward(s, log_z, log_z_rest, stored, local, p.masked_fill(~here, 0.0), rest, stated + rest)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return kl.squeeze(-1) * temperature**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        s, log_z, log_z_rest, stored, local, p, rest, mass = ctx.saved_tensors
        # `mass` is 1 but for what rounding of the stored numbers adds.
        d = (s - log_z).exp_().mul_(mass)
        if log_z_rest is not None:
            d.sub_((s - log_z_rest).exp_().mul_(rest).masked_fill_(stored, 0.0))
        d.scatter_add_(-1, local, -p)
        d.mul_(grad.unsqueeze(-1) * ctx.temperature)
        return d.to(ctx.dtype), None, None, None, None
