"""The street plan of a simulated city: which junctions there are and which streets join them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from nmp_train.sim.polyline import resample

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """What tells one city from another. Probabilities are per street, junction arm or side as named."""

    drives_left: bool
    spacing: tuple[float, float]
    """block length between junctions, m"""
    crossing: float
    """chance of a crossing on a junction arm"""
    midblock: float
    """chance of a crossing between junctions on a long street"""
    median: float
    """chance that a main road has a raised median"""
    driveways: float
    """driveway openings per 100 m of kerb"""
    parking: float
    """chance of parking bays on a side"""
    bend: float
    """amplitude of the bends in the street plan, m"""


STYLES: dict[str, Style] = {
    "boston-seaport": Style(False, (88, 125), 0.80, 0.45, 0.70, 1.6, 0.55, 12),
    "singapore-onenorth": Style(True, (88, 130), 0.55, 0.35, 0.80, 1.0, 0.15, 22),
    "singapore-hollandvillage": Style(True, (80, 115), 0.45, 0.25, 0.60, 3.2, 0.20, 16),
    "singapore-queenstown": Style(True, (85, 125), 0.60, 0.35, 0.75, 1.4, 0.15, 20),
}
"""Rough habits of the four cities of nuScenes, by location; other names get those of Boston."""

ARTERIAL, COLLECTOR, LOCAL = 2, 1, 0


@dataclass
class PlannedStreet:
    """A street between two junctions; ``b`` is -1 where it leaves the city."""

    a: int
    b: int
    centre: Array
    """[N, 2] reference line from a to b, m"""
    rank: int


@dataclass
class Plan:
    """Junction positions [J, 2] (m) and the streets between them."""

    nodes: Array
    streets: list[PlannedStreet] = field(default_factory=list)


def min_radius(points: Array) -> float:
    """Return the radius (m) of the tightest bend of a polyline [N, 2] with about a metre between points."""
    tangent = gaussian_filter1d(np.gradient(points, axis=0), 2.0, axis=0, mode="nearest")
    turn = np.abs(np.gradient(np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))))
    return float(1 / max(turn.max(), 1e-6))


def make_plan(rng: np.random.Generator, size_m: float, style: Style) -> Plan:
    """Draw a bent, jittered and thinned grid with a few diagonals, without dead ends inside."""
    margin = min(32.0, 0.10 * size_m)
    index, nodes = _grid_nodes(rng, size_m, margin, style)
    edges = _grid_edges(rng, index, nodes)
    _prune(edges)
    tangents = _line_tangents(index, nodes)
    streets = [
        PlannedStreet(a, b, _curve(rng, nodes, tangents, a, b, line), rank) for (a, b), (line, rank) in edges.items()
    ]
    streets = _merge_bends(streets)
    used = sorted({n for s in streets for n in (s.a, s.b)})
    streets += _stubs(rng, nodes, used, streets, size_m)
    renumber = {old: new for new, old in enumerate(used)}
    for street in streets:
        street.a, street.b = renumber[street.a], renumber.get(street.b, -1)
    return Plan(nodes[used], streets)


def _grid_nodes(
    rng: np.random.Generator, size: float, margin: float, style: Style
) -> tuple[dict[tuple[int, int], int], Array]:
    sx, sy = rng.uniform(*style.spacing, size=2)
    sx, sy = (min(s, (size - 2 * margin) / 2.4) for s in (sx, sy))
    turn = rng.uniform(-0.45, 0.45)
    shear = rng.uniform(-0.18, 0.18)
    reach = int(size / min(sx, sy)) + 2
    waves = [(rng.uniform(0, 2 * np.pi, 2), rng.uniform(0, 2 * np.pi), rng.uniform(260, 480)) for _ in range(3)]
    index: dict[tuple[int, int], int] = {}
    nodes: list[Array] = []
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            p = np.array([(i + shear * j) * sx, j * sy]) + rng.normal(0, 0.07 * min(sx, sy), 2)
            p = np.array([np.cos(turn) * p[0] - np.sin(turn) * p[1], np.sin(turn) * p[0] + np.cos(turn) * p[1]])
            for (aim, push), phase, length in waves:
                wave = np.sin((p[0] * np.cos(aim) + p[1] * np.sin(aim)) * 2 * np.pi / length + phase)
                p = p + style.bend * wave * np.array([np.cos(push), np.sin(push)]) * 0.8
            p = p + size / 2
            if (p > margin).all() and (p < size - margin).all():
                index[(i, j)] = len(nodes)
                nodes.append(p)
    return index, np.asarray(nodes)


Edges = dict[tuple[int, int], tuple[str, int]]


def _grid_edges(rng: np.random.Generator, index: dict[tuple[int, int], int], nodes: Array) -> Edges:
    ranks: dict[str, int] = {}
    for axis in "ij":
        values = sorted({k[0 if axis == "i" else 1] for k in index})
        for n, value in enumerate(values):
            ranks[f"{axis}{value}"] = int(rng.choice([ARTERIAL, COLLECTOR, LOCAL], p=[0.3, 0.36, 0.34]))
            if n == len(values) // 2:
                ranks[f"{axis}{value}"] = ARTERIAL
    edges: Edges = {}
    for (i, j), a in index.items():
        for step, line in (((1, 0), f"j{j}"), ((0, 1), f"i{i}")):
            b = index.get((i + step[0], j + step[1]))
            keep = rng.random() > (0.05 if ranks[line] == ARTERIAL else 0.18)
            if b is not None and keep:
                edges[(a, b)] = (line, ranks[line])
        corner = index.get((i + 1, j + 1))
        if corner is not None and rng.random() < 0.07:
            edges[(a, corner)] = ("", int(rng.choice([COLLECTOR, LOCAL])))
    for a, b in [e for e, (line, _) in edges.items() if not line]:
        if min(_arm_angles(nodes, edges, a, b), _arm_angles(nodes, edges, b, a)) < np.radians(38):
            del edges[(a, b)]
    return edges


def _arm_angles(nodes: Array, edges: Edges, at: int, to: int) -> float:
    """Smallest angle (rad) between the street at -> to and the other streets at the junction."""
    d = nodes[to] - nodes[at]
    angles = [np.pi]
    for a, b in edges:
        if at in (a, b) and to not in (a, b):
            e = nodes[b if a == at else a] - nodes[at]
            angles.append(float(np.arccos(np.clip(d @ e / np.linalg.norm(d) / np.linalg.norm(e), -1, 1))))
    return min(angles)


def _prune(edges: Edges) -> None:
    """Drop dead ends, then all but the largest connected part."""
    while True:
        degree: dict[int, int] = {}
        for a, b in edges:
            degree[a] = degree.get(a, 0) + 1
            degree[b] = degree.get(b, 0) + 1
        dead = [e for e in edges if degree[e[0]] < 2 or degree[e[1]] < 2]
        if not dead or len(dead) == len(edges):
            break
        for e in dead:
            del edges[e]
    group = {n: n for e in edges for n in e}

    def root(n: int) -> int:
        while group[n] != n:
            n = group[n]
        return n

    for a, b in edges:
        group[root(a)] = root(b)
    roots = [root(a) for a, _ in edges]
    largest = max(set(roots), key=lambda r: (roots.count(r), r)) if roots else -1
    for e in [e for e in edges if root(e[0]) != largest]:
        del edges[e]


def _line_tangents(index: dict[tuple[int, int], int], nodes: Array) -> dict[tuple[int, str], Array]:
    """Directions in which each grid line passes its nodes, so that streets run on smoothly through junctions."""
    out: dict[tuple[int, str], Array] = {}
    for (i, j), n in index.items():
        for step, line in (((1, 0), f"j{j}"), ((0, 1), f"i{i}")):
            after = index.get((i + step[0], j + step[1]), n)
            before = index.get((i - step[0], j - step[1]), n)
            d = nodes[after] - nodes[before]
            if np.any(d):
                out[(n, line)] = d / np.linalg.norm(d)
    return out


def _curve(
    rng: np.random.Generator, nodes: Array, tangents: dict[tuple[int, str], Array], a: int, b: int, line: str
) -> Array:
    p, q = nodes[a], nodes[b]
    chord = q - p
    length = float(np.linalg.norm(chord))
    ta, tb = tangents.get((a, line), chord / length), tangents.get((b, line), chord / length)
    t = np.linspace(0, 1, 60)[:, None]
    h = (2 * t**3 - 3 * t**2 + 1) * p + (t**3 - 2 * t**2 + t) * ta * length
    h = h + (-2 * t**3 + 3 * t**2) * q + (t**3 - t**2) * tb * length
    side = np.array([-chord[1], chord[0]]) / length
    bow = rng.normal(0, 0.018 * length) * 16 * (t * (1 - t)) ** 2
    return resample(h + bow * side, 1.0)


def _merge_bends(streets: list[PlannedStreet]) -> list[PlannedStreet]:
    """Join the two streets at a node of degree 2 into one street with a rounded bend."""
    streets = list(streets)
    while True:
        arms: dict[int, list[PlannedStreet]] = {}
        for s in streets:
            arms.setdefault(s.a, []).append(s)
            arms.setdefault(s.b, []).append(s)
        bend = next((n for n, at in sorted(arms.items()) if len(at) == 2 and _mergeable(at[0], at[1], n)), None)
        if bend is None:
            return streets
        one, two = arms[bend]
        head = one.centre if one.b == bend else one.centre[::-1]
        tail = two.centre if two.a == bend else two.centre[::-1]
        start = one.a if one.b == bend else one.b
        end = two.b if two.a == bend else two.a
        joined = resample(np.concatenate([head, tail[1:]]), 1.0)
        # Leave the ends, where junctions are, in place.
        weight = np.clip(np.minimum(np.arange(len(joined)), np.arange(len(joined))[::-1]) / 25.0, 0, 1)[:, None]
        for sigma in (9.0, 13.0, 18.0, 24.0):
            smooth = gaussian_filter1d(joined, sigma, axis=0, mode="nearest")
            bend_line = resample(weight * smooth + (1 - weight) * joined, 1.0)
            if min_radius(bend_line) > 22:
                break
        joined = bend_line
        rank = one.rank if len(one.centre) > len(two.centre) else two.rank
        streets = [s for s in streets if s is not one and s is not two] + [PlannedStreet(start, end, joined, rank)]


def _mergeable(one: PlannedStreet, two: PlannedStreet, node: int) -> bool:
    ends = {one.a, one.b, two.a, two.b} - {node}
    return one is not two and len(ends) == 2


def _stubs(
    rng: np.random.Generator, nodes: Array, used: list[int], streets: list[PlannedStreet], size: float
) -> list[PlannedStreet]:
    """Short streets that leave the city across its edge."""
    out = []
    for n in used:
        edge = min(nodes[n].min(), (size - nodes[n]).min())
        if edge > 0.2 * size or rng.random() < 0.3:
            continue
        away = np.zeros(2)
        arms = []
        for s in streets:
            if n in (s.a, s.b):
                d = s.centre[min(15, len(s.centre) - 1)] - s.centre[0] if s.a == n else s.centre[-15] - s.centre[-1]
                arms.append(d / np.linalg.norm(d))
                away -= arms[-1]
        if len(arms) > 3 or np.linalg.norm(away) < 0.4:
            continue
        d = away / np.linalg.norm(away)
        if max(float(a @ d) for a in arms) > np.cos(np.radians(60)):
            continue
        length = rng.uniform(45, 75)
        end = nodes[n] + d * length
        if (end < 6).any() or (end > size - 6).any():
            t = np.linspace(0, length, 60)
            inside = ((nodes[n] + t[:, None] * d > 6) & (nodes[n] + t[:, None] * d < size - 6)).all(axis=1)
            length = float(t[inside].max())
        other = [np.linalg.norm(nodes[m] - nodes[n] - d * length) for m in used if m != n]
        if length > 32 and min(other) > 45:
            line = np.stack([nodes[n], nodes[n] + d * length])
            ranks = [s.rank for s in streets if n in (s.a, s.b)]
            out.append(PlannedStreet(n, -1, resample(line, 1.0), int(rng.choice(ranks))))
    return out
