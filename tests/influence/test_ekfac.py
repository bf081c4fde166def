"""EK-FAC against explicit Kronecker products and per-document gradients in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_r1.influence.ekfac import EKFAC
from megatron_r1.influence.fisher import DocumentUses, FisherDocuments, LinearUse
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.reference import Reference
from megatron_r1.influence.rows import Row
from megatron_r1.model.build import R1Model, build_model
from megatron_r1.model.config import PRESETS, ModelConfig
from megatron_r1.model.forward import logits, token_losses
from megatron_r1.model.generate import drawn_labels
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.seeding import generator

VOCAB = 24
SMALL = ModelConfig(vocab_size=VOCAB, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=6)
EMBEDDING = "embedding.word_embeddings.weight"


class Stream:
    """Documents given as they are."""

    def __init__(self, documents: list[DocumentUses], tokens: int) -> None:
        self.documents, self.tokens = documents, tokens

    def __iter__(self) -> Iterator[DocumentUses]:
        return iter(self.documents)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exact_where_the_fisher_is_a_kronecker_product() -> None:
    """Every pair of some inputs and some output gradients is a document of one token: then the Fisher matrix is S (x) A."""
    inputs, outputs = normal(1, 5, 3), normal(2, 7, 4)
    documents: list[DocumentUses] = [{"w": LinearUse(a[None], b[None])} for a in inputs for b in outputs]
    found = EKFAC(Stream(documents, len(documents)), 0.1)
    vectors = torch.stack([torch.outer(b, a).flatten() for a in inputs for b in outputs])
    fisher = vectors.t() @ vectors / len(vectors)
    assert torch.allclose(fisher, torch.kron(outputs.t() @ outputs / 7, inputs.t() @ inputs / 5))
    lam = 0.1 * fisher.diagonal().mean()
    probe = normal(3, 4, 3)
    expected = torch.linalg.solve(fisher + lam * torch.eye(12, dtype=torch.float64), probe.flatten())
    assert found.damping["w"] == pytest.approx(float(lam))
    assert torch.allclose(found({"w": probe})["w"].flatten(), expected, rtol=1e-9)


def test_eigenvalues_are_of_whole_documents() -> None:
    """Two tokens whose gradients cancel say nothing about the curvature, though each does by itself."""
    a, b = normal(4, 1, 3), normal(5, 1, 2)
    cancel = LinearUse(torch.cat([a, a]), torch.cat([b, -b]))
    plain = LinearUse(normal(6, 2, 3), normal(7, 2, 2))
    found = EKFAC(Stream([{"w": cancel}, {"w": plain}], 4), 0.1)
    bases = found.bases["w"]
    assert torch.allclose(found.eigenvalues["w"], bases.into(plain.gradient()).square() / 4)


# ---------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def ctx() -> ParallelContext:
    return initialize(LayoutConfig(), 0)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, ctx: ParallelContext) -> R1Model:
    """Weights large enough to make it differ from a uniform guess."""
    config = SMALL.model_copy(update={"tied_embeddings": request.param, "init_std": 0.5})
    return build_model(config, ctx, seed=0)[0].double()


ROWS = [Row(i, np.random.default_rng(i).integers(0, VOCAB, 6 + i % 4)) for i in range(6)]
REFERENCE = Reference(ROWS, [f"document {i}" for i in range(len(ROWS))], {"toy": len(ROWS)}, "")


def drawn(model: R1Model, i: int) -> dict[str, Tensor]:
    """A document with labels drawn by hand from whole probabilities."""
    tokens = torch.as_tensor(ROWS[i].tokens[None, :-1])
    total = logits(model, tokens)[0].softmax(-1).cumsum(-1)
    uniform = generator(3, "drawn labels", i).random((1, tokens.shape[1]))[0]
    labels = [int((row < u).sum()) for row, u in zip(total, torch.from_numpy(uniform))]
    return {"tokens": tokens, "labels": torch.tensor([labels])}


def explicit(model: R1Model) -> dict[str, Tensor]:
    """The matrix EK-FAC stands for, [entries, entries] for every parameter, from hooks of its own and autograd."""
    names = {name: p for name, p in model.named_parameters()}
    linear = {name: dict(model.named_modules())[name.removesuffix(".weight")] for name in names if "linear_" in name}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linear}
    gradients, tokens = [], 0
    for i in range(len(ROWS)):
        held: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [module.register_forward_hook(keep(held, name)) for name, module in linear.items()]
        batch = drawn(model, i)
        loss = token_losses(model, batch).sum()
        outputs = [held[name][1] for name in linear]
        found = torch.autograd.grad(loss, [*names.values(), *outputs])
        gradients.append(dict(zip(names, found)))
        for name, b in zip(linear, found[len(names) :]):
            seen[name].append((held[name][0].flatten(0, 1), b.flatten(0, 1)))
        for handle in handles:
            handle.remove()
        tokens += batch["tokens"].numel()
    matrices = {}
    for name, parameter in names.items():
        each = torch.stack([g[name] for g in gradients])
        if name in linear:
            a, b = (torch.cat(side) for side in zip(*seen[name]))
            basis = torch.kron(torch.linalg.eigh(b.t() @ b).eigenvectors, torch.linalg.eigh(a.t() @ a).eigenvectors)
        elif parameter.ndim == 2:
            right = torch.linalg.eigh(torch.einsum("nvd,nve->de", each, each)).eigenvectors.contiguous()
            basis = torch.kron(torch.eye(len(parameter), dtype=torch.float64), right)
        else:
            basis = torch.eye(len(parameter), dtype=torch.float64)
        values = (each.flatten(1) @ basis).square().sum(0) / tokens
        matrices[name] = basis @ torch.diag(values + 0.1 * values.mean()) @ basis.t()
    return matrices


def keep(held: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        held[name] = (arguments[0].detach(), output[0])

    return hook


def test_labels_are_drawn_from_the_model(model: R1Model) -> None:
    tokens = torch.as_tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 5)))
    whole = logits(model, tokens).softmax(-1).detach()
    uniform = torch.from_numpy(np.random.default_rng(1).random((500, 2, 5)))
    labels = torch.stack([drawn_labels(model, tokens, u) for u in uniform])
    shares = torch.nn.functional.one_hot(labels, VOCAB).double().mean(0)
    assert float((shares - whole).abs().max()) < 5 * (0.25 / 500) ** 0.5
    assert torch.equal(drawn_labels(model, tokens, uniform[0]), labels[0])


def test_scores_are_those_of_the_explicit_matrices(model: R1Model, ctx: ParallelContext) -> None:
    """P G and, through the ghost engine, per-document scores: <g, M^-1 G> with M written out and inverted."""
    names = [name for name, _ in model.named_parameters()]
    found = EKFAC(FisherDocuments([model], ctx, names, REFERENCE, 3), 0.1)
    probe: dict[str, Tensor] = {name: normal(i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
    direction = found(probe)
    solved = {name: torch.linalg.solve(matrix, probe[name].flatten()) for name, matrix in explicit(model).items()}
    for name in names:
        assert torch.linalg.norm(direction[name].flatten() - solved[name]) <= 1e-6 * torch.linalg.norm(solved[name])
    ghost = Ghost([model], ctx)
    scores = ghost.scores([direction], ghost.pack(ROWS, 64))[:, 0]
    assert scores == pytest.approx([per_sample(model, row, solved) for row in ROWS], rel=1e-6)
    assert all(p.requires_grad for p in model.parameters())


def per_sample(model: R1Model, row: Row, solved: Mapping[str, Tensor]) -> float:
    batch = {"tokens": torch.as_tensor(row.tokens[None, :-1]), "labels": torch.as_tensor(row.tokens[None, 1:])}
    found = torch.autograd.grad(token_losses(model, batch).sum(), list(model.parameters()))
    return sum(float(g.flatten() @ solved[name]) for (name, _), g in zip(model.named_parameters(), found))


def test_a_choice_of_parameters_is_estimated_alone(model: R1Model, ctx: ParallelContext) -> None:
    kept = [name for name, _ in model.named_parameters() if "linear_fc2" in name or "final_layernorm" in name]
    found = EKFAC(FisherDocuments([model], ctx, kept, REFERENCE, 3), 0.1)
    whole = EKFAC(FisherDocuments([model], ctx, [name for name, _ in model.named_parameters()], REFERENCE, 3), 0.1)
    probe = {name: normal(i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
    part, full = found(probe), whole(probe)
    assert sorted(found.damping) == sorted(kept)
    for name in probe:
        assert torch.allclose(part[name], full[name] if name in kept else torch.zeros_like(probe[name]), rtol=1e-9)


def test_symmetric_positive_and_blind_to_the_gradients_scale() -> None:
    documents: list[DocumentUses] = [{"w": LinearUse(normal(i, 4, 3), normal(10 + i, 4, 2)), "g": normal(20 + i, 5), "e": normal(30 + i, 6, 3)} for i in range(5)]
    found = EKFAC(Stream(documents, 20), 0.1)
    u, v = ({"w": normal(s, 2, 3), "g": normal(s + 1, 5), "e": normal(s + 2, 6, 3)} for s in (40, 50))
    pu, pv = found.several([u, v])

    def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return sum(float((a[n] * b[n]).sum()) for n in a)

    assert dot(u, pv) == pytest.approx(dot(v, pu), rel=1e-9)
    assert dot(u, pu) > 0 < dot(v, pv)
    louder: list[DocumentUses] = [
        {n: LinearUse(use.inputs, 3 * use.outputs) if isinstance(use, LinearUse) else 3 * use for n, use in document.items()} for document in documents
    ]
    assert 9 * dot(u, EKFAC(Stream(louder, 20), 0.1)(v)) == pytest.approx(dot(u, pv), rel=1e-9)


def test_refusals(ctx: ParallelContext) -> None:
    with pytest.raises(ConfigError, match="damping > 0"):
        EKFAC(Stream([{"g": normal(1, 3)}], 1), -0.1)
    with pytest.raises(DataError, match=r"gradients of some documents[\s\S]*curvature\.documents"):
        EKFAC(Stream([], 0), 0.1)
    with pytest.raises(DataError, match=r"gradients of g that are finite and not all zero[\s\S]*`parameters`"):
        EKFAC(Stream([{"g": torch.zeros(3)}], 1), 0.1)
    broken = build_model(PRESETS["nano"], ctx, seed=0)[0]
    with torch.no_grad():
        broken.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"finite gradients of document 0[\s\S]*earlier checkpoint"):
        EKFAC(FisherDocuments([broken], ctx, [EMBEDDING], REFERENCE, 3), 0.1)
