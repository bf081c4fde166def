"""One rank: scores of both engines, and a probe gradient, under every layout it is told, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from scenarios import MODEL

from megatron_r1.influence.finite_difference import FiniteDifference
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.probe_gradient import fold_gradient
from megatron_r1.influence.rows import Row, batches
from megatron_r1.influence.space import Sharded, space_of
from megatron_r1.model.build import build_model, cut, global_names
from megatron_r1.model.forward import token_losses
from megatron_r1.parallel import context
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.utils.seeding import derive_seed

DIRECTIONS = 3


def rows() -> list[Row]:
    draw = np.random.default_rng(1)
    return [Row(i, draw.integers(0, MODEL.vocab_size, int(draw.integers(3, 40)))) for i in range(14)]


def scored(layout: LayoutConfig, tied: bool = True, recompute: bool = False, double: bool = False) -> dict[str, Any]:
    """ghost: [rows, K + 1] along the same directions whatever the layout, and along a probe gradient G; data-parallel ranks take
    turns with the rows, zeros for the others'. differences: [rows] along G. loss, norm: of the probe, and |G|."""
    ctx = context.initialize(layout, seed=0)
    chunks = build_model(MODEL.replace(tied_embeddings=tied), ctx, seed=3, recompute=recompute)
    for chunk in chunks:
        chunk.train(recompute)
        if double:
            chunk.double()
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.copy_(_gain(global_names(chunk)[name]).expand(parameter.shape) if parameter.ndim == 1 else parameter * 2)
    engine = Ghost(chunks, ctx)
    lines = [_direction(chunks, ctx, k) for k in range(DIRECTIONS)]
    every = rows()
    mine = list(range(len(every)))[ctx.data_rank :: ctx.data_size]
    space = space_of(chunks, ctx)
    losses = space.losses if isinstance(space, Sharded) else lambda batch: token_losses(chunks, batch)
    if double and layout.pipeline > 1:
        raise AssertionError("stages exchange fp32")
    probe = fold_gradient(losses, engine.parameters, every[:5], 0, 1, "documents", 96, ctx.device, space=space)
    found = np.zeros((len(every), DIRECTIONS + 1))
    found[mine] = engine.scores([*lines, probe.gradient], engine.pack([every[i] for i in mine], 96))
    differences = FiniteDifference(losses, engine.parameters, 1e-4, space)
    moved = differences.scores(probe.gradient, batches(every, 96, ctx.device))
    differences.verify_restored()
    return {"ghost": found.tolist(), "differences": moved.tolist(), "loss": probe.loss, "norm": space.norm(probe.gradient)}


def _gain(name: str) -> torch.Tensor:
    return 0.5 + torch.rand(1, generator=torch.Generator().manual_seed(derive_seed(0, name)))


def _direction(chunks: list[Any], ctx: context.ParallelContext, number: int) -> dict[str, torch.Tensor]:
    """The same whole direction under every layout, cut as the weights are."""
    found = {}
    for i, chunk in enumerate(chunks):
        names = global_names(chunk)
        for name, parameter in chunk.named_parameters():
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= ctx.tensor_size
            draw = torch.Generator().manual_seed(derive_seed(number, "direction", names[name]))
            whole = torch.randn(shape, generator=draw, dtype=torch.float64)
            found[(f"chunk{i}." if len(chunks) > 1 else "") + name] = cut(whole, parameter, ctx)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    results = {name: scored(LayoutConfig(**case["layout"]), **case.get("options", {})) for name, case in arguments["cases"].items()}
    (folder / f"result-{context.current().rank}.json").write_text(json.dumps(results))
    context.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
