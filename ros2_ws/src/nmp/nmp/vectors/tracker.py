"""Identities for the elements around the car, so that a line keeps its number from frame to frame.

Every frame is turned into elements anew. Those of one class are assigned to those known from earlier frames (Kuhn,
"The Hungarian method for the assignment problem", 1955) such that the length that runs along together is greatest in
all; near counts more than far. What is not found for a while keeps its number for its return; then it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from nmp.frame import CLASSES, LocalMap
from nmp.geometry import Array, yaw_of
from nmp.vectorize import VectorElement, along, mean_along, outline, vectorize
from nmp.vectors.elements import MapElement

NEAR_M = 1.5
"""parts of two elements that are further apart do not run along together"""
SHARED = 0.4
"""of the shorter of two elements, so much must run along the other for them to be one"""
SPACING_M = 1.0
"""elements are compared at points this far apart"""
FORGET_S = 5.0
"""what was not found for so long is forgotten"""


Traversals = Callable[[str, Array], NDArray[np.int64] | None]
"""tells how many drives saw points [N, 2] (map frame, m) of a city; None where that is not known"""


@dataclass(frozen=True)
class Tracked:
    """The elements of one frame."""

    stamp_ns: int
    elements: tuple[MapElement, ...]
    gone: tuple[tuple[str, int], ...]
    """class and id of what was reported before and is not there any more: each is named until it is forgotten, since
    whoever listens may have missed a message"""


@dataclass
class _Known:
    element: MapElement
    lost_ns: int | None = None
    """stamp of the first frame that did not find it; None while it is found"""


class ElementTracker:
    """Follows the elements of a drive. Not for several threads at once."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._left: dict[int, _Known] = {}
        """of another city or another time: named as gone, and never found again"""
        self._location = ""
        self._stamp_ns = 0
        self._next_id = 1

    def update(self, local_map: LocalMap, traversals: Traversals | None = None) -> Tracked:
        """Return the elements of the next frame, in the map frame.

        A stamp before the last one, or another city, ends everything known.

        :param traversals: what the prior knows of a city
        """
        now = local_map.stamp_ns
        if local_map.location != self._location or now < self._stamp_ns:
            # Stamps of another time say nothing now.
            self._left = {i: _Known(k.element, now) for i, k in (self._left | self._known).items()}
            self._known = {}
        self._location, self._stamp_ns = local_map.location, now
        self._forget(now)
        seen = (local_map.evidence > 0).astype(np.float32)
        found = vectorize(local_map.probabilities * seen, local_map.grid)
        elements = []
        for name in CLASSES:
            elements += self._follow(name, [e for e in found if e.name == name], local_map)
        present = {e.id for e in elements}
        for number, known in self._known.items():
            known.lost_ns = None if number in present else (known.lost_ns or now)
        gone = {i: k for i, k in (self._left | self._known).items() if k.lost_ns is not None}
        if traversals is not None:
            elements = _with_traversals(elements, lambda points: traversals(local_map.location, points))
        return Tracked(now, tuple(elements), tuple((k.element.name, i) for i, k in sorted(gone.items())))

    def _forget(self, now: int) -> None:
        for table in (self._known, self._left):
            for number in [i for i, k in table.items() if k.lost_ns is not None and now - k.lost_ns > FORGET_S * 1e9]:
                del table[number]

    def _follow(self, name: str, found: Sequence[VectorElement], local_map: LocalMap) -> list[MapElement]:
        pose = local_map.map_from_base
        shapes = [_in_map(e.geometry, pose) for e in found]
        ids = [i for i, k in self._known.items() if k.element.name == name]
        before = assign(shapes, [self._known[i].element.geometry for i in ids])
        out = []
        for element, shape, place in zip(found, shapes, before, strict=True):
            if place is None:
                number, first, frames = self._next_id, local_map.stamp_ns, 0
                self._next_id += 1
            else:
                old = self._known[ids[place]].element
                number, first, frames = old.id, old.first_seen_ns, old.frames
            out.append(
                MapElement(
                    id=number,
                    name=name,
                    geometry=shape,
                    confidence=element.score,
                    first_seen_ns=first,
                    last_seen_ns=local_map.stamp_ns,
                    frames=frames + 1,
                    evidence=mean_along(local_map.evidence, element.geometry, local_map.grid),
                )
            )
        for new in out:
            self._known[new.id] = _Known(new)
        return out


def _with_traversals(
    elements: Sequence[MapElement], ask: Callable[[Array], NDArray[np.int64] | None]
) -> list[MapElement]:
    """Return elements with how many drives saw them (median along each); at least this one did."""
    parts = [along(outline(element.geometry), SPACING_M) for element in elements]
    counts = ask(np.concatenate(parts)) if parts else None
    if counts is None:
        return list(elements)
    each = np.split(counts, np.cumsum([len(part) for part in parts])[:-1])
    return [replace(e, traversals=max(int(np.median(seen)), 1)) for e, seen in zip(elements, each, strict=True)]


def assign(new: Sequence[BaseGeometry], old: Sequence[BaseGeometry]) -> list[int | None]:
    """Return for each of ``new`` the index of the one of ``old`` that it continues, or None.

    No two continue the same one.
    """
    out: list[int | None] = [None] * len(new)
    if not new or not old:
        return out
    mine, theirs = [outline(a) for a in new], [outline(b) for b in old]
    together = np.zeros((len(new), len(old)))
    near = shapely.dwithin(np.array(mine, object)[:, None], np.array(theirs, object)[None], NEAR_M)
    for a, b in np.argwhere(near):
        together[a, b] = _together(mine[a], theirs[b])
    for a, b in zip(*linear_sum_assignment(together, maximize=True), strict=True):
        if together[a, b] > 0:
            out[a] = int(b)
    return out


def _together(new: BaseGeometry, old: BaseGeometry) -> float:
    """Return the length (m) that two lines have in common, where near counts more; 0 when that is too little."""
    shorter, longer = sorted((new, old), key=lambda line: line.length)
    distance = shapely.distance(shapely.points(along(shorter, SPACING_M)), longer)
    near = distance < NEAR_M
    if near.mean() < SHARED:
        return 0.0
    return float((1.0 - distance[near] / NEAR_M).sum() * SPACING_M)


def _in_map(shape: BaseGeometry, map_from_base: Array) -> BaseGeometry:
    """Return a shape of the ego frame in the map frame, by the planar part of the pose."""
    c, s = np.cos(yaw_of(map_from_base)), np.sin(yaw_of(map_from_base))
    return affinity.affine_transform(shape, [c, -s, s, c, map_from_base[0, 3], map_from_base[1, 3]])
