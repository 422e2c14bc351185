"""Tiles: the squares of cells that are kept in memory and saved as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.window import Window

TILE = 64
"""cells along each edge of a tile"""
ORIGIN = 2**20
"""tiles between the start of the stored array and map coordinate 0, along both axes"""
FIELD_PLANES = 6
"""byte planes after the latent: evidence (2), last seen (4)"""

Key = tuple[int, int]
"""(row, column) of a tile: floor(cell row / TILE), floor(cell column / TILE)"""


class Tile:
    """The cells of one tile, in memory."""

    def __init__(self, channels: int) -> None:
        self.latent: NDArray[np.int8] = np.zeros((channels, TILE, TILE), np.int8)
        self.evidence: NDArray[np.uint16] = np.zeros((TILE, TILE), np.uint16)
        self.last_seen_s: NDArray[np.uint32] = np.zeros((TILE, TILE), np.uint32)
        self.edits = 0
        """counts the changes, to tell whether a tile changed while it was being saved"""

    @staticmethod
    def nbytes(channels: int) -> int:
        """Return the memory of one tile, bytes."""
        return (channels + FIELD_PLANES) * TILE * TILE

    def pack(self) -> NDArray[np.uint8]:
        """Return a copy as it is stored: [channels + 6, 64, 64] bytes."""
        channels = len(self.latent)
        planes = np.empty((channels + FIELD_PLANES, TILE, TILE), np.uint8)
        planes[:channels] = self.latent.view(np.uint8)
        planes[channels : channels + 2] = _to_planes(self.evidence.astype("<u2", copy=False))
        planes[channels + 2 :] = _to_planes(self.last_seen_s.astype("<u4", copy=False))
        return planes

    @classmethod
    def unpack(cls, planes: NDArray[np.uint8]) -> Tile:
        """Return the tile of stored planes [channels + 6, 64, 64]."""
        channels = len(planes) - FIELD_PLANES
        tile = cls(channels)
        tile.latent[...] = planes[:channels].view(np.int8)
        tile.evidence[...] = _from_planes(planes[channels : channels + 2], "<u2")
        tile.last_seen_s[...] = _from_planes(planes[channels + 2 :], "<u4")
        return tile

    def store(
        self,
        where: tuple[slice, slice],
        latent: NDArray[np.int8],
        evidence: NDArray[np.uint16],
        seconds: int,
        changed: NDArray[np.bool_],
    ) -> None:
        """Overwrite the cells of a block where ``changed`` [rows, cols] is set."""
        old = self.latent[:, where[0], where[1]]
        if changed.all():
            old[...] = latent
        else:
            # old ^ (old ^ new) & mask: five times faster than a masked copy
            difference = old ^ latent
            difference &= -changed.view(np.int8)
            old ^= difference
        np.copyto(self.evidence[where], evidence, where=changed)
        np.copyto(self.last_seen_s[where], np.uint32(seconds), where=changed)
        self.edits += 1


def _to_planes(values: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Return the bytes of [rows, cols] values as [bytes, rows, cols]."""
    return np.moveaxis(values[..., None].view(np.uint8), -1, 0)


def _from_planes(planes: NDArray[np.uint8], dtype: str) -> NDArray[np.unsignedinteger]:
    """Return the [rows, cols] values of [bytes, rows, cols] planes."""
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(dtype)[..., 0]


class Block(NamedTuple):
    """The part of a window that lies in one tile."""

    key: Key
    in_tile: tuple[slice, slice]
    in_window: tuple[slice, slice]


def blocks(window: Window) -> Iterator[Block]:
    """Cut a window along the borders of the tiles, row by row.

    Raises :class:`NmpError` when the window leaves the storable range.
    """
    limit = ORIGIN * TILE
    if min(window.row, window.col) < -limit or max(window.row + window.rows, window.col + window.cols) > limit:
        raise NmpError(
            f"window at cell row {window.row}, column {window.col} lies over {limit} cells from the map's origin: "
            "check the localisation"
        )
    columns = list(_spans(window.col, window.cols))
    for tile_row, row_in_tile, row_in_window in _spans(window.row, window.rows):
        for tile_col, col_in_tile, col_in_window in columns:
            yield Block((tile_row, tile_col), (row_in_tile, col_in_tile), (row_in_window, col_in_window))


def _spans(start: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """Cut cells ``start`` to ``start + count`` of one axis: tile, cells in the tile, cells in the window."""
    for tile in range(start // TILE, (start + count - 1) // TILE + 1):
        first, last = max(start, tile * TILE), min(start + count, (tile + 1) * TILE)
        yield tile, slice(first - tile * TILE, last - tile * TILE), slice(first - start, last - start)


def bounds(keys: Iterable[Key]) -> Window | None:
    """Return the smallest block of cells that covers all these tiles, or None when there are none."""
    corners = np.array(list(keys), dtype=np.int64)
    if not len(corners):
        return None
    low, high = corners.min(0) * TILE, (corners.max(0) + 1) * TILE
    return Window(int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1]))
