"""Output head and loss: compiled row kernels against the same chunks in plain torch and against dense logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.harness import Case, relative_error
from megatron_r1.ops.dispatch import OPS_VARIABLE
from megatron_r1.ops.linear_loss import linear_loss
from megatron_r1.ops.row_losses import CrossEntropyRows, DistillRows, WholeVocabulary

ALLOWED = 2e-5


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The quickstart's head, and a published model's vocabulary with few positions."""
    shapes = [(2048, 128, 8192), (256, 256, 128256)] if device == "cpu" else [(8192, 1536, 128256)]
    for n, d, vocabulary in shapes[:1] if quick else shapes:
        for teacher in (False, True):
            yield _case(device, n, d, vocabulary, teacher)


def _case(device: str, n: int, d: int, vocabulary: int, teacher: bool) -> Case:
    hidden = torch.randn(n, d, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, d, device=device) / d**0.5).requires_grad_()
    taught = torch.randn(n, d, device=device)
    labels = torch.randint(vocabulary, (n,), device=device)

    def rows() -> CrossEntropyRows | DistillRows:
        piece = WholeVocabulary(vocabulary)
        if not teacher:
            return CrossEntropyRows(labels, piece)
        return DistillRows(lambda a, b: torch.mm(taught[a:b], weight.detach().t()), 1.0, piece)

    def chunked(implementation: str) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            import os

            before = os.environ.get(OPS_VARIABLE)
            os.environ[OPS_VARIABLE] = implementation
            try:
                loss = linear_loss(hidden, weight, rows()).mean()
                return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
            finally:
                if before is None:
                    os.environ.pop(OPS_VARIABLE)
                else:
                    os.environ[OPS_VARIABLE] = before

        return run

    def dense(double: bool = False) -> tuple[Tensor, ...]:
        h, w, t = (x.detach().double() if double else x.detach() for x in (hidden, weight, taught))
        h, w = h.requires_grad_(), w.requires_grad_()
        logits = h @ w.t()
        if teacher:
            p = (t @ w.detach().t()).log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), p, log_target=True, reduction="sum") / n
        else:
            loss = F.cross_entropy(logits, labels)
        return (loss.detach(), *torch.autograd.grad(loss, (h, w)))

    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {"csrc": chunked("csrc"), "chunks in plain torch": chunked("plain"), "dense logits": dense}
    want = dense(double=True)

    def check(name: str) -> float:
        error = max(relative_error(got, exact) for got, exact in zip(ways[name](), want, strict=True))
        if error > ALLOWED:
            raise SystemExit(f"linear_loss {name}: error {error:.2g} against fp64, at most {ALLOWED:.0e} allowed")
        return error

    products = 6.0 + (2.0 if teacher else 0.0)
    return Case(
        op="linear_loss " + ("KL to a teacher" if teacher else "cross-entropy") + ", forward+backward",
        shape=f"{n} positions, width {d}, vocabulary {vocabulary}", dtype=torch.float32, contestants=ways, check=check,
        flops=products * n * d * vocabulary,
    )  # fmt: skip
