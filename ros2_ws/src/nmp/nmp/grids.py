"""Reading nav_msgs/OccupancyGrids without ROS: by attribute name, so those of rclpy and of rosbags both fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import CLASSES, LocalMap
from nmp.geometry import Array, BevGrid, transform_from_xyyaw, yaw_of
from nmp.messages import stamp_ns, transform_of
from nmp.vectors.raster import Overview


def from_occupancy_grids(grids: Mapping[str, Any], location: str) -> LocalMap:
    """Return the local map of one grid per class, with the planar part (x, y, yaw) of the pose.

    Unknown cells get probability 0 and evidence 0, all others evidence 1. Raises :class:`NmpError` when a
    class is missing or the grids do not lie over one another.
    """
    cells, first = _cells(grids)
    # float32 in the message: back to the decimal that was meant, so that grids compare equal
    resolution = round(first.info.resolution, 6)
    grid = BevGrid(first.info.width * resolution, first.info.height * resolution, resolution)
    origin = transform_of(first.info.origin.position, first.info.origin.orientation)
    corner = transform_from_xyyaw(origin[0, 3], origin[1, 3], yaw_of(origin))
    base: Array = corner @ transform_from_xyyaw(grid.length / 2, grid.width / 2, 0.0)
    return LocalMap(
        stamp_ns=stamp_ns(first),
        location=location,
        map_from_base=base,
        grid=grid,
        probabilities=np.maximum(cells, 0).astype(np.float32) / 100.0,
        evidence=(cells[0] >= 0).astype(np.float32),
    )


def from_city_grids(grids: Mapping[str, Any]) -> Overview:
    """Return the city of one grid per class, in the axes of ``map``, to a percent.

    Raises :class:`NmpError` like :func:`from_occupancy_grids`.
    """
    cells, first = _cells(grids)
    origin = first.info.origin.position
    return Overview(
        probabilities=np.maximum(cells, 0).astype(np.float32) / 100.0,
        seen=(cells[0] >= 0).astype(np.float32),
        corner=(float(origin.x), float(origin.y)),
        resolution=round(first.info.resolution, 6),
    )


def _cells(grids: Mapping[str, Any]) -> tuple[NDArray[np.int8], Any]:
    """Return the cells [classes, rows, cols] of one grid per class, and the first of the grids."""
    if missing := [c for c in CLASSES if c not in grids]:
        raise NmpError(f"no layer '{missing[0]}': subscribe to all of {', '.join(CLASSES)}")
    first = grids[CLASSES[0]]
    cells = np.empty((len(CLASSES), first.info.height, first.info.width), dtype=np.int8)
    for plane, name in zip(cells, CLASSES, strict=True):
        msg = grids[name]
        shape, size = (msg.info.height, msg.info.width), len(msg.data)
        if shape != plane.shape or size != plane.size or msg.header.stamp != first.header.stamp:
            raise NmpError(
                f"layer '{name}' does not match '{CLASSES[0]}' in size or time: record one mapping node only"
            )
        plane[:] = np.frombuffer(msg.data, dtype=np.int8).reshape(plane.shape)
    return cells, first
