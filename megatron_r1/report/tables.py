"""The numbers behind the page as CSV tables, unrounded, one per figure or table shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.report.leave_one_out import analyses
from megatron_r1.report.records import Run, origin_parts
from megatron_r1.report.rounds import JOINT, chains, histogram
from megatron_r1.report.settings import comparable
from megatron_r1.report.verdicts import Verdict, equal_budget_pairs, last_losses


@dataclass(frozen=True)
class Table:
    """One CSV file."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def csv(self) -> str:
        """The file's content: a header line, then the rows; None becomes an empty field."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(("" if value is None else value for value in row) for row in self.rows)
        return text.getvalue()


def tables(run: Run, verdicts: Sequence[Verdict]) -> list[Table]:
    """Every table that has at least one row."""
    found = [
        _verdicts(verdicts), _corpora(run), _probes(run), _influence(run), _reliability(run), _validity(run), _mixtures(run), _decisions(run), _kept(run), _rounds(run), _round_sources(run), _histograms(run), _compared(run), _leave_one_out(run), _agreement(run), _probe_loss(run), _metrics(run), _training_scores(run),
        _evaluation(run), _artifacts(run),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def _table(name: str, columns: str, rows: Iterable[tuple[Any, ...]]) -> Table:
    return Table(name, tuple(columns.split()), tuple(rows))


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    return _table("verdicts", "key status claim detail", ((v.key, v.status, v.claim, v.detail) for v in verdicts))


def _corpora(run: Run) -> Table:
    rows = (
        (c.step, s.name, s.domain, s.distractor, s.format, split, n.documents, n.tokens, n.bytes, "; ".join(origin_parts(s.origin)))
        for c in run.corpora
        for s in c.sources
        for split, n in s.splits.items()
    )
    return _table("corpora", "step source domain distractor format split documents tokens bytes origin", rows)


def _probes(run: Run) -> Table:
    rows = (
        (p.step, capability, s.name, s.source, s.entered, s.left, s.threshold, s.relaxed)
        for p in run.probes
        for capability, sieves in p.sieves.items()
        for s in sieves
    )
    return _table("probe_sieves", "step capability rule source documents_in documents_out threshold relaxed", rows)


def _influence(run: Run) -> Table:
    rows = (
        (i.step, source, capability, cell.mean, cell.low, cell.high, " + ".join(i.covers), cell.documents, cell.ess, cell.positive)
        for i in run.influences
        for source, row in i.cells.items()
        for capability, cell in [*row.items(), *([("joint", i.joint[source])] if source in i.joint else [])]
    )
    return _table("influence", "step source capability mean low high interval_covers documents effective_documents share_positive", rows)


def _reliability(run: Run) -> Table:
    rows = ((i.step, r.of, r.over, r.capability, r.value, r.have, r.needed) for i in run.influences for r in i.reliabilities)
    return _table("reliability", "step ranking_of halves_of capability reliability have needed_for_0.9", rows)


def _validity(run: Run) -> Table:
    rows = (
        (i.step, capability, number, foretold, measured)
        for i in run.influences
        for capability, receipt in ((i.validity or {}).get("capabilities") or {}).items()
        for number, (foretold, measured) in enumerate(zip(receipt["predicted"], receipt["measured"], strict=True))
    )
    return _table("validity", "step capability batch foretold_drop measured_drop", rows)


def _mixtures(run: Run) -> Table:
    rows = (
        (m.step, m.method, source, weight, *((m.intervals or {}).get(source, (None, None))), m.natural.get(source), m.uniform.get(source), m.epochs.get(source), source in m.clipped,
         " + ".join(m.covers), m.rho.get(source), *m.rho_intervals.get(source, (None, None)), m.shrunk.get(source), m.shrinkage.get(source))
        for m in run.mixtures
        for source, weight in m.weights.items()
    )
    return _table("mixtures", "step method source weight low high natural uniform epochs clipped interval_covers rho rho_low rho_high rho_shrunk shrinkage", rows)


def _decisions(run: Run) -> Table:
    rows = (
        (m.step, d.paper.stop, d.paper.positive, d.paper.median, d.paper.previous_median, d.statistical.stop, " ".join(d.statistical.helping),
         min(d.statistical.p_values.values()), d.statistical.reference, d.statistical.gain_rate, d.statistical.path, d.statistical.gain, d.statistical.tolerance)
        for m in run.mixtures
        if (d := m.decision) is not None
    )  # fmt: skip
    columns = "step paper_stop share_positive median previous_median statistical_stop helping smallest_p reference gain_rate path gain tolerance"
    return _table("decisions", columns, rows)


def _kept(run: Run) -> Table:
    rows = (
        (m.step, m.kept.rule, m.kept.control, m.kept.unscored, source, m.kept.scored[source], m.kept.passed[source], count, m.kept.tokens[source])
        for m in run.mixtures
        if m.kept is not None
        for source, count in m.kept.documents.items()
    )
    return _table("kept_documents", "step rule control unscored source scored passed documents tokens", rows)


def _rounds(run: Run) -> Table:
    """A chain is named after its last round. size: root mean square of the benefit per token in nats (joint: none)."""
    rows = (
        (chain.name, number, r.name, name, sum(len(r.benefit(s)) for s in r.sources), share, r.sizes().get(name), chain.shrinking(r)[name])
        for chain in chains(run)
        for number, r in enumerate(chain.rounds, 1)
        for name, share in r.positive().items()
    )
    return _table("rounds", "chain round influence capability documents share_positive size_nats size_over_first", rows)


def _round_sources(run: Run) -> Table:
    rows = (
        (chain.name, number, r.name, r.filtered.step if r.filtered else None, source, len(r.benefit(source)), r.positive(source)[JOINT], int(r.dropped(source).sum()))
        for chain in chains(run)
        for number, r in enumerate(chain.rounds, 1)
        for source in r.sources
    )
    return _table("round_sources", "chain round influence filtered_by source scored share_positive left_out", rows)


def _histograms(run: Run) -> Table:
    """The outermost bins hold what lies beyond them too."""
    rows = (
        (chain.name, number, r.name, name, edges[k], edges[k + 1], int(found.counts[name][number - 1][k]), int(found.dropped[name][number - 1][k]))
        for chain in chains(run)
        for found in [histogram(chain)]
        for number, r in enumerate(chain.rounds, 1)
        for name, edges in found.edges.items()
        if name in (*r.capabilities, JOINT)
        for k in range(len(edges) - 1)
    )
    return _table("round_histograms", "chain round influence capability low high documents left_out", rows)


def _compared(run: Run) -> Table:
    rows = (
        (number, trained.step, mixture.step, mixture.method, trained.tokens, capability, loss)
        for number, group in enumerate(comparable(run))
        for trained, mixture in group
        for capability, loss in last_losses(trained).items()
    )
    return _table("mixtures_compared", "group step mixture method tokens capability loss_nats_per_token", rows)


def _leave_one_out(run: Run) -> Table:
    """Truth, and beside it the prediction of every influence table measured at the start (an empty name without one)."""
    rows = (
        (a.full.step, trained.step, source, capability, a.truth[source][capability], prediction.influence if prediction else None,
         prediction.values[source][capability] if prediction else None)
        for a in analyses(run)
        for prediction in (a.predictions or (None,))
        for source, trained in a.left_out.items()
        for capability in a.capabilities
    )  # fmt: skip
    return _table("leave_one_out", "full_step step source capability loss_without_minus_with influence predicted", rows)


def _agreement(run: Run) -> Table:
    rows = (
        (a.full.step, p.influence, p.preconditioner, r.capability, len(a.truth), r.spearman, r.low, r.high)
        for a in analyses(run)
        for p in a.predictions
        for r in p.ranks
    )
    return _table("leave_one_out_agreement", "full_step influence preconditioner capability sources spearman low high", rows)


def _probe_loss(run: Run) -> Table:
    rows = (
        (pair.tested.step, which, trained.step, capability, tokens, loss)
        for pair in equal_budget_pairs(run)
        for which, trained in (("influence", pair.tested), ("uniform", pair.control))
        for capability in pair.capabilities
        for tokens, loss in trained.probe_curve(capability)
    )
    return _table("probe_loss", "pair mixture step capability tokens loss_nats_per_token", rows)


def _metrics(run: Run) -> Table:
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "rankme")
    rows = ((t.step, *(record.get(key) for key in keys)) for t in run.trained for record in t.metrics)
    return _table("training", "training_step " + " ".join(keys), rows)


def _training_scores(run: Run) -> Table:
    rows = (
        (t.step, source, capability, found.mean, found.error, found.documents, found.tokens, t.scores.error[capability])
        for t in run.trained
        if t.scores is not None
        for source, row in t.scores.sources.items()
        for capability, found in row.items()
    )
    return _table("training_scores", "training_step source capability mean_per_token standard_error documents tokens largest_rank_error", rows)


def _evaluation(run: Run) -> Table:
    rows = (
        (e.step, e.model, r.task, r.group, r.metric, r.value, r.low, r.high, r.n, r.chance, r.higher_is_better, r.note)
        for e in run.evaluated
        for r in e.results
    )
    return _table("evaluation", "step model task group metric value low high n chance higher_is_better note", rows)


def _artifacts(run: Run) -> Table:
    rows = (
        (s.name, s.stage, s.kind, s.fingerprint, " ".join(f"{role}={name}:{digest}" for role, name, digest in s.parents), s.files, s.bytes, s.seconds, s.created, s.command)
        for s in run.steps
    )
    return _table("artifacts", "step stage kind fingerprint parents files bytes seconds created command", rows)
