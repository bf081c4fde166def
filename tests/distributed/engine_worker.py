"""precision: fp8 with a stand-in for Transformer Engine, in each process of a layout: what the layers are, and whether they do what ours do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import engine_stand_in

engine_stand_in.install("2.2.0")

import torch  # noqa: E402
from scenarios import MICROBATCHES, MODEL, Run  # noqa: E402

from megatron_r1.model.taps import find_taps  # noqa: E402
from megatron_r1.parallel import checkpoint, device, mcore  # noqa: E402
from megatron_r1.parallel.config import LayoutConfig  # noqa: E402
from megatron_r1.parallel.ddp import unwrap  # noqa: E402
from megatron_r1.utils.errors import DataError, EnvironmentProblem  # noqa: E402


def same(a: Run, b: Run) -> bool:
    """Whether all weights are equal, by name."""
    one, two = (dict(unwrap(run.chunks[0]).named_parameters()) for run in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refused(act: Any, error: type[Exception]) -> str:
    """What it says."""
    try:
        act()
    except error as problem:
        return str(problem)
    return "not refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    layout, result = LayoutConfig(**arguments["layout"]), dict[str, Any]()
    result["on a CPU"] = refused(lambda: Run(layout, precision="fp8"), EnvironmentProblem)
    device.require_fp8 = lambda target: None
    oldest, mcore.OLDEST_ENGINE = mcore.OLDEST_ENGINE, mcore.Version("2.3")
    result["too old"] = refused(lambda: Run(layout, precision="fp8"), EnvironmentProblem)
    mcore.OLDEST_ENGINE = oldest

    ours, fp8 = Run(layout, precision="bf16"), Run(layout, precision="fp8")
    layer = unwrap(fp8.chunks[0]).decoder.layers[0]
    result["classes"] = [type(module).__name__ for module in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2)]
    result["built equal"] = same(ours, fp8)
    keys = [[(entry.key, entry.global_shape, entry.global_offset) for entry in checkpoint._stored(run.chunks, run.optimizer)[0]] for run in (ours, fp8)]
    result["keys equal"] = keys[0] == keys[1]
    result["not heard"] = refused(lambda: find_taps(fp8.chunks), DataError)
    expected = ours.steps(2)
    engine_stand_in.calls.clear()
    result["steps equal"] = fp8.steps(2) == expected and same(ours, fp8)
    calls = list(engine_stand_in.calls)
    result["calls"] = len(calls) == 2 * MICROBATCHES * MODEL.num_layers * 4
    result["recipe"] = sorted({f"{type(call.recipe).__name__} {getattr(call.recipe, 'fp8_format', None)} {call.is_first_microbatch}" for call in calls})

    # From either to the other, and to fp32: the same checkpoint.
    ours.save(folder / "ours")
    fp8.save(folder / "fp8")
    after = ours.steps(2)
    for name, source, precision in (("ours to fp8", "ours", "fp8"), ("fp8 to ours", "fp8", "bf16")):
        run = Run(layout, precision=precision, seed=6)
        run.load(folder / source)
        result[name] = run.steps(2) == after and same(run, ours)
    again = Run(layout, precision="fp8", recompute=True)
    result["recomputed"] = again.steps(2) == expected
    (folder / f"result-{again.ctx.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
