"""How well layers and map elements agree with the truth. docs/evaluation.md defines every score.

Layers: intersection over union as published, summed over the whole set and then divided. Elements: the Chamfer
distance of HDMapNet (Li et al., ICRA 2022) and the average precision of VectorMapNet (Liu et al., ICML 2023). What is
counted are whole numbers and scores of elements, so that parts of a set, merged in any order, give exactly what the
whole set gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString, Point, box
from shapely.geometry.base import BaseGeometry

from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid
from nmp.truth import EDGE_MARGIN_M
from nmp.vectorize import VectorElement

NEAREST_RING_M = 10.0
"""radius of the innermost ring around the ego in which scores are broken down, see :func:`distance_edges`"""
FARTHEST_M = 5.0
"""the Chamfer distance counts what is further away, or missing altogether, as this far, as HDMapNet's evaluation"""
SPACING_M = 0.3
"""lines are compared at points this far apart"""
THRESHOLDS_M = (0.5, 1.0, 1.5)
"""an element is right when its Chamfer distance to a true one is less than this"""
SHORTEST_TRUTH_M = 1.0
"""shorter pieces, mostly corners that the edge of the region cuts off, are no elements that anyone should find"""
_UM = 1e6


def distance_edges(grid: BevGrid) -> tuple[float, ...]:
    """Return the edges (m) of the rings around the ego in which scores are broken down: 0, 10, 20, 40, ...

    Each reaches twice as far as the one inside of it, the last as far as the corners of the grid or beyond.
    """
    edges = [0.0, NEAREST_RING_M]
    while edges[-1] < grid.reach:
        edges.append(2 * edges[-1])
    return tuple(edges)


@dataclass
class IouMeter:
    """Running intersections and unions per class (pixels)."""

    intersection: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    union: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    frames: int = 0

    def add(self, predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Count one frame: two masks [3, rows, cols] of 0 and 1, classes in the order of ``CLASSES``."""
        p, t = predicted.astype(bool), truth.astype(bool)
        self.intersection += (p & t).sum(axis=(1, 2))
        self.union += (p | t).sum(axis=(1, 2))
        self.frames += 1

    def merge(self, other: IouMeter) -> None:
        """Count what another meter has counted, too."""
        self.intersection += other.intersection
        self.union += other.union
        self.frames += other.frames

    def percent(self) -> dict[str, float]:
        """Return IoU in percent per class and their mean as ``miou``; a class with an empty union is NaN.

        A NaN class is left out of the mean.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = 100.0 * self.intersection / self.union
        return _with_mean(iou, "miou")


@dataclass
class ChamferMeter:
    """Running distances between predicted and true lines, per class and way.

    Way 0, precision: from every point of a predicted line to the nearest true line of its class in the same frame.
    Way 1, recall: from every point of a true line to the nearest predicted one. HDMapNet calls them CD_P and CD_L.
    """

    micrometres: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(CLASSES), 2), np.int64))
    points: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(CLASSES), 2), np.int64))

    def add(self, index: int, way: int, distance: Array) -> None:
        """Count the distances [N] (m) of points on lines of one class."""
        # Whole numbers: their sum is the same in any order.
        self.micrometres[index, way] += np.rint(np.minimum(distance, FARTHEST_M) * _UM).astype(np.int64).sum()
        self.points[index, way] += len(distance)

    def merge(self, other: ChamferMeter) -> None:
        """Count what another meter has counted, too."""
        self.micrometres += other.micrometres
        self.points += other.points

    def metres(self) -> dict[str, dict[str, float]]:
        """Return m by way and class: ``precision``, ``recall``, and ``chamfer``, their mean.

        A way with no point to measure from is NaN, and ``chamfer`` is the other: a class that is never found has the
        largest distance, ``FARTHEST_M``. ``mean`` of a row is over the classes that are not NaN.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = (self.micrometres / self.points / _UM).T
        both = np.where(np.isnan(precision), recall, np.where(np.isnan(recall), precision, (precision + recall) / 2))
        rows = {"precision": precision, "recall": recall, "chamfer": both}
        return {name: _with_mean(row, "mean") for name, row in rows.items()}


@dataclass
class PrecisionMeter:
    """The elements found so far, their scores, and which of them were right."""

    found: list[list[tuple[float, tuple[bool, ...]]]] = field(default_factory=lambda: [[] for _ in CLASSES])
    """per class: score, and whether it was right at each of ``THRESHOLDS_M``"""
    true: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    """true elements per class"""

    def merge(self, other: PrecisionMeter) -> None:
        """Count what another meter has counted, too."""
        for mine, theirs in zip(self.found, other.found, strict=True):
            mine.extend(theirs)
        self.true += other.true

    def percent(self) -> dict[str, dict[str, float]]:
        """Return average precision in percent by threshold (``0.5 m``, ...) and class, and over all thresholds.

        ``mean`` of a row is over the classes, the row ``all`` is the mean of the others. A class without true elements
        is NaN, and left out of the means.
        """
        values = np.array([[self._average(c, k) for c in range(len(CLASSES))] for k in range(len(THRESHOLDS_M))])
        rows = {f"{m:g} m": row for m, row in zip(THRESHOLDS_M, values, strict=True)}
        return {name: _with_mean(row, "mean") for name, row in {"all": values.mean(axis=0), **rows}.items()}

    def _average(self, index: int, threshold: int) -> float:
        """Return the area (%) under the curve of precision over recall, made to fall as in the PASCAL VOC challenge."""
        if not self.true[index]:
            return float("nan")
        if not self.found[index]:
            return 0.0
        scores = np.array([score for score, _ in self.found[index]])
        right = np.array([hits[threshold] for _, hits in self.found[index]])
        # Elements of one score enter together: no order among them is better than another.
        steps, place = np.unique(-scores, return_inverse=True)
        right_so_far = np.cumsum(np.bincount(place, weights=right, minlength=len(steps)))
        precision = right_so_far / np.cumsum(np.bincount(place, minlength=len(steps)))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        return float(100.0 * (np.diff(right_so_far, prepend=0.0) * best).sum() / self.true[index])


class Breakdown:
    """Scores of a set in all (``all``), by label of a frame such as its weather, and by place such as the distance."""

    def __init__(self, grid: BevGrid) -> None:
        self._grid = grid
        centres = grid.centres()
        distance = np.hypot(centres[..., 0], centres[..., 1])
        edges = distance_edges(grid)
        self._rings = {
            f"{near:.0f}-{far:.0f} m": (distance >= near) & (distance < far) for near, far in pairwise(edges)
        }
        circles = [Point(0, 0).buffer(edge, quad_segs=64) for edge in edges]
        self._areas = dict(zip(self._rings, (outer - inner for inner, outer in pairwise(circles)), strict=True))
        self._places = set(self._rings)
        self.meters: dict[str, IouMeter] = {"all": IouMeter()}
        self.chamfer: dict[str, ChamferMeter] = {}
        """empty when only layers were added"""
        self.precision: dict[str, PrecisionMeter] = {}
        """the same; not by place, other than the rings, which elements are cut at"""

    def add(
        self,
        predicted: NDArray[np.uint8],
        truth: NDArray[np.uint8],
        labels: Iterable[str] = (),
        *,
        places: Mapping[str, NDArray[np.bool_]] | None = None,
        elements: Sequence[VectorElement] | None = None,
        true_lines: Mapping[str, Sequence[LineString]] | None = None,
    ) -> None:
        """Count one frame.

        :param predicted: mask [3, rows, cols] over the grid
        :param labels: what the frame is filed under
        :param places: more parts [rows, cols] of the grid, beside the rings, that are scored on their own
        :param elements: what was found, in the ego frame
        :param true_lines: as :func:`nmp.truth.truth_lines`; given together with ``elements``
        """
        names = ("all", *labels)
        parts = {**self._rings, **(places or {})}
        self._places |= set(parts)
        frame = IouMeter()
        frame.add(predicted, truth)
        for name in names:
            self.meters.setdefault(name, IouMeter()).merge(frame)
        for name, part in parts.items():
            self.meters.setdefault(name, IouMeter()).add(predicted * part, truth * part)
        if elements is not None and true_lines is not None:
            self._add_lines(names, parts, elements, true_lines)

    def _add_lines(
        self,
        names: Sequence[str],
        parts: Mapping[str, NDArray[np.bool_]],
        elements: Sequence[VectorElement],
        true_lines: Mapping[str, Sequence[LineString]],
    ) -> None:
        chamfer = {name: ChamferMeter() for name in ("all", *parts)}
        precision = {name: PrecisionMeter() for name in ("all", *self._areas)}
        for index, name in enumerate(CLASSES):
            found = [(line, e.score) for e in elements if e.name == name for line in element_lines(e, self._grid)]
            mine, true = [line for line, _ in found], [t for t in true_lines[name] if t.length >= SHORTEST_TRUTH_M]
            ways = _distances(mine, true), _distances(true, mine)
            for way, (points, distance, _) in enumerate(ways):
                nearest = distance.min(axis=1, initial=FARTHEST_M)
                chamfer["all"].add(index, way, nearest)
                rows, cols = self._pixels(points)
                for part, mask in parts.items():
                    chamfer[part].add(index, way, nearest[mask[rows, cols]])
            precision["all"].found[index] = _matches([s for _, s in found], (ways[0][2] + ways[1][2].T) / 2)
            precision["all"].true[index] = len(true)
            for ring, area in self._areas.items():
                pieces = [(piece, score) for line, score in found for piece in _pieces(line, area)]
                here, there = [p for p, _ in pieces], [p for t in true for p in _pieces(t, area)]
                apart = (_distances(here, there)[2] + _distances(there, here)[2].T) / 2
                precision[ring].found[index] = _matches([s for _, s in pieces], apart)
                precision[ring].true[index] = len(there)
        for name in names:
            self.chamfer.setdefault(name, ChamferMeter()).merge(chamfer["all"])
            self.precision.setdefault(name, PrecisionMeter()).merge(precision["all"])
        for name in parts:
            self.chamfer.setdefault(name, ChamferMeter()).merge(chamfer[name])
        for name in self._areas:
            self.precision.setdefault(name, PrecisionMeter()).merge(precision[name])

    def _pixels(self, points: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        g = self._grid
        cells = np.floor((points + [g.length / 2, g.width / 2]) / g.resolution).astype(np.int64)
        return np.clip(cells[:, 1], 0, g.rows - 1), np.clip(cells[:, 0], 0, g.cols - 1)

    def merge(self, other: Breakdown) -> None:
        """Count what another breakdown of the same grid has counted, too."""
        self._places |= other._places
        for name, meter in other.meters.items():
            self.meters.setdefault(name, IouMeter()).merge(meter)
        for name, distances in other.chamfer.items():
            self.chamfer.setdefault(name, ChamferMeter()).merge(distances)
        for name, elements in other.precision.items():
            self.precision.setdefault(name, PrecisionMeter()).merge(elements)

    def percent(self) -> dict[str, dict[str, float]]:
        """Return the scores of :meth:`IouMeter.percent` by name: all, the labels in order, the rings, other places."""
        labels = sorted(set(self.meters) - {"all"} - self._places)
        order = ("all", *labels, *self._rings, *sorted(self._places - set(self._rings)))
        return {name: self.meters[name].percent() for name in order if name in self.meters}

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return :meth:`percent` with ``frames`` and, where elements were added, more in every row.

        ``chamfer_m`` is :meth:`ChamferMeter.metres`, ``average_precision`` is :meth:`PrecisionMeter.percent`.
        """
        rows: dict[str, dict[str, Any]] = {}
        for name, iou in self.percent().items():
            rows[name] = {**iou, "frames": self.meters[name].frames}
            if name in self.chamfer:
                rows[name]["chamfer_m"] = self.chamfer[name].metres()
            if name in self.precision:
                rows[name]["average_precision"] = self.precision[name].percent()
        return rows


def element_lines(element: VectorElement, grid: BevGrid) -> list[LineString]:
    """Return the lines of an element as the truth has them: without what runs along the edge of the region.

    The outline of a crossing that the edge cuts off is open there, and may be in pieces.
    """
    if element.geometry.geom_type == "LineString":
        return [element.geometry]
    half_l, half_w = grid.length / 2 - EDGE_MARGIN_M, grid.width / 2 - EDGE_MARGIN_M
    cut = element.geometry.exterior.intersection(box(-half_l, -half_w, half_l, half_w))
    parts = shapely.get_parts(shapely.line_merge(cut) if cut.geom_type == "MultiLineString" else cut)
    return [part for part in parts if part.geom_type == "LineString"]


def _sampled(lines: Sequence[BaseGeometry]) -> tuple[Array, NDArray[np.int64]]:
    """Return points [N, 2] along the lines, both ends among them, and the number of the line of each point."""
    counts = [max(2, round(line.length / SPACING_M) + 1) for line in lines]
    if not counts:
        return np.zeros((0, 2)), np.zeros(0, np.int64)
    owner = np.repeat(np.arange(len(lines)), counts)
    share = np.concatenate([np.linspace(0.0, 1.0, n) for n in counts])
    on = shapely.line_interpolate_point(np.array(lines, object)[owner], share, normalized=True)
    return shapely.get_coordinates(on), owner


def _distances(lines: Sequence[LineString], others: Sequence[LineString]) -> tuple[Array, Array, Array]:
    """Return points [N, 2] along lines, how far (m) each is from the others [N, others], and the mean of each line."""
    points, owner = _sampled(lines)
    distance = shapely.distance(shapely.points(points)[:, None], np.array(others, object)[None])
    total = np.zeros((len(lines), len(others)))
    np.add.at(total, owner, distance)
    return points, distance, total / np.bincount(owner, minlength=len(lines))[:, None]


def _pieces(line: LineString, area: BaseGeometry) -> list[LineString]:
    """Return what of a line lies in an area, without what is too short to be counted."""
    parts = shapely.get_parts(line.intersection(area))
    return [part for part in parts if part.geom_type == "LineString" and part.length >= SHORTEST_TRUTH_M]


def _matches(scores: Sequence[float], distance: Array) -> list[tuple[float, tuple[bool, ...]]]:
    """Return the score and the hits of each found element, from its Chamfer distances [found, true] (m).

    As published: the best first, each is compared with the true element that it is nearest to. It is right when that
    is near enough and was not taken by a better one.
    """
    taken = np.zeros((len(THRESHOLDS_M), distance.shape[1]), bool)
    out = []
    # Equal scores go by distance, then all that is left are equal elements: the order of the list does not matter.
    nearest = distance.min(axis=1, initial=np.inf)
    for k in np.lexsort((nearest, -np.asarray(scores))):
        hits = [False] * len(THRESHOLDS_M)
        if distance.shape[1]:
            best = int(distance[k].argmin())
            for t, threshold in enumerate(THRESHOLDS_M):
                hits[t] = bool(distance[k, best] < threshold and not taken[t, best])
                taken[t, best] |= hits[t]
        out.append((float(scores[k]), tuple(hits)))
    return out


def _with_mean(values: Array, name: str) -> dict[str, float]:
    known = values[np.isfinite(values)]
    scores = {key: float(value) for key, value in zip(CLASSES, values, strict=True)}
    scores[name] = float(known.mean()) if known.size else float("nan")
    return scores


def format_vectors(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the element scores of rows as :meth:`Breakdown.scores`: average precision (percent) and Chamfer (m)."""
    width = max([len(name) for name in rows] + [6])
    heads = [*(f"AP {name}" for name in CLASSES), "AP (%)", *(f"CD {name}" for name in CLASSES), "CD (m)"]
    lines = [" | ".join([" " * width, *heads])]
    for name, row in rows.items():
        values: list[float] = []
        for key, inner in (("average_precision", "all"), ("chamfer_m", "chamfer")):
            values += row[key][inner].values() if key in row else [float("nan")] * (len(CLASSES) + 1)
        cells = ["-".rjust(len(h)) if np.isnan(v) else f"{v:{len(h)}.2f}" for h, v in zip(heads, values, strict=True)]
        lines.append(" | ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format scores (percent) in the published order, one row per named system."""
    width = max([len(name) for name in rows] + [6])
    lines = [f"{'':{width}} | Divider | Crossing | Boundary | All(mIoU)"]
    for name, s in rows.items():
        lines.append(
            f"{name:{width}} | {s['divider']:7.2f} | {s['crossing']:8.2f} | {s['boundary']:8.2f} | {s['miou']:9.2f}"
        )
    return "\n".join(lines)
