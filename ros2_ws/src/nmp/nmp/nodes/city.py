"""The city as far as this run has seen it, in few cells: what ``~/city`` shows. No ROS here."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from nmp.frame import LocalMap
from nmp.geometry import BevGrid
from nmp.vectors.raster import CityRaster, Overview

RESOLUTION_M = 0.6
LONGEST_SIDE = 16_000
"""cells; beyond it they get larger. RViz shows a map of up to 16,384"""


class CitySoFar:
    """Adds up local maps in cells of ``RESOLUTION_M``; a few milliseconds a frame."""

    def __init__(self) -> None:
        self._raster = CityRaster()

    def add(self, local_map: LocalMap) -> None:
        """Add a frame; with another city everything begins anew. Raises what :meth:`CityRaster.add` raises."""
        if self._raster.frames and local_map.location != self._raster.location:
            self.clear()
        self._raster.add(_coarse(local_map))

    def overview(self) -> Overview:
        """Return everything that was added, as small as it can be; at least one frame must have been."""
        whole = self._raster.overview(LONGEST_SIDE)
        rows, cols = (np.flatnonzero(whole.seen.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return whole
        part = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        corner = whole.corner[0] + cols[0] * whole.resolution, whole.corner[1] + rows[0] * whole.resolution
        return Overview(whole.probabilities[:, *part], whole.seen[part], corner, whole.resolution)

    def clear(self) -> None:
        """Forget everything."""
        self._raster.close()
        self._raster = CityRaster()

    def close(self) -> None:
        """Remove temporary files."""
        self._raster.close()


def _coarse(local_map: LocalMap) -> LocalMap:
    """Return a local map in larger cells, each with the greatest of what it covers: a mean would let lines fade."""
    grid = local_map.grid
    factor = max(round(RESOLUTION_M / grid.resolution), 1)
    rows, cols = (size // factor for size in grid.shape)
    edge = grid.resolution * factor

    def reduced(values: NDArray[np.float32]) -> NDArray[np.float32]:
        # what does not fill a cell is cut off alike on both sides, so that the car stays in the middle
        y, x = ((size - count * factor) // 2 for size, count in zip(grid.shape, (rows, cols), strict=True))
        whole = values[..., y : y + rows * factor, x : x + cols * factor]
        # one step after the other: several times as fast as the maximum over the blocks
        whole = reduce(np.maximum, (whole[..., i::factor] for i in range(factor)))
        whole = reduce(np.maximum, (whole[..., i::factor, :] for i in range(factor)))
        return np.asarray(whole, np.float32)

    return LocalMap(
        stamp_ns=local_map.stamp_ns,
        location=local_map.location,
        map_from_base=local_map.map_from_base,
        grid=BevGrid(cols * edge, rows * edge, edge),
        probabilities=reduced(local_map.probabilities),
        evidence=reduced(local_map.evidence),
    )
