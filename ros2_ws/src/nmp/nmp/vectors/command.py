"""The command ``nmp vectors``: layers in, a vector map of the city out."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from shapely import get_coordinates

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.vectorize import outline
from nmp.vectors.city import city_elements, raster_of
from nmp.vectors.elements import MapElement
from nmp.vectors.geo import origin_of
from nmp.vectors.geojson import write_geojson
from nmp.vectors.lanelet import write_lanelet2
from nmp.vectors.raster import CityRaster

LONGEST_SIDE_PX = 1600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp vectors``."""
    parser.add_argument(
        "layers", nargs="+", type=Path, metavar="LAYERS", help="folders of 'nmp map' or of a live run, all of one city"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="what to write: .geojson (or .json), or .osm (Lanelet2)"
    )
    parser.add_argument(
        "--crs",
        choices=("wgs84", "map"),
        default="wgs84",
        help="coordinates of GeoJSON: longitude and latitude, or x and y of the map frame, m (default: %(default)s)",
    )
    parser.add_argument(
        "--origin",
        nargs=2,
        type=float,
        metavar=("LAT", "LON"),
        help="where x = y = 0 of the map frame lies, degrees (default: as published for the cities of nuScenes)",
    )
    parser.add_argument(
        "--least-confidence",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out what is less sure, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw the elements over their raster")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp vectors``."""
    kind = args.out.suffix.lower()
    if kind not in (".geojson", ".json", ".osm"):
        raise NmpError(f"--out {args.out}: the name must end in .geojson, .json or .osm, which says what to write")
    if kind == ".osm" and args.crs == "map":
        raise NmpError("a Lanelet2 map is in longitude and latitude: leave --crs map out, or write .geojson")
    if not 0.0 <= args.least_confidence <= 1.0:
        raise NmpError(f"--least-confidence is {args.least_confidence:g}: give a share from 0 to 1")
    with CityRaster() as raster:
        raster_of(args.layers, raster)
        origin = None if args.crs == "map" else origin_of(raster.location, args.origin)
        elements = [e for e in city_elements(raster) if e.confidence >= args.least_confidence]
        if kind == ".osm":
            assert origin is not None
            write_lanelet2(args.out, elements, raster.location, origin)
        else:
            write_geojson(args.out, elements, raster.location, origin)
        print(f"wrote {args.out}: {_summary(elements)} from {raster.frames} frames of {raster.location}")
        if args.picture:
            _draw(args.picture, elements, raster)
            print(f"wrote {args.picture}")


def _summary(elements: list[MapElement]) -> str:
    count = Counter(e.name for e in elements)
    metres = {name: sum(outline(e.geometry).length for e in elements if e.name == name) for name in CLASSES}
    return ", ".join(f"{count[name]} x {name} ({metres[name]:.0f} m)" for name in CLASSES)


def _draw(path: Path, elements: list[MapElement], raster: CityRaster) -> None:
    from nmp.draw import save_png, vector_picture  # brings matplotlib, which takes its time

    view = raster.overview(LONGEST_SIDE_PX)
    lines = [(e.name, np.asarray(get_coordinates(outline(e.geometry)))) for e in elements]
    title = f"{raster.location}: {len(elements)} elements from {raster.frames} frames"
    save_png(path, vector_picture(view.probabilities, view.seen, view.corner, view.resolution, lines, title))
