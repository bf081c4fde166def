"""Runs in the peers' own environment: scores documents with one library, beside a plain forward and backward pass. Started by
benchmarks/influence_peers.py; it imports nothing of megatron_r1.

Legend: N documents to score, M probe documents, T tokens of one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def kilobytes(field: str) -> int:
    """Of this process, from the kernel."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def measured(run: Callable[[], tuple[np.ndarray, float]], floor: Callable[[], float]) -> tuple[np.ndarray, dict[str, Any]]:
    """What `run` returns first (its scores), and CPU seconds of the floor before and after, of the whole run and of its probe gradient
    (its second result), and peak memory over what was there before it."""
    floors = [floor()]
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    scores, probe_seconds = run()
    total = time.process_time() - began
    peak = (kilobytes("VmHWM") - before) / 1024
    floors.append(floor())
    return scores, {"torch": torch.__version__, "floors": floors, "total": total, "probe": probe_seconds, "peak_mb": peak}


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Summed token loss of each document [b], tokens [b, T]."""
    logits = model(tokens).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).sum(1)


def plain(model: nn.Module, tokens: Tensor, batch: int) -> None:
    """A training step's forward and backward over all documents."""
    for piece in tokens.split(batch):
        losses(model, piece).sum().backward()
        model.zero_grad(set_to_none=True)


def body_linears(model: nn.Module) -> list[str]:
    """Linear layers without the output head: what the peers score."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]


def bergson(model: nn.Module, train: Tensor, probe: Tensor, batch: int) -> Callable[[], tuple[np.ndarray, float]]:
    """Exact gradients (no projection), the probe's summed first."""
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
    from bergson.collector.collector import CollectorComputer
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset

    folder = tempfile.mkdtemp()
    config = IndexConfig(run_path=folder, projection_dim=0, loss_reduction="sum")
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    sets = [Dataset.from_dict({"input_ids": t.tolist()}) for t in (train, probe)]

    def pieces(count: int) -> list[list[int]]:
        return [list(range(i, min(i + batch, count))) for i in range(0, count, batch)]

    def run() -> tuple[np.ndarray, float]:
        began = time.process_time()
        query = InMemoryCollector(
            model=model.base_model, data=sets[1], cfg=config, processor=GradientProcessor(), preprocess_cfg=PreprocessConfig(aggregation="sum")
        )  # fmt: skip
        CollectorComputer(model, sets[1], collector=query, batches=pieces(len(probe)), cfg=config).run_with_collector_hooks()
        directions = dict(query.gradients)
        seconds = time.process_time() - began
        writer = InMemorySequenceScoreWriter(len(train), 1)
        scorer = Scorer(directions, list(directions), writer, torch.device("cpu"), torch.float32)
        collector = InMemoryCollector(model=model.base_model, data=sets[0], cfg=config, processor=GradientProcessor(), scorer=scorer)
        CollectorComputer(model, sets[0], collector=collector, batches=pieces(len(train)), cfg=config).run_with_collector_hooks()
        return writer.scores[:, 0].double().numpy(), seconds

    return run


def kronfluence(model: nn.Module, train: Tensor, probe: Tensor, batch: int) -> Callable[[], tuple[np.ndarray, float]]:
    """Identity in place of a Hessian, the probe's gradients summed."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return losses(model, batch[0]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return losses(model, batch[0]).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return body_linears(model)

    task = Summed()
    prepared = prepare_model(model, task)
    analyzer = Analyzer("peers", prepared, task, cpu=True, output_dir=tempfile.mkdtemp(), disable_tqdm=True)
    sets = [TensorDataset(t) for t in (train, probe)]
    analyzer.fit_all_factors("none", sets[0], factor_args=FactorArguments(strategy="identity"))

    def run() -> tuple[np.ndarray, float]:
        analyzer.compute_pairwise_scores(
            "scores", "none", sets[1], sets[0], per_device_query_batch_size=batch, per_device_train_batch_size=batch,
            score_args=ScoreArguments(aggregate_query_gradients=True), overwrite_output_dir=True,
        )  # fmt: skip
        scores = analyzer.load_pairwise_scores("scores")
        return scores["all_modules"].flatten().double().numpy(), 0.0  # it does not tell the probe's part

    return run


METHODS = {"bergson": bergson, "kronfluence": kronfluence}


def main() -> None:
    """Floor, method, floor; result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, probe = (torch.from_numpy(np.load(options.folder / f"{name}.npy")) for name in ("train", "probe"))

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()

    untouched, model = load(), load()
    run = METHODS[options.method](model, train, probe, options.batch)
    plain(untouched, train[: 2 * options.batch], options.batch)  # warm-up

    def floor() -> float:
        began = time.process_time()
        plain(untouched, train, options.batch)
        return time.process_time() - began

    scores, figures = measured(run, floor)
    np.save(options.folder / f"{options.method}.npy", scores)
    json.dump({"version": metadata.version(options.method), **figures}, sys.stdout)


if __name__ == "__main__":
    main()
