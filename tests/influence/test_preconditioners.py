"""Preconditioned scores against explicit matrices, in float64, on a model small enough to write its curvature down."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_world import influence_config
from torch import Tensor

from megatron_r1.influence.config import PARAMETER_KINDS
from megatron_r1.influence.datainf import DataInf
from megatron_r1.influence.groups import KINDS, Selected, by_group, only, score_shares, select
from megatron_r1.influence.probe_gradient import dot
from megatron_r1.influence.reference import DocumentGradients, Reference, draw
from megatron_r1.influence.rows import Batch, Row
from megatron_r1.model.precondition import Adam, Identity, Preconditioner
from megatron_r1.utils.errors import ConfigError, DataError

CPU = torch.device("cpu")
VOCAB, WIDTH = 7, 4


class Toy:
    """Tied embedding, one nonlinear layer, a gain: a language model of 48 numbers."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = {"embedding.weight": (VOCAB, WIDTH), "mlp.weight": (WIDTH, WIDTH), "norm.weight": (WIDTH,)}
        self.parameters = {
            name: torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()
        }

    def losses(self, batch: Batch) -> Tensor:
        """As `rows.TokenLosses`. A running mean of what came before stands for attention."""
        table = self.parameters["embedding.weight"]
        states = table[batch["tokens"]].cumsum(1) / torch.arange(1, batch["tokens"].shape[1] + 1)[None, :, None]
        states = torch.tanh(states @ self.parameters["mlp.weight"].t()) * self.parameters["norm.weight"]
        return torch.nn.functional.cross_entropy((states @ table.t()).transpose(1, 2), batch["labels"], reduction="none")

    def gradient(self, row: Row, mean: bool) -> dict[str, Tensor]:
        """Of a document's summed or mean token loss, without any of the project's code."""
        batch = {"tokens": torch.as_tensor(row.tokens[None, :-1]), "labels": torch.as_tensor(row.tokens[None, 1:])}
        losses = self.losses(batch)
        loss = losses.mean() if mean else losses.sum()
        return dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values()))))


def rows_of(seed: int, count: int) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [Row(i, draw.integers(0, VOCAB, int(draw.integers(4, 12)))) for i in range(count)]


def reference_of(rows: list[Row]) -> Reference:
    return Reference(rows, [f"document {row.unit}" for row in rows], {"toy": len(rows)}, "")


TOY, DOCUMENTS, SCORED = Toy(), rows_of(1, 9), rows_of(2, 6)
PROBE = TOY.gradient(rows_of(3, 1)[0], mean=True)


def gradients(rows: list[Row] = DOCUMENTS) -> DocumentGradients:
    return DocumentGradients(TOY.losses, TOY.parameters, reference_of(rows), CPU)


def flat(gradient: Mapping[str, Tensor], name: str) -> Tensor:
    return gradient[name].detach().flatten()


def scores(direction: Mapping[str, Tensor]) -> np.ndarray:
    """<gradient of the summed loss, direction> of every scored document."""
    return np.array([sum(float(flat(TOY.gradient(row, False), n) @ flat(direction, n)) for n in direction) for row in SCORED])


def inverse_hessian(name: str, damping: float) -> Tensor:
    """DataInf's matrix written out: the mean of (g g^T + lambda)^-1, lambda a tenth of the mean squared gradient entry."""
    found = torch.stack([flat(TOY.gradient(row, True), name) for row in DOCUMENTS])
    lam = damping * (found**2).mean()
    return torch.stack([torch.linalg.inv(torch.outer(g, g) + lam * torch.eye(len(g), dtype=g.dtype)) for g in found]).mean(0)


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_datainf_is_the_mean_of_inverses(damping: float) -> None:
    direction = DataInf(gradients(), damping)(PROBE)
    expected = {name: inverse_hessian(name, damping) @ flat(PROBE, name) for name in PROBE}
    for name, line in expected.items():
        assert torch.allclose(flat(direction, name), line, rtol=1e-9, atol=1e-12)
    wanted = [sum(float(flat(TOY.gradient(row, False), n) @ expected[n]) for n in expected) for row in SCORED]
    assert scores(direction) == pytest.approx(wanted, rel=1e-6)


def test_adam_scores_are_preconditioned_dot_products() -> None:
    moment = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for name, p in PROBE.items()}
    direction = Adam(moment, step=30, beta2=0.95, eps=1e-3)(PROBE)
    wanted = [
        sum(
            float((TOY.gradient(row, False)[n] * PROBE[n] / ((moment[n] / (1 - 0.95**30)).sqrt() + 1e-3)).sum())
            for n in PROBE
        )
        for row in SCORED
    ]
    assert scores(direction) == pytest.approx(wanted, rel=1e-6)


def test_datainf_does_not_see_a_common_scale_of_all_losses() -> None:
    """Scaling every loss by 3 scales G and the scored gradients by 3 and P by 1/9 (a fixed P would give 9 times the scores)."""

    class Louder(Toy):
        def losses(self, batch: Batch) -> Tensor:
            return 3.0 * super().losses(batch)

    quiet = DataInf(gradients(), 0.1)(PROBE)
    louder = Louder()
    loud = DataInf(DocumentGradients(louder.losses, louder.parameters, reference_of(DOCUMENTS), CPU), 0.1)(
        {name: 3.0 * part for name, part in PROBE.items()}
    )
    assert 3.0 * scores(loud) == pytest.approx(scores(quiet), rel=1e-9)


def test_several_gradients_cost_one_pass_more() -> None:
    passes = []

    class Counted(DocumentGradients):
        def __iter__(self) -> Any:
            passes.append(len(self))
            return super().__iter__()

    found = DataInf(Counted(TOY.losses, TOY.parameters, reference_of(DOCUMENTS), CPU), 0.1)
    second = TOY.gradient(SCORED[0], mean=True)
    both = found.several([PROBE, second])
    assert passes == [9, 9]
    for one, alone in zip(both, (found(PROBE), found(second))):
        assert all(torch.equal(one[name], alone[name]) for name in one)


def every_preconditioner() -> dict[str, Preconditioner]:
    moment = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(6)) for name, p in PROBE.items()}
    return {"none": Identity(), "adam": Adam(moment, 5, 0.9, 1e-6), "datainf": DataInf(gradients(), 0.1)}


@pytest.mark.parametrize("name", every_preconditioner())
def test_symmetric_and_positive(name: str) -> None:
    """Positive: so that normalise: self never divides by something that is not."""
    found = every_preconditioner()[name]
    draw = torch.Generator().manual_seed(8)
    u, v = ({n: torch.randn(p.shape, generator=draw, dtype=torch.float64) for n, p in PROBE.items()} for _ in range(2))
    pu, pv = found.several([u, v])
    dots = [sum(float((a[n] * b[n]).sum()) for n in a) for a, b in ((u, pv), (v, pu), (u, pu), (v, pv))]
    assert dots[0] == pytest.approx(dots[1], rel=1e-9)
    assert min(dots[2:]) > 0


@pytest.mark.parametrize("name", every_preconditioner())
def test_the_probe_scores_one_in_units_of_itself(name: str) -> None:
    """normalise: self divides by <G, P G>: the mean over the probe's documents of their score per token."""
    probe = rows_of(9, 5)
    each = [TOY.gradient(row, mean=True) for row in probe]
    whole = {n: torch.stack([part[n] for part in each]).mean(0) for n in PROBE}
    direction = every_preconditioner()[name](whole)
    per_token = [sum(float((part[n] * direction[n]).sum()) for n in PROBE) for part in each]
    assert np.mean(per_token) / dot(whole, direction) == pytest.approx(1.0)


def test_datainf_refuses_what_has_no_curvature() -> None:
    with pytest.raises(ConfigError, match=r"damping > 0[\s\S]*0\.1 is the paper's"):
        DataInf(gradients(), 0.0)
    with pytest.raises(DataError, match=r"gradients of some documents[\s\S]*curvature\.documents"):
        DataInf(gradients([]), 0.1)
    still = [{name: part * (name != "mlp.weight") for name, part in PROBE.items()}] * 3
    with pytest.raises(DataError, match=r"gradients of mlp\.weight[\s\S]*not all zero[\s\S]*`parameters`"):
        DataInf(still, 0.1)


def test_a_document_without_a_finite_gradient_is_named() -> None:
    def broken(batch: Batch) -> Tensor:
        found = TOY.losses(batch)
        return found * float("nan") if batch["tokens"].shape[1] == DOCUMENTS[4].targets else found

    first = next(row.unit for row in DOCUMENTS if row.targets == DOCUMENTS[4].targets)
    with pytest.raises(DataError, match=rf"finite gradients of document {first}[\s\S]*earlier checkpoint"):
        DataInf(DocumentGradients(broken, TOY.parameters, reference_of(DOCUMENTS), CPU), 0.1)


NAMES = ["embedding.word_embeddings.weight", "decoder.layers.0.input_layernorm.weight", "decoder.layers.1.mlp.linear_fc1.weight", "output_layer.weight"]


def test_parameters_are_chosen_by_name() -> None:
    assert select(NAMES, "all") == NAMES
    assert select(NAMES, "embeddings") == [NAMES[0], NAMES[3]]
    assert select(NAMES, ["*fc1*", "decoder.layers.?.input*"]) == NAMES[1:3]
    with pytest.raises(ConfigError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight[\s\S]*'decoder\.layers\.7\.mlp\.\*', which matches none of 4"):
        select(NAMES, ["*fc1*", "decoder.layers.7.mlp.*"])


def test_chosen_parameters_alone_are_scored() -> None:
    """The direction of a choice is that of the whole model at those parameters, and its scores add up with the others'."""
    whole = DataInf(gradients(), 0.1)
    parts = [Selected(whole, [name])(PROBE) for name in PROBE]
    for kept, part in zip(PROBE, parts):
        assert torch.equal(part[kept], whole(PROBE)[kept])
        assert not any(bool(part[name].any()) for name in PROBE if name != kept)
    assert sum(scores(part) for part in parts) == pytest.approx(scores(whole(PROBE)), rel=1e-9)
    few = DataInf(DocumentGradients(TOY.losses, {"mlp.weight": TOY.parameters["mlp.weight"]}, reference_of(DOCUMENTS), CPU), 0.1)
    assert torch.allclose(few(PROBE)["mlp.weight"], whole(PROBE)["mlp.weight"], rtol=1e-12)
    with pytest.raises(DataError, match="zero at every one"):
        Selected(whole, ["mlp.weight"])(only(PROBE, ["norm.weight"]))


def test_shares_of_the_scores_by_hand() -> None:
    parts = {"embedding": np.array([1.0, 2.0, 3.0]), "ffn": np.array([0.0, 0.0, 3.0]), "norm": np.array([5.0, 5.0, 5.0])}
    total = np.array([6.0, 7.0, 11.0])
    shares = score_shares(parts)
    assert shares is not None
    assert shares == pytest.approx({name: np.cov(part, total)[0, 1] / total.var(ddof=1) for name, part in parts.items()}, abs=1e-12)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["norm"] == pytest.approx(0.0, abs=1e-12)  # the same for every document: ranks nothing
    assert score_shares({"ffn": np.ones(5)}) is None
    assert score_shares({"ffn": np.array([1.0, 2.0])}) is None


def test_the_plan_knows_how_many_kinds_there_are() -> None:
    assert len(KINDS) == PARAMETER_KINDS


def test_groups_cut_a_direction_in_pieces() -> None:
    pieces = by_group({"embedding.w": torch.ones(2), "x.mlp.w": torch.ones(2), "x.mlp.v": torch.ones(2), "norm": torch.zeros(2)})
    assert {name: sorted(n for n, p in piece.items() if p.any()) for name, piece in pieces.items()} == {
        "embedding": ["embedding.w"],
        "ffn": ["x.mlp.v", "x.mlp.w"],
    }


class Shards:
    """Sources of random documents."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts

    def split(self, source: str, _: str) -> Any:
        draw = np.random.default_rng(len(source))
        found = [draw.integers(0, 9, 20) for _ in range(self.counts[source])]
        return Documents(found)


class Ids(list[str]):
    def take(self, rows: list[int]) -> list[str]:
        return [self[i] for i in rows]


class Documents:
    def __init__(self, found: list[np.ndarray]) -> None:
        self.found, self.lengths, self.ids = found, [len(d) for d in found], Ids(map(str, range(len(found))))

    def __len__(self) -> int:
        return len(self.found)

    def tokens(self, i: int) -> np.ndarray:
        return self.found[i]


def test_reference_documents_are_keyed_recorded_and_not_the_scored_ones() -> None:
    shards: Any = Shards(many=200, few=3)
    config = influence_config(preconditioner="datainf", curvature={"documents": 8})
    found = draw(config, shards, ["many", "few"])
    assert found.sources == {"many": 8, "few": 3}
    assert found.tokens == 11 * 19
    again = draw(config.model_copy(update={"documents": 3, "score_unit": "document"}), shards, ["many", "few"])
    assert (again.sha256, again.names) == (found.sha256, found.names)
    assert draw(config.model_copy(update={"seed": 6}), shards, ["many", "few"]).sha256 != found.sha256
    longer = draw(config.model_copy(update={"curvature": SimpleNamespace(documents=12)}), shards, ["many", "few"])
    assert longer.names[:8] == found.names[:8]
    with pytest.raises(DataError, match=r"at least 4 documents[\s\S]*few: 3[\s\S]*preconditioner: adam"):
        draw(config, shards, ["few"])


def test_eps_belongs_to_adam() -> None:
    with pytest.raises(ValueError, match="belongs to preconditioner adam"):
        influence_config(preconditioner="datainf", eps=1e-4)
