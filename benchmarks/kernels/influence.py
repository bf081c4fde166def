"""Per-document influence in the weight-gradient product, against the product alone and against other exact ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.harness import Case, relative_error
from megatron_r1.ops.influence import grad_dot, wgrad_dot

ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def cases(device: str, quick: bool) -> Iterator[Case]:
    """One linear layer of 1536 x 1536: long, short and ragged documents, one and four probes."""
    shapes = [([1024] * 4, 1), ([1024] * 4, 4), ([256] * 16, 1), ([37, 911, 1500, 3, 845, 800], 1), ([64] * 64, 1), ([64] * 64, 4), ([16] * 256, 1)]
    if device == "cuda":
        shapes += [([2048] * 16, 1), ([2048] * 16, 4), ([8192] * 4, 1), ([32768], 1)]
    for lengths, probes in shapes[:1] if quick else shapes:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16,):
            yield _case(device, lengths, probes, dtype)
    if device == "cuda" and not quick:
        yield from (_layer_step(device, tokens) for tokens in (2048, 8192, 32768))


def _ours(device: str) -> str:
    """On a GPU the one-pass kernel; where it does not pass its self-check there is nothing to measure, and the error says so."""
    return "fused" if device == "cuda" else "csrc"


def _lengths(lengths: list[int]) -> str:
    return f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} ragged, {sum(lengths)}"


def _case(device: str, lengths: list[int], probes: int, dtype: torch.dtype, din: int = 1536, dout: int = 1536) -> Case:
    tokens = sum(lengths)
    a, b = (torch.randn(tokens, d, device=device).to(dtype) for d in (din, dout))
    g = torch.randn(probes, dout, din, device=device).to(dtype)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    edges = cu.tolist()
    main_grad = torch.zeros(dout, din, device=device)
    plain_out = torch.empty(dout, din, dtype=dtype, device=device)

    def fused() -> Tensor:
        return wgrad_dot(a, b, g, cu, main_grad, implementation=_ours(device))

    def rows() -> Tensor:
        main_grad.add_(torch.mm(b.t(), a))
        per_token = torch.stack([torch.linalg.vecdot((a @ one.t()).float(), b.float()) for one in g], 1)
        return torch.stack([per_token[x:y].sum(0) for x, y in itertools.pairwise(edges)])

    def materialised() -> Tensor:
        scores = []
        for x, y in itertools.pairwise(edges):
            own = torch.mm(b[x:y].t(), a[x:y])
            main_grad.add_(own)
            scores.append(torch.stack([torch.dot(own.flatten(), one.flatten()) for one in g]))
        return torch.stack(scores)

    want = torch.stack([(torch.einsum("to,ti->oi", b[x:y].double(), a[x:y].double()) * g.double()).sum((1, 2)) for x, y in itertools.pairwise(edges)])
    gradient = b.double().t() @ a.double()
    # A document's score is a sum of random signs: its error is compared with what such sums are large as.
    ways = {"csrc": fused, "row-dot": rows, "per document, then dot": materialised}

    def check(name: str) -> float:
        main_grad.zero_()
        scores = ways[name]()
        error = max(relative_error(scores, want), relative_error(main_grad, gradient))
        if error > ALLOWED[dtype]:
            raise SystemExit(f"wgrad_dot {name} {dtype}: error {error:.2g} against fp64, at most {ALLOWED[dtype]:.0e} allowed")
        return error

    return Case(
        op=f"wgrad_dot K={probes}", shape=f"{_lengths(lengths)} tokens, {dout} x {din}", dtype=dtype,
        contestants={**ways, "product alone": lambda: torch.mm(b.t(), a, out=plain_out)},
        check=check, flops=2.0 * tokens * din * dout, floor_contestant="product alone",
        # The goals are of documents as they are scored, not of snippets.
        target={1: "<= 1.3x product", 4: "<= 1.6x product"}.get(probes, "") if device == "cpu" and tokens / len(lengths) >= 256 else "",
    )  # fmt: skip


def _layer_step(device: str, tokens: int) -> Case:
    """The products of one layer of the 950M model, forward and backward, with and without exact influence.

    Attention is left out, so the share is of the linear layers: an upper bound of the share of a whole step.
    """
    documents = max(tokens // 2048, 1)
    cu = torch.arange(0, tokens + 1, tokens // documents, device=device, dtype=torch.int32)
    layers = []
    for dout, din in ((2304, 1536), (1536, 1536), (12288, 1536), (1536, 6144)):
        a, b, w, g = (torch.randn(*shape, device=device).to(torch.bfloat16) for shape in ((tokens, din), (tokens, dout), (dout, din), (1, dout, din)))
        layers.append((a, b, w, g, torch.zeros(dout, din, device=device)))

    def step(influence: bool) -> list[Tensor]:
        scores = []
        for a, b, w, g, main_grad in layers:
            torch.mm(a, w.t())
            torch.mm(b, w)
            if influence:
                scores.append(wgrad_dot(a, b, g, cu, main_grad, implementation=_ours(device)))
            else:
                main_grad.add_(torch.mm(b.t(), a))
        return scores

    def check(name: str) -> float:
        for (a, b, _, g, main_grad), scores in zip(layers, step(True)):
            main_grad.zero_()
            own = grad_dot(a, b, g, cu, implementation="reference")
            if relative_error(scores, own) > ALLOWED[torch.bfloat16]:
                raise SystemExit(f"exact influence in a step: {name} differs from the reference")
        return 0.0

    return Case(
        op="exact influence in a step", shape=f"{tokens} tokens, linear layers of one 950M layer", dtype=torch.bfloat16,
        contestants={"csrc": lambda: step(True), "without influence": lambda: step(False)}, check=check,
        floor_contestant="without influence", target="<= +10 % of a step",
    )  # fmt: skip
