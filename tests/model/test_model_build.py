"""Construction: exact counts, initial weights that depend on nothing but the seed and the name."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.model.build import build_model, cut, global_names
from megatron_r1.model.config import PRESETS
from megatron_r1.parallel import context
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.utils.errors import ParallelError


@pytest.fixture(scope="module")
def ctx() -> context.ParallelContext:
    return context.initialize(LayoutConfig(), seed=0)


@pytest.mark.parametrize("name", ["nano", "tiny", "small"])
def test_parameter_counts_are_the_closed_form(name: str, ctx: context.ParallelContext) -> None:
    (model,) = build_model(PRESETS[name], ctx, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters()


def test_initial_weights(ctx: context.ParallelContext) -> None:
    config = PRESETS["nano"]
    torch.manual_seed(1)
    (a,) = build_model(config, ctx, seed=7)
    torch.manual_seed(2)  # the global generator plays no part
    (b,), (other,) = build_model(config, ctx, seed=7), build_model(config, ctx, seed=8)
    (deeper,) = build_model(config.replace(num_layers=3), ctx, seed=7)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), other.parameters()):
        assert torch.equal(x, y)
        if x.ndim == 1:
            assert torch.equal(x, torch.ones_like(x))
            continue
        assert not torch.equal(x, z)
        assert torch.equal(x, dict(deeper.named_parameters())[name]), "more layers leave the others as they were"
        assert x.mean().item() == pytest.approx(0.0, abs=5 * 0.02 / x.numel() ** 0.5)
        assert x.std().item() == pytest.approx(0.02, rel=0.05)
    layers = [p for n, p in a.named_parameters() if n.endswith("linear_proj.weight")]
    assert not torch.equal(layers[0], layers[1])


def test_names_are_those_of_the_whole_model(ctx: context.ParallelContext) -> None:
    (model,) = build_model(PRESETS["nano"], ctx, seed=0)
    names = global_names(model)
    assert names == {name: name for name in names}


def test_gate_and_up_are_cut_separately() -> None:
    class Fake:
        tensor_size, tensor_rank = 2, 1

    parameter = torch.nn.Parameter(torch.empty(4, 3))
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 2
    whole = torch.arange(8).view(8, 1).expand(8, 3)  # rows 0-3 gate, 4-7 up
    assert cut(whole, parameter, Fake())[:, 0].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"num_heads": 9, "hidden_size": 576, "num_kv_heads": 3}, "num_heads"), ({"num_kv_heads": 1}, "num_kv_heads"), ({"vocab_size": 513}, "vocab_size")],
)
def test_shapes_that_can_not_be_cut(change: dict[str, int], name: str) -> None:
    config = PRESETS["nano"].replace(**({"num_kv_heads": 2} | change))
    with pytest.raises(ParallelError) as caught:
        LayoutConfig(tensor=2).check_model(config)
    assert name in caught.value.expected
    assert str(getattr(config, name)) in caught.value.found
    assert "divisors" in caught.value.fix
