"""The ghost engine against float64 autograd, document by document, on every kind of parameter; and what it must refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_r1.influence.finite_difference import FiniteDifference
from megatron_r1.influence.ghost import Ghost, require_separate
from megatron_r1.influence.rows import PackedBatch, Row, batches, pack, packed
from megatron_r1.model.build import R1Model, build_model
from megatron_r1.model.config import PRESETS
from megatron_r1.model.forward import token_losses
from megatron_r1.model.precondition import Adam
from megatron_r1.model.taps import find_taps
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils.errors import CheckpointError, DataError
from megatron_r1.utils.statistics import spearman

CPU = torch.device("cpu")
PACK = 160
Direction = dict[str, Tensor]
SHAPES = {
    "tied, grouped queries": {},
    "untied, grouped queries": {"tied_embeddings": False},
    "tied, as many keys": {"num_kv_heads": 2},
    "untied, four small heads": {"tied_embeddings": False, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
}
GROUPS = ("word_embeddings", "layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def rows_of(seed: int, count: int, longest: int = 40) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [Row(i, draw.integers(0, 512, int(draw.integers(3, longest)))) for i in range(count)]


def model_of(dtype: torch.dtype = torch.float64, **changes: object) -> R1Model:
    """Weights far from their start, where every layer's gradient is of one size."""
    model = build_model(PRESETS["nano"].replace(**changes), initialize(LayoutConfig(), 0), seed=0)[0].to(dtype).eval()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=draw))
            else:
                parameter.mul_(2)
    return model


def directions_of(model: R1Model, count: int) -> list[Direction]:
    draw = torch.Generator().manual_seed(7)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return [{name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()} for _ in range(count)]


def gradients(model: R1Model, batches: list[PackedBatch]) -> list[Direction]:
    """Every row's gradient, where it stands: one backward pass each, of the loss of its tokens alone."""
    found: dict[int, Direction] = {}
    parameters = dict(model.named_parameters())
    for batch in batches:
        for place, position in enumerate(batch.positions):
            mine = batch.tensors["segment_ids"] == place
            loss = token_losses(model, batch.tensors)[mine & (batch.tensors["loss_mask"] > 0)].sum()
            found[position] = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    return [found[i] for i in sorted(found)]


def along(gradients: list[Direction], directions: list[Direction]) -> np.ndarray:
    return np.array([[sum(float((g[n].double() * d[n].double()).sum()) for n in g) for d in directions] for g in gradients])


def ghost(model: R1Model) -> Ghost:
    return Ghost([model], initialize(LayoutConfig(), 0))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_group_alone_and_all_together(shape: str) -> None:
    """Float64 to 1e-9; the tied embedding is one group with two uses."""
    model = model_of(**SHAPES[shape])
    rows = rows_of(1, 9)
    batches = packed(rows, PACK, CPU)
    assert len(batches) > 1
    (whole,) = directions_of(model, 1)
    groups = GROUPS if model.share_embeddings_and_output_weights else (*GROUPS, "output_layer")
    parts = [{n: p if group in n else torch.zeros_like(p) for n, p in whole.items()} for group in groups]
    assert all(any(bool(p.any()) for p in part.values()) for part in parts)
    assert sum(sum(bool(p.any()) for p in part.values()) for part in parts) == len(whole)
    found = ghost(model).scores([whole, *parts], batches)
    expected = along(gradients(model, batches), [whole, *parts])
    for k in range(expected.shape[1]):
        assert np.abs(found[:, k] - expected[:, k]).max() <= 1e-9 * np.abs(expected[:, k]).max()
    assert np.allclose(found[:, 0], found[:, 1:].sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, None)])
def test_narrow_weights(dtype: torch.dtype, tolerance: float | None) -> None:
    rows = rows_of(2, 24)
    batches, narrow = packed(rows, 256, CPU), model_of(dtype)
    exact = model_of(dtype).double()
    lines = directions_of(narrow, 2)
    lines.append(dict(gradients(exact, packed(rows_of(3, 1), 64, CPU))[0]))
    found, expected = ghost(narrow).scores(lines, batches), along(gradients(exact, batches), lines)
    for k in range(len(lines)):
        if tolerance is not None:
            assert relative(found[:, k], expected[:, k]) <= tolerance
        assert np.corrcoef(found[:, k], expected[:, k])[0, 1] >= 0.999


def test_adam_preconditioned_directions() -> None:
    """<g_i, P G> with P in the direction against the explicit product, document by document."""
    model = model_of()
    rows, probe = packed(rows_of(4, 8), PACK, CPU), gradients(model, packed(rows_of(5, 3), PACK, CPU))
    total = {name: sum(g[name] for g in probe) for name in probe[0]}
    draw = torch.Generator().manual_seed(1)
    moment = {name: 1e-6 * torch.rand(p.shape, generator=draw) for name, p in total.items()}
    line = Adam(moment, step=20, beta2=0.95, eps=1e-8)(total)
    expected = []
    for g in gradients(model, rows):
        expected.append(sum(float((g[n] * total[n] / ((moment[n].double() / (1 - 0.95**20)).sqrt() + 1e-8)).sum()) for n in g))
    assert relative(ghost(model).scores([line], rows)[:, 0], np.array(expected)) <= 1e-6


def test_finite_differences_agree() -> None:
    model = model_of(torch.float32)
    rows = rows_of(6, 40)
    probe = gradients(model, packed(rows_of(7, 4), PACK, CPU))
    line = {name: sum(g[name] for g in probe) for name in probe[0]}
    engine = FiniteDifference(lambda batch: token_losses(model, batch), dict(model.named_parameters()), 3e-4)
    found, other = ghost(model).scores([line], packed(rows, 512, CPU))[:, 0], engine.scores(line, batches(rows, 512, CPU))
    assert relative(other, found) <= 1e-3
    assert spearman(found, other) >= 0.999


def test_packed_is_as_alone() -> None:
    model = model_of(torch.float32)
    rows, lines = rows_of(8, 12), directions_of(model, 2)
    together = ghost(model).scores(lines, packed(rows, 4096, CPU))
    alone = np.concatenate([ghost(model).scores(lines, packed([row], 4096, CPU)) for row in rows])
    assert relative(together, alone) <= 2e-6
    filled = ghost(model).scores(lines, packed(rows, 130, CPU, multiple=16, even=True))
    assert relative(filled, alone) <= 2e-6


def test_rows_that_see_each_other_are_refused_for_they_would_be_wrong() -> None:
    model = model_of()
    rows, lines = rows_of(9, 5), directions_of(model, 1)
    tensors, ends = pack(rows, sum(row.targets for row in rows), CPU)
    leaking = tensors | {"segment_ids": torch.zeros_like(tensors["segment_ids"])}
    half = tensors | {"segment_ids": (tensors["segment_ids"] > 2).long()}
    for batch, message in ((leaking, "4 such places"), (half, "3 such places"), ({k: v for k, v in tensors.items() if k != "segment_ids"}, "no segment_ids")):
        with pytest.raises(DataError, match=rf"{message}[\s\S]*finite_differences"):
            ghost(model).scores(lines, [PackedBatch(list(range(5)), batch, ends)])
    with pytest.raises(DataError, match=r"one row of tokens"):
        require_separate({"tokens": torch.zeros(2, 3)}, ends)
    # What the refusal spares: the sum over positions is far from the gradient of the row's loss.
    parameters = dict(model.named_parameters())
    losses = token_losses(model, leaking).flatten()
    true = []
    for a, b in itertools.pairwise(ends):
        parts = torch.autograd.grad(losses[a:b].sum(), list(parameters.values()), retain_graph=True)
        true.append(sum(float((p * lines[0][n]).sum()) for n, p in zip(parameters, parts)))
    assert relative(ghost(model).scores(lines, packed(rows, 4096, CPU))[:, 0], np.array(true)) > 0.05


def test_recomputed_activations_count_once() -> None:
    config = PRESETS["nano"]
    ctx = initialize(LayoutConfig(), 0)
    plain, again = (build_model(config, ctx, seed=0, recompute=flag)[0] for flag in (False, True))
    again.train()  # recomputation is for training
    batches, lines = packed(rows_of(10, 8), PACK, CPU), directions_of(plain, 2)
    assert relative(Ghost([again], ctx).scores(lines, batches), Ghost([plain], ctx).scores(lines, batches)) <= 1e-6


def test_weights_and_their_settings_are_left_alone() -> None:
    model = model_of(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = model.decoder.final_layernorm.weight.requires_grad_(False)
    engine = ghost(model)
    engine.scores(directions_of(model, 1), packed(rows_of(11, 3), PACK, CPU))
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


def test_no_parameter_goes_unheard() -> None:
    model = model_of()
    assert {tap.name for tap in find_taps([model])} == {name for name, _ in model.named_parameters()}
    model.decoder.layers[1].extra = torch.nn.LayerNorm(4)
    with pytest.raises(DataError, match=r"decoder.layers.1.extra.bias, decoder.layers.1.extra.weight[\s\S]*finite_differences"):
        ghost(model)


def test_a_direction_without_a_parameter_is_refused() -> None:
    model = model_of()
    (line,) = directions_of(model, 1)
    line.pop("decoder.final_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"none for 1, such as decoder.final_layernorm.weight"):
        ghost(model).scores([line], packed(rows_of(0, 2), PACK, CPU))


def test_a_gradient_that_is_no_number_names_its_row() -> None:
    rows = rows_of(12, 6, 20)
    poisoned = int(rows[3].tokens[1])
    rows = [row if i == 3 else Row(row.unit, np.where(row.tokens == poisoned, (poisoned + 1) % 512, row.tokens)) for i, row in enumerate(rows)]
    # A tied embedding is in everybody's loss, an untied one only where the token stands.
    for tied, message in ((False, r"document of row 3 \(1 of 6 rows\)[\s\S]*leave the document out"), (True, r"for all others[\s\S]*did not diverge")):
        model = model_of(torch.float32, tied_embeddings=tied)
        with torch.no_grad():
            model.embedding.word_embeddings.weight[poisoned] = float("nan")
        with pytest.raises(DataError, match=message):
            ghost(model).scores(directions_of(model, 1), packed(rows, PACK, CPU), name="document of row {}".format)


def test_no_rows_have_no_scores() -> None:
    model = model_of()
    assert ghost(model).scores(directions_of(model, 2), []).shape == (0, 2)


def test_packing_by_hand() -> None:
    rows = [Row(0, np.array([5, 6, 7])), Row(1, np.array([8, 9, 1, 2])), Row(2, np.array([3, 4]))]
    first, second = packed(rows, 5, CPU)
    assert (first.positions, second.positions) == ([1, 0], [2])
    assert first.tensors["tokens"].tolist() == [[8, 9, 1, 5, 6]]
    assert first.tensors["labels"].tolist() == [[9, 1, 2, 6, 7]]
    assert first.tensors["segment_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert first.cu_seqlens.tolist() == [0, 3, 5]
    a, b = packed(rows, 5, CPU, multiple=4, even=True)
    assert a.padded_tokens == b.padded_tokens == 8
    assert b.cu_seqlens.tolist() == [0, 1, 8]
    assert b.tensors["loss_mask"].tolist() == [[1] + [0] * 7]
