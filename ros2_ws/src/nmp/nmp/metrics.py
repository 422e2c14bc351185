"""Intersection over union, as published: summed over the whole set, then divided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nmp.frame import CLASSES
from nmp.geometry import BevGrid

DISTANCE_EDGES_M = (0.0, 10.0, 20.0, 40.0)
"""edges of the rings around the ego in which scores are broken down, m"""


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

    def percent(self) -> dict[str, float]:
        """Return IoU in percent per class and their mean as ``miou``; a class with an empty union is NaN.

        A NaN class is left out of the mean.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = 100.0 * self.intersection / self.union
        known = iou[np.isfinite(iou)]
        scores = {name: float(value) for name, value in zip(CLASSES, iou, strict=True)}
        scores["miou"] = float(known.mean()) if known.size else float("nan")
        return scores


class Breakdown:
    """IoU of a set in all (``all``), by label of a frame such as its weather, and by distance from the ego."""

    def __init__(self, grid: BevGrid) -> None:
        centres = grid.centres()
        distance = np.hypot(centres[..., 0], centres[..., 1])
        self._rings = {
            f"{near:.0f}-{far:.0f} m": (distance >= near) & (distance < far) for near, far in pairwise(DISTANCE_EDGES_M)
        }
        self.meters: dict[str, IouMeter] = {"all": IouMeter()}

    def add(self, predicted: NDArray[np.uint8], truth: NDArray[np.uint8], labels: Iterable[str] = ()) -> None:
        """Count one frame: masks [3, rows, cols] over the grid, and what the frame is filed under."""
        for name in ("all", *labels):
            self.meters.setdefault(name, IouMeter()).add(predicted, truth)
        for name, ring in self._rings.items():
            self.meters.setdefault(name, IouMeter()).add(predicted * ring, truth * ring)

    def percent(self) -> dict[str, dict[str, float]]:
        """Return the scores of :meth:`IouMeter.percent` by name: all, the labels in order, the rings outwards."""
        labels = sorted(set(self.meters) - {"all", *self._rings})
        return {name: self.meters[name].percent() for name in ("all", *labels, *self._rings) if name in self.meters}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Format scores (percent) in the published order, one row per named system."""
    width = max([len(name) for name in rows] + [6])
    lines = [f"{'':{width}} | Divider | Crossing | Boundary | All(mIoU)"]
    for name, s in rows.items():
        lines.append(
            f"{name:{width}} | {s['divider']:7.2f} | {s['crossing']:8.2f} | {s['boundary']:8.2f} | {s['miou']:9.2f}"
        )
    return "\n".join(lines)
