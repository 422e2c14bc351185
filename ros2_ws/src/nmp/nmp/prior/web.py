"""A city as a map for a browser: a pyramid of small pictures, and one page that shows them without any network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nmp.errors import NmpError
from nmp.page import page_with
from nmp.prior.sheets import CHUNK, CHUNK_PX, KINDS, City, Sheet, Sums

PAGE = "index.html"
_MARK = "<!-- nmp prior render -->"
Step = Callable[[int], object]


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for a map, or clear that of an earlier one.

    Raises :class:`NmpError` for a folder that holds anything else, and for one that cannot be written.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            page = folder / PAGE
            if not (page.is_file() and page.read_bytes().startswith(_MARK.encode())):
                raise NmpError(f"--web {folder} holds other files: choose a new folder, or empty it")
            for kind in KINDS:
                if (folder / kind).is_dir():
                    shutil.rmtree(folder / kind)
        folder.mkdir(parents=True, exist_ok=True)
        # at once: a map that was interrupted can be drawn again
        (folder / PAGE).write_text(f"{_MARK}\nThe map is still being drawn.\n")
    except OSError as error:
        raise _failure(folder, error) from error


def write_map(city: City, sheets: list[Sheet], folder: Path, step: Step) -> int:
    """Draw sheets of a city as ``<kind>/<z>/<x>/<y>.png`` and ``index.html``; return how many pictures there are.

    Every picture has 256 x 256 pixels; there is none where nothing is known. At z = 0 one holds the whole city, at the
    highest z a pixel is half a cell; x counts from the west, y from the north.

    :param step: is told how many more chunks are drawn

    Raises :class:`NmpError` when something cannot be written, or a tile cannot be read.
    """
    pyramid = _Pyramid(city.chunks(), city.cell)
    written = sum(pyramid.draw(sheet, folder / sheet.name, step) for sheet in sheets)
    content = {
        "city": city.name,
        "drives": city.drives,
        "kinds": [{"name": sheet.name, **sheet.key()} for sheet in sheets],
        "levels": pyramid.levels,
        "tile": CHUNK_PX,
        "metres": pyramid.metres_per_pixel(pyramid.levels),
        # of the upper left corner of picture 0, 0
        "west": pyramid.west * CHUNK * city.cell,
        "north": pyramid.north * CHUNK * city.cell,
        # of the city, in pixels of the highest level
        "size": [pyramid.cols * CHUNK_PX, pyramid.rows * CHUNK_PX],
    }
    try:
        (folder / PAGE).write_text(f"{_MARK}\n{page_with('nmp.prior', content)}", encoding="utf-8")
    except OSError as error:
        raise _failure(folder, error) from error
    return written


class _Pyramid:
    """Chunks in the order of a Z-curve (Morton, 1966), so that every square of a level is one stretch of the list.

    Drawn depth first: four pictures of each level are in memory at a time.
    """

    def __init__(self, chunks: NDArray[np.int64], cell: float) -> None:
        self._cell = cell
        (low_row, self.west), (high_row, high_col) = chunks.min(axis=0).tolist(), chunks.max(axis=0).tolist()
        self.north = high_row + 1
        self.rows, self.cols = high_row - low_row + 1, high_col - self.west + 1
        self.levels = (max(self.rows, self.cols) - 1).bit_length()
        """the highest z"""
        self._codes = np.sort(_interleaved(high_row - chunks[:, 0], chunks[:, 1] - self.west))

    def metres_per_pixel(self, level: int) -> float:
        return CHUNK * self._cell / CHUNK_PX * 2.0 ** (self.levels - level)

    def draw(self, sheet: Sheet, folder: Path, step: Step) -> int:
        """Draw all levels of a sheet; return how many pictures were written."""
        written = 0

        def visit(level: int, row: int, col: int, begin: int, end: int) -> Sums:
            nonlocal written
            if level == self.levels:
                sums = sheet.sums(self.north - 1 - row, self.west + col)
                step(1)
            else:
                # the codes of a square's four quarters follow one another
                size = 4 ** (self.levels - level - 1)
                first = int(_interleaved(np.array(row), np.array(col))) * 4 * size
                cuts = begin + np.searchsorted(self._codes[begin:end], first + size * np.arange(5))
                quarters: list[Sums | None] = [
                    visit(level + 1, 2 * row + q // 2, 2 * col + q % 2, int(cuts[q]), int(cuts[q + 1]))
                    if cuts[q + 1] > cuts[q]
                    else None
                    for q in range(4)
                ]
                sums = _halved(quarters)
            if sums[-1].any():
                _save(sheet, sums, self.metres_per_pixel(level), folder / str(level) / str(col) / f"{row}.png")
                written += 1
            return sums

        visit(0, 0, 0, 0, len(self._codes))
        return written


def _halved(quarters: list[Sums | None]) -> Sums:
    """Return the averages over 2 x 2 pixels of four squares, upper left, upper right, lower left, lower right."""
    half = CHUNK_PX // 2
    planes = next(len(quarter) for quarter in quarters if quarter is not None)
    out = np.zeros((planes, CHUNK_PX, CHUNK_PX), np.float32)
    for number, quarter in enumerate(quarters):
        if quarter is not None:
            rows, cols = (slice(at * half, (at + 1) * half) for at in divmod(number, 2))
            out[:, rows, cols] = quarter.reshape(planes, half, 2, half, 2).mean(axis=(2, 4))
    return out


def _interleaved(rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bits of rows and columns (below 2^21) in turn, a row's above a column's."""
    return _spread(rows) << 1 | _spread(cols)


def _spread(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put a zero above every bit."""
    out = values.astype(np.int64)
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        out = (out | out << shift) & mask
    for shift, mask in ((2, 0x3333333333333333), (1, 0x5555555555555555)):
        out = (out | out << shift) & mask
    return out


def _save(sheet: Sheet, sums: Sums, metres_per_pixel: float, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.paint(sums, metres_per_pixel)).save(path)
    except OSError as error:
        raise _failure(path, error) from error


def _failure(path: Path, error: OSError) -> NmpError:
    return NmpError(
        f"cannot write the map {path} ({error.strerror or error}): choose another --web folder, or free disk space"
    )
