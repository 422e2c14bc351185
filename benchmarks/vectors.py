"""Time the vectors of a drive, live and as one map, and measure how far the map is from the truth.

    python benchmarks/vectors.py LAYERS [LAYERS ...] --maps DATAROOT [--out vectors.json]

Prints (and writes) JSON. "live" is what the mapping node adds to a frame for ~/vectors, with the share of a frame of
200 ms and how long numbers last; "city" is what `nmp vectors` does. Its Chamfer distances (m) are those of
docs/evaluation.md, once for the whole map: `precision` from what was found to the truth, `recall` from the truth where
anything was seen to what was found. Layers lie where the car believed to be, the truth where it is.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from nmp.changelog import local_date
from nmp.evaluation import CityMaps, nan_as_null, write_json
from nmp.frame import CLASSES
from nmp.geometry import Array, BevGrid
from nmp.layers import read_layers
from nmp.metrics import FARTHEST_M, SPACING_M, ChamferMeter
from nmp.truth import truth_lines
from nmp.vectorize import along, outline, vectorize
from nmp.vectors.city import city_elements, raster_of
from nmp.vectors.elements import MapElement
from nmp.vectors.raster import CityRaster
from nmp.vectors.tracker import ElementTracker, Tracked

FRAME_MS = 200.0
MARGIN_M = 50.0


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what an action returns, and how long it took, ms."""
    start = time.perf_counter()
    result = action()
    return result, (time.perf_counter() - start) * 1e3


def median(values: list[float]) -> float:
    return round(float(np.median(values)), 2)


def live(folder: Path) -> dict[str, Any]:
    """Follow the elements of one drive, frame by frame."""
    try:
        from nmp.nodes.conversions import to_markers
    except ImportError:  # no ROS here
        to_markers = None  # type: ignore[assignment]
    tracker = ElementTracker()
    lines, following, messages, counts, frames = [], [], [], [], Counter[int]()
    continued = total = 0
    before: set[int] = set()
    for local_map in read_layers(folder):
        _, ms = timed(lambda m=local_map: vectorize(m.probabilities, m.grid))
        lines.append(ms)
        tracked: Tracked
        tracked, ms = timed(lambda m=local_map: tracker.update(m))
        following.append(ms)
        if to_markers is not None:
            messages.append(timed(lambda t=tracked: to_markers(t))[1])
        ids = {e.id for e in tracked.elements}
        counts.append(len(ids))
        if frames:
            continued, total = continued + len(ids & before), total + len(before)
        frames.update(ids)
        before = ids
    ms = float(np.median(following)) + (float(np.median(messages)) if messages else 0.0)
    return {
        "frames": len(counts),
        "elements_per_frame": median([float(c) for c in counts]),
        "vectorize_ms": median(lines),
        "vectorize_and_follow_ms": median(following),
        "follow_p95_ms": round(float(np.percentile(following, 95)), 2),
        "markers_ms": median(messages) if messages else None,
        "share_of_200_ms": round(ms / FRAME_MS, 3),
        "ids": len(frames),
        "frames_per_id": median([float(c) for c in frames.values()]),
        "ids_kept_to_the_next_frame": round(continued / max(total, 1), 3),
    }


def city(folders: list[Path], maps: CityMaps) -> dict[str, Any]:
    """Make one map of all drives and compare it with the truth."""
    with CityRaster() as raster:
        _, adding = timed(lambda: raster_of(folders, raster))
        elements, lines = timed(lambda: city_elements(raster))
        return {
            "frames": raster.frames,
            "tiles": len(raster.tiles),
            "raster_ms_per_frame": round(adding / raster.frames, 2),
            "vectorize_ms": round(lines, 1),
            "elements": dict(Counter(e.name for e in elements)),
            "vertices": int(sum(len(shapely.get_coordinates(e.geometry)) for e in elements)),
            "chamfer_m": nan_as_null(chamfer(elements, raster, maps)),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def chamfer(elements: list[MapElement], raster: CityRaster, maps: CityMaps) -> dict[str, dict[str, float]]:
    """Return the rows of :meth:`nmp.metrics.ChamferMeter.metres` for a whole map."""
    truth = true_lines(raster, maps, max(e.last_seen_ns for e in elements))
    meter = ChamferMeter()
    for index, name in enumerate(CLASSES):
        found = [outline(e.geometry) for e in elements if e.name == name]
        meter.add(index, 0, nearest(points_on(found), truth[name]))
        points = points_on(truth[name])
        meter.add(index, 1, nearest(points[raster.seen(points).frames > 0], found))
    return meter.metres()


def true_lines(raster: CityRaster, maps: CityMaps, stamp_ns: int) -> dict[str, list[BaseGeometry]]:
    """Return the lines of the map in force at a time, around all that was seen (map frame, m)."""
    low, high = (np.array(t) * raster.edge for t in (np.min(raster.tiles, axis=0), np.max(raster.tiles, axis=0) + 1))
    x, y = (low + high) / 2
    length, width = high - low + 2 * MARGIN_M
    region = BevGrid(float(length), float(width), raster.resolution)
    source = maps.city(raster.location, local_date(raster.location, stamp_ns))
    local = truth_lines(source, float(x), float(y), 0.0, region)
    return {name: [shapely.affinity.translate(line, x, y) for line in lines] for name, lines in local.items()}


def points_on(lines: list[BaseGeometry]) -> Array:
    return np.concatenate([np.zeros((0, 2)), *(along(line, SPACING_M) for line in lines)])


def nearest(points: Array, lines: list[BaseGeometry]) -> Array:
    if not len(points) or not lines:
        return np.full(len(points), FARTHEST_M)
    tree = shapely.STRtree(lines)
    return tree.query_nearest(shapely.points(points), return_distance=True, all_matches=False)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="+", type=Path, metavar="LAYERS")
    parser.add_argument("--maps", type=Path, required=True, metavar="DATAROOT")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    result = {
        "live": {folder.name: live(folder) for folder in args.layers},
        "city": city(args.layers, CityMaps(args.maps)),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
