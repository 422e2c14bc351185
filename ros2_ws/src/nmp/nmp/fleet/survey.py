"""What has to be known of a recorded drive before it is mapped: which it is, when it began, and where it leads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmp import topics
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA
from nmp.geometry import points_along
from nmp.messages import stamp_ns
from nmp.prior.tiles import TILE, Key
from nmp.replay import keyframes_of, recording_of, topics_of

SPACING_M = 5.0
"""a path is thinned out to points about this far apart, m"""
_LEAP_M = 10_000.0
"""a pose so far from the one before is no drive, m"""


@dataclass(frozen=True)
class Survey:
    """One recorded drive."""

    bag: Path
    recording: str
    """hash that tells it from others"""
    location: str
    """the city"""
    first_ns: int
    """stamp of the first image of the anchor camera, ns"""
    frames: int
    """images of the anchor camera"""
    path: NDArray[np.float64]
    """[points, 2] x, y in the city's map frame, m; neighbours lie at most SPACING_M apart along each axis"""

    @property
    def order(self) -> tuple[int, str]:
        """Drives are mapped in this order where they meet."""
        return self.first_ns, self.recording

    def tiles(self, side: int, cell: float) -> set[Key]:
        """Return every tile of the prior that the drive can read or write.

        :param side: rows and columns of the window of cells that the mapper uses around the car
        :param cell: edge of a cell, m
        """
        # a frame's pose lies between two points of the path, and its window is snapped to the cells
        reach = side * cell / 2 + SPACING_M + cell
        low = np.floor((self.path[:, ::-1] - reach) / (TILE * cell)).astype(np.int64)
        high = np.floor((self.path[:, ::-1] + reach) / (TILE * cell)).astype(np.int64)
        corners = np.unique(np.concatenate([low, high], 1), axis=0).tolist()
        return {
            (row, col) for r0, c0, r1, c1 in corners for row in range(r0, r1 + 1) for col in range(c0, c1 + 1)
        }  # fmt: skip


def survey(bag: Path, location: str = "") -> Survey:
    """Look through a bag.

    :param location: the city, where the bag names none or the wrong one

    Raises :class:`NmpError` when no drive can be made of it.
    """
    with BagReader(bag) as reader:
        uses = topics_of(reader)
        image = next(name for name, use in uses.items() if use == ("image", ANCHOR_CAMERA))
        first = next(reader.messages([image])).message
        places = {location} if location else _locations(reader)
        if not places:
            raise NmpError(f"bag {bag} names no city on {topics.absolute(topics.LOCATION)}: give --location")
        if len(places) > 1:
            raise NmpError(f"bag {bag} names {' and '.join(sorted(places))}: cut it into one bag per city")
        return Survey(bag, recording_of(reader), places.pop(), stamp_ns(first), keyframes_of(reader), _path(reader))


def _locations(reader: BagReader) -> set[str]:
    names = (message.message.data for message in reader.messages([topics.absolute(topics.LOCATION)]))
    return {name for name in names if name.strip()}


def _path(reader: BagReader) -> NDArray[np.float64]:
    positions = (message.message.pose.pose.position for message in reader.messages([topics.absolute(topics.ODOM)]))
    points = np.array([(p.x, p.y) for p in positions], np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        raise NmpError(
            f"bag {reader.path} has no finite pose on {topics.absolute(topics.ODOM)}: check the localisation"
        )
    leap = float(np.abs(np.diff(points, axis=0)).max(initial=0.0))
    if leap > _LEAP_M:
        raise NmpError(f"poses of bag {reader.path} leap by {leap / 1000:.0f} km: check the localisation")
    return evenly(points)


def evenly(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points [m, 2] on the line through ``points`` [n, 2], m, at most SPACING_M apart along each axis.

    Every part of the line lies within SPACING_M of one of them, along each axis.
    """
    length = np.concatenate([[0.0], np.abs(np.diff(points, axis=0)).sum(1).cumsum()])
    steps = np.linspace(0.0, length[-1], int(np.ceil(length[-1] / SPACING_M)) + 1)
    return points_along(points, length, steps)
