"""Draws the arc of a run as an SVG: steps as boxes in layers, arrows from what a step reads to the step.

Layered drawing in the manner of Sugiyama, Tagawa and Toda (1981): layers by longest path, crossings reduced by
barycentres, positions by least squares with a minimum distance. Colours are CSS classes, so the page's light and dark
themes apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from megatron_r1.report.records import Step, depths
from megatron_r1.report.text import duration

BOX_HEIGHT, ROW = 46.0, 84.0
GAP, BEND_WIDTH, MARGIN = 18.0, 14.0, 12.0
GROUP = {
    "shards": "data", "probe": "data", "mixture": "score", "influence": "score",
    "checkpoint": "train", "evaluation": "check", "export": "check", "report": "check",
}  # fmt: skip


@dataclass(frozen=True)
class Arrow:
    """From a parent to a child. `weights`: the child starts from the parent's weights; `teacher`: it learns from them, or is
    compared with them while it learns."""

    parent: str
    child: str
    weights: bool = False
    teacher: bool = False


@dataclass
class _Node:
    """A step, or a bend of an arrow that passes a layer (`step` is None)."""

    layer: int
    width: float
    step: Step | None = None
    x: float = 0.0


def arrows(steps: Sequence[Step]) -> list[Arrow]:
    """The arrows worth drawing: all that carry weights, of the others only those not implied by a longer path."""
    by_name = {step.name: step for step in steps}
    parents = {s.name: list(dict.fromkeys(p for _, p, _ in s.parents if p in by_name)) for s in steps}
    ancestors: dict[str, set[str]] = {}

    def above(name: str) -> set[str]:
        if name not in ancestors:
            ancestors[name] = set()
            for parent in parents[name]:
                ancestors[name] |= {parent} | above(parent)
        return ancestors[name]

    found = []
    for step in steps:
        roles = {name: role for role, name, _ in step.parents}
        for parent in parents[step.name]:
            both_train = by_name[parent].kind == step.kind == "checkpoint"
            implied = any(parent in above(other) for other in parents[step.name] if other != parent)
            if both_train or not implied:
                teacher = both_train and roles[parent] in ("teacher", "reference")
                found.append(Arrow(parent, step.name, weights=both_train and not teacher, teacher=teacher))
    return found


FAMILY = 3
"""From so many steps of one stage whose names differ after the last dash only, one box stands for all."""


def gathered(steps: Sequence[Step]) -> list[Step]:
    """The steps with every family of a recipe (proxy-0, proxy-1, ...) as one: its name counts it, its time is the sum."""
    families: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        if "-" in step.name:
            families.setdefault((step.name.rpartition("-")[0], step.stage), []).append(step)
    label = {s.name: f"{prefix}-* ({len(found)})" for (prefix, _), found in families.items() if len(found) >= FAMILY for s in found}
    made: dict[str, Step] = {}
    for step in steps:
        parents = dict.fromkeys((role, label.get(name, name), "" if name in label else digest) for role, name, digest in step.parents)
        name = label.get(step.name, step.name)
        before = made.get(name)
        together = tuple(dict.fromkeys([*(before.parents if before else ()), *parents]))
        made[name] = replace(step, name=name, parents=together, seconds=step.seconds + (before.seconds if before else 0.0))
    return list(made.values())


def draw_arc(steps: Sequence[Step], title: str) -> str:
    """The SVG element. `title` is what a screen reader says for the picture."""
    if not steps:
        return ""
    edges = arrows(steps)
    depth = depths(tuple(steps))
    nodes: dict[str, _Node] = {}
    for step in steps:
        nodes[step.name] = _Node(depth[step.name], _box_width(step), step)
    routes = {edge: _route(edge, nodes) for edge in edges}
    layers = _ordered_layers(nodes, routes.values())
    _place(layers, nodes, list(routes.values()))
    left = min(n.x - n.width / 2 for n in nodes.values()) - MARGIN
    right = max(n.x + n.width / 2 for n in nodes.values()) + MARGIN
    height = len(layers) * ROW - (ROW - BOX_HEIGHT) + 2 * MARGIN
    parts = [
        f'<svg class="arc" role="img" aria-label="{escape(title, quote=True)}" viewBox="{left:.1f} 0 {right - left:.1f} {height:.1f}"'
        f' width="{right - left:.0f}" height="{height:.0f}" xmlns="http://www.w3.org/2000/svg">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" orient="auto-start-reverse">'
        '<path class="tip" d="M0 0.6 L8 4 L0 7.4 z"/></marker></defs>',
    ]
    parts += [_arrow(edge, [nodes[name] for name in route]) for edge, route in routes.items()]
    parts += [_box(node) for node in nodes.values() if node.step is not None]
    return "\n".join([*parts, "</svg>"])


def _box_width(step: Step) -> float:
    # 7.6 px a letter at 13 px bold, 6.3 px at 11.5 px: wide enough for every common sans-serif font
    return max(7.6 * len(step.name), 6.3 * len(_second_line(step)), 60.0) + 26.0


def _second_line(step: Step) -> str:
    return step.stage if step.seconds < 0 else f"{step.stage} · {duration(step.seconds)}"


def _route(edge: Arrow, nodes: dict[str, _Node]) -> list[str]:
    """Names of the nodes an arrow passes; adds a bend to `nodes` for every layer between its ends."""
    route = [edge.parent]
    for layer in range(nodes[edge.parent].layer + 1, nodes[edge.child].layer):
        bend = f"{edge.parent}>{edge.child}@{layer}"
        nodes[bend] = _Node(layer, BEND_WIDTH)
        route.append(bend)
    return [*route, edge.child]


def _ordered_layers(nodes: dict[str, _Node], routes: Iterable[list[str]]) -> list[list[str]]:
    links = [pair for route in routes for pair in pairwise(route)]
    up: dict[str, list[str]] = {name: [] for name in nodes}
    down: dict[str, list[str]] = {name: [] for name in nodes}
    for parent, child in links:
        up[child].append(parent)
        down[parent].append(child)
    layers: list[list[str]] = [[] for _ in range(max(n.layer for n in nodes.values()) + 1)]
    for name, node in nodes.items():
        layers[node.layer].append(name)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, down)
    for sweep in range(12):
        forward = sweep % 2 == 0
        for index in range(1, len(layers)) if forward else range(len(layers) - 2, -1, -1):
            fixed = {name: i for i, name in enumerate(layers[index - 1 if forward else index + 1])}
            near = up if forward else down
            old = {name: i for i, name in enumerate(layers[index])}

            def centre(name: str, near: dict = near, fixed: dict = fixed, old: dict = old) -> float:
                places = [fixed[other] for other in near[name] if other in fixed]
                return sum(places) / len(places) if places else old[name]

            layers[index].sort(key=centre)
        crossings = _crossings(layers, down)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    return best


def _crossings(layers: list[list[str]], down: dict[str, list[str]]) -> int:
    total = 0
    for upper, lower in pairwise(layers):
        place = {name: i for i, name in enumerate(lower)}
        ends = [(i, place[child]) for i, name in enumerate(upper) for child in down[name]]
        total += sum(1 for k, (a, b) in enumerate(ends) for c, d in ends[:k] if (a - c) * (b - d) < 0)
    return total


def _place(layers: list[list[str]], nodes: dict[str, _Node], routes: list[list[str]]) -> None:
    """Horizontal positions: every node near the mean of its neighbours, neighbours in a layer never overlapping."""
    near: dict[str, list[str]] = {name: [] for name in nodes}
    for route in routes:
        for parent, child in pairwise(route):
            near[parent].append(child)
            near[child].append(parent)
    for layer in layers:
        _spread(layer, nodes, [0.0] * len(layer))
    for sweep in range(60):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _spread(layer, nodes, [_centre(nodes[name], [nodes[other] for other in near[name]]) for name in layer])


def _centre(node: _Node, near: list[_Node]) -> float:
    """Mean position of the neighbours; bends count more for each other, so that long arrows run straight."""
    if not near:
        return node.x
    weights = [6.0 if node.step is None and other.step is None else 1.0 for other in near]
    return sum(w * other.x for w, other in zip(weights, near, strict=True)) / sum(weights)


def _spread(layer: list[str], nodes: dict[str, _Node], wanted: list[float]) -> None:
    """Least-squares positions with minimum distances: isotonic regression (pool adjacent violators) after a shift."""
    offsets, offset = [], 0.0
    for i, name in enumerate(layer):
        if i:
            offset += (nodes[layer[i - 1]].width + nodes[name].width) / 2 + GAP
        offsets.append(offset)
    pools: list[tuple[float, int]] = []
    for value, shift in zip(wanted, offsets, strict=True):
        mean, size = value - shift, 1
        while pools and pools[-1][0] >= mean:
            other, many = pools.pop()
            mean, size = (mean * size + other * many) / (size + many), size + many
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    for name, mean, shift in zip(layer, flat, offsets, strict=True):
        nodes[name].x = mean + shift


def _top(node: _Node) -> float:
    return MARGIN + node.layer * ROW


def _arrow(edge: Arrow, route: list[_Node]) -> str:
    points = [(route[0].x, _top(route[0]) + BOX_HEIGHT)]
    for node in route[1:-1]:
        points += [(node.x, _top(node)), (node.x, _top(node) + BOX_HEIGHT)]
    points.append((route[-1].x, _top(route[-1]) - 1.5))
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        middle = (y0 + y1) / 2
        straight = i % 2 == 1
        path += f" L{x1:.1f} {y1:.1f}" if straight else f" C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    kind = "weights" if edge.weights else "teacher" if edge.teacher else "reads"
    return f'<path class="edge {kind}" d="{path}" marker-end="url(#tip)"/>'


def _box(node: _Node) -> str:
    step = node.step
    assert step is not None
    x, y = node.x - node.width / 2, _top(node)
    group = GROUP.get(step.kind, "check")
    return (
        f'<g class="box {group}"><title>{escape(step.name)}: {escape(step.stage)}, {step.fingerprint[:8]}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{node.width:.1f}" height="{BOX_HEIGHT}" rx="7"/>'
        f'<text class="name" x="{node.x:.1f}" y="{y + 19:.1f}">{escape(step.name)}</text>'
        f'<text class="time" x="{node.x:.1f}" y="{y + 36:.1f}">{escape(_second_line(step))}</text></g>'
    )
