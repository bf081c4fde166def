"""The figures of a report: each once as SVG that follows the page's light or dark theme, once as PNG for papers.

Drawn with matplotlib's object interface (no pyplot, no global state, no display). Text becomes outlines, so a figure
looks the same on every machine; what it shows is said in `alt` and stands as numbers in the tables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_r1.report.records import Cell, Evaluated, Influence, MixtureView, Result, Trained
from megatron_r1.report.rounds import JOINT, Chain, histogram
from megatron_r1.report.text import power_of_ten, signed
from megatron_r1.report.verdicts import Pair, is_control

# Okabe and Ito's colours, told apart by readers with any common colour blindness; the page maps each to a lighter
# variant in dark mode, which is why a figure may use no other colours.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
INK, SOFT, FAINT = "#1c2126", "#5a6570", "#d3d9df"
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES: tuple = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)), "-", (0, (5, 2)))
THEME = {**{colour: f"var(--s{i + 1})" for i, colour in enumerate(SERIES)}, INK: "var(--ink)", SOFT: "var(--soft)", FAINT: "var(--faint)"}
DIVERGING = LinearSegmentedColormap.from_list("benefit", ["#b2500f", "#f0b27f", "#f7f7f7", "#8fbfe0", "#1668a5"])
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "svg.fonttype": "path", "svg.hashsalt": "megatron_r1",
    "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.7, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "lines.linewidth": 1.8, "axes.unicode_minus": True, "lines.solid_capstyle": "round",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """`svg` for the page (no fixed size, theme variables), `png` on white, `width` in CSS pixels at full size."""

    name: str
    alt: str
    svg: str
    png: bytes
    width: int


def draw(name: str, alt: str, inches: tuple[float, float], paint: Callable[[Axes], None]) -> Figure:
    """Run `paint` on one pair of axes and save it twice."""
    return draw_grid(name, alt, inches, (1, 1), lambda grid: paint(grid[0][0]))


def draw_grid(name: str, alt: str, inches: tuple[float, float], shape: tuple[int, int], paint: Callable[[Sequence[Sequence[Axes]]], None]) -> Figure:
    """Run `paint` on rows x columns of axes, those of a row sharing both scales, and save the figure twice."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=inches, layout="constrained")
        paint(canvas.subplots(*shape, squeeze=False, sharex="row", sharey="row"))
        vector, raster = io.StringIO(), io.BytesIO()
        canvas.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(raster, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Figure(name, alt, _inline(vector.getvalue(), name), raster.getvalue(), round(inches[0] * 96))


def _inline(svg: str, prefix: str) -> str:
    """An SVG element that can stand in a page next to others: unique ids, theme colours, scalable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", prefix)
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{slug}-", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points at even distances, always with the first and the last."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (most - 1))] for i in range(most)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; shorter at both ends."""
    half = window // 2
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [sum(values[a:b]) / (b - a) for a, b in spans]


def loss_curve(trained: Trained, points: int) -> Figure | None:
    """Training loss of one step over its tokens (of one trained on rewards: the mean reward): logged values faint, their moving mean strong."""
    rewarded = trained.objective == "grpo"
    curve = thin(trained.curve("reward" if rewarded else "loss"), points)
    if len(curve) < 2:
        return None
    x, y = [p[0] for p in curve], [p[1] for p in curve]
    label = {"distill": "distillation loss (nats/token)", "grpo": "mean reward"}.get(trained.objective, "loss (nats/token)")

    def paint(axes: Axes) -> None:
        window = max(1, len(y) // 20)
        if window > 1:
            axes.plot(x, y, color=SERIES[0], alpha=0.3, linewidth=1)
        axes.plot(x, smooth(y, window), color=SERIES[0])
        axes.set_title(trained.step)
        _token_axes(axes, label)

    return draw(f"loss_{trained.step}", f"{'Mean reward' if rewarded else 'Training loss'} of {trained.step}: from {y[0]:.3f} to {y[-1]:.3f}.", (3.6, 2.5), paint)


def probe_curves(pair: Pair, points: int) -> list[Figure]:
    """One panel a capability: probe loss of the influence mixture and of its uniform control over tokens."""
    return [_probe_panel(pair, capability, points) for capability in pair.capabilities]


def _probe_panel(pair: Pair, capability: str, points: int) -> Figure:
    curves = [(t, thin(t.probe_curve(capability), points)) for t in (pair.tested, pair.control)]
    labels = ("influence mixture", "uniform mixture")

    def paint(axes: Axes) -> None:
        for i, (_, curve) in enumerate(curves):
            x, y = [p[0] for p in curve], [p[1] for p in curve]
            axes.plot(x, y, color=SERIES[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=3.5, label=labels[i])
        axes.set_title(capability)
        axes.legend()
        _token_axes(axes, "probe loss (nats/token)")

    ends = " and ".join(f"{curve[-1][1]:.3f} for the {label}" for label, (_, curve) in zip(labels, curves, strict=True))
    return draw(f"probe_{pair.tested.step}_{capability}", f"Probe loss on {capability} ends at {ends}.", (3.6, 2.7), paint)


def rankme_curves(trained: Sequence[Trained], points: int) -> Figure | None:
    """RankMe over all tokens a model has seen, one line a training step; a step that measured it once is a single mark."""
    curves = [(t, [(t.tokens_before + x, y) for x, y in thin(t.curve("rankme"), points)]) for t in trained]
    curves = [(t, curve) for t, curve in curves if curve]
    if not curves:
        return None

    def paint(axes: Axes) -> None:
        for i, (t, curve) in enumerate(curves):
            k = i % len(SERIES)
            x, y = [p[0] for p in curve], [p[1] for p in curve]
            axes.plot(x, y, color=SERIES[k], linestyle=DASHES[k], marker=MARKERS[k], markersize=4, label=t.step)
        _legend_on_top(axes)
        _token_axes(axes, "RankMe (effective dimensions)", "tokens the model has seen, earlier steps included")

    ends = ", ".join(f"{t.step} {curve[-1][1]:.1f}" for t, curve in curves)
    return draw("rankme", f"RankMe at the end of each training step: {ends}.", (6.0, 3.2), paint)


def _legend_on_top(axes: Axes) -> None:
    """Above the plot, left: beside it a narrow screen would cut it off."""
    _, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) > 24 else 3
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=columns, columnspacing=1.4, handletextpad=0.5)


def _token_axes(axes: Axes, label: str, tokens: str = "tokens in this step") -> None:
    axes.set_ylabel(label)
    axes.set_xlabel(tokens)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)


def mixture_bars(mixture: MixtureView, distractors: Sequence[str]) -> Figure:
    """Weights with intervals as bars, natural and uniform shares as marks on the same rows."""
    names = sorted(mixture.weights, key=lambda n: mixture.weights[n])

    def paint(axes: Axes) -> None:
        rows = range(len(names))
        axes.barh(rows, [100 * mixture.weights[n] for n in names], height=0.56, color=SERIES[0], alpha=0.85, label=f"{mixture.step}")
        if mixture.intervals:
            for row, name in zip(rows, names, strict=True):
                low, high = (100 * edge for edge in mixture.intervals.get(name, (mixture.weights[name],) * 2))
                axes.plot([low, high], [row, row], color=INK, linewidth=1.4)
        for marks, marker, colour, label in ((mixture.natural, "D", SERIES[1], "natural"), (mixture.uniform, "|", INK, "uniform")):
            found = [(100 * marks[n], row) for row, n in zip(rows, names, strict=True) if n in marks]
            size = 34 if marker == "D" else 110
            axes.scatter([f[0] for f in found], [f[1] for f in found], marker=marker, s=size, color=colour, label=label, zorder=3, linewidths=1.6)
        axes.set_yticks(list(rows), [n + (" (distractor)" if n in distractors else "") for n in names])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of training tokens (%)")
        axes.set_xlim(left=0)
        _legend_on_top(axes)

    top = ", ".join(f"{n} {100 * mixture.weights[n]:.1f} %" for n in reversed(names[-3:]))
    return draw(f"mixture_{mixture.step}", f"Shares of {mixture.step}; largest: {top}.", (6.2, 1.2 + 0.34 * len(names)), paint)


def influence_map(influence: Influence, order: Sequence[str], distractors: Sequence[str]) -> Figure:
    """Heat map sources x capabilities with the number and its interval in every cell."""
    scale, unit = influence_scale(influence)
    top = largest(influence) or 1.0

    def paint(axes: Axes) -> None:
        grid = [[tone(influence.cells[s].get(c), top) for c in influence.capabilities] for s in order]
        axes.imshow(grid, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
        for i, source in enumerate(order):
            for j, capability in enumerate(influence.capabilities):
                cell = influence.cells[source].get(capability)
                if cell is not None:
                    colour = "#ffffff" if abs(tone(cell, top)) > 0.75 else "#111111"
                    axes.text(j, i, cell_text(cell, scale), ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(influence.capabilities)), influence.capabilities)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(order)), [s + (" (distractor)" if s in distractors else "") for s in order])
        axes.tick_params(length=0, labelcolor=INK)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"{influence.step}: benefit per token{', ' + unit if unit else ''} (mean ± half of the 95 % interval)")

    return draw(f"influence_{influence.step}", f"Influence of every source on every capability in {influence.step}.", (7.0, 1.0 + 0.36 * len(order)), paint)


def validity_scatter(influence: Influence) -> Figure | None:
    """Drop of the probe loss after real updates against the drop their documents' scores foretold, one mark a batch."""
    receipt = (influence.validity or {}).get("capabilities") or {}
    series = {name: (r["predicted"], r["measured"]) for name, r in receipt.items() if r.get("predicted")}
    if not series:
        return None
    top = max(abs(v) for pair in series.values() for values in pair for v in values) or 1.0
    correlation = {name: "not defined" if receipt[name].get("spearman") is None else f"{receipt[name]['spearman']:.2f}" for name in series}
    exponent, unit = power_of_ten(top)
    unit = f" ({unit.removeprefix('×')} nats/token)" if unit else " (nats/token)"

    def paint(axes: Axes) -> None:
        edge = 1.08 * top / 10**exponent
        axes.plot([-edge, edge], [-edge, edge], color=SOFT, linewidth=1, linestyle=DASHES[1], label="as foretold")
        for i, (name, (foretold, measured)) in enumerate(series.items()):
            k = i % len(SERIES)
            points = [v / 10**exponent for v in foretold], [v / 10**exponent for v in measured]
            axes.scatter(*points, color=SERIES[k], marker=MARKERS[k], s=24, label=f"{name}: rank correlation {correlation[name]}")
        axes.set_xlabel("drop foretold by the scores" + unit)
        axes.set_ylabel("drop measured" + unit)
        _legend_on_top(axes)

    said = ", ".join(f"{name} {value}" for name, value in correlation.items())
    return draw(f"validity_{influence.step}", f"Measured against foretold drop of the probe loss; rank correlation {said}.", (5.6, 3.9), paint)


def round_histograms(chain: Chain) -> Figure:
    """Rows: capabilities and joint; columns: rounds. Documents by benefit per token; what a mixture leaves out is marked."""
    found = histogram(chain)
    names, rounds = list(found.edges), chain.rounds
    some_dropped = any(r.filtered for r in rounds)

    def paint(grid: Sequence[Sequence[Axes]]) -> None:
        for row, name in enumerate(names):
            edges, width = found.edges[name], float(found.edges[name][1] - found.edges[name][0])
            for column, r in enumerate(rounds):
                axes, total = grid[row][column], found.counts[name][column]
                if np.isnan(total).any():
                    axes.set_axis_off()
                    continue
                share = 100 / total.sum()
                left_out = found.dropped[name][column]
                axes.bar(edges[:-1], share * (total - left_out), width, align="edge", color=SERIES[0], label="trained on")
                if some_dropped:
                    axes.bar(edges[:-1], share * left_out, width, align="edge", bottom=share * (total - left_out), color=SERIES[1], label="left out")
                axes.axvline(0, color=INK, linewidth=0.8)
                axes.text(0.98, 0.96, f"{100 * r.positive()[name]:.0f} % above 0", transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=8.5)
                axes.set_xlim(edges[0], edges[-1])
                axes.margins(y=0.22)  # room for the words above
                axes.xaxis.set_major_locator(MaxNLocator(5))
                axes.yaxis.set_major_locator(MaxNLocator(4))
                if row == 0:
                    axes.set_title(f"round {column + 1}: {r.name}" if len(r.name) <= 18 else f"round {column + 1}")
                if column == 0:
                    axes.set_ylabel(f"{name}\ndocuments (%)")
                if row == len(names) - 1:
                    axes.set_xlabel("benefit per token")
        if some_dropped:
            grid[0][0].legend(loc="upper left", fontsize=8, borderaxespad=0.1, handlelength=1.0)

    said = "; ".join(f"{r.name}: {100 * r.positive()[JOINT]:.0f} % of documents above 0, size {chain.shrinking(r)[JOINT]:.2f} of the first round's" for r in rounds)
    slug = rounds[-1].influences[0].step
    inches = (max(3.6, 0.5 + 2.75 * len(rounds)), 0.5 + 1.5 * len(names))
    return draw_grid(f"rounds_{slug}", f"Histograms of benefit per token, round by round. {said}.", inches, (len(names), len(rounds)), paint)


def largest(influence: Influence) -> float:
    """Largest absolute mean in the table."""
    return max((abs(c.mean) for row in influence.cells.values() for c in row.values()), default=0.0)


def influence_scale(influence: Influence) -> tuple[float, str]:
    """Factor that numbers are divided by, and how to say it."""
    exponent, unit = power_of_ten(largest(influence))
    return 10.0**exponent, unit


def tone(cell: Cell | None, top: float) -> float:
    """Colour position in [-1, 1]: signed root, because scores span orders of magnitude and small ones must stay visible."""
    if cell is None:
        return 0.0
    share = max(-1.0, min(1.0, cell.mean / top))
    return (abs(share) ** 0.5) * (1 if share >= 0 else -1)


def cell_text(cell: Cell, scale: float) -> str:
    """+1.2 ± 0.3 in the table's unit; as many decimals as its size warrants."""
    decimals = decimals_for(scale, cell)
    return f"{signed(cell.mean / scale, decimals)} ± {abs(cell.high - cell.low) / 2 / scale:.{decimals}f}"


def decimals_for(scale: float, cell: Cell) -> int:
    """Two decimals below 10, one below 100, none above."""
    size = max(abs(cell.mean), abs(cell.high - cell.low) / 2) / scale
    return 2 if size < 10 else 1 if size < 100 else 0


EVALUATIONS = {
    "answers": "right answers (%); a grey bar marks chance",
    "text": "bits per byte of held-out text (lower is better)",
    "solutions": "bits per byte of the right solution, given the question (lower is better)",
}


def evaluation_kind(result: Result) -> str:
    """Which of the evaluation figures a result belongs to; "" for none."""
    kind = "answers" if is_share(result) else result.group
    return kind if kind in EVALUATIONS else ""


def evaluation_dots(evaluated: Sequence[Evaluated], kind: str) -> Figure | None:
    """One row a task, one mark with its interval a model. `kind`: a key of EVALUATIONS."""
    picked = [(e, {r.key: r for r in e.results if evaluation_kind(r) == kind}) for e in evaluated]
    picked = [(e, results) for e, results in picked if results]
    keys = list(dict.fromkeys(key for _, results in picked for key in results))
    if not keys:
        return None
    share = kind == "answers"
    factor = 100 if share else 1
    spread = 0.62 / max(1, len(picked))

    def paint(axes: Axes) -> None:
        for i, (evaluation, results) in enumerate(picked):
            k = i % len(SERIES)
            rows = [(row + (i - (len(picked) - 1) / 2) * spread, results[key]) for row, key in enumerate(keys) if key in results]
            for y, r in rows:
                axes.plot([factor * r.low, factor * r.high], [y, y], color=SERIES[k], linewidth=1.3)
            axes.scatter([factor * r.value for _, r in rows], [y for y, _ in rows], color=SERIES[k], marker=MARKERS[k], s=26, zorder=3, label=evaluation.model or evaluation.step)
        _chance_marks(axes, keys, picked, factor)
        axes.set_yticks(range(len(keys)), [_label(key, picked) for key in keys])
        axes.set_ylim(len(keys) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(EVALUATIONS[kind])
        if share:
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        _legend_on_top(axes)

    alt = f"Evaluation, {EVALUATIONS[kind]}, per task and model; the table below has every number."
    return draw(f"evaluation_{kind}", alt, (6.2, 1.3 + 0.14 * len(keys) * (len(picked) + 1.2)), paint)


def _chance_marks(axes: Axes, keys: list, picked: list[tuple[Evaluated, Mapping]], factor: float) -> None:
    for row, key in enumerate(keys):
        chance = next((results[key].chance for _, results in picked if key in results and results[key].chance is not None), None)
        if chance is not None:
            axes.plot([factor * chance] * 2, [row - 0.4, row + 0.4], color=SOFT, linewidth=3, alpha=0.45, solid_capstyle="butt")


def _label(key: tuple[str, str], picked: list[tuple[Evaluated, Mapping]]) -> str:
    result = next(results[key] for _, results in picked if key in results)
    return result.task.removesuffix(": solution") + (" (control)" if is_control(result) and "control" not in result.task else "")


def is_share(result: Result) -> bool:
    """True for metrics that are shares between 0 and 1 where more is better."""
    return result.higher_is_better and result.low >= 0.0 and result.high <= 1.0
