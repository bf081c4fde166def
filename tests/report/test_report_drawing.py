"""The arc's layout, the curves' thinning and the number formats."""

from __future__ import annotations

import re

import pytest
from fixture_run import FixtureRun
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.report import figures, text
from megatron_r1.report.collect import collect
from megatron_r1.report.graph import BOX_HEIGHT, Arrow, arrows, draw_arc
from megatron_r1.report.records import Step, depths


def step(name: str, *parents: str, kind: str = "mixture") -> Step:
    return Step(name, kind, name * 8, tuple(("role", p, "") for p in parents), "", 1.0, "", {}, {}, {}, 0, 0, {})


def boxes(svg: str) -> list[tuple[float, float, float]]:
    """(left, top, right) of every box."""
    found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([-\d.]+)"', svg)
    return [(float(x), float(y), float(x) + float(w)) for x, y, w in found]


@st.composite
def graphs(draw: st.DrawFn) -> list[Step]:
    n = draw(st.integers(1, 14))
    return [step(f"s{i}", *(f"s{j}" for j in range(i) if draw(st.booleans()) and draw(st.booleans()))) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_boxes_never_overlap_and_arrows_point_down(steps: list[Step]) -> None:
    svg = draw_arc(steps, "t")
    placed = boxes(svg)
    assert len(placed) == len(steps)
    for i, (left, top, right) in enumerate(placed):
        for other_left, other_top, other_right in placed[:i]:
            assert top != other_top or right < other_left or other_right < left
            assert top == other_top or abs(top - other_top) >= BOX_HEIGHT
    level = depths(tuple(steps))
    assert all(level[a.parent] < level[a.child] for a in arrows(steps))


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_leaving_out_implied_arrows_keeps_who_descends_from_whom(steps: list[Step]) -> None:
    def reach(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
        while True:
            more = {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs
            if not more:
                return pairs
            pairs |= more

    full = {(p, s.name) for s in steps for _, p, _ in s.parents}
    drawn = {(a.parent, a.child) for a in arrows(steps)}
    assert drawn <= full
    assert reach(set(drawn)) == reach(set(full))


def test_weights_and_teacher_arrows_are_kept_although_a_longer_path_exists(whole: FixtureRun) -> None:
    found = arrows(collect(whole.artifacts.values()).steps)
    assert Arrow("pretrain1", "pretrain2", weights=True) in found
    assert Arrow("teacher", "midtrain", teacher=True) in found
    assert Arrow("midtrain", "sft", weights=True) in found
    assert not [a for a in found if (a.parent, a.child) == ("corpus", "sft")]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 10)), min_size=1, max_size=200), st.integers(20, 60))
def test_thinning_keeps_both_ends_and_the_order(points: list[tuple[float, float]], most: int) -> None:
    kept = figures.thin(points, most)
    assert len(kept) <= max(most, 1)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    places = iter(points)
    assert all(point in places for point in kept)


def test_smoothing_a_constant_or_a_line_changes_nothing_inside() -> None:
    assert figures.smooth([2.0] * 9, 5) == [2.0] * 9
    assert figures.smooth([float(i) for i in range(9)], 5)[2:-2] == [2.0, 3.0, 4.0, 5.0, 6.0]


def test_figure_colours_follow_the_theme(page: str) -> None:
    drawings = re.findall(r"<svg aria-hidden.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) > 10
    # matplotlib's own defaults would be invisible or glaring in dark mode
    assert not re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", "".join(drawings))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999, "999"), (9999, "9,999"), (12345, "12.3 k"), (359_431_168, "359 M"), (2.097e12, "2.10 T")],
)
def test_count(value: float, expected: str) -> None:
    assert text.count(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.04, "0.0 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(value: float, expected: str) -> None:
    assert text.duration(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.012345, "0.0123"), (1.0, "1.00"), (1234.5, "1,234"), (-2.5, "\N{MINUS SIGN}2.50"), (0.0, "0")])
def test_significant(value: float, expected: str) -> None:
    assert text.significant(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.001, "0.00"), (-0.001, "0.00"), (0.126, "+0.13"), (-0.126, "\N{MINUS SIGN}0.13")])
def test_signed(value: float, expected: str) -> None:
    assert text.signed(value, 2) == expected


@pytest.mark.parametrize(("largest", "exponent"), [(0.0, 0), (0.05, 0), (999.0, 0), (0.0123, -3), (4.7e-5, -6), (12345.0, 3)])
def test_power_of_ten(largest: float, exponent: int) -> None:
    found, unit = text.power_of_ten(largest)
    assert found == exponent
    assert (unit == "") == (exponent == 0)


@pytest.mark.parametrize(("nbytes", "expected"), [(12, "12 B"), (1536, "1.50 KiB"), (5 * 2**20, "5.00 MiB")])
def test_size(nbytes: int, expected: str) -> None:
    assert text.size(nbytes) == expected
