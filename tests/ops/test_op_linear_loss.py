"""Row losses and the chunked head against losses of whole logits, with automatic derivatives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.ops import linear_loss as module
from megatron_r1.ops.linear_loss import HeadScores, linear_loss, linear_loss_scores, logits_loss
from megatron_r1.ops.low_rank import Factors
from megatron_r1.ops.row_losses import (
    CrossEntropyRows,
    DistillRows,
    DistillTopKRows,
    MixedRows,
    RowLoss,
    WholeVocabulary,
)
from megatron_r1.ops.softmax_rows import ROW_STATS, SOFTMAX_GRAD
from megatron_r1.utils.errors import DataError

N, D, V, K = 23, 8, 50, 6


@pytest.fixture(autouse=True, params=["csrc", "plain", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file runs with every implementation of the row kernels."""
    if reason := ROW_STATS.reasons("cpu")[request.param]:
        pytest.skip(reason)
    monkeypatch.setenv("MEGATRON_R1_OPS", f"row_stats={request.param},softmax_grad={request.param}")
    return request.param


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

    def mixed(soft: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda z: 0.3 * F.cross_entropy(z, labels, reduction="none") + 0.7 * soft(z)

    return {
        "cross entropy": (ce, lambda z: F.cross_entropy(z, labels, reduction="none")),
        "distill": (DistillRows(rows, 1.0, whole), lambda z: kl(z, teacher, 1.0)),
        "distill T 2.5": (DistillRows(rows, 2.5, whole), lambda z: kl(z, teacher, 2.5)),
        "top k": (DistillTopKRows(top, logp, 1.0, whole, V), lambda z: topk_kl(z, teacher, 1.0)),
        "top k T 2": (DistillTopKRows(top2, logp2, 2.0, whole, V), lambda z: topk_kl(z, teacher, 2.0)),
        "mixed": (MixedRows(ce, DistillRows(rows, 1.0, whole), 0.3), mixed(lambda z: kl(z, teacher, 1.0))),
        "mixed T 2": (MixedRows(ce, DistillRows(rows, 2.0, whole), 0.3), mixed(lambda z: kl(z, teacher, 2.0))),
        "mixed top k": (MixedRows(ce, DistillTopKRows(top, logp, 1.0, whole, V), 0.3), mixed(lambda z: topk_kl(z, teacher, 1.0))),
        "mixed top k T 2": (MixedRows(ce, DistillTopKRows(top2, logp2, 2.0, whole, V), 0.3), mixed(lambda z: topk_kl(z, teacher, 2.0))),
        # Not the two that share their sums: each on its own copy.
        "mixed the other way": (MixedRows(DistillRows(rows, 2.0, whole), ce, 0.7), mixed(lambda z: kl(z, teacher, 2.0))),
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
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((ours * share).sum(), both), torch.autograd.grad((theirs * share).sum(), both)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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


def double(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (value.detach().double() if value.is_floating_point() else value) for name, value in x.items()}


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_in_fp64(name: str) -> None:
    """gradcheck of the head as a whole, and the value against the same loss of fp64 logits."""
    x = double(tensors(3))
    x["teacher"] = x["teacher"] / 3
    rows, oracle = cases(x)[name]
    hidden, weight = 0.3 * x["hidden"], x["weight"]
    torch.testing.assert_close(linear_loss(hidden, weight, rows), oracle(hidden @ weight.t()), rtol=1e-10, atol=1e-10)
    both = (hidden[:6].clone().requires_grad_(), weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_loss(h, w, rows, x["mask"][:6]), both, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda z: logits_loss(z, rows), ((hidden[:6] @ weight.t()).requires_grad_(),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cross entropy", "mixed T 2", "mixed top k T 2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_logits_and_derivative_once(name: str, dtype: torch.dtype) -> None:
    x = tensors()
    hidden, weight = x["hidden"].detach().to(dtype).requires_grad_(), x["weight"].detach().to(dtype).requires_grad_()
    rows, oracle = cases(x)[name]
    ours = linear_loss(hidden, weight, rows, x["mask"])
    z = (hidden.detach() @ weight.detach().t()).float().requires_grad_()  # the logits as they were rounded
    theirs = oracle(z)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    (dz,) = torch.autograd.grad((theirs * x["mask"]).sum(), z)
    found = torch.autograd.grad((ours * x["mask"]).sum(), (hidden, weight))
    eps = torch.finfo(dtype).eps
    for a, b, size in zip(found, (dz @ weight.float(), dz.t() @ hidden.float()), (dz.abs() @ weight.float().abs(), dz.t().abs() @ hidden.float().abs())):
        assert a.dtype == dtype
        assert ((a.float() - b).abs() <= eps * (size + b.abs()) + 1e-6).all()


def test_non_contiguous_arguments() -> None:
    x = tensors()
    rows, oracle = cases(x)["mixed"]
    hidden, weight = x["hidden"].detach().t().contiguous().t().requires_grad_(), x["weight"].detach().t().contiguous().t().requires_grad_()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    ours, theirs = linear_loss(hidden, weight, rows), oracle(hidden @ weight.t())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.sum(), (hidden, weight)), torch.autograd.grad(theirs.sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_positions(name: str) -> None:
    x = {key: (value[:0] if key != "weight" else value).detach() for key, value in tensors().items()}
    rows, _ = cases(x)[name]
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    losses = linear_loss(hidden, weight, rows, x["mask"])
    assert losses.shape == (0,)
    grads = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert grads[0].shape == (0, D)
    assert torch.equal(grads[1], torch.zeros(V, D))
    assert linear_loss(hidden.detach(), weight.detach(), rows).shape == (0,)
    z = torch.zeros(0, V, requires_grad=True)
    assert torch.autograd.grad(logits_loss(z, rows).sum(), z)[0].shape == (0, V)


def test_a_mask_of_zeros() -> None:
    x = tensors()
    rows, oracle = cases(x)["mixed"]
    losses = linear_loss(x["hidden"], x["weight"], rows, torch.zeros(N))
    torch.testing.assert_close(losses, oracle(x["hidden"] @ x["weight"].t()), atol=1e-5, rtol=1e-5)
    for grad in torch.autograd.grad((losses * torch.zeros(N)).sum(), (x["hidden"], x["weight"])):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_the_loss_of_its_position_only(name: str) -> None:
    x = tensors()
    rows, _ = cases(x)[name]
    hidden = x["hidden"].detach().clone()
    hidden[3] = torch.nan
    losses = linear_loss(hidden, x["weight"].detach(), rows)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    z = (x["hidden"] @ x["weight"].t()).detach()
    for column in (0, V - 1):
        spoilt = z.clone()
        spoilt[5, column] = torch.nan
        assert logits_loss(spoilt, rows).isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("label", [-100, -1, V, V + 7])
def test_labels_outside_the_vocabulary(label: int) -> None:
    x = tensors()
    x["labels"][4] = label
    with pytest.raises(DataError, match=rf"(?s)labels: ids of the vocabulary.*found: {label}.*do: "):
        linear_loss(x["hidden"], x["weight"], cases(x)["cross entropy"][0])
    indices = torch.tensor([[1, 2]]).repeat(N, 1)
    indices[7, 1] = label
    with pytest.raises(DataError, match=rf"(?s)indices: ids of the vocabulary.*found: {label}.*do: "):
        linear_loss(x["hidden"], x["weight"], DistillTopKRows(indices, torch.full((N, 2), -1.0), 1.0, WholeVocabulary(V), V))


def test_arguments_that_do_not_fit_are_named() -> None:
    x = {key: value.detach() for key, value in tensors().items()}
    rows = cases(x)["cross entropy"][0]
    for argument, call in {
        "weight": lambda: linear_loss(x["hidden"], x["weight"][1:], rows),
        "hidden": lambda: linear_loss(x["hidden"][:, 1:], x["weight"], rows),
        "hidden: .*bfloat16": lambda: linear_loss(x["hidden"], x["weight"].bfloat16(), rows),
        "expected: one": lambda: linear_loss(x["hidden"], x["weight"], rows, x["mask"][1:]),
        "teacher": lambda: linear_loss(x["hidden"], x["weight"], DistillRows(lambda a, b: x["teacher"][a:b, 1:], 1.0, WholeVocabulary(V))),
        "probes": lambda: linear_loss_scores(x["hidden"], x["weight"], rows, x["weight"], torch.tensor([0, N])),
        "cu_seqlens": lambda: linear_loss_scores(x["hidden"], x["weight"], rows, x["weight"][None], torch.tensor([0, N - 1])),
        "cu_seqlens: ": lambda: linear_loss_scores(x["hidden"], x["weight"], rows, x["weight"][None], torch.tensor([0, 5, 4, N])),
        "cu_seqlens: whole": lambda: linear_loss_scores(x["hidden"], x["weight"], rows, x["weight"][None], torch.tensor([0.0, N])),
    }.items():
        with pytest.raises(DataError, match=rf"(?s)expected: {argument}.*found: .*do: "):
            call()


def test_the_log_says_what_runs(implementation: str, caplog: pytest.LogCaptureFixture) -> None:
    x = tensors()
    for op in (ROW_STATS, SOFTMAX_GRAD):
        op._chosen.clear()
    with caplog.at_level(logging.INFO):
        linear_loss(x["hidden"], x["weight"], cases(x)["cross entropy"][0])
    assert f"op row_stats: {implementation} (cpu)" in caplog.text
    assert f"op softmax_grad: {implementation} (cpu)" in caplog.text


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("name", ["cross entropy", "mixed", "mixed top k"])
def test_the_logits_are_never_there_as_a_whole(name: str) -> None:
    vocabulary, n, d = 128256, 400, 2
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=generator).requires_grad_(), torch.randn(vocabulary, d, generator=generator).requires_grad_()
    other, labels, whole = torch.randn(n, d, generator=generator), torch.randint(0, vocabulary, (n,), generator=generator), WholeVocabulary(vocabulary)
    ce = CrossEntropyRows(labels, whole)
    soft = DistillRows(lambda a, b: other[a:b] @ weight.detach().t(), 1.0, whole)
    stored = DistillTopKRows(labels[:, None], torch.full((n, 1), -0.5), 1.0, whole, vocabulary)
    rows = {"cross entropy": ce, "mixed": MixedRows(ce, soft, 0.5), "mixed top k": MixedRows(ce, stored, 0.5)}[name]
    with Largest() as largest:
        linear_loss(hidden, weight, rows).sum().backward()
    rows_at_once = largest.elements // vocabulary
    assert rows_at_once <= module._FEWEST_ROWS, f"a tensor of {rows_at_once} rows of logits; there are {n} positions"


class Pieces:
    """The vocabulary cut into `parts`, and reductions over their ranks, each of which is a thread here."""

    def __init__(self, parts: int) -> None:
        self.parts, self.barrier, self.sent = parts, threading.Barrier(parts), [None] * parts

    def run(self, one: Callable[[Any], Any]) -> list[Any]:
        """one(piece) for every piece, at the same time."""
        with ThreadPoolExecutor(self.parts) as pool:
            return list(pool.map(one, [Piece(self, i) for i in range(self.parts)]))

    def reduce(self, rank: int, x: torch.Tensor, how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self.sent[rank] = x.clone()
        self.barrier.wait(60)
        out = how(torch.stack(self.sent))
        self.barrier.wait(60)
        x.fill_(torch.nan)  # a reduction may overwrite what it was given
        return out


class Piece:
    """One of them: a VocabPiece."""

    whole = False

    def __init__(self, all_pieces: Pieces, rank: int) -> None:
        each = V // all_pieces.parts
        self.all, self.rank, self.start, self.end = all_pieces, rank, rank * each, (rank + 1) * each

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return self.all.reduce(self.rank, x, lambda y: y.amax(0))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.all.reduce(self.rank, x, lambda y: y.sum(0))


def on_piece(rows: RowLoss, piece: Any) -> RowLoss:
    if isinstance(rows, MixedRows):
        return MixedRows(on_piece(rows.first, piece), on_piece(rows.second, piece), rows.weight)
    if isinstance(rows, DistillRows):
        whole = rows.teacher
        return DistillRows(lambda a, b: whole(a, b)[:, piece.start : piece.end], rows.temperature, piece)
    return replace(rows, piece=piece)


@pytest.mark.parametrize("parts", [2, 5, 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_in_pieces(parts: int, name: str) -> None:
    x = {key: value.detach() for key, value in tensors().items()}
    x["weight"][: V // parts] *= 20  # maxima far from each other
    rows, wide = cases(x)[name][0], double(x)
    hidden, weight = wide["hidden"].requires_grad_(), wide["weight"].requires_grad_()
    theirs = cases(wide)[name][1](hidden @ weight.t())  # in fp64, where nothing underflows
    wanted = torch.autograd.grad((theirs * wide["mask"]).sum(), (hidden, weight))

    def one(piece: Piece) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(1)
        h, w = x["hidden"].clone().requires_grad_(), x["weight"][piece.start : piece.end].clone().requires_grad_()
        losses = linear_loss(h, w, on_piece(rows, piece), x["mask"])
        scores = linear_loss_scores(h, w, on_piece(rows, piece), w.detach()[None], torch.tensor([0, 4, N]), x["mask"])[1]
        return losses.detach(), *torch.autograd.grad((losses * x["mask"]).sum(), (h, w)), scores

    found = Pieces(parts).run(one)
    for losses, _, _, scores in found:
        torch.testing.assert_close(losses.double(), theirs.detach(), atol=2e-5, rtol=1e-5)
        assert torch.equal(scores, found[0][3])
    torch.testing.assert_close(sum(f[1] for f in found).double(), wanted[0], atol=1e-4, rtol=2e-5)
    torch.testing.assert_close(torch.cat([f[2] for f in found]).double(), wanted[1], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found[0][3].sum().double(), (wanted[1] * weight.detach()).sum(), atol=1e-3, rtol=1e-4)


def test_a_label_no_piece_has() -> None:
    x = {key: value.detach() for key, value in tensors().items()}
    x["labels"][0] = V

    def one(piece: Piece) -> str:
        with pytest.raises(DataError, match="labels") as caught:
            linear_loss(x["hidden"], x["weight"][piece.start : piece.end], CrossEntropyRows(x["labels"], piece))
        return str(caught.value)

    assert all(f"found: {V}," in said for said in Pieces(2).run(one))


def test_pieces_with_nothing_possible_in_them() -> None:
    """A piece whose logits are all -inf changes nothing."""
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    z[:, : V // 2] = -torch.inf
    labels = torch.arange(V - 4, V)
    found = Pieces(2).run(lambda piece: logits_loss(z[:, piece.start : piece.end], CrossEntropyRows(labels, piece)))
    for losses in found:
        torch.testing.assert_close(losses, F.cross_entropy(z, labels, reduction="none"))


DOCUMENTS = {"several": [0, 3, 3, 4, 15, N], "one": [0, N], "empty at the ends": [0, 0, N, N], "each its own": list(range(N + 1))}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", ["cross entropy", "mixed T 2", "top k"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_scores_of_documents(name: str, documents: str) -> None:
    """Against one automatic fp64 gradient of the head per document."""
    x, bounds = tensors(), DOCUMENTS[documents]
    probes = torch.randn(3, V, D, generator=torch.Generator().manual_seed(9))
    rows, _ = cases(x)[name]
    losses, scores, d_hidden, d_weight = linear_loss_scores(x["hidden"], x["weight"], rows, probes, torch.tensor(bounds, dtype=torch.int32), x["mask"])
    wide = double(x)
    hidden, weight = wide["hidden"].requires_grad_(), wide["weight"].requires_grad_()
    exact = cases(wide)[name][1](hidden @ weight.t()) * wide["mask"]
    truth = torch.zeros(len(bounds) - 1, 3, dtype=torch.float64)
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b > a:
            (g,) = torch.autograd.grad(exact[a:b].sum(), weight, retain_graph=True)
            truth[i] = (probes.double() * g).sum((1, 2))
    torch.testing.assert_close(scores.double(), truth, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses.double() * wide["mask"], exact.detach(), atol=2e-5, rtol=1e-5)
    for found, wanted in zip((d_hidden, d_weight), torch.autograd.grad(exact.sum(), (hidden, weight))):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.sum(0), (probes * d_weight).sum((1, 2)), atol=1e-4, rtol=1e-5)


def test_scores_alone_keep_no_gradient_of_the_weight() -> None:
    x = tensors()
    rows = cases(x)["cross entropy"][0]
    probes, bounds = torch.ones(1, V, D, dtype=torch.float64), torch.tensor([0, 5, N])
    losses, scores, d_hidden, d_weight = linear_loss_scores(x["hidden"], x["weight"], rows, probes, bounds, weight_gradient=False)
    assert d_weight is None
    assert not any(t.requires_grad for t in (losses, scores, d_hidden))
    full = linear_loss_scores(x["hidden"], x["weight"], rows, probes.float(), bounds)
    torch.testing.assert_close(scores, full[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d_hidden, full[2])
    none = linear_loss_scores(x["hidden"][:0], x["weight"], CrossEntropyRows(x["labels"][:0], WholeVocabulary(V)), probes, torch.tensor([0]))
    assert none[1].shape == (0, 1)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("whole", [True, False])
def test_scores_beside_a_differentiable_loss(whole: bool, documents: str) -> None:
    """In units of the gradient that arrives, whatever was expected; gradients are what they are without scores."""
    x, bounds = tensors(), torch.tensor(DOCUMENTS[documents])
    draw = torch.Generator().manual_seed(9)
    factors = Factors(torch.randn(V, 2 * 3, generator=draw), torch.randn(D, 2 * 3, generator=draw), 2)
    probes = torch.stack([factors.left[:, k : k + 3] @ factors.right[:, k : k + 3].t() for k in (0, 3)])
    rows = cases(x)["cross entropy"][0]
    for shares in (x["mask"], x["mask"] / 4, torch.rand(N, generator=draw)):
        heard: list[torch.Tensor] = []
        found = []
        for scores in (None, HeadScores(probes if whole else factors, bounds, heard.append)):
            losses = linear_loss(x["hidden"], x["weight"], rows, x["mask"], scores)
            found.append(torch.autograd.grad((losses * shares).sum(), (x["hidden"], x["weight"])))
        truth = linear_loss_scores(x["hidden"], x["weight"], rows, probes, bounds, shares)[1].double()
        (parts,) = heard
        assert parts.shape == (len(bounds) - 1 if whole else N, 2)
        sums = parts if whole else torch.segment_reduce(parts, "sum", lengths=bounds.diff(), axis=0, initial=0.0)
        torch.testing.assert_close(sums, truth, atol=1e-4, rtol=1e-5)
        for plain, beside in zip(*found):
            torch.testing.assert_close(beside, plain, atol=1e-6 if whole else 0, rtol=1e-5 if whole else 0)
    with torch.no_grad():
        linear_loss(x["hidden"], x["weight"], rows, x["mask"], HeadScores(factors, bounds, lambda _: pytest.fail("nothing was differentiated")))
