"""The ground of a city as a texture: asphalt, markings, kerbs and pavements painted from the map.

A surface is a pyramid of RGB images with heights in the map frame, so that the renderer can look up distant
ground without aliasing. What is painted at a place depends on the city, the seed and the place only: surfaces of
two drives through one city agree where they overlap.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from shapely import STRtree
from shapely.geometry.base import BaseGeometry
from torch import Tensor

from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.ground import Image, Noise, Window, cover, paint_marks
from nmp_train.sim.kerbs import mark_kerbs
from nmp_train.sim.markings import mark_crossings, mark_dividers, mark_ghosts
from nmp_train.sim.marks import IndexedMarks, Layer, Marks
from nmp_train.sim.roadside import EDGE_M, RoadSide
from nmp_train.sim.unmapped import mark_crossing_surroundings, mark_junctions, mark_lanes, mark_roadsides
from nmp_train.sim.wear import mark_concrete, mark_lengthwise, mark_spots

LEVELS = 6
BLOCK = 1 << (LEVELS - 1)
"""surfaces begin and end at multiples of this many texels, so that all levels of two surfaces agree"""
WINDOW = 640
"""edge of what is painted at once, texels: what it needs fits into a cache"""
REACH_M = 6.0
"""the distance from the road is known this far"""
MARGIN_M = 40.0
"""marks of geometries this far outside are drawn as well; none reaches further"""
RAMP_M = 1.0
"""a kerb goes down over this length"""
LAWN, SOIL, SLAB, TARRED, RIM, PLAZA = range(6)
"""what lies beside the road: places in ``_Plan.palette`` and ``_Plan.contrast``"""


@dataclass(frozen=True)
class Surface:
    """A painted ground: colour and height packed into one int32 per texel, all pyramid levels behind each other.

    Bits 0..23 are red + 256 green + 65536 blue (0..255 each). Bits 24..30 are the height of the ground above the
    road in units of 5 mm: 0 on roads and where a kerb is lowered, 24..30 (12 to 15 cm, one kerb height per city)
    beside them. Texels of coarser levels hold averages of both.
    """

    x0: float
    y0: float
    """map position of the corner of the first texel, m"""
    resolution: float
    """edge of a texel of level 0, m"""
    texels: Tensor
    """[total] int32: red + 256 green + 65536 blue + 2^24 height"""
    levels: tuple[tuple[int, int, int], ...]
    """(offset, rows, cols) of each level in ``texels``; rows run along y, columns along x"""

    def to(self, device: torch.device | str) -> Surface:
        """Return the same surface with its texels on a device."""
        return Surface(self.x0, self.y0, self.resolution, self.texels.to(device), self.levels)


def paint_surface(
    city: CityMap,
    bounds: tuple[float, float, float, float],
    seed: int,
    resolution: float = 0.1,
    *,
    ghosts: Sequence[BaseGeometry] = (),
    difficulty: float = 1.0,
    clutter: Clutter | None = None,
) -> Surface:
    """Paint the ground of a city inside ``bounds`` (x0, y0, x1, y1 in the map frame, m).

    The surface covers at least ``bounds``; it begins and ends at multiples of 32 texels. Give the whole city, not a
    part of it: what lies at a place must not depend on where the map was cut. The outlines of the last cities are
    remembered, so further surfaces of them cost their own area only.

    :param resolution: edge of a texel, m
    :param ghosts: lines and polygons that the map had once (map frame, m): painted as blacked-out traces
    :param difficulty: strength of everything that does not agree with the map, see :class:`Clutter`
    :param clutter: its shares and densities at difficulty 1; None takes the defaults
    :raise NmpError: when ``bounds`` are empty or a parameter is out of range
    """
    if not (bounds[2] > bounds[0] and bounds[3] > bounds[1]):
        raise NmpError(f"bounds {bounds} of a surface are empty: give x0 < x1 and y0 < y1, in metres")
    if not 0.02 <= resolution <= 1:
        raise NmpError(f"resolution {resolution:g} m of a surface is out of range: choose 0.02 to 1 m")
    strengths = (clutter or Clutter()).scaled(difficulty)
    step = resolution * BLOCK
    low = [int(np.floor(v / step + 1e-6)) * BLOCK for v in bounds[:2]]
    high = [int(np.ceil(v / step - 1e-6)) * BLOCK for v in bounds[2:]]
    whole = Window(low[0], low[1], high[0] - low[0], high[1] - low[1], resolution)
    plan = _Plan(city, whole, seed, strengths, ghosts)
    packed = np.zeros((whole.rows, whole.cols, 4), np.uint8)
    for window in _windows(whole):
        block = packed[window.row - whole.row :, window.col - whole.col :][: window.rows, : window.cols]
        plan.paint(window, block)
    return _pyramid(packed, whole)


def _windows(whole: Window) -> Iterator[Window]:
    rows, cols = (max(1, round(n / WINDOW)) for n in (whole.rows, whole.cols))
    across, along = np.linspace(0, whole.rows, rows + 1).astype(int), np.linspace(0, whole.cols, cols + 1).astype(int)
    for a, b in zip(across[:-1], across[1:], strict=True):
        for c, d in zip(along[:-1], along[1:], strict=True):
            yield Window(whole.col + int(c), whole.row + int(a), int(d - c), int(b - a), whole.resolution)


@functools.lru_cache(maxsize=4)  # one for each location: drives through them alternate
def _roadside(city: CityMap) -> RoadSide:
    return RoadSide(city)


class _Plan:
    """Everything that lies on the ground of one city in and around a region, ready to be painted there."""

    def __init__(
        self, city: CityMap, whole: Window, seed: int, clutter: Clutter, ghosts: Sequence[BaseGeometry]
    ) -> None:
        self.clutter, self.noise = clutter, Noise(seed)
        rng = np.random.default_rng((seed, 21))
        # Whatever reaches into the window is drawn whole, from geometries that are not cut.
        self.asphalt = rng.uniform(0.16, 0.3) * np.array([1.0, 1.0, 1.03])
        side, marks, region = _roadside(city), Marks(self.asphalt), whole.region(MARGIN_M)
        axes = side.axes_near(region)
        edges = mark_kerbs(marks, city, side, region, clutter, seed)
        mark_concrete(marks, axes, clutter, seed)
        mark_lengthwise(marks, city, side, region, clutter, seed)
        mark_spots(marks, side, region, clutter, seed)
        mark_ghosts(marks, ghosts, clutter, seed)
        mark_roadsides(marks, city, side, region, clutter, seed)
        mark_junctions(marks, city, side, region, clutter, seed)
        mark_crossing_surroundings(marks, city, side, region, clutter, seed)
        mark_lanes(marks, city, side, axes, clutter, seed)
        ramps = mark_crossings(marks, city, side, region, clutter, seed)
        mark_dividers(marks, city, side, region, clutter, seed)
        self.marks: IndexedMarks = marks.indexed()
        # Short edges: cut at a window's border, none of them changes its slope inside.
        self.road = shapely.clip_by_rect(side.segmented, *whole.region(2 * MARGIN_M).bounds)
        self.walks = _Group(city.walkways.near(region))
        self.openings = _Group([*edges.openings])
        self.level = _Group([*edges.flush, *edges.openings, *ramps])
        self.kerb_height = int(rng.integers(24, 31))
        lawn = rng.uniform(0.2, 0.34) * np.array([rng.uniform(0.8, 1.08), 1.0, rng.uniform(0.48, 0.66)])
        soil = rng.uniform(0.22, 0.36) * np.array([1.0, rng.uniform(0.82, 0.9), rng.uniform(0.65, 0.8)])
        slab = rng.uniform(0.3, 0.52) * np.array([1.0, 0.985, 0.95])
        tarred = self.asphalt * rng.uniform(0.85, 1.2)
        plaza = np.array([0.44, 0.36, 0.31]) * rng.uniform(0.7, 1.1)
        self.palette = np.array([lawn, soil, slab, tarred, slab * rng.uniform(0.9, 1.3), plaza], dtype=np.float32)
        self.contrast = np.array([0.3, 0.35, 0.13, 0.2, 0.12, 0.13], dtype=np.float32)

    def paint(self, window: Window, out: NDArray[np.uint8]) -> None:
        """Paint a window into ``out`` [rows, cols, 4]: red, green, blue, height."""
        r, noise, clutter = window.resolution, self.noise, self.clutter
        halo = int(np.ceil(REACH_M / r)) + 1
        core = (slice(halo, -halo), slice(halo, -halo))
        wide = window.grown(halo)
        road_wide = cover(wide, [shapely.clip_by_rect(self.road, *wide.region(40.0).bounds)])
        outside = np.minimum(cv2.distanceTransform(255 - road_wide, cv2.DIST_L2, 5)[core] * r, REACH_M)
        inside = np.minimum(
            cv2.distanceTransform((road_wide > 127).astype(np.uint8), cv2.DIST_L2, 5)[core] * r, REACH_M
        )
        road = road_wide[core]

        grain, rough = noise.tile(noise.grain, window), noise.tile(noise.rough, window)
        metre, street = noise.tile(noise.metre, window), noise.field(window, 9.0, 2)
        block = noise.field(window, 45.0, 3)
        index = self._materials(window, outside, metre)
        shade = 0.35 * grain + 0.4 * metre + 0.45 * street
        shade *= np.take(self.contrast, index)
        shade += 1
        np.clip(shade, 0.35, 1.9, out=shade)
        rgb = np.take(self.palette, index, axis=0)
        rgb *= shade[..., None]

        alpha = road.astype(np.float32) * np.float32(1 / 255)
        shade = 0.45 * grain + 0.25 * rough + 0.12 * metre + 0.25 * street + 0.6 * block
        shade *= 0.17
        shade += 1
        # Dust, leaves and soil gather along the kerb, more in some streets than in others.
        dirt = np.clip((0.9 - inside) * 1.2 + 0.35 * rough + 0.5 * metre - 0.4, 0, 1)
        some = noise.field(window, 28.0, 4)
        dirt *= np.clip(some + np.float32(2.6 * clutter.dirt - 1.6), 0, 0.6) if clutter.dirt else 0
        # Grass creeps over the edge where nobody cuts it.
        creep = np.clip((0.12 + 0.45 * np.clip(metre, 0, 2) + 0.15 * rough - inside) * 4, 0, 1)
        wild = noise.field(window, 22.0, 5)
        creep *= np.clip((wild + np.float32(3.2 * clutter.overgrown - 2.2)) * 2, 0, 1) if clutter.overgrown else 0
        np.clip(shade, 0.4, 1.8, out=shade)
        tarmac = shade[..., None] * self.asphalt.astype(np.float32)
        rgb += alpha[..., None] * (tarmac - rgb)
        paint_marks(rgb, window, self.marks, rough, range(Layer.KERB, Layer.KERB + 1))
        openings = self.openings.near(wide)
        if openings:
            rgb += (cover(window, openings).astype(np.float32) / 255)[..., None] * (tarmac - rgb)
        del tarmac
        paint_marks(rgb, window, self.marks, rough, range(Layer.TONE, Layer.DIRT + 1))
        for strength, material in ((dirt, SOIL), (creep, LAWN)):
            amount = strength * alpha
            if amount.any():
                rgb += amount[..., None] * (self.palette[material] * np.float32(0.85) - rgb)
        rgb *= 255
        rgb += 0.5
        np.clip(rgb, 0, 255, out=rgb)
        out[..., :3] = rgb
        out[..., 3] = self._height(wide, road_wide)[core]

    def _materials(self, window: Window, outside: Image, metre: Image) -> NDArray[np.uint8]:
        """Choose what lies beside the road: pavements, planted strips, second kerbs, lawns."""
        noise, clutter = self.noise, self.clutter
        area, kind = noise.field(window, 40.0, 6), noise.field(window, 55.0, 7)
        index = np.where(area > 0.5, SLAB, LAWN).astype(np.uint8)  # courts and lawns away from the road
        index[(area > 0.3) & (area <= 0.5)] = PLAZA
        paving = np.where(kind > 1.9 - 3.4 * clutter.asphalt_walks, TARRED, SLAB).astype(np.uint8)
        paved = outside < 2.6 + 1.1 * np.clip(noise.field(window, 60.0, 8), -1.5, 2.0)
        index[paved] = paving[paved]
        index[cover(window, self.walks.near(window)) > 127] = SLAB
        # A planted strip between the kerb and the path, with a kerb of its own behind it.
        strip = noise.field(window, 35.0, 9) > 1.9 - 3.2 * clutter.second_kerbs
        depth = 1.5 + 0.5 * np.clip(noise.field(window, 50.0, 10), -1.5, 2.5)
        planted = strip & (outside > 0.25) & (outside < depth)
        index[planted] = np.where(metre > 0.7, SOIL, LAWN)[planted]
        index[strip & (outside >= depth) & (outside < depth + 0.14)] = RIM
        path = strip & (outside >= depth + 0.14) & (outside < depth + 2.0)
        index[path] = paving[path]
        return index

    def _height(self, window: Window, road: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the height (units of 5 mm) of a window whose road is known; its outermost metre is not exact."""
        height = np.where(road > 127, 0, self.kerb_height).astype(np.uint8)
        lowered = self.level.near(window)
        if lowered:
            size = 2 * round(RAMP_M / 2 / window.resolution) + 1
            low = cv2.blur(cover(window, lowered), (size, size)).astype(np.float32) * np.float32(1 / 127)
            low = np.clip(1 - low, 0, 1)  # down to the road inside the area, up again around it
            height = np.round(height * low).astype(np.uint8)
        return height


class _Group:
    """Polygons with a spatial index."""

    def __init__(self, shapes: list[BaseGeometry]) -> None:
        self.shapes = [shapely.segmentize(shape, EDGE_M) for shape in shapes]
        self.tree = STRtree(self.shapes)

    def near(self, window: Window) -> list[BaseGeometry]:
        return [self.shapes[i] for i in np.sort(self.tree.query(window.region(5.0)))]


def _pyramid(packed: NDArray[np.uint8], whole: Window) -> Surface:
    level = torch.from_numpy(packed)
    flat, levels, offset = [], [], 0
    for k in range(LEVELS):
        if k:
            four = [level[a::2, b::2].to(torch.int16) for a in (0, 1) for b in (0, 1)]
            level = ((four[0] + four[1] + four[2] + four[3] + 2) >> 2).to(torch.uint8)
        rows, cols = level.shape[:2]
        flat.append(level.contiguous().view(torch.int32).flatten())  # little-endian: height is the highest byte
        levels.append((offset, rows, cols))
        offset += rows * cols
    r = whole.resolution
    return Surface(whole.col * r, whole.row * r, r, torch.cat(flat), tuple(levels))


def city_bounds(city: CityMap, margin: float = 10.0) -> tuple[float, float, float, float]:
    """Return the extent (x0, y0, x1, y1) of all roads of a city and ``margin`` m around them (map frame, m)."""
    roads = [*city.road_segments.geometries, *city.lanes.geometries]
    if not roads:
        raise NmpError(f"the map of {city.location} has no roads: there is nothing to drive on")
    x0, y0, x1, y1 = shapely.total_bounds(roads).tolist()
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin
