"""The edge of the road: stones, gutters, drains, openings, and roads that end without any kerb."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from nmp.citymap import CityMap
from nmp_train.sim.clutter import Clutter
from nmp_train.sim.markings import TAR, paint_crossing, wear_level
from nmp_train.sim.marks import Array, Layer, Marks, pieces, rng_of
from nmp_train.sim.polyline import Polyline
from nmp_train.sim.roadside import RoadSide, Run

STONE = np.array([0.5, 0.49, 0.47])
FLUSH_M = 14.0
"""the ground beside a road without kerb lies at its level this far"""


@dataclass
class Edges:
    """Areas (m, map frame) in which the edge of the road is not an ordinary kerb."""

    openings: list[Polygon] = field(default_factory=list)
    """covered with the asphalt of the road, at its level"""
    flush: list[Polygon] = field(default_factory=list)
    """at the level of the road"""


def mark_kerbs(marks: Marks, city: CityMap, side: RoadSide, region: BaseGeometry, clutter: Clutter, seed: int) -> Edges:
    """Lay kerbs, gutters and drains; return where there is none."""
    edges = Edges()
    for run in side.runs_near(region):
        block = rng_of(seed, run.kerb, 6)
        rng = rng_of(seed, run.path.points, 7)
        dull, gutter = block.random() < clutter.dull_kerbs, block.random() < clutter.gutters
        width, tone = float(block.uniform(0.12, 0.28)), STONE * block.uniform(0.8, 1.25)
        striped = block.random() < clutter.striped_kerbs
        if dull:  # about as light as what lies beside it
            tone = STONE * block.uniform(0.5, 0.8)
        if run.straight and run.path.length > 12 and not run.thin and rng.random() < clutter.flush:
            edges.flush.append(run.path.quad(0, run.path.length, -FLUSH_M, 0.3))
            if rng.random() < 0.4:  # a rolled edge: a strip of stones at road level
                _stones(marks, rng, run.path, -width / 2, width, tone, 0.4)
            continue
        if side.left_hand and striped:
            _stripes(marks, rng, run.path, max(width, 0.2))
        else:
            _stones(marks, rng, run.path, -width / 2, width, tone, float(rng.uniform(0.35, 0.7)) if dull else 0.9)
        # the face of the stone is dark, and dirt gathers below it
        _stones(marks, rng, run.path, 0.03, 0.06, TAR, float(rng.uniform(0.15, 0.5)))
        if gutter:
            pan = float(block.uniform(0.3, 0.6))
            for part in run.path.shifted(pan / 2):
                marks.stroke(pieces(part, 6.0), pan, STONE * block.uniform(0.7, 1.0), 0.8, layer=Layer.TONE, rough=0.25)
            for part in run.path.shifted(pan):
                marks.stroke(pieces(part, 6.0), 0.03, TAR, 0.6, layer=Layer.SEAM, rough=0.5)
        _drains(marks, rng, run, clutter)
        if run.straight and not run.thin and run.path.length > 12:
            _openings(marks, rng, run, city, clutter, edges)
    return edges


def _stones(
    marks: Marks, rng: np.random.Generator, path: Polyline, offset: float, width: float, rgb: Array, opacity: float
) -> None:
    for part in path.shifted(offset):
        strokes = pieces(part, 5.0)
        level = opacity * rng.uniform(0.75, 1.0, len(strokes))
        marks.stroke(strokes, width, rgb, level.tolist(), layer=Layer.KERB, rough=0.35)


def _stripes(marks: Marks, rng: np.random.Generator, path: Polyline, width: float) -> None:
    for part in path.shifted(-width / 2):
        stones = pieces(part, 1.0)
        level = 0.85 * rng.uniform(0.4, 1.0, len(stones))
        for k, tone in enumerate((STONE * 1.4, TAR)):
            marks.stroke(stones[k::2], width, tone, level[k::2].tolist(), layer=Layer.KERB, rough=0.4)


def _drains(marks: Marks, rng: np.random.Generator, run: Run, clutter: Clutter) -> None:
    for _ in range(rng.poisson(clutter.drains_per_km * run.path.length / 1000)):
        s, long = float(rng.uniform(0, run.path.length)), float(rng.uniform(0.5, 0.9))
        grate = run.path.quad(s, min(s + long, run.path.length), 0.03, float(rng.uniform(0.3, 0.5)))
        marks.fill([grate], TAR * 0.8, 0.85, layer=Layer.PATCH, rough=0.3)


def _openings(
    marks: Marks,
    rng: np.random.Generator,
    run: Run,
    city: CityMap,
    clutter: Clutter,
    edges: Edges,
) -> None:
    """Lead the asphalt over the edge of the road into drives and car parks that the map leaves out."""
    path = run.path
    for _ in range(rng.poisson(clutter.openings_per_km * path.length / 1000)):
        wide, deep = float(rng.uniform(3.0, 8.0)), float(rng.uniform(2.5, 12.0))
        if path.length < wide + 3:
            continue
        s = float(rng.uniform(1.5, path.length - wide - 1.5))
        flare = float(rng.uniform(0.0, 1.2))
        ends = np.array([s - flare, s, s + wide, s + wide + flare])
        at = np.array([0.02, -1.0, -1.0, 0.02])
        ring = np.concatenate([path.beside(ends, at), path.beside([s + wide, s], [-deep, -deep])])[[0, 1, 5, 4, 2, 3]]
        area = Polygon(ring)
        if not area.is_valid or city.crossings.near(area):
            continue
        edges.openings.append(area)
        if rng.random() < 0.35:  # a flat stone where the kerb would be
            stone = path.cut(ends[1], ends[2])
            marks.stroke([stone], 0.12, STONE * rng.uniform(0.5, 0.9), 0.6, layer=Layer.SEAM, rough=0.3)
        if rng.random() < clutter.car_park_zebras:
            corner = path.beside([s, s + wide, s + wide, s], [-0.6, -0.6, -3.0, -3.0])
            state = wear_level(rng, 0.4, 0.5)
            paint_crossing(marks, rng, corner, state, clutter, left_hand=False)
