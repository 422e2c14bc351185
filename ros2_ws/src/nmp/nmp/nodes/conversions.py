"""Between this package's types and ROS messages. Grids are read in :mod:`nmp.grids`, which needs no ROS."""

from __future__ import annotations

import array
import json

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Point32, PolygonStamped
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from sensor_msgs.msg import Image
from visualization_msgs.msg import Marker, MarkerArray

from nmp import topics
from nmp.frame import CLASSES, LocalMap, car_outline
from nmp.geometry import Array, flatten_to_plane, transform_from_xyyaw, yaw_of
from nmp.layers import occupancy, to_occupancy
from nmp.vectorize import outline
from nmp.vectors.elements import MapElement
from nmp.vectors.raster import Overview
from nmp.vectors.tracker import Tracked
from nmp.view.sink import Elements, Line

try:
    from tf_transformations import quaternion_from_euler  # type: ignore[import-not-found]
except ImportError:
    from nmp.nodes.tf_compat import quaternion_from_euler

LINE_WIDTH_M = 0.2
"""of a marker"""


def to_time(stamp_ns: int) -> Time:
    """Return a stamp in ns as a message."""
    return Time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


def to_ns(time: Time) -> int:
    """Return a stamp message in ns."""
    return int(time.sec) * 10**9 + int(time.nanosec)


def to_occupancy_grids(local_map: LocalMap) -> dict[str, OccupancyGrid]:
    """Return one grid per class: 0..100 % probability, -1 where nothing was ever seen.

    The grid is the window around the car, turned with it: its origin is the rear right corner as a pose in
    ``map`` with the car's heading.
    """
    grid = local_map.grid
    corner = flatten_to_plane(local_map.map_from_base) @ transform_from_xyyaw(-grid.length / 2, -grid.width / 2, 0.0)
    return _grids(to_occupancy(local_map), local_map.stamp_ns, grid.resolution, corner)


def to_city_grids(overview: Overview, stamp_ns: int) -> dict[str, OccupancyGrid]:
    """Return one grid per class of a whole city, in the axes of ``map``: 0..100 %, -1 where nothing was ever seen."""
    cells = occupancy(overview.probabilities, overview.seen > 0)
    return _grids(cells, stamp_ns, overview.resolution, transform_from_xyyaw(*overview.corner, 0.0))


def _grids(layers: NDArray[np.int8], stamp_ns: int, resolution: float, corner: Array) -> dict[str, OccupancyGrid]:
    """Return layers [classes, rows, cols] as grids whose corner lies at a planar pose [4, 4] in ``map``."""
    x, y, z, w = quaternion_from_euler(0.0, 0.0, yaw_of(corner))
    out: dict[str, OccupancyGrid] = {}
    for name, cells in zip(CLASSES, layers, strict=True):
        msg = OccupancyGrid()
        msg.header.stamp = to_time(stamp_ns)
        msg.header.frame_id = topics.MAP_FRAME
        msg.info.map_load_time = msg.header.stamp
        msg.info.resolution = float(resolution)
        msg.info.height, msg.info.width = cells.shape
        origin = msg.info.origin
        origin.position.x, origin.position.y = float(corner[0, 3]), float(corner[1, 3])
        origin.orientation.x, origin.orientation.y = float(x), float(y)
        origin.orientation.z, origin.orientation.w = float(z), float(w)
        msg.data = array.array("b", cells.tobytes())
        out[name] = msg
    return out


def to_footprint(local_map: LocalMap) -> PolygonStamped:
    """Return the car's outline in ``map``, at the pose of the layers."""
    pose = flatten_to_plane(local_map.map_from_base)
    corners = np.array([(x, y, 0.0, 1.0) for x, y in car_outline()]) @ pose.T
    msg = PolygonStamped()
    msg.header.stamp = to_time(local_map.stamp_ns)
    msg.header.frame_id = topics.MAP_FRAME
    msg.polygon.points = [Point32(x=float(x), y=float(y), z=0.0) for x, y in corners[:, :2]]
    return msg


def from_markers(msg: MarkerArray) -> Elements:
    """Return the lines of markers, and what they delete; the other way round of :func:`to_markers`."""
    stamps = [to_ns(m.header.stamp) for m in msg.markers]
    lines, gone, afresh = [], [], False
    for marker in msg.markers:
        if marker.action == Marker.DELETEALL:
            afresh = True
        elif marker.action == Marker.DELETE:
            gone.append((marker.ns, marker.id))
        elif marker.ns in CLASSES:
            points = np.array([[p.x, p.y] for p in marker.points]).reshape(-1, 2)
            lines.append(Line(marker.ns, marker.id, points, (marker.color.a - 0.3) / 0.7))
    return Elements(max(stamps, default=0), lines, gone, afresh)


def to_image(rgb: NDArray[np.uint8], stamp_ns: int) -> Image:
    """Return an RGB picture [H, W, 3] as a sensor_msgs/Image."""
    msg = Image()
    msg.header.stamp = to_time(stamp_ns)
    msg.header.frame_id = topics.BASE_FRAME
    msg.height, msg.width, msg.step = rgb.shape[0], rgb.shape[1], 3 * rgb.shape[1]
    msg.encoding = "rgb8"
    # An array.array is taken as it is; bytes would be checked element by element.
    msg.data = array.array("B", np.ascontiguousarray(rgb).tobytes())
    return msg


def to_markers(tracked: Tracked) -> MarkerArray:
    """Return a line in ``map`` for every element, and a deletion for every one that is gone.

    ``ns`` is the class and ``id`` that of the element, closed for a crossing, as opaque as it is sure. ``text``, which
    a line does not show, holds what else is known: :func:`describe` as JSON.
    """
    out = MarkerArray()
    for element in tracked.elements:
        marker = _marker(element.name, element.id, tracked.stamp_ns)
        marker.type, marker.action = Marker.LINE_STRIP, Marker.ADD
        marker.pose.orientation.w = 1.0
        marker.scale.x = LINE_WIDTH_M
        red, green, blue = (value / 255.0 for value in _colour(element.name))
        marker.color.r, marker.color.g, marker.color.b = red, green, blue
        marker.color.a = 0.3 + 0.7 * element.confidence
        marker.points = [Point(x=float(x), y=float(y), z=0.0) for x, y in outline(element.geometry).coords]
        marker.text = json.dumps(describe(element))
        out.markers.append(marker)
    for name, number in tracked.gone:
        marker = _marker(name, number, tracked.stamp_ns)
        marker.action = Marker.DELETE
        out.markers.append(marker)
    return out


def describe(element: MapElement) -> dict[str, float | int]:
    """Return confidence (0..1), age (s), frames and, where they are known, evidence and traversals."""
    out: dict[str, float | int] = {
        "confidence": round(element.confidence, 3),
        "age_s": round(element.age_s, 3),
        "frames": element.frames,
    }
    if element.evidence is not None:
        out["evidence"] = round(element.evidence, 1)
    if element.traversals is not None:
        out["traversals"] = element.traversals
    return out


def _marker(name: str, number: int, stamp_ns: int) -> Marker:
    marker = Marker(ns=name, id=number)
    marker.header.stamp = to_time(stamp_ns)
    marker.header.frame_id = topics.MAP_FRAME
    return marker


def _colour(name: str) -> tuple[int, int, int]:
    from nmp.draw import CLASS_COLOURS  # brings matplotlib, which takes its time

    return CLASS_COLOURS[name]
