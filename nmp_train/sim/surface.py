"""The ground of a city as a texture: asphalt, markings, kerbs and pavements painted from the map.

A surface is a pyramid of RGB images in the map frame, so that the renderer can look up distant ground
without aliasing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from shapely import ops
from shapely.geometry import LineString
from shapely.geometry.base import BaseGeometry
from torch import Tensor

from nmp.citymap import CityMap, IndexedGeometries

LEVELS = 6
SUBPIXEL_BITS = 6

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Surface:
    """A painted ground: RGB packed into one int32 per texel, all pyramid levels behind each other."""

    x0: float
    y0: float
    """map position of the corner of the first texel, m"""
    resolution: float
    """edge of a texel of level 0, m"""
    texels: Tensor
    """[total] int32: red + 256 green + 65536 blue"""
    levels: tuple[tuple[int, int, int], ...]
    """(offset, rows, cols) of each level in ``texels``; rows run along y, columns along x"""

    def to(self, device: torch.device | str) -> Surface:
        return Surface(self.x0, self.y0, self.resolution, self.texels.to(device), self.levels)


def paint_surface(
    city: CityMap, bounds: tuple[float, float, float, float], seed: int, resolution: float = 0.1
) -> Surface:
    """Paint the ground of a city inside ``bounds`` (x0, y0, x1, y1 in the map frame, m)."""
    x0, y0, x1, y1 = bounds
    painter = _Painter(x0, y0, round((x1 - x0) / resolution), round((y1 - y0) / resolution), resolution, seed)
    return painter.paint(city)


class _Painter:
    def __init__(self, x0: float, y0: float, cols: int, rows: int, resolution: float, seed: int) -> None:
        self.x0, self.y0, self.res = x0, y0, resolution
        self.shape = (rows, cols)
        self.rng = np.random.default_rng(seed)

    def paint(self, city: CityMap) -> Surface:
        rng = self.rng
        road = self._fill([*city.road_segments.geometries, *city.lanes.geometries])
        walk = self._fill(list(city.walkways.geometries))
        ground = self._noise(8.0) * 0.5 + self._noise(0.7) * 0.5
        rgb = self._tint(ground, rng.uniform([0.20, 0.26, 0.12], [0.36, 0.38, 0.22]), 0.35)
        # Pavements of real cities are rarely all mapped: a strip along every kerb is paved as well.
        apron = cv2.dilate(road, np.ones((2 * round(2.5 / self.res) + 1,) * 2, np.uint8))
        paved = np.maximum(walk, (apron * (self._noise(25.0) > -0.3)).astype(np.uint8))
        self._blend(rgb, paved, self._tint(self._noise(1.5), rng.uniform(0.38, 0.6) * np.ones(3), 0.15))
        del walk, apron, paved
        base = rng.uniform(0.16, 0.34)
        asphalt = self._noise(0.15) * 0.25 + self._noise(1.0) * 0.2 + self._noise(12.0) * 0.55
        patches = np.round(self._noise(6.0) * 1.2) * 0.08  # repaired rectangles differ in tone
        self._blend(rgb, road, self._tint(asphalt + patches, base * np.array([1.0, 1.0, 1.04]), 0.22))
        del asphalt, patches
        self._tar_lines(rgb, road, city)
        wear = self._noise(0.4) * 0.5 + self._noise(5.0) * 0.5
        self._kerbs(rgb, city)
        self._crossings(rgb, city, wear)
        self._dividers(rgb, city, wear)
        return self._pyramid(rgb)

    # -- primitives ------------------------------------------------------------------------------------------

    def _pixels(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        scaled = (np.asarray(points)[:, :2] - [self.x0, self.y0]) / self.res - 0.5
        return np.round(scaled * (1 << SUBPIXEL_BITS)).astype(np.int32)

    def _fill(self, polygons: list[BaseGeometry]) -> NDArray[np.uint8]:
        mask = np.zeros(self.shape, np.uint8)
        union = ops.unary_union(polygons)
        for part in getattr(union, "geoms", [union]):
            if part.geom_type == "Polygon" and not part.is_empty:
                rings = [self._pixels(np.array(r.coords)) for r in (part.exterior, *part.interiors)]
                cv2.fillPoly(mask, rings, (255,), lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
        return mask

    def _noise(self, scale_m: float) -> Image:
        """Smooth noise of about unit deviation with features of the given size (m)."""
        rows, cols = (max(2, int(n * self.res / scale_m) + 2) for n in self.shape)
        coarse = self.rng.standard_normal((rows, cols)).astype(np.float32)
        return np.asarray(cv2.resize(coarse, self.shape[::-1], interpolation=cv2.INTER_LINEAR), np.float32)

    @staticmethod
    def _tint(noise: Image, rgb: NDArray[np.float64], contrast: float) -> Image:
        shade = np.clip(1 + contrast * noise, 0.3, 1.9)
        return (shade[..., None] * rgb.astype(np.float32)).astype(np.float32)

    @staticmethod
    def _blend(rgb: Image, mask: NDArray[np.uint8], other: Image) -> None:
        alpha = mask.astype(np.float32)[..., None] / 255
        rgb += alpha * (other - rgb)

    def _stroke(
        self,
        rgb: Image,
        lines: list[NDArray[np.float64]],
        width_m: float,
        colour: NDArray[np.float64],
        opacity: Image | float,
    ) -> None:
        """Draw polylines (map frame, m) with antialiasing, touching only the pixels around them."""
        for line in _pieces(lines):
            pixels = self._pixels(line)
            pad = round(width_m / self.res) + 3
            low = np.maximum((pixels.min(axis=0) >> SUBPIXEL_BITS) - pad, 0)
            high = np.minimum((pixels.max(axis=0) >> SUBPIXEL_BITS) + pad, self.shape[::-1])
            if (high <= low).any():
                continue
            mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
            shifted = pixels - (low << SUBPIXEL_BITS).astype(np.int32)
            thickness = max(1, round(width_m / self.res))
            cv2.polylines(mask, [shifted], False, (255,), thickness, cv2.LINE_AA, SUBPIXEL_BITS)
            block = (slice(low[1], high[1]), slice(low[0], high[0]))
            alpha = mask.astype(np.float32) / 255 * (opacity if isinstance(opacity, float) else opacity[block])
            rgb[block] += alpha[..., None] * (colour.astype(np.float32) - rgb[block])

    # -- what a street has on it -----------------------------------------------------------------------------

    def _worn(self, wear: Image, line_level: float) -> Image:
        """Opacity of paint: ``line_level`` 1 is fresh, 0 is gone but for traces."""
        return np.clip((wear + 3.0 * line_level - 0.6) * 0.8, 0.06, 0.95)

    def _dividers(self, rgb: Image, city: CityMap, wear: Image) -> None:
        white, yellow = np.array([0.85, 0.85, 0.82]), np.array([0.82, 0.62, 0.14])
        levels = [self._worn(wear, level) for level in (0.15, 0.5, 0.9)]

        def strokes(
            line: LineString, width: float, colour: NDArray[np.float64], dash: tuple[float, float] | None
        ) -> None:
            opacity = levels[int(self.rng.choice(3, p=[0.2, 0.35, 0.45]))]
            self._stroke(rgb, _dashes(line, dash, self.rng.uniform(0, 9)), width, colour, opacity)

        yellow_city = self.rng.random() < 0.5
        for line in city.road_dividers.geometries:
            style = self.rng.choice(3, p=[0.45, 0.4, 0.15])
            colour = yellow if yellow_city else white
            if style == 0:
                for offset in (-0.16, 0.16):
                    strokes(line.offset_curve(offset), 0.13, colour, None)
            else:
                strokes(line, 0.16, colour, None if style == 1 else (3.0, 3.0))
        for line in city.lane_dividers.geometries:
            solid = self.rng.random() < 0.2
            dash = None if solid else ((3.0, 6.0) if self.rng.random() < 0.5 else (2.5, 3.5))
            strokes(line, self.rng.uniform(0.11, 0.17), white, dash)

    def _crossings(self, rgb: Image, city: CityMap, wear: Image) -> None:
        paint = np.array([0.85, 0.85, 0.83])
        levels = [self._worn(wear, level) for level in (0.2, 0.6, 1.0)]
        for polygon in city.crossings.geometries:
            box = polygon.minimum_rotated_rectangle
            if box.geom_type != "Polygon":
                continue
            corner = np.array(box.exterior.coords)[:4]
            sides = np.linalg.norm(np.roll(corner, -1, axis=0) - corner, axis=1)
            if sides[0] < sides[1]:
                corner = np.roll(corner, -1, axis=0)
            along, across = corner[1] - corner[0], corner[3] - corner[0]
            length, depth = np.linalg.norm(along), np.linalg.norm(across)
            opacity = levels[int(self.rng.integers(3))]
            if self.rng.random() < 0.65:  # zebra: bars in the direction of travel, half a metre apart
                pitch = self.rng.uniform(0.9, 1.3)
                stations = np.arange(0.4, length - 0.2, pitch) / length
                bars = [np.stack([corner[0] + s * along, corner[3] + s * along]) for s in stations]
                self._stroke(rgb, bars, 0.5, paint, opacity)
            else:  # ladder rails only
                rails = [np.stack([corner[i], corner[j]]) for i, j in ((0, 1), (3, 2))]
                self._stroke(rgb, rails, 0.3 if depth > 2 else 0.2, paint, opacity)

    def _kerbs(self, rgb: Image, city: CityMap) -> None:
        union = ops.unary_union([*city.road_segments.geometries, *city.lanes.geometries])
        stone = np.array([0.55, 0.54, 0.52]) * self.rng.uniform(0.75, 1.15)
        fade = np.clip(0.75 + 0.3 * self._noise(10.0), 0.15, 1.0)
        gutter = np.array([0.13, 0.13, 0.13])
        for part in getattr(union, "geoms", [union]):
            if part.geom_type == "Polygon":
                rings = [np.array(r.coords) for r in (part.exterior, *part.interiors)]
                self._stroke(rgb, rings, 0.45, gutter, fade * 0.35)
                self._stroke(rgb, rings, 0.2, stone, fade)

    def _tar_lines(self, rgb: Image, road: NDArray[np.uint8], city: CityMap) -> None:
        """Cracks and seams: dark or light lines that mean nothing, so that a line alone is no proof of a divider."""
        rows, cols = self.shape
        count = int(rows * cols * self.res**2 / 900)
        inside = np.argwhere(road[::20, ::20] > 0) * 20
        if not len(inside):
            return
        for _ in range(count):
            y, x = inside[self.rng.integers(len(inside))] * self.res + [self.y0, self.x0]
            angle = self.rng.uniform(0, 2 * np.pi)
            steps = self.rng.normal(0, 0.25, self.rng.integers(4, 16)).cumsum() + angle
            points = np.cumsum(np.stack([np.cos(steps), np.sin(steps)], axis=1) * 1.5, axis=0) + [x, y]
            tone = self.rng.choice([0.07, 0.1, 0.42], p=[0.5, 0.3, 0.2]) * np.ones(3)
            self._stroke(rgb, [points], self.rng.uniform(0.05, 0.15), tone, float(self.rng.uniform(0.2, 0.6)))

    def _pyramid(self, rgb: Image) -> Surface:
        level = torch.from_numpy(rgb).clamp(0, 1).mul(255).round().to(torch.uint8)
        flat, levels, offset = [], [], 0
        for _ in range(LEVELS):
            rows, cols = level.shape[:2]
            channels = level.to(torch.int32)
            flat.append((channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]).flatten())
            levels.append((offset, rows, cols))
            offset += rows * cols
            pooled = torch.nn.functional.avg_pool2d(level.permute(2, 0, 1)[None].float(), 2, ceil_mode=True)
            level = pooled[0].permute(1, 2, 0).round().to(torch.uint8)
        return Surface(self.x0, self.y0, self.res, torch.cat(flat), tuple(levels))


def _dashes(line: BaseGeometry, dash: tuple[float, float] | None, phase: float) -> list[NDArray[np.float64]]:
    """Cut a line into dashes of (paint, gap) metres; None gives the whole line."""
    parts = [p for p in getattr(line, "geoms", [line]) if p.geom_type == "LineString" and not p.is_empty]
    if dash is None:
        return [np.array(p.coords) for p in parts]
    out = []
    for part in parts:
        for start in np.arange(-phase % sum(dash) - sum(dash), part.length, sum(dash)):
            piece = ops.substring(part, max(start, 0.0), max(start + dash[0], 0.0))
            if piece.length > 0.1:
                out.append(np.array(piece.coords))
    return out


def _pieces(lines: list[NDArray[np.float64]], length_m: float = 15.0) -> Iterator[NDArray[np.float64]]:
    """Cut polylines into short ones: a long diagonal would touch a huge block of pixels."""
    for line in lines:
        fine = np.array(LineString(line[:, :2]).segmentize(length_m).coords)
        start = 0
        travelled = np.concatenate([[0.0], np.linalg.norm(np.diff(fine, axis=0), axis=1).cumsum()])
        while start < len(fine) - 1:
            end = max(start + 1, int(np.searchsorted(travelled, travelled[start] + length_m, side="right")) - 1)
            yield fine[start : end + 1]
            start = end


def city_bounds(city: CityMap, margin: float = 10.0) -> tuple[float, float, float, float]:
    """Return the extent (x0, y0, x1, y1) of all roads of a city, m."""
    groups: list[IndexedGeometries] = [city.road_segments, city.lanes]
    boxes = np.array([g.bounds for group in groups for g in group.geometries])
    low, high = boxes[:, :2].min(axis=0) - margin, boxes[:, 2:].max(axis=0) + margin
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
