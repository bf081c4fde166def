"""Rounds of co-evolution (arXiv 2509.24945 v1, section 6, Fig. 8): measure, mix, train on the mixture, measure again.

A round is an influence table (or the tables of specialised models together) and what was mixed from it. It follows the round whose
mixture the measured model was trained on. Recipes with several arms have a chain of rounds for each, with the first ones in common.

Histograms of a chain share their bins and their unit, so that a distribution that narrows is seen to narrow. The tables' own
scale would hide it: it brings every table to the same width. Value of document i, capability c, round r:

    v[i, c, r] = u[i, c, r] / rms_i(u[., c, r]) * rms_i(n[., c, r]) / rms_i(n[., c, first])

    u: benefit per token in the table's own scale, whose signs are those that mixtures and filters go by
    n: the same in nats of probe loss per unit of learning rate

With one checkpoint u is n rescaled and v is n / rms(n of the first round). joint: mean over c of u, both factors averaged over c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_r1.report.records import Influence, MixtureView, Run

JOINT = "joint"
BINS = 40
WITHIN = 0.98
"""Share of the widest round's documents that the bins reach; what lies beyond is counted in the outermost bins."""


@dataclass(frozen=True)
class Round:
    """`mixtures`: the one the next round's model was trained on; of the last round all that were made from it."""

    influences: tuple[Influence, ...]
    mixtures: tuple[MixtureView, ...]

    @property
    def name(self) -> str:
        """Names of its tables."""
        return " + ".join(i.step for i in self.influences)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Of all its tables."""
        return tuple(c for i in self.influences for c in i.capabilities)

    @property
    def sources(self) -> tuple[str, ...]:
        """Scored in every table."""
        first, *others = self.influences
        return tuple(s for s in first.documents if all(s in i.documents for i in others))

    @property
    def filtered(self) -> MixtureView | None:
        """The first mixture that leaves documents out; one that a rule chose before a random one."""
        found = [m for m in self.mixtures if m.numbers is not None and m.kept is not None]
        return min(found, key=lambda m: m.kept is not None and m.kept.control, default=None)

    def benefit(self, source: str) -> np.ndarray:
        """Benefit per token in the tables' own scale, [n, C]."""
        return np.concatenate([i.documents[source].benefit for i in self.influences], axis=1)

    def nats(self, source: str) -> np.ndarray:
        """The same in nats of probe loss per unit of learning rate, [n, C]."""
        return np.concatenate([i.documents[source].nats for i in self.influences], axis=1)

    def sizes(self) -> dict[str, float]:
        """Capability -> root mean square over all scored documents of the benefit per token in nats."""
        return dict(zip(self.capabilities, _rms(np.concatenate([self.nats(s) for s in self.sources])).tolist(), strict=True))

    def positive(self, source: str | None = None) -> dict[str, float]:
        """Capability and joint -> share of the scored documents (of one source) with benefit above 0."""
        values = np.concatenate([self.benefit(s) for s in ([source] if source else self.sources)])
        return dict(zip((*self.capabilities, JOINT), [*(values > 0).mean(axis=0).tolist(), float((values.mean(axis=1) > 0).mean())], strict=True))

    def dropped(self, source: str) -> np.ndarray:
        """Which scored documents the mixture leaves out, bool [n]."""
        index = self.influences[0].documents[source].index
        if self.filtered is None or self.filtered.numbers is None or source not in self.filtered.numbers:
            return np.zeros(len(index), bool)
        return ~np.isin(index, self.filtered.numbers[source])

    def all_dropped(self) -> np.ndarray:
        """The same for the documents of all sources in order."""
        return np.concatenate([self.dropped(s) for s in self.sources])


def _rms(values: np.ndarray) -> np.ndarray:
    """Of the columns of [n, C]."""
    return np.sqrt((values**2).mean(axis=0))


@dataclass(frozen=True)
class Chain:
    """Rounds that follow one another."""

    rounds: tuple[Round, ...]

    @property
    def name(self) -> str:
        """Name of the last round, which no other chain ends with."""
        return self.rounds[-1].name

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Of all rounds."""
        return tuple(dict.fromkeys(c for r in self.rounds for c in r.capabilities))

    @property
    def alike(self) -> bool:
        """Whether all rounds measured the same way, so that their widths can be compared."""
        return len({(i.preconditioner, i.parameters) for r in self.rounds for i in r.influences}) == 1

    def first_sizes(self) -> dict[str, float]:
        """Capability -> its size in the first round that has it."""
        found: dict[str, float] = {}
        for r in self.rounds:
            found = {**r.sizes(), **found}
        return found

    def shrinking(self, r: Round) -> dict[str, float]:
        """Capability and joint -> size of benefits in a round, the first round being 1."""
        first, now = self.first_sizes(), r.sizes()
        ratio = {c: size / first[c] if first[c] > 0 else 0.0 for c, size in now.items()}
        return {**ratio, JOINT: float(np.mean(list(ratio.values())))}

    def values(self, r: Round) -> dict[str, np.ndarray]:
        """Capability and joint -> v of all documents of the round [N], source after source."""
        own = np.concatenate([r.benefit(s) for s in r.sources])
        width, ratio = _rms(own), self.shrinking(r)
        columns = [*own.T, own.mean(axis=1)]
        widths = [*width.tolist(), float(width.mean())]
        names = (*r.capabilities, JOINT)
        return {name: column / w * ratio[name] if w > 0 else np.zeros_like(column) for name, column, w in zip(names, columns, widths, strict=True)}


@dataclass(frozen=True)
class Histogram:
    """Documents by benefit: `counts[name]` [rounds, BINS] and of them those left out, `dropped`; NaN where a round did not measure
    a capability. Outermost bins hold what lies beyond them."""

    edges: Mapping[str, np.ndarray]  # capability and joint -> [BINS + 1]
    counts: Mapping[str, np.ndarray]
    dropped: Mapping[str, np.ndarray]


def histogram(chain: Chain) -> Histogram:
    """Of every capability and of the joint benefit, the same bins in all rounds; 0 is an edge."""
    edges, counts, dropped = {}, {}, {}
    values = [chain.values(r) for r in chain.rounds]
    for name in (*chain.capabilities, JOINT):
        reach = max((float(np.quantile(np.abs(v[name]), WITHIN)) for v in values if name in v), default=0.0) or 1.0
        edges[name] = np.linspace(-reach, reach, BINS + 1)
        counts[name] = np.stack([_count(v.get(name), edges[name]) for v in values])
        left_out = [r.all_dropped() for r in chain.rounds]
        dropped[name] = np.stack([_count(v[name][out] if name in v else None, edges[name]) for v, out in zip(values, left_out, strict=True)])
    return Histogram(edges, counts, dropped)


def _count(values: np.ndarray | None, edges: np.ndarray) -> np.ndarray:
    if values is None:
        return np.full(len(edges) - 1, np.nan)
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].astype(float)


def chains(run: Run) -> tuple[Chain, ...]:
    """Every chain of the run, first rounds first; one for each table (or set of tables) that no later round follows."""
    groups: dict[tuple[str, ...], None] = {}
    for mixture in run.mixtures:
        if mixture.influences and all(run.influence(name) for name in mixture.influences):
            groups.setdefault(mixture.influences)
    used = {name for group in groups for name in group}
    groups |= {(i.step,): None for i in run.influences if i.step not in used}
    before = {group: _before(run, group, groups) for group in groups}
    followed = {found[0] for found in before.values() if found}
    made = [_chain(run, group, before) for group in groups if group not in followed]
    place = {i.step: n for n, i in enumerate(run.influences)}
    return tuple(sorted(made, key=lambda chain: place[chain.rounds[-1].influences[0].step]))


def _before(run: Run, group: tuple[str, ...], groups: Mapping[tuple[str, ...], None]) -> tuple[tuple[str, ...], MixtureView] | None:
    """The round before and the mixture that leads from it to this one: what the measured model, or one it started from, was trained on."""
    table = run.influence(group[0])
    trained = run.training(table.model) if table else None
    while trained is not None:
        mixture = run.mixture(trained.mixture)
        if mixture is not None and mixture.influences in groups:
            return mixture.influences, mixture
        trained = run.training(trained.start)
    return None


def _chain(run: Run, last: tuple[str, ...], before: Mapping[tuple[str, ...], tuple[tuple[str, ...], MixtureView] | None]) -> Chain:
    rounds: list[Round] = []
    group: tuple[str, ...] = last
    mixtures = tuple(m for m in run.mixtures if m.influences == last)
    while True:
        rounds.insert(0, Round(tuple(i for name in group if (i := run.influence(name))), mixtures))
        found = before[group]
        if found is None:
            return Chain(tuple(rounds))
        group, mixtures = found[0], (found[1],)
