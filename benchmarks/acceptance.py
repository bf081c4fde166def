"""Acceptance measurements of influence and mixture on worlds whose right answer is known (docs/influence.md, Acceptance).

    python benchmarks/acceptance.py step known noise loop null

One nano model each, languages are Markov chains, all stages are the real ones:

    step    A6: does a real step of the trainer's optimizer on a random batch do to the probe loss what the batch's scores foretell?
    known   A7: sources that are known to help much, some, little and not at all are ranked so, and noise is not shown to help;
            A8: documents of the probe's own language with shuffled tokens are told from the others by their scores
    loop    A9: trained on for the same tokens, the re-weighted mixture beats the uniform one, and chosen documents as many at random
    noise   A7 again: where noise is shown to help, do real steps on nothing but noise lower the probe loss?
    null    A13: where nothing helps by construction (a probe drawn from the model itself), or all sources are alike (their documents are
            dealt out at random), how often is something found?

Prints measured value, threshold and verdict, and appends one dated row a section to benchmarks/results/acceptance.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "tests" / name) for name in ("influence", "probe", "distributed", "mixture"))]
import known_answers as known  # noqa: E402
import preconditioners  # noqa: E402
import small_world  # noqa: E402
from tiny_shards import build_shards, documents  # noqa: E402

from megatron_r1.artifacts.base import Artifact, open_workspace  # noqa: E402
from megatron_r1.artifacts.checkpoint import CheckpointSet  # noqa: E402
from megatron_r1.artifacts.influence import InfluenceTable  # noqa: E402
from megatron_r1.artifacts.probe import load_probe  # noqa: E402
from megatron_r1.data.shards import ShardSet  # noqa: E402
from megatron_r1.influence.config import ValidityConfig  # noqa: E402
from megatron_r1.influence.rows import Row, collate  # noqa: E402
from megatron_r1.influence.validity import draw_batches  # noqa: E402
from megatron_r1.model.build import build_model  # noqa: E402
from megatron_r1.model.config import PRESETS  # noqa: E402
from megatron_r1.model.forward import token_losses  # noqa: E402
from megatron_r1.model.generate import generate  # noqa: E402
from megatron_r1.model.load import load_model  # noqa: E402
from megatron_r1.parallel import checkpoint as store  # noqa: E402
from megatron_r1.parallel.config import LayoutConfig  # noqa: E402
from megatron_r1.parallel.context import initialize  # noqa: E402
from megatron_r1.parallel.ddp import wrap  # noqa: E402
from megatron_r1.parallel.optimizer import build_optimizer, set_lr, step  # noqa: E402
from megatron_r1.parallel.schedule import forward_backward  # noqa: E402
from megatron_r1.train.config import TrainConfig  # noqa: E402
from megatron_r1.train.run import run as run_train  # noqa: E402
from megatron_r1.utils import io, machine  # noqa: E402
from megatron_r1.utils.logging import get_logger  # noqa: E402
from megatron_r1.utils.statistics import spearman, t_quantile  # noqa: E402

RESULTS = HERE / "results" / "acceptance.jsonl"
STEPS = ((1e-4, 1.0), (1e-5, 0.0))
"""Learning rate and clipping norm of the whole steps: as trained (small), and nearer to what a derivative can foretell."""


@dataclass(frozen=True)
class Line:
    """One thing measured. `passed`: whether `value` keeps to `threshold`; `detail`: what it was computed from."""

    test: str
    what: str
    value: float
    threshold: str
    passed: bool
    detail: dict[str, Any]


# ------------------------------------------------------------------ A6: one real step


def acceptance_step(seeds: int) -> Iterator[Line]:
    """Rank correlations over 24 batches, two capabilities and `seeds` draws of documents and batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = small_world.small_shards(folder)
        world = {"shards": shards, "probe": small_world.small_probe(folder, shards), "checkpoint": small_world.small_checkpoint(folder, shards)}
        for pool, least in (("all sources", 0.95), ("others only", 0.85)):
            sources = preconditioners.POOLS[pool]
            found = [s for seed in range(seeds) for s in preconditioners.spearmans(world, folder, ("adam", "all"), "trainer", sources, seed)]
            yield Line("A6", f"receipt (v held fixed, no momentum), {pool}", min(found), f">= {least} (lowest)", min(found) >= least, {"each": found})
            for lr, clip in STEPS:
                found = [s for seed in range(seeds) for s in full_steps(world, folder, sources, seed, lr, clip)]
                what = f"a whole step of the trainer's AdamW (momentum, new v, decay, {'clipping' if clip else 'no clipping'}; lr {lr:g}), {pool}"
                yield Line("A6", what, min(found), f">= {least} (lowest)", min(found) >= least, {"each": found})


def full_steps(world: dict[str, Artifact], folder: Path, sources: list[str] | None, seed: int, lr: float, clip: float) -> list[float]:
    """Spearman of foretold and real drop of each capability's probe loss when the trainer's optimizer, restored with its moments,
    takes one step on a batch."""
    table = InfluenceTable.open(known.measure(folder, world, f"full-{seed}-{sources is None}-{lr}-{clip}", sources=sources, seed=seed))
    config = ValidityConfig(batches=preconditioners.BATCHES)
    scored = {source: table.scores(source) for source in table.sources}
    opened, probe = ShardSet.open(world["shards"]), load_probe(world["probe"])
    layout = LayoutConfig()
    ctx = initialize(layout, 0)
    chunks = wrap(build_model(PRESETS["nano"], ctx, seed=0), layout, ctx)
    optimizer = build_optimizer(chunks, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=clip, layout=layout, precision="fp32")
    final = CheckpointSet.open(world["checkpoint"]).final
    looks = {name: collate([Row(i, d.tokens(opened)) for i, d in enumerate(found.documents)], ctx.device) for name, found in probe.capabilities.items()}

    @torch.no_grad()
    def losses() -> np.ndarray:
        each = [(token_losses(chunks, look).double() * look["loss_mask"]).sum(dim=1) / look["loss_mask"].sum(dim=1) for look in looks.values()]
        return np.array([float(one.mean()) for one in each])

    def forward_step(batches: Iterator[dict], chunk: torch.nn.Module):
        batch = next(batches)
        return token_losses(chunk, batch), lambda out: ((out * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int(), {})

    foretold, real = [], []
    for drawn in draw_batches(config, scored, seed):  # type: ignore[arg-type]
        store.load(final.path, chunks, optimizer, ctx)
        before = losses()
        rows = []
        for source, place in drawn:
            s = scored[source]
            start = int(s.start[place])
            rows.append(Row(0, np.asarray(opened.split(source, "train").tokens(int(s.index[place])))[start : start + int(s.n_tokens[place]) + 1]))
        batch = collate(rows, ctx.device)
        forward_backward(ctx, chunks, forward_step, iter([batch]), 1, batch["tokens"].shape[1], len(rows))
        set_lr(optimizer, lr)
        step(optimizer)
        real.append(before - losses())
        foretold.append(sum(scored[source].raw[place, :, 0] for source, place in drawn) / sum(row.targets for row in rows))
    pairs = zip(np.array(foretold).T, np.array(real).T, strict=True)
    return [value for a, b in pairs if (value := spearman(a, b)) is not None]


# ------------------------------------------------------------------ A7 and A8: known sources, corrupted documents


def acceptance_known(seeds: int) -> Iterator[Line]:
    """A world of its own for every seed: other languages, other documents, another training."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            world, corrupt = known.mixed_world(folder, seed)
            influence = known.measure(folder, world, documents=120, checkpoints=3, probe_folds=4, fold_documents=40, sources=list(known.ORDER))
            _, mixture = known.mix(folder, world, influence, sources=list(known.ORDER))
            table = InfluenceTable.open(known.measure(folder, world, "inside", documents=200, checkpoints=3, sources=["inside"]))
            scores = table.scores("inside")
            rates, bad = scores.raw[:, 0] / scores.n_tokens[:, None], corrupt[scores.index]  # [n, T]
            joint = table.benefits("inside")[:, 0] / scores.n_tokens
        aucs = {f"checkpoint {point.step} alone": known.auc(rates[~bad, t], rates[bad, t]) for t, point in enumerate(table.record.checkpoints)}
        aucs = {"three checkpoints, Eq. 5": known.auc(joint[~bad], joint[bad]), **aucs}
        loss = {point.step: table.record.directions[f"target@{point.step}"].probe_loss for point in table.record.checkpoints}
        rows.append({
            "seed": seed, "weights": {s: mixture.weights[s] for s in known.ORDER}, "rho": {s: mixture.rho[s] for s in known.ORDER}, "noise": list(mixture.rho_intervals["noise"]),
            "auc": aucs, "probe_loss": loss, "above_0": {"clean": float((joint[~bad] > 0).mean()), "corrupt": float((joint[bad] > 0).mean())},
        })  # fmt: skip
        said = ", ".join(f"{s} {w:.3f}" for s, w in rows[-1]["weights"].items())
        print(f"  seed {seed}: {said}; noise {[round(edge, 3) for edge in rows[-1]['noise']]}; AUC {[round(v, 3) for v in aucs.values()]}", flush=True)
    twin, useful, noise = known.ORDER[0], known.ORDER[1:-1], known.ORDER[-1]
    apart = [r["weights"][twin] > max(r["weights"][u] for u in useful) and min(r["weights"][u] for u in useful) > r["weights"][noise] for r in rows]
    strict = [all(a > b for a, b in pairwise(r["weights"][s] for s in known.ORDER)) for r in rows]
    harmless = [r["noise"][0] <= 0 for r in rows]
    yield Line("A7", "twin above every useful source, every useful source above noise", float(np.mean(apart)), "all seeds", all(apart), {"seeds": rows})
    yield Line("A7", "all five in order (useful by their share of the probe's language)", float(np.mean(strict)), "all seeds", all(strict), {"each": strict})
    yield Line("A7", "noise is not shown to help (lower end of its interval at or below 0)", float(np.mean(harmless)), "all seeds", all(harmless), {})
    for what in rows[0]["auc"]:
        each = [r["auc"][what] for r in rows]
        yield Line("A8", f"AUC of clean against shuffled documents, lowest of the seeds: {what}", min(each), ">= 0.85", min(each) >= 0.85, {"each": each})


def acceptance_noise(seeds: int) -> Iterator[Line]:
    """The worlds of `known`, last checkpoint: the interval of the benefit of noise, and the receipt's steps on batches of noise alone."""
    agree, rows = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            world, _ = known.mixed_world(folder, seed)
            record = InfluenceTable.open(known.measure(folder, world, documents=120, probe_folds=4, fold_documents=40, sources=["noise"], validity={"batches": 12})).record
        assert record.validity is not None
        drops = record.validity["capabilities"]["target"]["measured"]
        cell = record.sources["noise"]["target"]
        rows.append({"seed": seed, "interval": list(cell.interval), "steps_that_helped": float(np.mean(np.array(drops) > 0)), "drops": drops})
        agree.append((cell.mean > 0) == (np.mean(drops) > 0))
        print(f"  seed {seed}: interval {[round(edge, 3) for edge in cell.interval]}, {100 * rows[-1]['steps_that_helped']:.0f} % of 12 steps on noise lowered the probe loss", flush=True)
    yield Line("A7", "sign of the benefit of noise is that of the mean drop after real steps on noise alone", float(np.mean(agree)), "all seeds", all(agree), {"seeds": rows})


# ------------------------------------------------------------------ A9: closed loop


def acceptance_loop(seeds: int) -> Iterator[Line]:
    """From one start on the uniform mixture, four trainings of equal tokens with the train stage."""
    gains: dict[str, list[float]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            last = loop(Path(name), seed)
        print(f"  seed {seed}: " + ", ".join(f"{arm} {value['target']:.4f}" for arm, value in last.items()), flush=True)
        for better, worse in (("influence", "uniform"), ("kept", "uniform"), ("kept", "random"), ("kept", "influence")):
            for stream in ("target", "held out"):
                gains.setdefault(f"{better} over {worse}, {'probe' if stream == 'target' else stream} loss", []).append(last[worse][stream] - last[better][stream])
    for what, each in gains.items():
        mean, half = float(np.mean(each)), float(t_quantile(0.975, len(each) - 1) * np.std(each, ddof=1) / len(each) ** 0.5)
        wins = sum(gain > 0 for gain in each)
        passed = mean - half > 0 and wins >= 0.8 * len(each)
        yield Line("A9", f"gain in nats per token, {what}", mean, "interval above 0, 4 of 5 seeds won", passed, {"low": mean - half, "high": mean + half, "wins": wins, "each": each})


def loop(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """arm -> last probe loss and loss on other documents of the probe's language, nats per token."""
    world, _ = known.mixed_world(folder, seed, steps=150, count=500)
    pool = [s for s in known.pool(world) if s != "twin"]  # the probe's language is found in `inside`, a fifth of it shuffled, and in parts of others
    influence = known.measure(folder, world, documents=300, score_unit="document", sources=pool)
    rules = {
        "uniform": {"method": "uniform"},
        "influence": {},
        "kept": {"filter": {"rule": "paper", "unscored": "drop"}},
        "random": {"filter": {"rule": "paper", "unscored": "drop", "control": True}},
    }
    last = {}
    for arm, changes in rules.items():
        mixture, _ = known.mix(folder, world, influence, arm, sources=pool, **changes)
        inputs = {"shards": world["shards"], "mixture": mixture, "checkpoint": world["checkpoint"], "probe": world["probe"]}
        config = TrainConfig.model_validate({
            "seed": seed, "inputs": {"shards": "corpus", "mixture": arm, "checkpoint": "pretrain", "probe": "probe"}, "budget": "64 steps", "global_batch": "1024 tokens",
            "seq_length": "64 tokens", "micro_batch": 16, "lr": {"peak": 1e-3, "warmup": "4 steps", "final_ratio": 0.1},
            "validation": {"every": "64 steps", "tokens": "3072 tokens"}, "log": {"every": "32 steps", "tensorboard": False},
        })  # fmt: skip
        trained = run_train(config, inputs, open_workspace(folder, f"on-{arm}", "checkpoint", config, inputs))
        assert trained is not None
        validation = [r for r in io.read_jsonl(trained.file("metrics.jsonl")) if r.get("validation")][-1]["validation"]
        last[arm] = {"target": validation["probe/target"], "held out": validation["test/web"]}
    return last


# ------------------------------------------------------------------ A13: nothing to find


def acceptance_null(draws: int) -> Iterator[Line]:
    """One trained model; every draw has other documents and another probe.

    own: the probe is drawn from the model itself, token by token. The expected gradient of its loss is then exactly 0 (the score
    function has mean 0), and so is every source's benefit in the population.
    target: the probe is in the language that all three sources are dealt from, so the population's weights are a third each.
    """
    sources, found = ("one", "two", "three"), {"own": [], "joint": [], "helping": [], "weights": []}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        languages = {f"language_{k}": documents(known.language(k, 0), 900 + k, 300) for k in (1, 2, 3)}
        world = known.world(base, languages, documents(known.language(1, 0), 990, 180), 240)
        ctx = initialize(LayoutConfig(), 0)
        model = load_model(CheckpointSet.open(world["checkpoint"]).final, ctx)
        for draw in range(draws):
            with tempfile.TemporaryDirectory(dir=base) as inner:
                one = null_draw(Path(inner), world["checkpoint"], model, sources, draw)
            found["own"] += one["own"]
            found["joint"].append(any(one["own"]))
            found["helping"].append(one["helping"])
            found["weights"] += one["weights"]
            if draw % 10 == 9:
                print(f"  {draw + 1} draws: " + ", ".join(f"{key} {np.mean(value):.3f}" for key, value in found.items()), flush=True)
    most = 0.05 + 1.645 * (0.05 * 0.95 / draws) ** 0.5  # a rate of 5 % stays below it in 95 of 100 measurements of so many draws
    said = f"<= 0.05, with its error <= {most:.3f}"
    rates = {key: float(np.mean(value)) for key, value in found.items()}
    yield Line("A13", "benefit 0 by construction: intervals of benefit that exclude 0 (over sources and draws)", rates["own"], said, rates["own"] <= most, {"draws": draws})
    yield Line("A13", "the same: draws in which the stop rule says that a source is shown to help (Holm)", rates["helping"], said, rates["helping"] <= most, {"draws": draws})
    yield Line("A13", "exchangeable sources: intervals of the weight that exclude 1/3", rates["weights"], said, rates["weights"] <= most, {"draws": draws, "any_source_own": rates["joint"]})


def null_draw(folder: Path, checkpoint: Artifact, model: Any, sources: tuple[str, ...], draw: int) -> dict[str, Any]:
    """Which intervals exclude what is true."""
    rng = np.random.default_rng(10_000 + draw)
    dealt = documents(known.language(1, 0), 20_000 + draw, 40 * len(sources))
    starts = [[int(token)] for token in rng.integers(64, 256, 32)]
    own = [np.array([*start, *rest]) for start, rest in zip(starts, generate(model, starts, small_world.TOKENS, greedy=False, seed=draw), strict=True)]
    splits: dict[str, Any] = {source: {"train": dealt[k :: len(sources)]} for k, source in enumerate(sources)}
    probes = {"own": own, "target": documents(known.language(1, 0), 30_000 + draw, 40, small_world.TOKENS + 1, small_world.TOKENS + 2)}
    shards = build_shards(folder, {**splits, **{name: {"probe": found} for name, found in probes.items()}})
    world = {"shards": shards, "probe": small_world.small_probe(folder, shards, tuple(probes), 32), "checkpoint": checkpoint}

    def mixture(capability: str, **changes: object):
        influence = known.measure(folder, world, f"of-{capability}", capabilities=[capability], probe_folds=8, seed=draw)
        return known.mix(folder, world, influence, f"mix-{capability}", **changes)[1]

    null, equal = mixture("own", method="natural"), mixture("target")
    assert null.decision is not None
    assert equal.intervals is not None
    return {
        "own": [low > 0 or high < 0 for low, high in null.rho_intervals.values()],
        "helping": bool(null.decision.statistical.helping),
        "weights": [not low <= 1 / len(sources) <= high for low, high in equal.intervals.values()],
    }


SECTIONS: dict[str, tuple[Callable[[int], Iterator[Line]], int]] = {
    "step": (acceptance_step, 3),
    "known": (acceptance_known, 10),
    "noise": (acceptance_noise, 5),
    "loop": (acceptance_loop, 5),
    "null": (acceptance_null, 100),
}


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--repeat", type=int, default=None, help="seeds or draws (by default those of the section)")
    parser.add_argument("--no-store", action="store_true", help="print only")
    options = parser.parse_args()
    get_logger("acceptance").parent.setLevel("ERROR")  # type: ignore[union-attr]
    for name in options.sections:
        section, usual = SECTIONS[name]
        print(f"{name}:", flush=True)
        lines = []
        for line in section(options.repeat or usual):
            lines.append(line)
            print(f"{line.test:<4} {'passed' if line.passed else 'MISSED':<7} {line.value:.4g} ({line.threshold})  {line.what}", flush=True)
        if not options.no_store:
            record = {"date": date.today().isoformat(), "command": f"python benchmarks/acceptance.py {name}" + (f" --repeat {options.repeat}" if options.repeat else ""), "section": name}
            io.append_jsonl(RESULTS, {**record, "repeat": options.repeat or usual, "machine": machine.describe(), "versions": machine.versions(), "lines": [asdict(line) for line in lines]})


if __name__ == "__main__":
    main()
