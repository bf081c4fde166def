"""What each rank of `test_context_attention` runs: attention over its piece of the sequences, against the whole on one process.

Every rank makes the same whole input, so each compares its own share; the answers are the largest differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.ops.attention import ATTENTION, qknorm_attention
from megatron_r1.parallel.sequence import SequencePiece, sequence_piece
from megatron_r1.utils.errors import DataError, ParallelError

LENGTH = 48


def documents(kind: str | None) -> dict[str, Tensor]:
    """Boundaries at 1, 2 (inside the first chunk), 20, 21, 47: documents over the borders of chunks, of one token, empty ones."""
    if kind is None:
        return {}
    cuts = torch.tensor([0, 1, 2, 2, 20, 21, 47, 48, 48], dtype=torch.int32)
    if kind == "boundaries":
        return {"cu_seqlens": cuts}
    first = torch.arange(8).repeat_interleave(cuts.diff().long())
    second = torch.arange(3).repeat_interleave(torch.tensor([5, 38, 5]))
    return {"segment_ids": torch.stack([first, second])}


def compare(piece: SequencePiece, case: dict[str, Any]) -> dict[str, float]:
    """Largest difference of output and gradients, relative to the largest number of each (at least 1)."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    rows = 1 if case["documents"] == "boundaries" else 2
    generator = torch.Generator().manual_seed(11)
    packed = torch.randn(LENGTH, rows, (6 + 2 * 2) * 16, generator=generator).to(dtype)
    grad = torch.randn(LENGTH, rows, 6 * 16, generator=generator).to(dtype)
    weights = {name: torch.rand(16, generator=generator) + 0.5 for name in ("q_weight", "k_weight")} if case.get("gains") else {}
    options = {"num_kv_heads": 2, "head_dim": 16, "rope_theta": 1e4, "eps": 1e-5, **documents(case["documents"]), **case.get("options", {})}

    def run(qkv: Tensor, dout: Tensor, **more: Any) -> list[Tensor]:
        leaves = [qkv.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights.values())]
        out = qknorm_attention(leaves[0], **options, **dict(zip(weights, leaves[1:])), **more)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    whole = run(packed, grad)
    mine = run(piece.cut(packed), piece.cut(grad), context=piece)
    for share in mine[2:]:  # every rank sees its own tokens' part of a gain's gradient
        dist.all_reduce(share)
    found = {}
    for name, here, there in zip(("out", "dqkv", *weights), mine, [piece.cut(whole[0]), piece.cut(whole[1]), *whole[2:]], strict=True):
        assert here.dtype == there.dtype
        found[name] = float((here - there).abs().max() / there.abs().max().clamp(min=1.0))
    return found


def exchange(piece: SequencePiece) -> list[bool]:
    """gather undoes cut; scatter_sum is the adjoint of gather: <gather x, y> = <x, scatter_sum y>, added up over ranks."""
    whole = torch.arange(LENGTH * 3.0, dtype=torch.float64).view(LENGTH, 3)
    mine = torch.randn(LENGTH // piece.size, 2, generator=torch.Generator().manual_seed(piece.rank), dtype=torch.float64)
    other = torch.randn(LENGTH, 2, generator=torch.Generator().manual_seed(100 + piece.rank), dtype=torch.float64)
    sides = torch.stack([(piece.gather(mine) * other).sum(), (mine * piece.scatter_sum(other)).sum()])
    dist.all_reduce(sides)
    half = whole.bfloat16()
    return [
        torch.equal(piece.gather(piece.cut(whole)), whole),
        torch.equal(piece.gather(piece.cut(half)), half),
        torch.equal(piece.scatter_sum(whole), piece.size * piece.cut(whole)),
        bool((sides[0] - sides[1]).abs() < 1e-10),
    ]


def refused(piece: SequencePiece) -> list[str]:
    """Lengths that can not be cut: refused before anything is sent, on every rank alike."""
    messages = []
    for action in (
        lambda: piece.cut(torch.zeros(2 * piece.size + 1, 1)),
        lambda: piece.gather(torch.zeros(3, 1)),
        lambda: piece.scatter_sum(torch.zeros(2 * piece.size - 1, 1)),
        lambda: qknorm_attention(torch.zeros(3, 1, 6), num_kv_heads=1, head_dim=2, rope_theta=1e4, eps=1e-5, context=piece),
    ):
        try:
            action()
            messages.append("accepted")
        except (DataError, ParallelError) as error:
            messages.append(str(error))
    return messages


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    dist.init_process_group("gloo")
    piece = sequence_piece()
    here = [name for name, reason in ATTENTION.reasons("cpu").items() if reason is None]
    results: dict[str, Any] = {"exchange": exchange(piece), "refused": refused(piece), "implementations": here}
    for name, case in arguments["cases"].items():
        implementation = case.get("options", {}).get("implementation")
        results[name] = compare(piece, case) if implementation is None or implementation in here else {}
    (folder / f"result-{piece.rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
