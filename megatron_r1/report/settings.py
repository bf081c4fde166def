"""What makes two trainings comparable: the same start, and no setting that differs but the mixture."""

from __future__ import annotations

from megatron_r1.report.records import MixtureView, Run, Trained


def same_model(run: Run, tested: Trained, control: Trained) -> bool:
    """Random starts are the same weights only for the same sizes; a start from a checkpoint is compared by the caller."""
    return tested.start is not None or run.step(tested.step).config.get("model") == run.step(control.step).config.get("model")


def same_start(run: Run, a: Trained, b: Trained) -> bool:
    """Whether both go on from one model; or, as the arms of several rounds do, from models whose own trainings differ in their
    mixtures only and have the same start in turn."""
    if a.start == b.start:
        return same_model(run, a, b)
    before, other = run.training(a.start), run.training(b.start)
    if before is None or other is None or before.tokens != other.tokens or before.teacher != other.teacher or before.reference != other.reference:
        return False
    return not differences(run, before, other) and same_start(run, before, other)


def differences(run: Run, tested: Trained, control: Trained) -> tuple[str, ...]:
    """Settings of two trainings that differ, the mixture left out."""
    a, b = (dict(run.step(t.step).config) for t in (tested, control))
    return tuple(sorted(k for k in a.keys() | b.keys() if k not in ("inputs", "sources") and a.get(k) != b.get(k)))


def comparable(run: Run) -> tuple[tuple[tuple[Trained, MixtureView], ...], ...]:
    """Groups of trainings on mixtures of at least two methods that differ in their mixture only: same start, teacher, tokens
    and settings. Random mixtures (proxies) and those with one source left out are not among them."""
    groups: list[list[tuple[Trained, MixtureView]]] = []
    for trained in run.trained:
        mixture = run.mixture(trained.mixture)
        if mixture is None or mixture.method in ("random", "without") or not trained.capabilities:
            continue
        for group in groups:
            first = group[0][0]
            start = same_start(run, trained, first) and trained.teacher == first.teacher and trained.reference == first.reference
            if start and trained.tokens == first.tokens and not differences(run, trained, first):
                group.append((trained, mixture))
                break
        else:
            groups.append([(trained, mixture)])
    return tuple(tuple(group) for group in groups if len(group) >= 3)
