"""Our engines beside bergson and kronfluence: the same model, the same documents, the same summed probe.

    python -m venv peers && peers/bin/pip install bergson kronfluence transformers
    python benchmarks/influence_peers.py --peers peers/bin/python

The peers have an environment of their own (what they need does not fit ours) and get the model as a Hugging Face folder; each runs
in a process of its own, with one thread in fp32. They score linear layers only (bergson with the output head, kronfluence without), so
their agreement is given with the whole gradient and with that of the linear layers. A ratio is CPU seconds over those of a plain forward and backward pass of the scored documents in
the same process, measured before and after. Exact scores: every document's gradient in float64, by transformers. Appends a dated row to
benchmarks/results/influence_peers.jsonl.

Legend: N documents to score, M probe documents.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from influence_engines import MODEL, TOKENS, documents, trained  # noqa: E402
from peers.worker import body_linears, losses, measured  # noqa: E402

from megatron_r1.influence.finite_difference import FiniteDifference  # noqa: E402
from megatron_r1.influence.ghost import Ghost  # noqa: E402
from megatron_r1.influence.probe_gradient import gradient  # noqa: E402
from megatron_r1.influence.rows import batches  # noqa: E402
from megatron_r1.model.forward import token_losses  # noqa: E402
from megatron_r1.model.hf_map import hf_config, to_hf  # noqa: E402
from megatron_r1.parallel.config import LayoutConfig  # noqa: E402
from megatron_r1.parallel.context import initialize  # noqa: E402
from megatron_r1.utils import io, machine  # noqa: E402

RESULTS = HERE / "results" / "influence_peers.jsonl"
BATCH = 8
PEERS = ("bergson", "kronfluence")


def prepare(folder: Path, n: int, m: int) -> None:
    """Model and documents on disk."""
    from safetensors.torch import save_file

    ctx = initialize(LayoutConfig(device="cpu"), 0)
    model = trained(ctx)
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in to_hf(model.state_dict(), MODEL).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    io.atomic_write_json(folder / "config.json", hf_config(MODEL))
    for name, seed, count in (("train", 1, n), ("probe", 2, m)):
        np.save(folder / f"{name}.npy", np.stack([row.tokens for row in documents(seed, count)]))


def exact(folder: Path) -> dict[str, np.ndarray]:
    """Scores [N] from float64 gradients: over all parameters, and over the linear layers without the head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    names, leaves = zip(*model.named_parameters())
    body = {f"{name}.weight" for name in body_linears(model)}
    train, probe = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("train", "probe"))

    def one(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(losses(model, tokens[None]).sum(), leaves)

    total = [torch.zeros_like(leaf) for leaf in leaves]
    for tokens in probe:
        for part, own in zip(total, one(tokens)):
            part.add_(own)
    scores = []
    for tokens in train:
        products = [float((own * part).sum()) for own, part in zip(one(tokens), total)]
        scores.append((sum(products), sum(p for name, p in zip(names, products) if name in body)))
    whole, linears = np.array(scores).T
    return {"all parameters": whole, "linear layers without the head": linears}


def ours(engine: str, folder: Path) -> dict[str, Any]:
    """One of our engines in this process, as the worker does it for the peers."""
    torch.set_num_threads(1)
    ctx = initialize(LayoutConfig(device="cpu"), 0)
    model = trained(ctx)
    parameters = dict(model.named_parameters())
    train, probe = (documents(seed, len(np.load(folder / f"{name}.npy"))) for name, seed in (("train", 1), ("probe", 2)))
    size = BATCH * TOKENS
    padded = batches(train, size, ctx.device)

    def per_token(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_losses(model, batch)

    def plain() -> float:
        began = time.process_time()
        for batch in padded:
            (per_token(batch.tensors) * batch.tensors["loss_mask"]).sum().backward()
            model.zero_grad(set_to_none=True)
        return time.process_time() - began

    def run() -> tuple[np.ndarray, float]:
        began = time.process_time()
        direction, _ = gradient(per_token, parameters, probe, [1.0] * len(probe), size, ctx.device)
        seconds = time.process_time() - began
        if engine == "ghost":
            scorer = Ghost([model], ctx)
            return scorer.scores([direction], scorer.pack(train, size))[:, 0], seconds
        return FiniteDifference(per_token, parameters, 3e-4).scores(direction, padded), seconds

    plain()
    scores, figures = measured(run, plain)
    np.save(folder / f"{engine}.npy", scores)
    return {"version": "", **figures}


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a contestant; its last line is its result. Raises SystemExit with its words."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def agreement(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Relative L2 error and rank correlation (no ties)."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (scores, right)]
    return {"error": float(np.linalg.norm(scores - right) / np.linalg.norm(right)), "spearman": float(np.corrcoef(*ranks)[0, 1])}


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="Python of an environment with bergson and kronfluence; without it only our engines run and nothing is stored")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--probe", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3, help="runs of every contestant; the median is shown")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.ours[0], Path(options.ours[1]))))
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.documents, options.probe)
        right = exact(folder)
        commands = {engine: [sys.executable, __file__, "--ours", engine, name] for engine in ("ghost", "differences")}
        if options.peers:
            worker = str(HERE / "peers" / "worker.py")
            commands |= {peer: [str(options.peers), worker, "--method", peer, "--folder", name, "--batch", str(BATCH)] for peer in PEERS}
        found: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in commands}
        for _ in range(options.repeat):  # in turn: a slow moment hits all
            for contestant, command in commands.items():
                found[contestant].append(measure(command, environment))
        rows = [row(contestant, runs, np.load(folder / f"{contestant}.npy"), right, options) for contestant, runs in found.items()]
    print(f"{'':<24}{'scoring':>9}{'whole call':>11}{'docs/s':>8}{'peak MB':>9}   all parameters: error, Spearman   linear layers: error, Spearman")
    for each in rows:
        a, b = (each["agreement"][kind] for kind in right)
        scoring = f"{each['scoring']:.2f}" if each["scoring"] else "-"
        print(
            f"{each['contestant']:<24}{scoring:>9}{each['whole']:>11.2f}{each['documents_per_second']:>8.1f}{each['peak_mb']:>9.0f}   "
            f"{a['error']:>16.1e}, {a['spearman']:.4f}   {b['error']:>17.1e}, {b['spearman']:.4f}"
        )
    print("scoring, whole call: times a plain forward and backward pass of the N documents, and of the N + M documents; docs/s of one core's CPU time")
    if options.peers and not options.no_store:
        record = {
            "date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv]), "threads": 1, "repeat": options.repeat,
            "model": json.loads(MODEL.model_dump_json()), "documents": options.documents, "probe": options.probe, "tokens": TOKENS, "batch": BATCH,
            "machine": machine.describe(), "versions": machine.versions(),
        }  # fmt: skip
        io.append_jsonl(RESULTS, record | {"rows": rows})


def row(contestant: str, runs: list[dict[str, Any]], scores: np.ndarray, right: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over runs. Scoring alone is not known of a peer that does not tell the probe's part."""
    n, m = options.documents, options.probe
    scoring = [(run["total"] - run["probe"]) / np.mean(run["floors"]) for run in runs if run["probe"]]
    return {
        "contestant": f"{contestant} {runs[0]['version']}".strip(), "torch": runs[0]["torch"],
        "scoring": round(float(np.median(scoring)), 3) if scoring else None,
        "whole": round(float(np.median([run["total"] / (np.mean(run["floors"]) * (n + m) / n) for run in runs])), 3),
        "documents_per_second": round(n / float(np.median([run["total"] for run in runs])), 2),
        "floor_seconds": round(float(np.median([np.mean(run["floors"]) for run in runs])), 3),
        "peak_mb": round(float(np.median([run["peak_mb"] for run in runs])), 1),
        "agreement": {kind: agreement(scores, values) for kind, values in right.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
