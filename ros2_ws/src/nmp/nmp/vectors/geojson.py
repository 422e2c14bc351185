"""Vector maps as GeoJSON (RFC 7946)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from nmp.evaluation import write_json
from nmp.vectors.elements import MapElement
from nmp.vectors.geo import Origin, proj_string, to_wgs84

DEGREE_DIGITS, METRE_DIGITS = 8, 3
"""a millimetre, either way"""


def time_text(stamp_ns: int) -> str:
    """Return a stamp as ISO 8601 text in UTC, to the millisecond."""
    return datetime.fromtimestamp(stamp_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def properties_of(element: MapElement) -> dict[str, Any]:
    """Return what is known of an element, beside its geometry, by the names that files use."""
    return {
        "class": element.name,
        "confidence": round(element.confidence, 3),
        "first_seen": time_text(element.first_seen_ns),
        "last_seen": time_text(element.last_seen_ns),
        "frames": element.frames,
        **({} if element.traversals is None else {"traversals": element.traversals}),
    }


def feature_collection(elements: Sequence[MapElement], location: str, origin: Origin | None) -> dict[str, Any]:
    """Return a FeatureCollection.

    :param origin: of the map frame: coordinates are WGS84 longitude and latitude. None: they are x and y of the map
        frame in metres, which section 4 of the RFC leaves to those who agree on it; the member ``nmp`` says so
    """
    frame: dict[str, Any] = {"location": location, "coordinates": "map frame, m: x east, y north"}
    if origin is not None:
        frame |= {
            "coordinates": "WGS84",
            "origin": {"latitude": origin.latitude, "longitude": origin.longitude},
            "map_frame": proj_string(origin),
        }
    # A member that the RFC does not know, which readers pass over (section 6.1).
    return {"type": "FeatureCollection", "nmp": frame, "features": [_feature(e, origin) for e in elements]}


def _feature(element: MapElement, origin: Origin | None) -> dict[str, Any]:
    shape: BaseGeometry = element.geometry
    # Outer rings run anticlockwise (section 3.1.6).
    shape = orient(shape) if shape.geom_type == "Polygon" else shape
    digits = METRE_DIGITS
    if origin is not None:
        shape, digits = to_wgs84(shape, origin), DEGREE_DIGITS
    geometry = mapping(shape)
    coordinates = _rounded(geometry["coordinates"], digits)
    return {
        "type": "Feature",
        "id": element.id,
        "geometry": {"type": geometry["type"], "coordinates": coordinates},
        "properties": properties_of(element),
    }


def _rounded(value: Any, digits: int) -> Any:
    return round(float(value), digits) if not isinstance(value, tuple | list) else [_rounded(v, digits) for v in value]


def write_geojson(path: Path, elements: Sequence[MapElement], location: str, origin: Origin | None) -> None:
    """Write a vector map; :class:`NmpError` when the file cannot be written."""
    write_json(path, feature_collection(elements, location, origin))
