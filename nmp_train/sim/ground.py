"""The raster of a piece of ground: noise that is fixed to the map, materials, and marks on top of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from nmp_train.sim.marks import IndexedMarks, Layer

Image = NDArray[np.float32]
SUBPIXEL_BITS = 6
FINE = 4
"""marks are rasterised this many times finer, then averaged"""
TILE = 1024
"""edge of the repeating textures, texels"""
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
BORDER = 3
LARGE_M = 20.0
"""a mark whose box is larger is rasterised without the finer grid"""


@dataclass(frozen=True)
class Window:
    """A block of the global grid of texels; texel (0, 0) has its corner at the origin of the map."""

    col: int
    row: int
    cols: int
    rows: int
    resolution: float
    """edge of a texel, m"""

    def grown(self, texels: int) -> Window:
        """Return the window with a margin of this many texels around it."""
        return Window(
            self.col - texels, self.row - texels, self.cols + 2 * texels, self.rows + 2 * texels, self.resolution
        )

    def region(self, margin_m: float = 0.0) -> BaseGeometry:
        """Return the rectangle of the window and a margin around it (map frame, m)."""
        r, m = self.resolution, margin_m
        return box(self.col * r - m, self.row * r - m, (self.col + self.cols) * r + m, (self.row + self.rows) * r + m)

    def pixels(self, points: NDArray[np.float64], factor: int = 1) -> NDArray[np.int32]:
        """Return map points as fixed-point pixels of an image that is ``factor`` times finer."""
        # Rounded before the window's corner is taken off: the same point has the same fraction in every window.
        scaled = np.round((points / self.resolution * factor - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int64)
        corner = np.array([self.col, self.row], dtype=np.int64) * factor << SUBPIXEL_BITS
        return (scaled - corner).astype(np.int32)


class Noise:
    """Smooth noise of unit deviation that depends on the seed and the place only."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.grain, self.rough, self.metre = _textures()
        self.shift = np.random.default_rng((seed, 20)).integers(0, TILE, 2).tolist()

    def tile(self, texture: NDArray[np.float16], window: Window) -> Image:
        """Return the part [rows, cols] of a repeating texture that lies in a window."""
        rows = (np.arange(window.rows) + window.row + self.shift[0]) % TILE
        cols = (np.arange(window.cols) + window.col + self.shift[1]) % TILE
        return np.take(np.take(texture, rows, axis=0), cols, axis=1).astype(np.float32)

    def field(self, window: Window, cell_m: float, salt: int) -> Image:
        """Return noise [rows, cols] with features of ``cell_m`` m; every ``salt`` gives another one."""
        r = window.resolution
        weights, first = [], []
        for start, count in ((window.row, window.rows), (window.col, window.cols)):
            at = (np.arange(start, start + count) + 0.5) * r / cell_m
            low = np.floor(at).astype(np.int64)
            t = at - low
            t = t * t * (3 - 2 * t)
            matrix = np.zeros((count, int(low[-1] - low[0]) + 2))
            matrix[np.arange(count), low - low[0]] = 1 - t
            matrix[np.arange(count), low - low[0] + 1] = t
            weights.append(matrix)
            first.append(int(low[0]))
        lattice = self._lattice(first, [m.shape[1] for m in weights], salt)
        # In double precision: the order in which a product is summed up depends on its size.
        return (weights[0] @ lattice @ weights[1].T).astype(np.float32)

    def _lattice(self, first: list[int], count: list[int], salt: int) -> NDArray[np.float64]:
        i, j = (np.arange(f, f + n, dtype=np.int64).astype(np.uint64) for f, n in zip(first, count, strict=True))
        key = np.uint64(self.seed * 1_000_003 + salt)
        with np.errstate(over="ignore"):
            x = _mix(_mix(i * np.uint64(0x9E3779B97F4A7C15) + key)[:, None] + j * np.uint64(0xD1B54A32D192ED03))
        # Uniform, spread to the deviation of about 1 that is left after interpolation.
        return ((x >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1) * 2.3


@functools.lru_cache(maxsize=1)
def _textures() -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.float16]]:
    """Return three noises that vary from texel to texel, over decimetres, and over metres (texels of 0.1 m)."""
    rng = np.random.default_rng(20)
    white = rng.standard_normal((TILE, TILE)).astype(np.float32)

    def smooth(texels: float) -> Image:
        # Wrapped at its edges, so that it repeats without a joint.
        blurred = gaussian_filter(rng.standard_normal((TILE, TILE)).astype(np.float32), texels, mode="wrap")
        return np.asarray(blurred / blurred.std(), dtype=np.float32)

    grain = 0.75 * white + 0.6 * smooth(1.2)
    rough = 0.5 * smooth(0.8) + 0.7 * smooth(2.0) + 0.5 * smooth(8.0)
    metre = 0.8 * smooth(6.0) + 0.6 * smooth(14.0)
    return grain.astype(np.float16), rough.astype(np.float16), metre.astype(np.float16)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble integers (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def cover(window: Window, shapes: list[BaseGeometry]) -> NDArray[np.uint8]:
    """Return how much of each texel lies in one of the polygons, 0..255; their edges are shorter than 30 m."""
    # OpenCV draws outlines that leave the image a little differently in its outermost pixels.
    drawn = window.grown(BORDER)
    mask = np.zeros((drawn.rows, drawn.cols), np.uint8)
    region = window.region(30.0)
    for shape in shapes:
        for part in shapely.get_parts(shapely.clip_by_rect(shape, *region.bounds)):
            if part.geom_type == "Polygon" and not part.is_empty:
                rings = [drawn.pixels(shapely.get_coordinates(r)) for r in (part.exterior, *part.interiors)]
                cv2.fillPoly(mask, rings, (255,), lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
    return mask[BORDER:-BORDER, BORDER:-BORDER]


def paint_marks(rgb: Image, window: Window, marks: IndexedMarks, rough: Image, layers: range) -> None:
    """Paint the marks of some layers into ``rgb`` [rows, cols, 3] of a window.

    :param rough: [rows, cols] noise that breaks up marks
    """
    source = marks.marks
    for k in marks.near(window.region(1.0)).tolist():
        if source.layers[k] not in layers:
            continue
        colour, opacity, roughness, soft, gain = source.looks[k]
        found = _block(source.rings[k], window, soft)
        if found is None:
            continue
        mask, block = found
        alpha = mask.astype(np.float32) * np.float32(opacity / 255)
        if roughness:
            # Thin paint goes first where the ground is rough.
            kept = rough[block] * np.float32(0.75 * roughness) + np.float32(1.15 - 0.35 * roughness)
            alpha *= np.clip(kept, 0, 1, out=kept)
        target = rgb[block]
        if gain:
            target *= 1 + alpha[..., None] * (colour - 1).astype(np.float32)
        else:
            paint = colour.astype(np.float32)
            if source.layers[k] in (Layer.TONE, Layer.PATCH):  # of a grain like the road's
                paint = paint * (1 + np.float32(0.07) * rough[block])[..., None]
            target += alpha[..., None] * (paint - target)


def _block(
    ring: NDArray[np.float64], window: Window, soft: float
) -> tuple[NDArray[np.uint8], tuple[slice, slice]] | None:
    """Rasterise a polygon; return its coverage and where it lies in the window."""
    r = window.resolution
    pad = 1 + (int(np.ceil(soft / r)) if soft else 0)
    low = np.floor(ring.min(axis=0) / r).astype(int) - pad
    high = np.ceil(ring.max(axis=0) / r).astype(int) + pad
    start = np.maximum(low, [window.col, window.row])
    stop = np.minimum(high, [window.col + window.cols, window.row + window.rows])
    if (stop <= start).any():
        return None
    # Drawn whole, also where it reaches out of the window: clipping would move its edges a little.
    (col, row), (cols, rows) = low.tolist(), (high - low).tolist()
    own = Window(col, row, cols, rows, r)
    if (high - low).max() * r > LARGE_M:
        mask = np.zeros((own.rows, own.cols), np.uint8)
        cv2.fillPoly(mask, [own.pixels(ring)], (255,), lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
    else:
        fine = np.zeros((own.rows * FINE, own.cols * FINE), np.uint8)
        cv2.fillPoly(fine, [own.pixels(ring, FINE)], (255,), lineType=cv2.LINE_8, shift=SUBPIXEL_BITS)
        # A fill takes every pixel that its outline touches: half of the outline is taken off again.
        thin = cv2.addWeighted(fine, 0.5, cv2.erode(fine, CROSS), 0.5, 0)
        mask = np.asarray(cv2.resize(thin, (own.cols, own.rows), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if soft:
        size = 2 * max(1, round(soft / r)) + 1
        mask = np.asarray(cv2.blur(mask, (size, size)), dtype=np.uint8)
    part = slice(start[1] - low[1], stop[1] - low[1]), slice(start[0] - low[0], stop[0] - low[0])
    block = (
        slice(start[1] - window.row, stop[1] - window.row),
        slice(start[0] - window.col, stop[0] - window.col),
    )
    return mask[part], block
