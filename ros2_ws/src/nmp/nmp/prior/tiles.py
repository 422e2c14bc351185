"""Tiles: the squares of cells that are loaded and saved as a whole."""

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

Key = tuple[int, int]
"""(row, column) of a tile: floor(cell row / TILE), floor(cell column / TILE)"""


class Block(NamedTuple):
    """The part of a window that lies in one tile."""

    key: Key
    in_tile: tuple[slice, slice]
    in_window: tuple[slice, slice]

    def cropped(self, mask: NDArray[np.bool_]) -> Block | None:
        """Return the smallest part that holds all cells of a mask of the window; None when there are none."""
        box = box_of(mask[self.in_window])
        return None if box is None else Block(self.key, part_of(self.in_tile, box), part_of(self.in_window, box))


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Return the smallest block of rows and columns that holds all cells of a mask; None when there are none."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)) if len(rows) else None


def part_of(block: tuple[slice, slice], box: tuple[slice, slice]) -> tuple[slice, slice]:
    """Return a part of a block, which is counted from the start of the block, in the coordinates of the block."""
    (row, col), (rows, cols) = (b.start for b in block), box
    return slice(row + rows.start, row + rows.stop), slice(col + cols.start, col + cols.stop)


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


def keys_of(window: Window) -> list[Key]:
    """Return the tiles that a window lies on, row by row, wherever it is."""
    rows, cols = (
        range(start // TILE, (start + count - 1) // TILE + 1)
        for start, count in ((window.row, window.rows), (window.col, window.cols))
    )
    return [(row, col) for row in rows for col in cols]


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
