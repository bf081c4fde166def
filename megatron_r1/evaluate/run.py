"""The evaluate stage: tasks one after the other, each stored when done, so that an interrupted evaluation goes on.

    evaluation.json          every result, dropped tasks, comparison with the baseline
    measurements/<task>.json the task's results with their items (for paired comparisons)
    samples/<task>.jsonl     what was asked, what the model answered, what was right
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.chat import stop_ids
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.evaluate.compare import compare
from megatron_r1.evaluate.config import EvaluateConfig, enabled
from megatron_r1.evaluate.results import Measurement
from megatron_r1.evaluate.subject import CheckpointSubject
from megatron_r1.evaluate.task import Bench, TaskDropped
from megatron_r1.evaluate.tasks import build
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import generator

log = get_logger("evaluate")
EVALUATION_FILE = "evaluation.json"


def run(config: EvaluateConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact | None:
    """Evaluate the final checkpoint of `inputs["checkpoint"]`.

    One process works. Under torchrun every rank must call this, because loading a checkpoint is collective; ranks other
    than 0 return None after that.
    """
    checkpoint: Artifact = inputs["checkpoint"]
    baseline: Artifact | None = inputs.get("baseline")
    if baseline is not None and baseline.kind != "evaluation":
        raise ArtifactError(
            expected="an evaluation artifact as baseline", found=f"{baseline.path.name} is of kind {baseline.kind}", fix="name an evaluate step as baseline"
        )
    model = CheckpointSet.open(checkpoint)
    ctx = initialize(LayoutConfig(), config.seed or 0)
    pending = ctx.broadcast_object([name for name in enabled(config) if not _stored(work, name).exists()])
    bench = _bench(config, model, inputs.get("shards"), ctx) if pending else None
    if not ctx.is_main:
        return None
    for name in enabled(config):
        if name in pending:
            _measure(config, bench, work, name)
        else:
            log.info("%s: stored by an earlier attempt, kept", name)
    measured, dropped = _collect(config, work)
    if not measured:
        raise ArtifactError(
            expected="at least one task that runs", found="; ".join(f"{d['task']}: {d['reason']}" for d in dropped) or "no task switched on",
            fix="install what the message names, or switch other tasks on",
        )
    differences = []
    if baseline is not None:
        differences = compare(measured, _measurements_of(baseline), config.bootstrap, generator(config.seed or 0, "evaluate", "compare"))
    io.atomic_write_json(
        work.path / EVALUATION_FILE,
        {
            "checkpoint": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint, "step": model.final.step, "tokens": model.final.tokens},
            "results": [m.result.plain() for m in measured],
            "dropped": dropped,
            "baseline": None if baseline is None else {"name": baseline.name, "fingerprint": baseline.fingerprint},
            "comparison": [d.plain() for d in differences],
        },
    )
    return work.complete({"results": len(measured), "dropped": [d["task"] for d in dropped], "headline": _headline(measured)})


def _bench(config: EvaluateConfig, checkpoint: CheckpointSet, shards: Artifact | None, ctx: ParallelContext) -> Bench:
    """The model, its tokenizer and the held-out documents. Collective: every rank loads."""
    tokenizer = Tokenizer.load(checkpoint.tokenizer_folder)
    opened = None if shards is None else ShardSet.open(shards)
    if opened is not None and opened.tokenizer.sha256 != tokenizer.sha256:
        raise ArtifactError(
            expected="shards written with the model's tokenizer", found=f"tokenizer {opened.tokenizer.sha256[:12]}... there, {tokenizer.sha256[:12]}... here",
            fix="use the corpus step the model was trained on",
        )
    subject = CheckpointSubject(load_model(checkpoint.final, ctx), batch_size=config.batch_size, tokens_per_batch=config.tokens_per_batch)
    return Bench(
        subject=subject, tokenizer=tokenizer, shards=opened, seed=config.seed or 0, bootstrap=config.bootstrap,
        allow_code_execution=config.allow_code_execution, stop_ids=stop_ids(tokenizer),
    )


def _measure(config: EvaluateConfig, bench: Bench, work: Workspace, name: str) -> None:
    log.info("%s ...", name)
    try:
        outcome = build(config, name).run(bench)
    except TaskDropped as reason:
        log.warning("%s is DROPPED: %s", name, reason)
        io.atomic_write_json(_stored(work, name), {"dropped": str(reason), "measurements": []})
        return
    io.write_jsonl(_samples(work, name), outcome.samples)
    # Written last: it marks the task as done.
    io.atomic_write_json(_stored(work, name), {"dropped": None, "measurements": [m.plain() for m in outcome.measurements]})
    for m in outcome.measurements:
        r = m.result
        chance = "" if r.chance is None else f", chance {r.chance:.3g}"
        log.info("%s %s %.4g [%.4g, %.4g] n=%d%s", r.task, r.metric, r.value, r.low, r.high, r.n, chance)


def _collect(config: EvaluateConfig, work: Workspace) -> tuple[list[Measurement], list[dict[str, str]]]:
    measured, dropped = [], []
    for name in enabled(config):
        stored = io.read_json(_stored(work, name))
        measured += [Measurement.of(plain) for plain in stored["measurements"]]
        if stored["dropped"]:
            dropped.append({"task": name, "reason": stored["dropped"]})
    return measured, dropped


def _measurements_of(baseline: Artifact) -> list[Measurement]:
    files = [name for name in baseline.manifest.files if name.startswith("measurements/")]
    return [Measurement.of(plain) for name in files for plain in baseline.json(name)["measurements"]]


def _headline(measured: list[Measurement]) -> dict[str, float]:
    return {f"{m.result.task} {m.result.metric}": round(m.result.value, 4) for m in measured}


def _stored(work: Workspace, name: str) -> Any:
    return work.path / "measurements" / f"{name}.json"


def _samples(work: Workspace, name: str) -> Any:
    return work.path / "samples" / f"{name}.jsonl"
