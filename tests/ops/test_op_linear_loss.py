"""Row losses and the chunked head against losses of whole logits, with automatic derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.ops import linear_loss as module
from megatron_r1.ops.linear_loss import linear_loss, logits_loss
from megatron_r1.ops.row_losses import (
    CrossEntropyRows,
    DistillRows,
    DistillTopKRows,
    MixedRows,
    RowLoss,
    WholeVocabulary,
)

N, D, V, K = 23, 8, 50, 6


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(N, D, generator=generator).requires_grad_(),
        "weight": torch.randn(V, D, generator=generator).requires_grad_(),
        "labels": torch.randint(0, V, (N,), generator=generator),
        "teacher": 3 * torch.randn(N, V, generator=generator),
        "mask": (torch.rand(N, generator=generator) < 0.6).float(),
    }


def kl(student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    p = torch.softmax(teacher / t, -1)
    return t * t * (p * (torch.log_softmax(teacher / t, -1) - torch.log_softmax(student / t, -1))).sum(-1)


def topk_kl(student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    """Merge every token outside the top k into one event, then the ordinary KL of two (k+1)-way distributions."""
    p, q = torch.softmax(teacher / t, -1), torch.softmax(student / t, -1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, teacher.topk(K, -1).indices, True)
    rest_p, rest_q = p.masked_fill(kept, 0).sum(-1), q.masked_fill(kept, 0).sum(-1)
    inside = torch.where(kept, p * (p.log() - q.log()), torch.zeros_like(p)).sum(-1)
    return t * t * (inside + rest_p * (rest_p.log() - rest_q.log()))


def cases(x: dict[str, torch.Tensor]) -> dict[str, tuple[RowLoss, Any]]:
    whole, teacher, labels = WholeVocabulary(V), x["teacher"], x["labels"]
    logp, top = torch.log_softmax(teacher, -1).topk(K, -1)
    logp2, top2 = torch.log_softmax(teacher / 2, -1).topk(K, -1)
    ce, rows = CrossEntropyRows(labels, whole), (lambda a, b: teacher[a:b])
    return {
        "cross entropy": (ce, lambda z: F.cross_entropy(z, labels, reduction="none")),
        "distill": (DistillRows(rows, 1.0, whole), lambda z: kl(z, teacher, 1.0)),
        "distill T 2.5": (DistillRows(rows, 2.5, whole), lambda z: kl(z, teacher, 2.5)),
        "top k": (DistillTopKRows(top, logp, 1.0, whole, V), lambda z: topk_kl(z, teacher, 1.0)),
        "top k T 2": (DistillTopKRows(top2, logp2, 2.0, whole, V), lambda z: topk_kl(z, teacher, 2.0)),
        "mixed": (MixedRows(ce, DistillRows(rows, 2.0, whole), 0.3), lambda z: 0.3 * F.cross_entropy(z, labels, reduction="none") + 0.7 * kl(z, teacher, 2.0)),
    }


NAMES = list(cases(tensors()))


@pytest.fixture(params=[4 * V, 4 * V * 7, 1 << 20], ids=["1 row", "7 rows", "all rows"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", request.param)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 1)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expected", ["mask", None, "wrong"])
def test_value_and_gradients(name: str, expected: str | None) -> None:
    x = tensors()
    rows, oracle = cases(x)[name]
    # "wrong" states other weights than the loss will have: the result must not change.
    stated = {"mask": x["mask"], None: None, "wrong": 1 - x["mask"]}[expected]
    share = x["mask"] / 7 if expected else torch.full((N,), 0.5)
    both = x["hidden"], x["weight"]
    ours = linear_loss(*both, rows, stated)
    theirs = oracle(x["hidden"] @ x["weight"].t())
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    for a, b in zip(torch.autograd.grad((ours * share).sum(), both), torch.autograd.grad((theirs * share).sum(), both)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_on_given_logits(name: str) -> None:
    x = tensors(1)
    rows, oracle = cases(x)[name]
    z = (x["hidden"] @ x["weight"].t()).detach().requires_grad_()
    before = z.detach().clone()
    share = torch.rand(N, generator=torch.Generator().manual_seed(2))
    ours, theirs = logits_loss(z, rows), oracle(z)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad((loss * share).sum(), z)[0] for loss in (ours, theirs)), atol=2e-5, rtol=1e-4)
    assert torch.equal(z, before), "the caller's logits are left alone"


def test_expected_weights_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensors()
    rows, oracle = cases(x)["cross entropy"]
    ours = linear_loss(x["hidden"], x["weight"], rows, torch.zeros(N))
    (grad,) = torch.autograd.grad(ours.sum(), x["hidden"])
    (truth,) = torch.autograd.grad(oracle(x["hidden"] @ x["weight"].t()).sum(), x["hidden"])
    torch.testing.assert_close(grad, truth, atol=1e-5, rtol=1e-4)


def test_a_right_guess_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = module._losses_and_gradients
    monkeypatch.setattr(module, "_losses_and_gradients", lambda *a: (calls.append(1), original(*a))[1])
    x = tensors()
    rows, _ = cases(x)["cross entropy"]
    (linear_loss(x["hidden"], x["weight"], rows, x["mask"]) * x["mask"]).sum().div(3).backward()
    assert len(calls) == 1
    (linear_loss(x["hidden"], x["weight"], rows, x["mask"]) * torch.rand(N)).sum().backward()
    assert len(calls) == 3


def test_without_gradients_nothing_is_kept() -> None:
    x = tensors()
    rows, oracle = cases(x)["distill"]
    with torch.no_grad():
        out = linear_loss(x["hidden"], x["weight"], rows)
    assert not out.requires_grad
    torch.testing.assert_close(out, oracle(x["hidden"] @ x["weight"].t()).detach(), atol=2e-5, rtol=1e-4)


def test_top_k_of_everything_is_the_whole_divergence() -> None:
    x = tensors()
    logp, top = torch.log_softmax(x["teacher"], -1).topk(V, -1)
    z = (x["hidden"] @ x["weight"].t()).detach()
    out = logits_loss(z, DistillTopKRows(top, logp, 1.0, WholeVocabulary(V), V))
    torch.testing.assert_close(out, kl(z, x["teacher"], 1.0), atol=2e-5, rtol=1e-4)


def test_top_k_is_a_lower_bound() -> None:
    x = tensors()
    z = (x["hidden"] @ x["weight"].t()).detach()
    whole = kl(z, x["teacher"], 1.0)
    last = torch.zeros(N)
    for k in (1, 3, 10, 30, V):
        logp, top = torch.log_softmax(x["teacher"], -1).topk(k, -1)
        bound = logits_loss(z, DistillTopKRows(top, logp, 1.0, WholeVocabulary(V), V))
        assert (bound <= whole + 1e-5).all()
        assert (bound >= last - 1e-5).all()
        last = bound


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    whole, labels = WholeVocabulary(3), torch.tensor([1, 2])
    logp = torch.tensor([[0.0], [-0.5]])
    for rows in (CrossEntropyRows(labels, whole), DistillTopKRows(labels[:, None], logp, 1.0, whole, 3), DistillRows(lambda a, b: -z[a:b].detach(), 1.0, whole)):
        out = logits_loss(z, rows)
        (grad,) = torch.autograd.grad(out.sum(), z)
        assert torch.isfinite(out).all()
        assert torch.isfinite(grad).all()


def test_bf16_weights() -> None:
    x = tensors()
    hidden, weight = x["hidden"].detach().bfloat16().requires_grad_(), x["weight"].detach().bfloat16().requires_grad_()
    rows, oracle = cases(x)["cross entropy"]
    ours = linear_loss(hidden, weight, rows, x["mask"])
    theirs = oracle((hidden @ weight.t()).float())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    for a, b in zip(torch.autograd.grad((ours * x["mask"]).sum(), (hidden, weight)), torch.autograd.grad((theirs * x["mask"]).sum(), (hidden, weight))):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), atol=0.1, rtol=0.05)
