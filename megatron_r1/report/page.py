"""Turns a run, its figures and verdicts into one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_r1.report import figures
from megatron_r1.report.figures import Figure
from megatron_r1.report.graph import draw_arc, gathered
from megatron_r1.report.leave_one_out import JOINT, LeaveOneOut, analyses
from megatron_r1.report.records import (
    Change,
    Evaluated,
    Influence,
    MixtureView,
    Probe,
    Reliable,
    Result,
    Run,
    Source,
    Step,
    Trained,
    origin_parts,
)
from megatron_r1.report.rounds import JOINT as ALL
from megatron_r1.report.rounds import Chain, Round, chains
from megatron_r1.report.seeds import Seeds
from megatron_r1.report.settings import comparable
from megatron_r1.report.text import count, duration, percent, plural, signed, significant, size
from megatron_r1.report.verdicts import Pair, Verdict, equal_budget_pairs, is_control

TEMPLATES = Path(__file__).parent / "templates"
OBJECTIVES = {"next_token": "next token", "distill": "distillation", "sft": "fine-tuning", "group_dro": "next token, group DRO", "grpo": "GRPO"}
RELIABLE = 0.9
DOMAIN_ORDER = ("code", "math", "maths", "knowledge", "science", "web", "chat", "noise")


@dataclass(frozen=True)
class Drawn:
    """All figures of a run by part of the page."""

    influence: Mapping[str, Figure]
    validity: Mapping[str, Figure]
    mixture: Mapping[str, Figure]
    rounds: Sequence[tuple[Chain, Figure]]
    probe_loss: Sequence[tuple[Pair, list[Figure]]]
    loss: Sequence[Figure]
    rankme: Figure | None
    evaluation: Sequence[Figure]

    def __iter__(self) -> Iterator[Figure]:
        yield from self.influence.values()
        yield from self.validity.values()
        yield from self.mixture.values()
        for _, figure in self.rounds:
            yield figure
        for _, panels in self.probe_loss:
            yield from panels
        yield from self.loss
        if self.rankme is not None:
            yield self.rankme
        yield from self.evaluation


def draw_all(run: Run, points: int) -> Drawn:
    """Every figure the run has data for."""
    noise = run.distractors
    evaluation = [figures.evaluation_dots(run.evaluated, kind) for kind in figures.EVALUATIONS]
    return Drawn(
        influence={i.step: figures.influence_map(i, source_order(run, i.cells), noise) for i in run.influences},
        validity={i.step: f for i in run.influences if (f := figures.validity_scatter(i)) is not None},
        mixture={m.step: figures.mixture_bars(m, noise) for m in run.mixtures if drawn_alone(m)},
        rounds=[(chain, figures.round_histograms(chain)) for chain in chains(run)],
        probe_loss=[(pair, figures.probe_curves(pair, points)) for pair in equal_budget_pairs(run) if pair.capabilities],
        loss=[f for t in run.trained if not in_family(run, t) and (f := figures.loss_curve(t, points)) is not None],
        rankme=figures.rankme_curves(run.trained, points),
        evaluation=[f for f in evaluation if f is not None],
    )


def drawn_alone(mixture: MixtureView) -> bool:
    """Whether a mixture has a figure of its own: not the plainest ones, nor members of families of dozens."""
    if mixture.method in ("random", "without"):
        return False
    return mixture.method not in ("uniform", "natural") or bool(mixture.rho) or mixture.kept is not None


def in_family(run: Run, trained: Trained) -> bool:
    """Whether a training is one of many that are shown together: a proxy, or one with a source left out."""
    mixture = run.mixture(trained.mixture)
    return mixture is not None and mixture.method in ("random", "without")


def source_order(run: Run, names: Mapping[str, Any]) -> list[str]:
    """Sources grouped by domain, distractors last."""
    sources = run.sources

    def key(name: str) -> tuple:
        source = sources.get(name)
        domain = source.domain if source else ""
        place = DOMAIN_ORDER.index(domain) if domain in DOMAIN_ORDER else len(DOMAIN_ORDER)
        return (bool(source and source.distractor), place, domain, name)

    return sorted(names, key=key)


def render(run: Run, verdicts: Sequence[Verdict], drawn: Drawn, title: str, own: Step, over_seeds: Seeds | None = None) -> str:
    """The page. `own` is the report's box in the arc. Deterministic: same artifacts, same bytes (no clock, no host)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": count, "size": size, "duration": duration, "percent": percent, "sig": significant, "plural": plural,
        "figure": _figure, "small": _small,
    }  # fmt: skip
    held = sum(v.status == "ok" for v in verdicts)
    tested = sum(v.status != "absent" for v in verdicts)
    context = {
        "title": title,
        "css": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "run": run,
        "drawn": drawn,
        "verdicts": verdicts,
        "held": held,
        "tested": tested,
        "summary": summary(run),
        "arc": Markup(draw_arc(gathered([*run.steps, own]), "Graph of the run's steps; the table under Provenance lists the same links")),
        "corpora": [corpus_rows(run, c.sources) for c in run.corpora],
        "funnels": [funnel(run, p) for p in run.probes],
        "dropped": [dropped_counts(c.sources) for c in run.corpora],
        "heat": [heat_map(run, i) for i in run.influences],
        "rounds": [round_table(run, chain) for chain, _ in drawn.rounds],
        "compared": [compared_table(group) for group in comparable(run)],
        "over_seeds": over_seeds,
        "left_out": [left_out_table(run, analysis) for analysis in analyses(run)],
        "evaluation": evaluation_table(run.evaluated),
        "speeds": speed_rows(run),
        "objectives": OBJECTIVES,
        "absent": absent_parts(run),
        "machines": _distinct(dict(s.machine) for s in run.steps),
        "versions": _distinct(dict(s.versions) for s in run.steps),
        "seconds": sum(s.seconds for s in run.steps),
        "parity": [(e, parity_rows(e.parity)) for e in run.exported],
    }
    page = environment.get_template("report.html.j2").render(context)
    return re.sub(r"(?<=\d) (?=[%±])", "\N{NO-BREAK SPACE}", page)


def _small(value: float) -> str:
    """A number of any size with its sign: three digits, or a power of ten."""
    text = f"{value:+.3g}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def _figure(figure: Figure, wide: bool = False) -> Markup:
    """A figure with a spoken description; scrolls sideways on a narrow screen instead of shrinking to nothing."""
    klass = "figure wide" if wide else "figure"
    return Markup('<div class="{}" role="img" aria-label="{}"><div style="--w:{}px">{}</div></div>').format(
        klass, figure.alt, figure.width, Markup(figure.svg)
    )


def summary(run: Run) -> str:
    """What happened, in plain sentences, from the artifacts alone."""
    parts = []
    if run.corpora:
        sources, noise = run.sources, run.distractors
        tokens = sum(s.total("tokens") for s in sources.values())
        planted = f", {len(noise)} of them planted {'distractor' if len(noise) == 1 else 'distractors'}," if noise else ""
        parts.append(f"{plural(len(sources), 'source')} of text ({count(tokens)} tokens){planted} were cut into training, probe and test documents.")
    if run.influences:
        first = run.influences[0]
        parts.append(
            f"Gradient influence measured what their documents do for {_list(first.capabilities)}"
            + (", and the scores became the training mixture." if any(m.follows_influence for m in run.mixtures) else ".")
        )
    helpers = {name for t in run.trained for name in (t.teacher, t.reference)}
    student = [t for t in run.trained if t.step not in helpers and t.objective != "group_dro" and not in_family(run, t)]
    if student:
        last = student[-1]
        lineage = _lineage(run, last.step)
        parts.append(f"A model of {count(last.parameters)} parameters went through {plural(len(lineage), 'training step')} ({', '.join(lineage)}).")
    if teachers := list(dict.fromkeys(t.teacher for t in run.trained if t.teacher)):
        known = [run.training(name) for name in teachers]
        sizes = ", ".join(f"{t.step} with {count(t.parameters)} parameters" for t in known if t)
        parts.append(f"Its teacher in distillation is another model trained in this same run ({sizes}), not a published one." if sizes else "")
    if run.exported:
        parts.append("The result was exported as a Hugging Face folder and compared with the trained weights.")
    return " ".join(part for part in parts if part) or "The inputs hold no stage that this page knows how to summarise."


def _lineage(run: Run, name: str) -> list[str]:
    chain: list[str] = []
    current = run.training(name)
    while current is not None and current.step not in chain:
        chain.insert(0, current.step)
        current = run.training(current.start)
    return chain


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def corpus_rows(run: Run, sources: Sequence[Source]) -> list[tuple[Source, str, str]]:
    """Sources in page order, each with what it is and where it came from."""
    by_name = {s.name: s for s in sources}
    ordered = [by_name[name] for name in source_order(run, by_name)]
    return [(s, str(s.origin.get("about", "")), ", ".join(origin_parts(s.origin))) for s in ordered]


def funnel(run: Run, probe: Probe) -> dict[str, Any]:
    """How many documents of each source every sieve let through: one row a source, one column a sieve, in order."""
    every = {(s.source, s.name): s for sieves in probe.sieves.values() for s in sieves}
    columns = list(dict.fromkeys(name for _, name in every))
    by_source = {source: [every.get((source, name)) for name in columns] for source in source_order(run, dict.fromkeys(source for source, _ in every))}
    return {
        "columns": columns,
        "rows": [(source, next(s.entered for s in cells if s), cells) for source, cells in by_source.items()],
        "relaxed": [s for cells in by_source.values() for s in cells if s and s.relaxed],
    }


def dropped_counts(sources: Sequence[Source]) -> list[tuple[str, int]]:
    """Reason -> documents dropped, over all sources, most frequent first."""
    total: Counter[str] = Counter()
    for source in sources:
        total.update(source.dropped)
    return [(reason.replace("_", " "), n) for reason, n in total.most_common() if n]


def heat_map(run: Run, influence: Influence) -> dict[str, Any]:
    """The heat map as a table: one record a row, a cell's `tone` in [-1, 1] sets its colour."""
    scale, unit = figures.influence_scale(influence)
    top = figures.largest(influence) or 1.0
    rows = []
    for source in source_order(run, influence.cells):
        cells = []
        for capability in influence.capabilities:
            cell = influence.cells[source].get(capability)
            if cell is None:
                cells.append(None)
                continue
            decimals = figures.decimals_for(scale, cell)
            cells.append(
                {
                    "mean": signed(cell.mean / scale, decimals),
                    "low": signed(cell.low / scale, decimals),
                    "high": signed(cell.high / scale, decimals),
                    "tone": round(figures.tone(cell, top), 3),
                    "cell": cell,
                }
            )
        positive = [c["cell"].positive for c in cells if c]
        documents = max((c["cell"].documents for c in cells if c), default=0)
        effective = min((c["cell"].ess for c in cells if c), default=0.0)
        rows.append(
            {
                "source": source,
                "distractor": source in run.distractors,
                "cells": cells,
                "positive": sum(positive) / len(positive) if positive else None,
                "documents": documents,
                "ess": effective,
            }
        )
    return {
        "influence": influence,
        "unit": unit,
        "scale": (influence.normalise, influence.preconditioner, influence.parameters, influence.covers),
        "rows": rows,
        "reliability": reliability_rows(influence.reliabilities),
    }


def round_table(run: Run, chain: Chain) -> dict[str, Any]:
    """What is known of each round, one line a fact and one column a round; and by source what helps and what was left out."""
    rounds = chain.rounds
    lines = [
        ("measured with the model of", [_list(list(dict.fromkeys(i.model or "an absent step" for i in r.influences))) for r in rounds]),
        ("mean probe loss of that model (nats per token)", [f"{_mean_loss(r):.3f}" for r in rounds]),
        ("documents scored", [count(sum(len(r.benefit(s)) for s in r.sources)) for r in rounds]),
    ]
    for name in (ALL, *chain.capabilities):
        lines.append((f"with benefit above 0, {name}", [percent(r.positive()[name]) if name in r.positive() else "" for r in rounds]))
    for name in (ALL, *chain.capabilities):
        sizes = [chain.shrinking(r) for r in rounds]
        lines.append((f"size of benefits (first round = 1), {name}", [significant(s[name]) if name in s else "" for s in sizes]))
    lines += [
        ("mixture made of it", [", ".join(m.step for m in r.mixtures) or "none" for r in rounds]),
        ("documents left out", ["; ".join(_left_out(m) for m in r.mixtures if m.kept) or "none" for r in rounds]),
        ("another round? the paper's rule", [_by_mixture(r, lambda m: "stop" if m.decision.paper.stop else "go on") for r in rounds]),
        ("another round? the statistical rule", [_by_mixture(r, lambda m: STATISTICAL[m.decision.statistical.stop]) for r in rounds]),
    ]
    sources = source_order(run, dict.fromkeys(s for r in rounds for s in r.sources))
    rows = [{"source": s, "distractor": s in run.distractors, "cells": [_source_in_round(r, s) for r in rounds]} for s in sources]
    return {"chain": chain, "lines": lines, "sources": rows, "filtered": any(r.filtered for r in rounds)}


STATISTICAL = {True: "stop", False: "go on", None: "not known"}


def _mean_loss(r: Round) -> float:
    losses = [loss for i in r.influences for loss in i.probe_loss.values()]
    return sum(losses) / len(losses)


def _left_out(mixture: MixtureView) -> str:
    """How many scored documents the rule drops, and what became of the rest."""
    kept = mixture.kept
    assert kept is not None
    scored, passed = sum(kept.scored.values()), sum(kept.passed.values())
    how = f"{count(scored - passed)} of {count(scored)} by the rule “{kept.rule}”"
    how = f"at random, as many tokens as would be {how}" if kept.control else how
    others = "" if kept.unscored == "keep" else ", and all that were not scored"
    return f"{how}{others}; {count(sum(kept.tokens.values()))} tokens are left"


def _by_mixture(r: Round, say: Callable[[Any], str]) -> str:
    found = [(m.step, say(m)) for m in r.mixtures if m.decision is not None]
    answers = {answer for _, answer in found}
    return ", ".join(answers) if len(answers) < 2 else "; ".join(f"{answer} ({step})" for step, answer in found)


def _source_in_round(r: Round, source: str) -> dict[str, str] | None:
    if source not in r.sources:
        return None
    return {"positive": percent(r.positive(source)[ALL], 0), "dropped": percent(float(r.dropped(source).mean()), 0) if r.filtered else ""}


UNITS = {"documents": "scored documents per source", "probe": "probe windows per capability"}


def reliability_rows(found: Sequence[Reliable]) -> list[dict[str, Any]]:
    """One line per ranking and side that was halved: the values by capability, and what the joint ranking would need."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for r in found:
        row = rows.setdefault((r.of, r.over), {"of": r.of, "have": r.have, "units": UNITS[r.over], "values": {}, "needs": ""})
        row["values"][r.capability] = r.value
        if r.capability == "joint":
            enough = r.value is not None and r.value >= RELIABLE
            row["needs"] = "enough" if enough else f"about {r.needed:,}" if r.needed is not None else "cannot be foretold"
    return [row for row in rows.values() if any(value is not None for value in row["values"].values())]


def compared_table(group: Sequence[tuple[Trained, MixtureView]]) -> dict[str, Any]:
    """Final probe losses of trainings that differ in their mixture only, the lowest mean first."""
    capabilities = [c for c in group[0][0].capabilities if all(c in trained.capabilities for trained, _ in group)]
    rows = []
    for trained, mixture in group:
        losses = [trained.probe_curve(c)[-1][1] for c in capabilities]
        rows.append({"trained": trained, "mixture": mixture, "losses": losses, "mean": sum(losses) / len(losses) if losses else float("nan")})
    return {"capabilities": capabilities, "tokens": group[0][0].tokens, "starts": list(dict.fromkeys(trained.start or "random weights" for trained, _ in group)), "rows": sorted(rows, key=lambda row: row["mean"])}


def left_out_table(run: Run, analysis: LeaveOneOut) -> dict[str, Any]:
    """Sources x capabilities of a leave-one-out analysis, what helps most first; `tone` in [-1, 1] sets a cell's colour."""
    top = max((abs(value) for row in analysis.truth.values() for value in row.values()), default=0.0) or 1.0
    rows = [
        {
            "source": source, "distractor": source in run.distractors,
            "cells": [{"value": _small(value), "tone": round(value / top, 3)} for c in analysis.capabilities for value in [analysis.truth[source][c]]],
        }
        for source in sorted(analysis.truth, key=lambda name: -analysis.truth[name][JOINT])
    ]  # fmt: skip
    return {"analysis": analysis, "rows": rows}


def evaluation_table(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Rows = tasks in order of first appearance, columns = models."""
    columns = [e.model or e.step for e in evaluated]
    by_key = [{r.key: r for r in e.results} for e in evaluated]
    keys = list(dict.fromkeys(key for results in by_key for key in results))
    rows = []
    for key in keys:
        results = [results.get(key) for results in by_key]
        sample = next(r for r in results if r is not None)
        rows.append({"first": sample, "cells": [_score(r) for r in results], "n": _range([r.n for r in results if r]), "control": is_control(sample)})
    notes = [(r["first"].task, r["first"].note) for r in rows if r["first"].note]
    notes += [(f"{task}, not measured on {e.model or e.step}", reason) for e in evaluated for task, reason in e.dropped]
    changes = [{"evaluation": e, "rows": [_change_row(c, e) for c in e.changes]} for e in evaluated if e.changes]
    return {"columns": columns, "rows": rows, "notes": notes, "changes": changes}


def _change_row(change: Change, evaluation: Evaluated) -> dict[str, Any]:
    """A paired difference in percentage points (shares) or in the metric's own unit; `verdict` says what the interval allows."""
    result = next((r for r in evaluation.results if r.key == (change.task, change.metric)), None)
    share = result is not None and figures.is_share(result)
    factor, decimals, unit = (100, 1, " points") if share else (1, 3, "")
    better = (change.low > 0) if result is None or result.higher_is_better else (change.high < 0)
    worse = (change.high < 0) if result is None or result.higher_is_better else (change.low > 0)
    return {
        "task": change.task,
        "metric": change.metric.replace("_", " "),
        "difference": signed(factor * change.difference, decimals) + unit,
        "interval": f"{signed(factor * change.low, decimals)} to {signed(factor * change.high, decimals)}",
        "verdict": "better" if better else "worse" if worse else "no clear change",
        "n": change.n,
    }


def _score(result: Result | None) -> dict[str, str] | None:
    if result is None:
        return None
    if figures.is_share(result):
        value, low, high = (f"{100 * v:.1f}" for v in (result.value, result.low, result.high))
        return {"value": f"{value} %", "interval": f"{low} to {high}"}
    return {"value": f"{result.value:.3f}", "interval": f"{result.low:.3f} to {result.high:.3f}"}


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def speed_rows(run: Run) -> list[dict[str, Any]]:
    """Time of every step, and speed where tokens were processed."""
    rows = []
    for step in run.steps:
        trained = run.training(step.name)
        rows.append(
            {
                "step": step,
                "tokens": trained.tokens if trained else None,
                "speed": trained.tokens_per_second if trained else _number(step.summary.get("tokens_per_second")),
                "memory": _number(step.summary.get("peak_memory_bytes")),
            }
        )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def parity_rows(parity: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The proof's facts as lines; nested records become dotted names, lists are counted."""
    rows: list[tuple[str, str]] = []
    for key, value in parity.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += parity_rows(value, f"{name}: ")
        elif isinstance(value, bool):
            rows.append((name, "yes" if value else "no"))
        elif isinstance(value, (list, tuple)):
            rows.append((name, f"{len(value)} (in parity.json)"))
        elif isinstance(value, float):
            rows.append((name, f"{value:.2e}" if value and abs(value) < 1e-3 else significant(value)))
        elif value is not None:
            rows.append((name, str(value)))
    return rows


def absent_parts(run: Run) -> list[str]:
    """Parts of a full run that the inputs do not hold."""
    parts = {
        "corpora": run.corpora, "probe sets": run.probes, "influence tables": run.influences, "mixtures": run.mixtures,
        "training steps": run.trained, "evaluations": run.evaluated, "exports": run.exported,
    }  # fmt: skip
    return [name for name, found in parts.items() if not found]


def _distinct(records: Any) -> list[tuple[dict[str, Any], int]]:
    """Different records with how often each occurs, most frequent first."""
    found: list[list[Any]] = []
    for record in records:
        for entry in found:
            if entry[0] == record:
                entry[1] += 1
                break
        else:
            found.append([record, 1])
    return [(record, times) for record, times in sorted(found, key=lambda entry: -entry[1])]


def own_step(name: str, fingerprint: str, steps: Sequence[Step]) -> Step:
    """The report itself as the last box of the arc; its time is not known while it is written (negative = none)."""
    parents = tuple(("artifacts", s.name, s.fingerprint) for s in steps)
    return Step(name, "report", fingerprint, parents, "", -1.0, "", {"stage": "report"}, {}, {}, 0, 0, {})
