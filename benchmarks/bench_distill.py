"""Memory of the distillation loss: the highest resident memory of a step with it, less that of the same step without it.

    python benchmarks/bench_distill.py                              three kinds of teacher, and filling the cache: a few minutes, 4 GB of memory
    python benchmarks/bench_distill.py --micro-batch 1 --no-store   one size, nothing written

The step is the forward and backward pass of a micro-batch through two layers of the 140M model's width with all 128,256 columns. Without
the loss, the head is left out: both models run to their last hidden states, and the sum of the student's squares is differentiated, so weights,
gradients and activations are the same. Both steps are processes of their own; their high-water mark is reset (/proc/self/clear_refs)
after the models are built and a small step has been made. `filling` is one micro-batch of the top-k cache, against the teacher's
forward pass. Rows go to benchmarks/results/distill.jsonl, the table to docs/training.md. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from result_rows import Rows, store  # noqa: E402

from megatron_r1.utils import machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "distill.jsonl"
DOCS = ROOT / "docs" / "training.md"
BEGIN = "<!-- table of benchmarks/results/distill.jsonl -->"
TEACHERS = {"trained": "trained, live", "outside": "from Hugging Face, live", "cached": "cached top 32", "filling": "filling the cache of the top 32"}
VOCABULARY, WIDTH, TOP_K, TEMPERATURE, KD_WEIGHT = 128256, 576, 32, 2.0, 0.7


def high_water(reset: bool = False) -> int:
    """Highest resident memory of this process in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def peak(case: str, micro_batch: int, seq_length: int, with_loss: bool) -> int:
    """Bytes at the peak of one step, in this process."""
    import torch

    from megatron_r1.model.build import build_model
    from megatron_r1.model.config import ModelConfig
    from megatron_r1.parallel.config import LayoutConfig
    from megatron_r1.parallel.context import initialize
    from megatron_r1.parallel.ddp import wrap
    from megatron_r1.parallel.optimizer import build_optimizer
    from megatron_r1.parallel.schedule import forward_backward
    from megatron_r1.parallel.vocab import vocab_shard
    from megatron_r1.train.config import DistillConfig
    from megatron_r1.train.objectives import Distill, to_tensors
    from megatron_r1.train.teacher import top_k
    from megatron_r1.train.topk_cache import TopKCache

    model = ModelConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=2048)
    ctx = initialize(LayoutConfig())
    piece = vocab_shard(VOCABULARY)
    teacher = None if case == "cached" else a_teacher(case, model, ctx)
    chunks = wrap(build_model(model, ctx, seed=1), LayoutConfig(), ctx)
    build_optimizer(chunks, lr=1e-3, layout=LayoutConfig())  # the gradient buffers belong to it

    class WithoutLoss(Distill):
        """The same forward passes; the sum of the squared last states takes the loss's place."""

        def output(self, chunk: Any, batch: dict[str, Any], arrays: Any) -> Any:
            if self.teacher is not None:
                self.teacher.logits(batch["tokens"], batch["segment_ids"], piece)
            return chunk(batch["tokens"], batch["segment_ids"], lambda _, states: states.square().sum(-1).t())

    def arrays(rows: int) -> dict[str, Any]:
        tokens = torch.randint(VOCABULARY, (rows, seq_length + 1), generator=torch.Generator().manual_seed(rows))
        return {
            "tokens": tokens[:, :-1].numpy(), "labels": tokens[:, 1:].numpy(), "loss_mask": torch.ones(rows, seq_length).numpy(),
            "segment_ids": (torch.arange(seq_length) // 100).int().repeat(rows, 1).numpy(), "position_ids": torch.arange(seq_length).repeat(rows, 1).numpy(),
            "source_ids": torch.zeros(rows, dtype=torch.int32).numpy(), "first_sample": 0,
        }  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        cache = TopKCache(Path(folder) / "cache", {}, samples=micro_batch, seq_length=seq_length, top_k=TOP_K, chunk=micro_batch)
        if case == "cached":
            cache.prepare()
            shape = (micro_batch, seq_length, TOP_K)
            likely = torch.randn(shape).sort(-1, descending=True).values
            cache.write(0, torch.log_softmax(likely, -1) - 0.1, torch.arange(TOP_K).expand(shape) * (VOCABULARY // TOP_K))
        kind = Distill if with_loss else WithoutLoss
        objective = kind(1, ctx.device, DistillConfig(temperature=TEMPERATURE, kd_weight=KD_WEIGHT), teacher=teacher, cache=cache if case == "cached" else None)

        def once(rows: int) -> None:
            if case != "filling":
                forward_backward(ctx, chunks, objective.forward_step, iter([arrays(rows)]), 1, seq_length, rows)
            elif with_loss:
                top_k(teacher, to_tensors(arrays(rows), ctx.device), True, piece, TOP_K, TEMPERATURE)
            else:
                batch = to_tensors(arrays(rows), ctx.device)
                teacher.logits(batch["tokens"], batch["segment_ids"], piece)

        once(1)
        high_water(reset=True)
        once(micro_batch)
        return high_water()


def a_teacher(case: str, model: Any, ctx: Any) -> Any:
    """A teacher of the student's size with random weights, without files."""
    from megatron_r1.model.build import build_model
    from megatron_r1.train.teacher import HuggingFaceTeacher, TrainedTeacher

    if case == "trained":
        teacher: Any = TrainedTeacher.__new__(TrainedTeacher)
        teacher.chunks = build_model(model, ctx, seed=2)
        return teacher
    import transformers

    from megatron_r1.model.pretrained import HeadApart

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=model.hidden_size, intermediate_size=model.ffn_size, num_hidden_layers=model.num_layers, head_dim=model.head_dim,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    teacher = HuggingFaceTeacher.__new__(HuggingFaceTeacher)
    teacher.model = HeadApart(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))
    return teacher


def table(rows: Rows) -> str:
    """The newest rows of every case, in GB."""
    newest = {(row["case"], row["micro_batch"]): row for row in rows}
    lines = ["| teacher | sequences of a micro-batch x tokens | without the loss, GB | with it, GB | the loss, GB | whole logits would be, GB |", "|---|--:|--:|--:|--:|--:|"]
    for (case, micro_batch), row in sorted(newest.items(), key=lambda item: (list(TEACHERS).index(item[0][0]), item[0][1])):
        whole = micro_batch * row["seq_length"] * VOCABULARY * 4 * (1 if case in ("cached", "filling") else 2)
        figures = (row["without"], row["with"], row["with"] - row["without"], whole)
        lines.append(f"| {TEACHERS[case]} | {micro_batch} x {row['seq_length']} | " + " | ".join(f"{figure / 1e9:.2f}" for figure in figures) + " |")
    last = rows[-1]
    return "\n".join(lines) + f"\n\n`{last['command']}`, {last['date']}, {last['machine']['cpu']}, torch {last['versions']['torch']}, fp32."


def main() -> int:
    """Entry point. Status 1 when the loss takes more than the goal of 0.5 GB anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(TEACHERS), action="append", help="only this one (may be repeated)")
    parser.add_argument("--micro-batch", type=int, action="append", help="sequences, may be repeated (default: 1, 4, 16)")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--no-store", action="store_true", help="only print")
    parser.add_argument("--here", choices=("with", "without"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = args.micro_batch or [1, 4, 16]
    if args.here:
        print(peak(args.case[0], sizes[0], args.seq_length, args.here == "with"))
        return 0
    rows, command = [], "python " + shlex.join(["benchmarks/bench_distill.py", *sys.argv[1:]])
    for case in args.case or TEACHERS:
        for size in sizes:
            found = {}
            for which in ("without", "with"):
                one = [sys.executable, __file__, "--case", case, "--micro-batch", str(size), "--seq-length", str(args.seq_length), "--here", which]
                done = subprocess.run(one, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-4000:])
                found[which] = int(done.stdout.split()[-1])
            print(f"{case:8s} {size:3d} x {args.seq_length}: " + ", ".join(f"{name} {value / 1e9:.3f} GB" for name, value in found.items())
                  + f", the loss {(found['with'] - found['without']) / 1e9:+.3f} GB", flush=True)  # fmt: skip
            rows.append({
                "date": date.today().isoformat(), "command": command, "case": case, "micro_batch": size, "seq_length": args.seq_length, "vocabulary": VOCABULARY,
                "width": WIDTH, **found, "machine": machine.describe(), "versions": machine.versions(),
            })  # fmt: skip
    if not args.no_store:
        store(rows, RESULTS, DOCS, BEGIN, table)
    return int(any(row["with"] - row["without"] > 0.5e9 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
