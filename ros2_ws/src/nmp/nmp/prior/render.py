"""A city as PNG pictures, at any scale: drawn chunk by chunk and written row by row, however large it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from nmp.draw import INK, LEAST_MAP_WIDTH, Picture, map_foot, map_zoom
from nmp.errors import NmpError
from nmp.png import PngStream
from nmp.prior.sheets import CHUNK, CHUNK_PX, City, Sheet, Sums
from nmp.prior.tiles import TILE

LONGEST_SIDE_PX = 32_767
"""most that common viewers open"""
USUAL_SIDE_PX = 1600
"""of the longer side, where no scale is asked for"""
_FINEST_PX = 1024
"""most pixels along a chunk: beyond that a pixel is an eighth of a cell"""

Step = Callable[[int], object]


class Frame(NamedTuple):
    """Where the pixels of a picture lie on the map."""

    chunk_px: int
    """pixels along each edge of a chunk"""
    metres_per_pixel: float
    left: int
    """pixels between the western edge of chunk column 0 and the picture; may be negative"""
    top: int
    """pixels between the southern edge of chunk row 0 and the upper edge of the picture, counted southward"""
    width: int
    height: int


def frame_of(city: City, metres_per_pixel: float | None = None) -> Frame:
    """Return the picture of a whole city at a scale (m; None: so that it is of a usual size).

    The scale is rounded so that a chunk has a whole number of pixels. Raises :class:`NmpError` for one that makes no
    picture.
    """
    chunk_m = CHUNK * city.cell
    low, high = city.tiles.min(axis=0), city.tiles.max(axis=0) + 1
    longest_m = float((high - low).max()) * TILE * city.cell
    finest, coarsest = chunk_m / _FINEST_PX, chunk_m
    if metres_per_pixel is None:
        wanted = min(max(longest_m / USUAL_SIDE_PX, city.cell / 2), coarsest)
    else:
        wanted = metres_per_pixel
        if not (math.isfinite(wanted) and finest <= wanted <= coarsest):
            raise NmpError(
                f"--metres-per-pixel is {wanted:g}: give {finest:g} to {coarsest:g} for a prior with cells of "
                f"{city.cell:g} m"
            )
    chunk_px = max(round(chunk_m / wanted), 1)
    # where the borders of the outermost tiles are drawn; a tile is half a chunk, which may be half a pixel
    edges = np.array([low, high]) * TILE * chunk_px // CHUNK
    (south, west), (north, east) = edges.tolist()
    width, height = max(east - west, 1), max(north - south, 1)
    if max(width, height) > LONGEST_SIDE_PX:
        least = longest_m / LONGEST_SIDE_PX
        raise NmpError(
            f"a picture of {width} x {height} pixels is too large for most viewers: give --metres-per-pixel "
            f"{math.ceil(least * 100) / 100:g} or more, or draw a web map (--web)"
        )
    return Frame(chunk_px, chunk_m / chunk_px, west, -north, width, height)


def resized(sums: Sums, side: int) -> Sums:
    """Return sums [planes, 256, 256] averaged over the pixels of a chunk that has ``side`` of them along an edge."""
    if side == CHUNK_PX:
        return sums
    mode = cv2.INTER_AREA if side < CHUNK_PX else cv2.INTER_NEAREST
    return np.stack([cv2.resize(np.ascontiguousarray(p), (side, side), interpolation=mode) for p in sums])


def write_picture(city: City, sheet: Sheet, path: Path, frame: Frame, step: Step) -> None:
    """Draw one sheet of a city with a legend and a scale bar.

    :param frame: as of :func:`frame_of`
    :param step: is told how many more chunks are drawn

    Raises :class:`NmpError` when the file cannot be written or a tile cannot be read; no picture is left behind then.
    """
    width = max(frame.width, LEAST_MAP_WIDTH)
    wide = frame._replace(left=frame.left - (width - frame.width) // 2, width=width)
    drives = f"{city.drives} drive{'s' if city.drives > 1 else ''}"
    head = sheet.legend(width, f"{city.name}, {drives}", map_zoom(width))
    foot = map_foot(width, frame.metres_per_pixel)
    with PngStream(path, width, len(head) + frame.height + len(foot)) as file:
        file.write(head)
        for strip in _strips(city.chunks(), sheet, wide, step):
            file.write(strip)
        file.write(foot)


def _strips(chunks: NDArray[np.int64], sheet: Sheet, frame: Frame, step: Step) -> Iterator[Picture]:
    """Yield the rows of a picture from north to south, those of one row of chunks at a time."""
    side, done = frame.chunk_px, 0
    order = np.lexsort((chunks[:, 1], -chunks[:, 0]))
    for row, places in groupby(chunks[order].tolist(), key=lambda place: place[0]):
        top = -(row + 1) * side - frame.top  # of this row of chunks in the picture; the first may begin above it
        yield from _empty(max(top, 0) - done, frame.width, side)
        begin, end = max(top, 0), min(top + side, frame.height)
        strip = np.full((end - begin, frame.width, 3), INK, np.uint8)
        for _, col in places:
            block = sheet.paint(resized(sheet.sums(row, col), side), frame.metres_per_pixel)
            x = col * side - frame.left
            inside = slice(max(x, 0), min(x + side, frame.width))
            strip[:, inside] = block[begin - top : end - top, inside.start - x : inside.stop - x]
            step(1)
        yield strip
        done = end


def _empty(rows: int, width: int, most: int) -> Iterator[Picture]:
    """Yield so many rows of background, ``most`` at a time: where a city has a gap."""
    for start in range(0, rows, most):
        yield np.full((min(most, rows - start), width, 3), INK, np.uint8)
