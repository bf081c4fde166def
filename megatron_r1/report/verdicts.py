"""Judges a run by rules written down before it: each claim holds, holds in part, fails, or was not tested.

Nothing here is a threshold somebody can tune in a recipe. A claim that cannot be tested with the given artifacts is
"absent", never "ok".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from megatron_r1.report.leave_one_out import ALL, analyses
from megatron_r1.report.records import Evaluated, Influence, MixtureView, Result, Run, Trained
from megatron_r1.report.settings import comparable, differences, same_model, same_start

Status = Literal["ok", "partly", "not ok", "absent"]
ZERO_WEIGHT = 1e-9
Z95 = 1.959963984540054
DOMAIN_NAMES = {"maths": "math", "mathematics": "math"}


@dataclass(frozen=True)
class Verdict:
    """One claim about the run. `claim` and `detail` are plain sentences for a reader."""

    key: str
    claim: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Pair:
    """Two training steps that differ in their mixture only. `differences`: other settings that differ, which must be none."""

    tested: Trained
    control: Trained
    mixture: MixtureView
    differences: tuple[str, ...]

    @property
    def equal_tokens(self) -> bool:
        """True when both saw the same number of tokens."""
        return self.tested.tokens == self.control.tokens

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities both measured."""
        return tuple(c for c in self.tested.capabilities if c in self.control.capabilities)


def judge(run: Run, shuffled: str | None = None) -> tuple[Verdict, ...]:
    """Every verdict, in the order of the page. `shuffled`: name of the source with shuffled tokens, if not guessable.

    The two claims about influence are judged on the first table, measured with a model that has seen every source alike.
    Tables measured again with a model that a mixture has narrowed stand in a line of their own.
    """
    return (
        _shuffled_does_not_help(run, run.influences[:1], shuffled),
        _shuffled_at_the_floor(run, shuffled),
        _ahead_in_influence(run, run.influences[:1]),
        _ahead_in_weight(run),
        *_measured_again(run, shuffled),
        _beats_uniform(run),
        *_beats_baselines(run),
        *_leave_one_out(run),
        *_beats_control(run),
        _above_start(run, "sft", "sft_above_base", "Fine-tuning lifts the generated tasks above the model it started from"),
        *_rewarded(run),
        _control_at_chance(run),
        _parity(run),
    )


def shuffled_sources(run: Run, name: str | None = None) -> tuple[str, ...]:
    """The known-answer sources: the named one, or distractors whose name says that they are shuffled."""
    return (name,) if name else tuple(s for s in run.distractors if "shuffl" in s.lower())


def _shuffled_does_not_help(run: Run, influences: Sequence[Influence], name: str | None) -> Verdict:
    key, claim = "shuffled_benefit", "Shuffled text is shown to help no capability (no 95 % interval above zero)"
    targets = shuffled_sources(run, name)
    scored = [(i, s) for i in influences for s in targets if s in i.cells]
    if not scored:
        return Verdict(key, claim, "absent", "No influence table with a shuffled source is among the inputs.")
    good, bad, below = [], [], 0
    for influence, source in scored:
        for capability, cell in influence.cells[source].items():
            (bad if cell.low > 0 else good).append(f"{capability} ({influence.step})")
            below += cell.high < 0
    count = len(good) + len(bad)
    detail = f"Of {count} capability scores {below} below zero, {len(bad)} above zero"
    return Verdict(key, claim, _status(good, bad), detail + (f" ({_join(bad)})" if bad else "") + f", {count - below - len(bad)} neither.")


def _shuffled_at_the_floor(run: Run, name: str | None) -> Verdict:
    key, claim = "shuffled_weight", "Shuffled text gets no more than the smallest share of any influence mixture"
    found = [(m, s) for m in run.mixtures if _from_influence(m) for s in shuffled_sources(run, name) if s in m.weights]
    if not found:
        return Verdict(key, claim, "absent", "No influence mixture over a shuffled source is among the inputs.")
    good, bad = [], []
    for mixture, source in found:
        said = f"{mixture.step} ({100 * mixture.weights[source]:.2g} %)"
        (good if mixture.weights[source] <= mixture.floor + ZERO_WEIGHT else bad).append(said)
    return Verdict(key, claim, _status(good, bad), f"More in {_join(bad)}." if bad else f"Its share: {_join(good)}.")


def probed_sources(run: Run) -> dict[str, tuple[str, ...]]:
    """capability -> real sources it is probed from: those with documents in the probe set, else those of that domain."""
    found: dict[str, tuple[str, ...]] = {}
    sources = run.sources
    for influence in run.influences:
        for capability in influence.capabilities:
            named = tuple(dict.fromkeys(s for p in run.probes for s in p.documents.get(capability, {})))
            domain = DOMAIN_NAMES.get(capability, capability)
            by_domain = tuple(n for n, s in sources.items() if DOMAIN_NAMES.get(s.domain, s.domain) == domain)
            found[capability] = tuple(s for s in (named or by_domain) if s not in run.distractors)
    return found


def _measured_again(run: Run, name: str | None) -> tuple[Verdict, ...]:
    """Both claims about influence on every later table, in one line; no line when there is one table only."""
    if len(run.influences) < 2:
        return ()
    parts = [_shuffled_does_not_help(run, run.influences[1:], name), _ahead_in_influence(run, run.influences[1:])]
    claim = "Measured again with a model that a mixture has narrowed, both claims about influence still hold"
    known = [part for part in parts if part.status != "absent"]
    if not known:
        return (Verdict("measured_again", claim, "absent", parts[0].detail),)
    holds = all(part.status == "ok" for part in known)
    fails = all(part.status == "not ok" for part in known)
    status: Status = "ok" if holds else "not ok" if fails else "partly"
    why = "" if holds else (
        " A score foretells the very next step only; the likely reason is that a model that has not seen a source for a "
        "while gains from its word frequencies first, shuffled or not (docs/numerics.md)."
    )  # fmt: skip
    return (Verdict("measured_again", claim, status, " ".join(part.detail for part in known) + why),)


def _ahead_in_influence(run: Run, influences: Sequence[Influence]) -> Verdict:
    key = "ahead_influence"
    claim = "Every source of a probed capability helps that capability more than any distractor does"
    good, bad = [], []
    for influence in influences:
        noise = [s for s in run.distractors if s in influence.cells]
        for capability, sources in probed_sources(run).items() if noise else ():
            best = max((influence.cells[s][capability].mean for s in noise if capability in influence.cells[s]), default=None)
            for source in sources:
                cell = influence.cells.get(source, {}).get(capability)
                if cell is not None and best is not None:
                    (good if cell.mean > best else bad).append(f"{source} on {capability} ({influence.step})")
    if not good and not bad:
        return Verdict(key, claim, "absent", "Needs an influence table that covers distractors and probed sources.")
    detail = f"True for {len(good)} of {len(good) + len(bad)} source and capability pairs"
    return Verdict(key, claim, _status(good, bad), detail + (f"; not for {_join(bad)}." if bad else "."))


def _ahead_in_weight(run: Run) -> Verdict:
    key, claim = "ahead_weight", "Every source of a probed capability gets more weight than any distractor"
    real = {s for sources in probed_sources(run).values() for s in sources}
    good, bad = [], []
    for mixture in run.mixtures:
        noise = [w for s, w in mixture.weights.items() if s in run.distractors]
        if _from_influence(mixture) and noise:
            for source in sorted(real & set(mixture.weights)):
                (good if mixture.weights[source] > max(noise) else bad).append(f"{source} ({mixture.step})")
    if not good and not bad:
        return Verdict(key, claim, "absent", "Needs an influence mixture that covers distractors and probed sources.")
    detail = f"True for {len(good)} of {len(good) + len(bad)} weights"
    return Verdict(key, claim, _status(good, bad), detail + (f"; not for {_join(bad)}." if bad else "."))


def _from_influence(mixture: MixtureView) -> bool:
    return mixture.follows_influence


def _on_uniform(run: Run, trained: Trained) -> bool:
    mixture = run.mixture(trained.mixture)
    return mixture.is_uniform if mixture is not None else run.step(trained.step).config.get("sources") == "uniform"


def equal_budget_pairs(run: Run) -> tuple[Pair, ...]:
    """Training steps on an influence mixture, each with a control on a uniform one that starts from the same weights."""
    pairs = []
    for tested in run.trained:
        mixture = run.mixture(tested.mixture)
        if mixture is None or not _from_influence(mixture):
            continue
        for control in run.trained:
            same_start = control.start == tested.start and control.teacher == tested.teacher and same_model(run, tested, control)
            if _on_uniform(run, control) and same_start and control.objective == tested.objective:
                pairs.append(Pair(tested, control, mixture, differences(run, tested, control)))
    return tuple(pairs)


def _beats_uniform(run: Run) -> Verdict:
    key = "beats_uniform"
    claim = "At equal tokens the influence mixture ends with a lower probe loss than the uniform one"
    pairs = [p for p in equal_budget_pairs(run) if p.capabilities and p.equal_tokens and not p.differences]
    if not pairs:
        return Verdict(key, claim, "absent", "No pair of training steps that differ in their mixture only is among the inputs.")
    good, bad, gaps = [], [], []
    for pair in pairs:
        for capability in pair.capabilities:
            a, b = pair.tested.probe_curve(capability)[-1][1], pair.control.probe_curve(capability)[-1][1]
            (good if a < b else bad).append(capability)
            gaps.append(f"{capability} {a:.3f} against {b:.3f}")
    seeds = "One seed, so small gaps may be chance."
    return Verdict(key, claim, _status(good, bad), f"Final probe loss in nats per token: {_join(gaps)}. {seeds}")


def last_losses(trained: Trained) -> dict[str, float]:
    """Capability -> probe loss at the end, nats per token."""
    return {capability: trained.probe_curve(capability)[-1][1] for capability in trained.capabilities}


def _beats_baselines(run: Run) -> tuple[Verdict, ...]:
    """Influence against every other mixture trained on alike; no line without other mixtures than the uniform one."""
    key, claim = "beats_baselines", "At equal tokens the influence mixture ends with a lower mean probe loss than every other method's"
    good, bad, said = [], [], []
    for group in comparable(run):
        means = {mixture.step: math.fsum(losses.values()) / len(losses) for trained, mixture in group if (losses := last_losses(trained))}
        tested = next((m.step for _, m in group if _from_influence(m)), None)
        others = [m.step for _, m in group if not _from_influence(m)]
        if tested is None or not any(not m.is_uniform for _, m in group if m.step in others):
            continue
        (good if all(means[tested] < means[name] for name in others) else bad).append(tested)
        said.append(", ".join(f"{name} {means[name]:.4f}" for name in sorted(means, key=lambda name: means[name])))
    if not said:
        return ()
    seeds = "One seed, so small gaps may be chance."
    return (Verdict(key, claim, _status(good, bad), f"Mean final probe loss in nats per token, best first: {'; '.join(said)}. {seeds}"),)


def _leave_one_out(run: Run) -> tuple[Verdict, ...]:
    """Predicted influence against leaving sources out; no line without such trainings. Holds when the interval is above 0."""
    found = analyses(run)
    if not found:
        return ()
    key, claim = "leave_one_out", "Influence ranks the sources as leaving each of them out does (interval of the rank correlation above 0)"
    predictions = [(p, rank) for analysis in found for p in analysis.predictions for rank in p.ranks if rank.capability == ALL]
    if not predictions:
        return (Verdict(key, claim, "absent", "No influence table measured at the start of these trainings is among the inputs."),)
    said, held, leaning = [], 0, 0
    for prediction, rank in predictions:
        held += rank.low is not None and rank.low > 0
        leaning += rank.spearman is not None and rank.spearman > 0
        width = "" if rank.low is None else f" ({rank.low:+.2f} to {rank.high:+.2f})"
        said.append(f"{prediction.influence}, {prediction.preconditioner}: " + ("not defined" if rank.spearman is None else f"{rank.spearman:+.2f}") + width)
    status: Status = "ok" if held == len(predictions) else "partly" if held or leaning else "not ok"
    detail = f"Mean Spearman over capabilities with a 95 % bootstrap interval over sources: {'; '.join(said)}. One training per source, so noise of training is in it."
    return (Verdict(key, claim, status, detail),)


def control_pairs(run: Run) -> tuple[Pair, ...]:
    """Training steps on documents that a rule kept, each with one on as many at random, from the same start (of all rounds)."""
    pairs = []
    for tested in run.trained:
        mixture = run.mixture(tested.mixture)
        if mixture is None or mixture.kept is None or mixture.kept.control:
            continue
        for control in run.trained:
            other = run.mixture(control.mixture)
            alike = same_start(run, tested, control) and control.teacher == tested.teacher
            if other is not None and other.kept is not None and other.kept.control and other.kept.rule == mixture.kept.rule and alike:
                pairs.append(Pair(tested, control, mixture, differences(run, tested, control)))
    return tuple(pairs)


def _beats_control(run: Run) -> tuple[Verdict, ...]:
    """Choosing documents against merely having fewer; no line when no documents were left out."""
    filtered = [m for m in run.mixtures if m.kept is not None and not m.kept.control]
    if not filtered:
        return ()
    key = "beats_control"
    claim = "At equal tokens the documents that the rule keeps end with a lower probe loss than as many at random"
    pairs = [p for p in control_pairs(run) if p.capabilities and p.equal_tokens and not p.differences]
    if not pairs:
        return (Verdict(key, claim, "absent", f"{_join([m.step for m in filtered])} left documents out, and no training on a random part beside it."),)
    good, bad, gaps = [], [], []
    for pair in pairs:
        for capability in pair.capabilities:
            a, b = pair.tested.probe_curve(capability)[-1][1], pair.control.probe_curve(capability)[-1][1]
            (good if a < b else bad).append(capability)
            gaps.append((f"{pair.tested.step}, " if len(pairs) > 1 else "") + f"{capability} {a:.3f} against {b:.3f}")
    seeds = "One seed, so small gaps may be chance."
    return (Verdict(key, claim, _status(good, bad), f"Final probe loss in nats per token: {_join(gaps)}. {seeds}"),)


@dataclass(frozen=True)
class Lift:
    """A fine-tuned model's share of right answers on generated tasks against its base's, with the gap's 95 % interval."""

    step: str
    after: float
    before: float
    gap: float
    low: float
    high: float
    how: str

    @property
    def sentence(self) -> str:
        """The lift in words."""
        return (
            f"{self.step}: {100 * self.after:.1f} % against {100 * self.before:.1f} % {self.how}, "
            f"difference {100 * self.gap:+.1f} points (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
        )


def lifts(run: Run, objective: str = "sft") -> tuple[Lift, ...]:
    """One per model trained with `objective` that was evaluated.

    The base is the model it started from; where that was not evaluated, the evaluation it was compared with. Questions are
    compared one by one where the evaluation holds that comparison, else mean against mean.
    """
    found = []
    for trained in run.trained:
        after = run.evaluation_of(trained.step)
        if trained.objective != objective or after is None:
            continue
        named = next((e for e in run.evaluated if e.step == after.baseline), None)
        before = run.evaluation_of(trained.start) or named
        lift = before and (_paired(trained.step, after, before) or _unpaired(trained.step, after, before))
        if lift:
            found.append(lift)
    return tuple(found)


def _paired(step: str, after: Evaluated, before: Evaluated) -> Lift | None:
    pooled = next((r for r in after.results if r.group == "pooled"), None)
    if pooled is None or after.baseline != before.step:
        return None
    change = next((c for c in after.changes if (c.task, c.metric) == pooled.key), None)
    if change is None:
        return None
    how = f"of {change.n} questions, compared one by one"
    return Lift(step, pooled.value, pooled.value - change.difference, change.difference, change.low, change.high, how)


def _unpaired(step: str, after: Evaluated, before: Evaluated) -> Lift | None:
    base = {r.key: r for r in before.results}
    matched = [(r, base[r.key]) for r in after.results if is_generated(r) and r.key in base]
    if not matched:
        return None
    (a, va), (b, vb) = (_mean(list(side)) for side in zip(*matched, strict=True))
    margin = Z95 * math.sqrt(va + vb)
    return Lift(step, a, b, a - b, a - b - margin, a - b + margin, f"as a mean over {len(matched)} tasks")


def is_generated(result: Result) -> bool:
    """True for tasks whose answer the model writes itself and a verifier checks."""
    return result.group == "generated" and result.higher_is_better


def _rewarded(run: Run) -> tuple[Verdict, ...]:
    """Only where something was trained on rewards."""
    if all(trained.objective != "grpo" for trained in run.trained):
        return ()
    return (_above_start(run, "grpo", "rewards_above_start", "Training on rewards lifts the generated tasks above the model it started from"),)


def _above_start(run: Run, objective: str, key: str, claim: str) -> Verdict:
    found = lifts(run, objective)
    if not found:
        return Verdict(key, claim, "absent", "Needs evaluations of the trained model and of the model it started from.")
    good = [lift.step for lift in found if lift.low > 0]
    bad = [lift.step for lift in found if lift.low <= 0]
    return Verdict(key, claim, _status(good, bad), "; ".join(lift.sentence for lift in found) + ".")


def _mean(results: list[Result]) -> tuple[float, float]:
    """Mean over tasks and its variance. Agresti-Coull (add 2 of 4) keeps the variance above zero at 0 % and 100 %."""
    mean = sum(r.value for r in results) / len(results)
    variance = 0.0
    for r in results:
        p = (r.value * r.n + 2) / (r.n + 4)
        variance += p * (1 - p) / (r.n + 4)
    return mean, variance / len(results) ** 2


def is_control(result: Result) -> bool:
    """True for the held-out groups that nothing in training can have taught."""
    return result.group == "control"


def _control_at_chance(run: Run) -> Verdict:
    """Several models are asked in several forms: with m looks at 95 %, one in 20 misses by luck, so the test divides 5 % by m."""
    key, claim = "control", "Questions about held-out countries stay at chance, so no answers leaked into training"
    found = [(e, r, r.chance) for e in run.evaluated for r in e.results if is_control(r) and r.chance is not None]
    if not found:
        return Verdict(key, claim, "absent", "No evaluation with a held-out control group is among the inputs.")
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * len(found)))
    good, bad = [], []
    for evaluation, result, chance in found:
        far = abs(result.value - chance) > z * math.sqrt(chance * (1 - chance) / result.n)
        (bad if far else good).append(f"{evaluation.model or evaluation.step}, {result.task} ({100 * result.value:.1f} %)")
    inside = sum(r.low <= chance <= r.high for _, r, chance in found)
    detail = f"Chance lies inside the 95 % interval in {inside} of {len(found)} measurements; "
    detail += f"off chance beyond what {len(found)} looks allow: {_join(bad) or 'none'}."
    return Verdict(key, claim, _status(good, bad), detail)


def _parity(run: Run) -> Verdict:
    key, claim = "parity", "The exported Hugging Face model is the trained model"
    if not run.exported:
        return Verdict(key, claim, "absent", "No export is among the inputs.")
    good = [e.step for e in run.exported if e.parity.get("passed") is True]
    bad = [e.step for e in run.exported if e.parity.get("passed") is not True]
    return Verdict(key, claim, _status(good, bad), f"Parity proof failed for {_join(bad)}." if bad else f"Parity proof passed for {_join(good)}.")


def _status(good: list[str], bad: list[str]) -> Status:
    return "ok" if not bad else "partly" if good else "not ok"


def _join(items: list[str], most: int = 6) -> str:
    shown = items[:most]
    rest = len(items) - len(shown)
    if rest:
        return ", ".join(shown) + f" and {rest} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


