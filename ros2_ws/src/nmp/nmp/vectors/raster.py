"""The layers of whole drives in one raster of a city, tile by tile, in bounded memory.

A pixel holds the mean of all probabilities that were ever drawn over it, in the axes of the map, weighted with the
evidence of each and with how near to the car it was. Coarser cells count the frames that saw them and the visits: a
visit begins when nothing was seen of a cell for ``VISIT_GAP_S``. Tiles that were not used for a while are moved to a
temporary folder.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import CLASSES, LocalMap
from nmp.geometry import Array, BevGrid, flatten_to_plane

TILE_PX = 400
"""edge of a tile; 60 m at 0.15 m"""
CELL_PX = 4
"""edge of the cells in which frames and visits are counted"""
VISIT_GAP_S = 60.0
HALF_WEIGHT_M = 15.0
"""what is seen from so far counts half as much as what is seen from nearby: cameras resolve less of it"""
RESIDENT = 48
"""tiles that stay in memory: 3 MB each"""
LEAST_WEIGHT = 0.05
"""pixels of less are unknown: they were touched by the rim of a layer only"""
FINEST_M, COARSEST_M = 0.02, 2.0
"""edges of cells that make sense"""
FARTHEST_M = 1e6
"""no map frame reaches further"""
Index = tuple[int, int]
"""column and row of a tile"""


@dataclass
class _Tile:
    sums: NDArray[np.float32]
    """[classes + 1, TILE_PX, TILE_PX] weighted probabilities, then the weight"""
    frames: NDArray[np.uint16]
    """[cells, cells] frames that saw any of the cell; so are the others"""
    visits: NDArray[np.uint16]
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]

    @classmethod
    def empty(cls) -> _Tile:
        cells = (TILE_PX // CELL_PX, TILE_PX // CELL_PX)
        return cls(
            np.zeros((len(CLASSES) + 1, TILE_PX, TILE_PX), np.float32),
            np.zeros(cells, np.uint16),
            np.zeros(cells, np.uint16),
            np.zeros(cells, np.int64),
            np.zeros(cells, np.int64),
        )


@dataclass(frozen=True)
class Seen:
    """When and how often places were seen; arrays [N]."""

    frames: NDArray[np.int64]
    visits: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    """0 where nothing was ever seen, as all of them"""
    last_ns: NDArray[np.int64]


@dataclass(frozen=True)
class Overview:
    """A whole raster, reduced; row 0 is in the south."""

    probabilities: NDArray[np.float32]
    """[classes, rows, cols] 0..1"""
    seen: NDArray[np.float32]
    """[rows, cols] 1 where anything was seen"""
    corner: tuple[float, float]
    """x, y of the south-western corner, map frame, m"""
    resolution: float
    """edge of a pixel, m"""


class CityRaster:
    """Layers of one city, added up. To be closed, or used in a ``with``."""

    def __init__(self, resident: int = RESIDENT) -> None:
        """:param resident: tiles to keep in memory."""
        self.location = ""
        self.resolution = 0.0
        """edge of a pixel, m: that of the first layers"""
        self.frames = 0
        self._resident = resident
        self._tiles: OrderedDict[Index, _Tile] = OrderedDict()
        self._stored: set[Index] = set()
        self._changed: set[Index] = set()
        """tiles in memory that are newer than in the folder"""
        self._folder = tempfile.TemporaryDirectory(prefix="nmp-vectors-")

    def add(self, local_map: LocalMap) -> None:
        """Draw the layers of one frame; frames come in the order of time.

        Raises :class:`NmpError` for layers of another city, of another resolution, or at no sensible pose.
        """
        self._check(local_map)
        left, top, votes = _turned(local_map, self.resolution)
        rows, cols = votes.shape[1:]
        seen = votes[-1] > LEAST_WEIGHT
        cells = seen.reshape(rows // CELL_PX, CELL_PX, cols // CELL_PX, CELL_PX).any(axis=(1, 3))
        for index in product(
            range(left // TILE_PX, (left + cols - 1) // TILE_PX + 1),
            range(top // TILE_PX, (top + rows - 1) // TILE_PX + 1),
        ):
            mine, theirs = _overlap(index, left, top, rows, cols, 1)
            mine_cells, their_cells = _overlap(index, left, top, rows, cols, CELL_PX)
            if not cells[their_cells].any():
                continue
            tile = self._tile(index)
            self._changed.add(index)
            tile.sums[(slice(None), *mine)] += votes[(slice(None), *theirs)]
            _count(tile, mine_cells, cells[their_cells], local_map.stamp_ns)
        self.frames += 1

    def _check(self, local_map: LocalMap) -> None:
        where = f"layers of {local_map.stamp_ns}"
        pose, resolution = local_map.map_from_base, local_map.grid.resolution
        if not FINEST_M <= resolution <= COARSEST_M:
            raise NmpError(f"{where}: cells of {resolution:g} m are too small or too large: write them again")
        if local_map.probabilities.shape != (len(CLASSES), *local_map.grid.shape) or pose.shape != (4, 4):
            raise NmpError(f"{where}: cells or pose do not have the shape that their grid asks for: write them again")
        if not np.isfinite(pose).all() or np.abs(pose[:2, 3]).max() > FARTHEST_M:
            raise NmpError(
                f"{where}: the pose is not finite, or further than {FARTHEST_M / 1e3:.0f} km away: map again"
            )
        if not self.frames:
            self.location, self.resolution = local_map.location, resolution
        if local_map.location != self.location:
            raise NmpError(
                f"layers of two cities, {self.location} and {local_map.location}: give the folders of one city"
            )
        if resolution != self.resolution:
            raise NmpError(f"layers of {self.resolution:g} m and of {resolution:g} m a cell: make one map of each")

    # ------------------------------------------------------------------------------------------------------ reading

    @property
    def tiles(self) -> list[Index]:
        """Columns and rows of all tiles of which anything was seen, in order."""
        return sorted(self._stored | set(self._tiles))

    @property
    def edge(self) -> float:
        """Edge of a tile, m."""
        return TILE_PX * self.resolution

    def window(self, index: Index, margin: int) -> NDArray[np.float32]:
        """Return the mean probabilities [classes, rows, cols] of a tile and ``margin`` pixels around it.

        0 where nothing was seen. Row 0 is in the south, column 0 in the west.
        """
        side = TILE_PX + 2 * margin
        sums = np.zeros((len(CLASSES) + 1, side, side), np.float32)
        left, top = index[0] * TILE_PX - margin, index[1] * TILE_PX - margin
        reach = -(-margin // TILE_PX)
        for dx, dy in product(range(-reach, reach + 1), repeat=2):
            other = (index[0] + dx, index[1] + dy)
            if other in self._tiles or other in self._stored:
                mine, theirs = _overlap(other, left, top, side, side, 1)
                sums[(slice(None), *theirs)] = self._tile(other).sums[(slice(None), *mine)]
        weight = sums[-1]
        mean = sums[:-1] / np.maximum(weight, LEAST_WEIGHT)
        return np.where(weight > LEAST_WEIGHT, mean, np.float32(0.0))

    def probability(self, points: Array, layer: int) -> Array:
        """Return the mean probability [N] of a class at points [N, 2] (map frame, m); 0 where nothing was seen."""
        pixels = np.floor(points / self.resolution).astype(np.int64)
        out = np.zeros(len(points))
        for tile, chosen in self._by_tile(pixels):
            cols, rows = (pixels[chosen] % TILE_PX).T
            weight = tile.sums[-1, rows, cols]
            mean = tile.sums[layer, rows, cols] / np.maximum(weight, LEAST_WEIGHT)
            out[chosen] = np.where(weight > LEAST_WEIGHT, mean, 0.0)
        return out

    def seen(self, points: Array) -> Seen:
        """Return when and how often points [N, 2] (map frame, m) were seen."""
        pixels = np.floor(points / self.resolution).astype(np.int64)
        out = Seen(*(np.zeros(len(points), np.int64) for _ in range(4)))
        for tile, chosen in self._by_tile(pixels):
            cols, rows = (pixels[chosen] % TILE_PX // CELL_PX).T
            out.frames[chosen], out.visits[chosen] = tile.frames[rows, cols], tile.visits[rows, cols]
            out.first_ns[chosen], out.last_ns[chosen] = tile.first_ns[rows, cols], tile.last_ns[rows, cols]
        return out

    def overview(self, longest_side: int) -> Overview:
        """Return everything as one picture, no side of which is longer than ``longest_side`` pixels (or one a tile)."""
        cols, rows = np.array(self.tiles).T
        across = max(int(np.ptp(cols)), int(np.ptp(rows))) + 1
        factor = next(f for f in range(1, TILE_PX + 1) if TILE_PX % f == 0 and (across * TILE_PX // f <= longest_side))
        side = TILE_PX // factor
        shape = ((int(np.ptp(rows)) + 1) * side, (int(np.ptp(cols)) + 1) * side)
        mean, seen = np.zeros((len(CLASSES), *shape), np.float32), np.zeros(shape, np.float32)
        for col, row in self.tiles:
            tile = self._tile((col, row))
            part = np.s_[(row - rows.min()) * side :, (col - cols.min()) * side :]
            # the greatest of a block: the mean would let thin lines fade
            blocks = (len(CLASSES) + 1, side, factor, side, factor)
            known = tile.sums[-1] > LEAST_WEIGHT
            values = np.where(known, tile.sums / np.maximum(tile.sums[-1], LEAST_WEIGHT), 0.0)
            small = values.reshape(blocks).max(axis=(2, 4))
            mean[(slice(None), *part)][:, :side, :side] = small[:-1]
            seen[part][:side, :side] = small[-1]
        corner = np.array([cols.min(), rows.min()]) * self.edge
        return Overview(mean, seen, (float(corner[0]), float(corner[1])), self.resolution * factor)

    def _by_tile(self, pixels: NDArray[np.int64]) -> Iterator[tuple[_Tile, NDArray[np.int64]]]:
        """Yield the tiles that pixels [N, 2] = (col, row) lie in, each with the indices of its pixels."""
        indices, place = np.unique(pixels // TILE_PX, axis=0, return_inverse=True)
        for number, (col, row) in enumerate(indices.tolist()):
            if (col, row) in self._tiles or (col, row) in self._stored:
                yield self._tile((col, row)), np.flatnonzero(place.reshape(-1) == number)

    # ------------------------------------------------------------------------------------------------------- memory

    def _tile(self, index: Index) -> _Tile:
        """Return a tile, new, from memory or from the folder, and move the one that was not used longest there."""
        if index in self._tiles:
            self._tiles.move_to_end(index)
            return self._tiles[index]
        tile = self._load(index) if index in self._stored else _Tile.empty()
        self._tiles[index] = tile
        if len(self._tiles) > self._resident:
            oldest, old = self._tiles.popitem(last=False)
            if oldest in self._changed:
                self._store(oldest, old)
        return tile

    def _path(self, index: Index) -> Path:
        return Path(self._folder.name) / f"{index[0]}_{index[1]}.npz"

    def _store(self, index: Index, tile: _Tile) -> None:
        try:
            np.savez(self._path(index), **vars(tile))
        except OSError as error:
            raise NmpError(
                f"cannot write {self._path(index)} ({error.strerror}): free some space, or set TMPDIR to another disk"
            ) from error
        self._stored.add(index)
        self._changed.discard(index)

    def _load(self, index: Index) -> _Tile:
        with np.load(self._path(index), allow_pickle=False) as data:
            return _Tile(**{name: data[name] for name in data.files})

    def close(self) -> None:
        """Remove what was moved to the temporary folder."""
        self._folder.cleanup()

    def __enter__(self) -> CityRaster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _turned(local_map: LocalMap, resolution: float) -> tuple[int, int, NDArray[np.float32]]:
    """Return a local map in the axes of the map, its lower left pixel (col, row) first.

    The array is [classes + 1, rows, cols]: weighted probabilities, then the weight; it begins and ends on whole cells.
    """
    grid = local_map.grid
    weight = (local_map.evidence * _nearness(grid)).astype(np.float32)
    votes = np.dstack([*(local_map.probabilities * weight), weight])
    pose = flatten_to_plane(local_map.map_from_base)
    half = np.array([grid.length, grid.width]) / 2
    corners = (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half) @ pose[:2, :2].T + pose[:2, 3]
    step = CELL_PX * resolution
    left, top = (np.floor(corners.min(axis=0) / step).astype(int) * CELL_PX).tolist()
    right, bottom = (np.ceil(corners.max(axis=0) / step).astype(int) * CELL_PX).tolist()
    warp = _pixel_from_metre(left, top, resolution) @ pose[np.ix_([0, 1, 3], [0, 1, 3])] @ _metre_from_cell(grid)
    turned = cv2.warpAffine(votes, warp[:2], (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    return left, top, np.ascontiguousarray(np.moveaxis(turned, -1, 0), np.float32)


@lru_cache(maxsize=4)
def _nearness(grid: BevGrid) -> NDArray[np.float32]:
    """Return what a cell [rows, cols] counts, 1 at the car."""
    distance = np.linalg.norm(grid.centres(), axis=-1)
    return np.asarray(1.0 / (1.0 + (distance / HALF_WEIGHT_M) ** 2), np.float32)


def _metre_from_cell(grid: BevGrid) -> Array:
    """Return the planar transform from (col, row) to the ego frame; centres are at whole numbers, as in OpenCV."""
    r = grid.resolution
    return np.array([[r, 0.0, (r - grid.length) / 2], [0.0, r, (r - grid.width) / 2], [0.0, 0.0, 1.0]])


def _pixel_from_metre(left: int, top: int, resolution: float) -> Array:
    """Return the planar transform from the map frame to (col, row) of a raster that begins at pixel left, top."""
    scale = 1.0 / resolution
    return np.array([[scale, 0.0, -left - 0.5], [0.0, scale, -top - 0.5], [0.0, 0.0, 1.0]])


def _overlap(
    index: Index, left: int, top: int, rows: int, cols: int, step: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the (rows, cols) that a tile and a raster at pixel left, top have in common, as either counts them.

    :param step: pixels of one count; all edges are multiples of it
    """
    mine, theirs = [], []
    for tile, begin, size in ((index[1] * TILE_PX, top, rows), (index[0] * TILE_PX, left, cols)):
        low, high = max(tile, begin), min(tile + TILE_PX, begin + size)
        high = max(low, high)
        mine.append(slice((low - tile) // step, (high - tile) // step))
        theirs.append(slice((low - begin) // step, (high - begin) // step))
    return (mine[0], mine[1]), (theirs[0], theirs[1])


def _count(tile: _Tile, where: tuple[slice, slice], seen: NDArray[np.bool_], stamp_ns: int) -> None:
    """Count one frame in the cells of a tile that it saw."""
    frames, visits, first, last = (a[where] for a in (tile.frames, tile.visits, tile.first_ns, tile.last_ns))
    begins = seen & ((frames == 0) | (stamp_ns - last > VISIT_GAP_S * 1e9))
    visits[begins] = np.minimum(visits[begins], np.iinfo(np.uint16).max - 1) + 1
    first[seen & (frames == 0)] = stamp_ns
    last[seen] = stamp_ns
    frames[seen] = np.minimum(frames[seen], np.iinfo(np.uint16).max - 1) + 1
