"""Training speed on GPUs: tokens a second, MFU and memory of this package, of plain Hugging Face with torch.compile, and of stock megatron-core.

    python benchmarks/bench_training.py                                  one H100- or H200-class GPU: 140M, 360M, 950M at 2048 tokens, bf16
    torchrun --nproc-per-node 8 benchmarks/bench_training.py             data parallel on the GPUs of one machine
    python benchmarks/bench_training.py --model nano --cpu --no-store    the same code on a CPU, to see that it runs; MFU is not defined there

Contestants, each in a process of its own, one after the other:

    ours           train.loop.Trainer with the default settings' callbacks, checkpoints apart
    ours_fp8       the same with precision: fp8, where Transformer Engine and the GPU can
    hugging_face   the exported architecture (transformers), torch.compile, bf16 autocast over fp32 weights, torch's fused AdamW
    stock_local    megatron-core's GPTModel with its own layer specification
    stock_te       the same with Transformer Engine's, where it is installed

All train the same shapes on random tokens that are in memory: steps of --sequences sequences, cut into micro-batches of --micro, halved until they fit
where a contestant runs out of memory (its row says which it took). A step is the time between two CUDA events; steps before --warm-up
are not counted, compilation is among them. MFU is tokens a second times the model's own count of operations
(ModelConfig.flops_per_token: matrix products, causal attention as half a square) over the GPU's dense bf16 peak (utils/devices.py). Goals of
ours: 50 % of 950M, 45 % of 360M, 40 % of 140M. Rows with date, command, GPU, driver and versions are appended to
benchmarks/results/training.jsonl. This script has never run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "training.jsonl"
GOALS = {"mobilellm_r1_950m": 0.50, "mobilellm_r1_360m": 0.45, "mobilellm_r1_140m": 0.40}
MICRO = {"mobilellm_r1_950m": 8, "mobilellm_r1_360m": 16, "mobilellm_r1_140m": 16}
"""Sequences of 2048 tokens in a micro-batch to begin with."""
CONTESTANTS = ("ours", "ours_fp8", "hugging_face", "stock_local", "stock_te")
OUT_OF_MEMORY, ROW = 77, "ROW "


# ---------------------------------------------------------------- contestants: each returns marks between its steps, and the last loss


def ours(args: argparse.Namespace, config: Any, data: Any) -> dict[str, Any]:
    """Our trainer; with which operations."""
    import in_memory

    from megatron_r1.ops.attention import describe
    from megatron_r1.train.callbacks.base import Callback

    class Done(Exception):
        """Before the last step, after which a checkpoint is due."""

    marks: list[Any] = []

    class Clock(Callback):
        def on_step(self, trainer: Any) -> None:
            marks.append(mark(trainer.ctx.device))
            if trainer.step == trainer.total - 1:
                raise Done

    with tempfile.TemporaryDirectory() as folder:
        trainer = in_memory.our_trainer(config, data, Path(folder), [Clock()])
        with contextlib.suppress(Done):
            trainer.train()
        return {
            "marks": marks, "loss": trainer.last.loss, "attention": describe(trainer.ctx.device.type, dtype(args), config.model.head_dim),
            "optimizer": type(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])[0].optimizer).__module__.split(".")[0],
        }  # fmt: skip


def hugging_face(args: argparse.Namespace, config: Any, data: Any) -> dict[str, Any]:
    """transformers' own model of the exported architecture."""
    import in_memory
    import transformers

    from megatron_r1.model.hf_map import ARCHITECTURE, hf_config
    from megatron_r1.parallel.context import initialize

    ctx = initialize(config.layout, 1)
    of = getattr(transformers, ARCHITECTURE)
    model: Any = of(of.config_class(**hf_config(config.model))).to(ctx.device).train()
    model.config.use_cache = False
    if ctx.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    if not args.no_compile:
        model = torch.compile(model)
    matrices, gains = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.95), fused=True)
    marks, total = [], 0.0
    ready = [in_memory.batches_of(data, ctx, config, step) for step in range(2)]
    for step in range(args.warm_up + args.steps + 1):
        marks.append(mark(ctx.device))
        batches, losses = ready[step % 2], []
        for batch in batches:
            with torch.autocast(ctx.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = float(sum(losses))
    return {"marks": marks, "loss": total, "compiled": not args.no_compile}


def stock(args: argparse.Namespace, config: Any, data: Any, transformer_engine: bool) -> dict[str, Any]:
    """megatron-core's GPTModel as it comes, with what it fuses on a GPU."""
    import in_memory
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    from megatron_r1.model.build import transformer_config
    from megatron_r1.parallel import device
    from megatron_r1.parallel.context import initialize
    from megatron_r1.parallel.ddp import wrap
    from megatron_r1.parallel.mcore import GPTModel
    from megatron_r1.parallel.optimizer import build_optimizer

    ctx, model = initialize(config.layout, 1), config.model
    device.install_cpu_shim()  # for the module imported just now
    core = transformer_config(model, ctx, config.precision)
    gpu = ctx.device.type == "cuda"
    core.qk_l2_norm = True
    core.init_method = core.output_layer_init_method = core.embedding_init_method = lambda weight: nn.init.normal_(weight, 0.0, model.init_std)
    core.bias_activation_fusion = core.bias_dropout_fusion = core.masked_softmax_fusion = core.cross_entropy_loss_fusion = gpu
    core.apply_rope_fusion = gpu and transformer_engine
    core.gradient_accumulation_fusion = gpu and (transformer_engine or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None)
    spec = get_gpt_layer_with_transformer_engine_spec(qk_l2_norm=True) if transformer_engine else get_gpt_layer_local_spec(qk_l2_norm=True, normalization="RMSNorm")
    bare = GPTModel(
        core, spec, model.vocab_size, model.max_positions, share_embeddings_and_output_weights=model.tied_embeddings, position_embedding_type="rope", rotary_base=model.rope_theta,
    )
    (chunk,) = wrap([bare.to(ctx.device)], config.layout, ctx)
    optimizer = build_optimizer([chunk], lr=1e-4, layout=config.layout, precision=config.precision)

    def forward_step(batches: Iterator[dict[str, Tensor]], chunk: nn.Module) -> Any:
        batch = next(batches)
        losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, lambda out: (out.float().sum(), torch.tensor(out.numel(), dtype=torch.int, device=out.device), {"loss": out.detach().float().sum()})

    marks, total = [], 0.0
    ready = [in_memory.batches_of(data, ctx, config, step) for step in range(2)]
    for step in range(args.warm_up + args.steps + 1):
        marks.append(mark(ctx.device))
        total = float(in_memory.bare_step(chunk, optimizer, forward_step, ready[step % 2]))
    return {"marks": marks, "loss": total * ctx.data_size / int(config.global_batch)}


# ---------------------------------------------------------------- one contestant, in its own process


def mark(device: torch.device) -> Any:
    """A point in the device's work."""
    from megatron_r1.parallel.device import Mark

    return Mark(device)


def dtype(args: argparse.Namespace) -> torch.dtype:
    """Of the activations."""
    return torch.float32 if args.precision == "fp32" else torch.bfloat16


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Measure `args.contestant` here; what rank 0 found."""
    import in_memory

    from megatron_r1.model.config import PRESETS
    from megatron_r1.parallel.context import current
    from megatron_r1.parallel.device import name_of
    from megatron_r1.utils.devices import peak_tflops
    from megatron_r1.utils.machine import peak_memory_bytes

    model = PRESETS[args.model]
    precision = "fp8" if args.contestant == "ours_fp8" else args.precision
    config = in_memory.settings(
        model, steps=args.warm_up + args.steps + 1, length=args.length, micro=args.micro, sequences=args.sequences, precision=precision, device="cpu" if args.cpu else "gpu",
        reset_documents=False, **({"watch": {"peak_tflops": args.peak_tflops}} if args.peak_tflops else {}),
    )
    data = in_memory.RandomTokens(2 * args.sequences, args.length, model.vocab_size)
    run = {
        "ours": ours, "ours_fp8": ours, "hugging_face": hugging_face, "stock_local": lambda *rest: stock(*rest, False), "stock_te": lambda *rest: stock(*rest, True),
    }[args.contestant]
    found = run(args, config, data)
    marks = found.pop("marks")
    seconds = [begin.seconds_until(end) for begin, end in itertools.pairwise(marks)][args.warm_up :]
    ctx = current()
    speed = args.sequences * args.length / statistics.median(seconds)
    name = name_of(ctx.device)
    peak = None if name is None else args.peak_tflops or peak_tflops(name, "bf16")  # of fp8 too: the share of what bf16 could do
    flops = model.flops_per_token(args.length)
    memory = peak_memory_bytes() if name is None else torch.cuda.max_memory_allocated(ctx.device)
    mfu = None if peak is None else speed * flops / (ctx.world_size * peak * 1e12)
    goal = GOALS.get(args.model) if args.contestant == "ours" else None
    return {
        "model": args.model, "contestant": args.contestant, "precision": precision, "seq_length": args.length, "sequences": args.sequences, "micro_batch": args.micro,
        "processes": ctx.world_size, "steps": len(seconds), "seconds_median": statistics.median(seconds), "seconds_least": min(seconds), "tokens_per_second": speed,
        "flops_per_token": flops, "peak_tflops": peak, "mfu": mfu, "goal_mfu": goal, "goal_met": None if goal is None or mfu is None else mfu >= goal,
        "peak_memory_gib": memory / 2**30, "memory_counted_by": "process" if name is None else "allocator", "device": name or "cpu", **found,
    }  # fmt: skip


# ---------------------------------------------------------------- all of them


def refusal(contestant: str, args: argparse.Namespace) -> str:
    """Why a contestant can not run here; empty when it can."""
    if contestant in ("ours_fp8", "stock_te") and importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if contestant in ("ours_fp8", "stock_te") and args.cpu:
        return "Transformer Engine's layers need a GPU"
    if contestant == "ours_fp8" and torch.cuda.get_device_capability() < (8, 9):
        return f"FP8 needs compute capability 8.9, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return ""


def environment(number: int) -> dict[str, str]:
    """Of contestant `number`'s process: under torchrun its processes meet at a port of their own."""
    found = dict(os.environ)
    if "RANK" in found:
        found["MASTER_PORT"] = str(int(found["MASTER_PORT"]) + 1 + number)
        found.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return found


def contest(args: argparse.Namespace, model: str, contestant: str, number: int) -> dict[str, Any]:
    """A row of one contestant, in as small micro-batches as it needs."""
    micro = args.micro or MICRO.get(model, 2)
    options = ["--model", model, "--contestant", contestant, "--precision", args.precision, "--steps", args.steps, "--warm-up", args.warm_up, "--length", args.length]
    options += ["--sequences", args.sequences or (4 if args.cpu else 64)] + ["--cpu"] * args.cpu + ["--no-compile"] * args.no_compile
    options += ["--peak-tflops", args.peak_tflops] if args.peak_tflops else []
    while True:
        command = [sys.executable, __file__, *map(str, options), "--micro", str(micro)]
        done = subprocess.run(command, env=environment(number), capture_output=True, text=True)
        if done.returncode == OUT_OF_MEMORY and micro > 1 and "RANK" not in os.environ:
            micro //= 2
            continue
        rows = [json.loads(line[len(ROW) :]) for line in done.stdout.splitlines() if line.startswith(ROW)]
        if done.returncode == 0 and rows:
            return rows[0]
        why = "out of memory" if done.returncode == OUT_OF_MEMORY else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"model": model, "contestant": contestant, "micro_batch": micro, "error": why[:500], "log": done.stderr[-3000:]}


def show(row: dict[str, Any]) -> str:
    """A line for people."""
    head = f"{row['model']:18} {row['contestant']:13}"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    mfu = "MFU not defined on a CPU" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f} %" + (f" (goal {100 * row['goal_mfu']:.0f} %)" if row["goal_mfu"] else "")
    return (
        f"{head} {row['tokens_per_second']:12,.0f} tokens/s  {row['seconds_median']:.3f} s a step  {mfu}  {row['peak_memory_gib']:.1f} GiB ({row['memory_counted_by']})  "
        f"micro-batch {row['micro_batch']}"
    )


def origin() -> dict[str, Any]:
    """Where the figures came from: machine, driver, versions."""
    from megatron_r1.parallel.cluster_check import nvidia_smi
    from megatron_r1.utils import machine

    versions = machine.versions()
    for name in ("transformer-engine", "apex", "flash-attn", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus, _ = nvidia_smi()
    driver = sorted({gpu["driver_version"] for gpu in gpus})
    return {"driver": driver, "cuda": torch.version.cuda, "machine": machine.describe(), "versions": versions}


def main() -> int:
    """Status 2 without a GPU, 1 when a contestant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a preset (may be repeated); default: the three published sizes")
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="this contestant (may be repeated); default: all that can run")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--micro", type=int, help="sequences of a micro-batch to begin with")
    parser.add_argument("--sequences", type=int, help="sequences of a step over all processes (default 64; on a CPU 4)")
    parser.add_argument("--steps", type=int, default=20, help="counted steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that is not in utils/devices.py")
    parser.add_argument("--cpu", action="store_true", help="on a CPU: to see that the script runs, not how fast")
    parser.add_argument("--no-compile", action="store_true", help="Hugging Face without torch.compile")
    parser.add_argument("--no-store", action="store_true", help="only print")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        print(f"no GPU: torch {torch.__version__} ({built}) finds none. `--model nano --cpu` runs the same code on a CPU, without MFU", file=sys.stderr)
        return 2
    main_rank = os.environ.get("RANK", "0") == "0"
    if args.contestant:
        (args.model,) = args.model
        try:
            row = one(args)
        except torch.cuda.OutOfMemoryError:
            return OUT_OF_MEMORY
        if main_rank:
            print(ROW + json.dumps(row), flush=True)
        return 0
    failed, number = False, 0
    about = origin() if main_rank else {}
    command = shlex.join(["python", "benchmarks/bench_training.py", *sys.argv[1:]])
    for model in args.model or list(reversed(GOALS)):
        for contestant in args.only or CONTESTANTS:
            why = refusal(contestant, args)
            if why:
                if main_rank:
                    print(f"{model:18} {contestant:13} left out: {why}", flush=True)
                continue
            row = contest(args, model, contestant, number) if main_rank or "RANK" in os.environ else {}
            number += 1
            if not main_rank:
                continue
            failed |= "error" in row
            print(show(row), flush=True)
            log = row.pop("log", "")
            if log:
                print(log, file=sys.stderr)
            if not args.no_store:
                with open(RESULTS, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"date": date.today().isoformat(), "command": command, **row, **about}) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
