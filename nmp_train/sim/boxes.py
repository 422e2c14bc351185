"""Solid things as oriented boxes, and whether two of them touch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BODY, CABIN, BUILDING, CROWN, POLE, PEDESTRIAN, BARRIER, LAMP_POLE, SIGN, CONE, WALL = range(11)
"""The kinds of box: parts of vehicles, standing things, and plain solids. ``BARRIER`` is also any plain solid part."""

EGO_LENGTH_M, EGO_WIDTH_M = 4.1, 1.7
EGO_CENTRE_M = 1.4
"""from the rear axle, where the ego pose is, forward to the middle of the car"""


@dataclass(frozen=True)
class Boxes:
    """K boxes that stand upright in the map frame."""

    centre: Array
    """[K, 3] middle of the box, m"""
    size: Array
    """[K, 3] length (along yaw), width, height, m"""
    yaw: Array
    """[K] rad"""
    rgb: Array
    """[K, 3] 0..1"""
    kind: NDArray[np.int64]
    """[K] 0 vehicle body, 1 cabin, 2 building, 3 tree crown, 4 trunk or pole, 5 pedestrian, 6 barrier, 7 lamp pole,
    8 sign, 9 cone, 10 wall, fence or hedge"""
    instance: NDArray[np.int64]
    """[K] number of the annotated thing that the box is part of, -1 for scenery"""
    velocity: Array
    """[K, 2] m/s"""

    def __len__(self) -> int:
        return len(self.yaw)

    def __getitem__(self, index: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Boxes:
        return Boxes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def empty() -> Boxes:
        """Return no boxes."""
        none = np.zeros(0, np.int64)
        return Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)), none, none, np.zeros((0, 2)))

    @staticmethod
    def joined(parts: list[Boxes]) -> Boxes:
        """Return the boxes of several sets as one."""
        parts = parts or [Boxes.empty()]
        return Boxes(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Boxes)})

    @staticmethod
    def scenery(centre: Array, size: Array, yaw: Array, rgb: Array, kind: int) -> Boxes:
        """Return standing boxes of one kind that belong to nothing annotated."""
        n = len(yaw)
        return Boxes(centre, size, yaw, rgb, np.full(n, kind), np.full(n, -1), np.zeros((n, 2)))


def apparent_distance(centre: Array, size: Array, xy: Array) -> Array:
    """Return [K] in which order boxes (centres and sizes [K, 3], m) matter to a picture taken at ``xy`` [2].

    It is the distance (m) to the edge of a box, divided by the root of its height and length together: a wall at
    50 m fills more of the picture than a bin at 10 m.
    """
    reach = np.hypot(size[:, 0], size[:, 1]) / 2
    distance = np.hypot(*(centre[:, :2] - np.asarray(xy)[:2]).T) - reach
    face = np.sqrt((size[:, 0] + size[:, 1]) / 2 * size[:, 2])
    return np.asarray(np.maximum(distance, 1.0) / np.sqrt(np.maximum(face, 0.05)))


def nearest(boxes: Boxes, xy: Array, radius: float, limit: int) -> Boxes:
    """Return up to ``limit`` boxes with an edge within ``radius`` (m) of a point [2], those that matter most first.

    The order is that of :func:`apparent_distance`.
    """
    reach = np.hypot(boxes.size[:, 0], boxes.size[:, 1]) / 2
    inside = np.flatnonzero(np.hypot(*(boxes.centre[:, :2] - np.asarray(xy)[:2]).T) - reach < radius)
    order = np.argsort(apparent_distance(boxes.centre[inside], boxes.size[inside], xy), kind="stable")
    return boxes[inside[order[:limit]]]


def rectangles_touch(a_xyyaw: Array, a_size: Array, b_xyyaw: Array, b_size: Array) -> NDArray[np.bool_]:
    """Return [...] whether two rectangles overlap; poses [..., 3] are of their middles, sizes [..., 2] in m."""
    delta = b_xyyaw[..., :2] - a_xyyaw[..., :2]
    apart = np.zeros(np.broadcast_shapes(a_xyyaw.shape[:-1], b_xyyaw.shape[:-1]), bool)
    turn = b_xyyaw[..., 2] - a_xyyaw[..., 2]
    c, s = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    for pose, own, other in ((a_xyyaw, a_size, b_size), (b_xyyaw, b_size, a_size)):
        cos, sin = np.cos(pose[..., 2]), np.sin(pose[..., 2])
        along = np.abs(delta[..., 0] * cos + delta[..., 1] * sin)
        across = np.abs(-delta[..., 0] * sin + delta[..., 1] * cos)
        apart |= along > (own[..., 0] + other[..., 0] * c + other[..., 1] * s) / 2
        apart |= across > (own[..., 1] + other[..., 0] * s + other[..., 1] * c) / 2
    return ~apart


def ego_middle(poses_xyyaw: Array) -> Array:
    """Return the middle [..., 3] of the ego car for poses [..., 3] of its rear axle."""
    out = np.array(poses_xyyaw, dtype=np.float64)
    out[..., 0] += EGO_CENTRE_M * np.cos(out[..., 2])
    out[..., 1] += EGO_CENTRE_M * np.sin(out[..., 2])
    return out
