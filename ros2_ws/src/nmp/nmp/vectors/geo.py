"""Where on Earth a map frame lies.

The map frame of a city is a plane in metres, x east and y north. It is laid on the WGS84 ellipsoid by the azimuthal
equidistant projection around its origin (Snyder, "Map Projections: A Working Manual", USGS 1987, chapter 25), which
keeps distances from the origin: within 4 km of it, no coordinate is off by more than a millimetre from that of a
tangent plane.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from pyproj import CRS, Transformer
from shapely import transform
from shapely.geometry.base import BaseGeometry

from nmp.errors import NmpError


class Origin(NamedTuple):
    """WGS84 coordinates of x = y = 0 of a map frame, degrees."""

    latitude: float
    longitude: float


ORIGINS: dict[str, Origin] = {
    "boston-seaport": Origin(42.336849169438615, -71.05785369873047),
    "singapore-onenorth": Origin(1.2882100868743724, 103.78475189208984),
    "singapore-hollandvillage": Origin(1.2993652317780957, 103.78217697143555),
    "singapore-queenstown": Origin(1.2782562240223188, 103.76741409301758),
}
"""south-west corners of the nuScenes maps, as nuscenes-devkit publishes them (``map_api``, ``export_poses``)"""


def origin_of(location: str, given: tuple[float, float] | None = None) -> Origin:
    """Return the origin that was given (latitude, longitude), else the published one of a city.

    Raises :class:`NmpError` where there is none, and for coordinates that are none.
    """
    if given is not None:
        origin = Origin(*given)
        # the poles have no east
        if not (abs(origin.latitude) < 90.0 and abs(origin.longitude) <= 180.0):
            raise NmpError(f"origin {origin.latitude:g} {origin.longitude:g}: give latitude and longitude in degrees")
        return origin
    if location not in ORIGINS:
        raise NmpError(
            f"nobody knows where on Earth the map frame of '{location}' lies: give --origin LAT LON, or --crs map for "
            "GeoJSON in metres"
        )
    return ORIGINS[location]


def proj_string(origin: Origin) -> str:
    """Return the projection of a map frame as a PROJ string."""
    return f"+proj=aeqd +lat_0={origin.latitude!r} +lon_0={origin.longitude!r} +datum=WGS84 +units=m"


def to_wgs84(shape: BaseGeometry, origin: Origin) -> BaseGeometry:
    """Return a shape of the map frame (m) in longitude and latitude (degrees, WGS84), in this order."""
    step = _transformer(origin)
    return transform(shape, lambda points: np.column_stack(step.transform(points[:, 0], points[:, 1])))


@lru_cache(maxsize=8)
def _transformer(origin: Origin) -> Transformer:
    return Transformer.from_crs(CRS.from_proj4(proj_string(origin)), CRS.from_epsg(4326), always_xy=True)
