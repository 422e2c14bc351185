"""What the mapping node publishes of a local map. Publishing happens in the worker's thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from geometry_msgs.msg import PolygonStamped
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import Image
from std_msgs.msg import String
from visualization_msgs.msg import Marker, MarkerArray

from nmp import topics
from nmp.frame import CLASSES, LocalMap
from nmp.nodes.city import CitySoFar
from nmp.nodes.conversions import to_city_grids, to_footprint, to_image, to_markers, to_occupancy_grids
from nmp.nodes.qos import profile, writer_events
from nmp.vectors.tracker import ElementTracker, Traversals

LONGEST_WITHOUT_S = 1.0
"""so long picture and elements are put off where the network never catches up, s"""
Draw = Callable[[LocalMap], NDArray[np.uint8]]


def draw_picture(local_map: LocalMap) -> NDArray[np.uint8]:
    """Return the layers as an RGB picture [H, W, 3]."""
    from nmp.draw import bev_picture  # brings matplotlib, which takes its time

    return bev_picture(local_map)


class Outputs:
    """The publishers of a configured node; they publish only while it is active."""

    def __init__(
        self, node: LifecycleNode, draw: Draw, *, vectors: bool, extras_rate: float, city_period_s: float
    ) -> None:
        self._node = node
        self._draw = draw

        def create(kind: type, topic: str, qos: topics.TopicQos) -> Any:
            return node.create_lifecycle_publisher(kind, topic, profile(qos), event_callbacks=writer_events(qos))

        self._layers = {c: create(OccupancyGrid, topics.layer_topic(c), topics.LATCHED) for c in CLASSES}
        self._located = ""  # what was last said on the next
        self._location = create(String, topics.MAPPED_LOCATION, topics.LATCHED)
        self._footprint = create(PolygonStamped, topics.FOOTPRINT, topics.LATCHED)
        self._picture = create(Image, topics.BEV, topics.PICTURE)
        self._vectors = create(MarkerArray, topics.VECTORS, topics.LATCHED) if vectors else None
        self._period_s = city_period_s
        names = CLASSES if city_period_s else ()
        self._city = {c: create(OccupancyGrid, topics.city_topic(c), topics.LATCHED) for c in names}
        self._so_far = CitySoFar()
        self._listeners, self._shown_s = 0, 0.0  # of ~/city; when it was last published, monotonic clock
        self._publishers = [
            *self._layers.values(),
            *self._city.values(),
            self._location,
            self._footprint,
            self._picture,
        ]
        self._publishers += [self._vectors] if self._vectors else []
        self._tracker = ElementTracker()
        # a tenth less, as frames do not come to the millisecond
        self._extras_every_s = 0.9 / extras_rate if extras_rate else 0.0
        self._extras_s = -math.inf  # when picture and elements were last made, monotonic clock
        # Pictures take a second of imports: beside everything else, or the first frame would hold up those behind it.
        threading.Thread(target=import_module, args=("nmp.draw",), name="imports", daemon=True).start()

    @property
    def wanted(self) -> bool:
        """Whether anybody listens to what a frame gives."""
        aside = (self._location, self._footprint)
        return any(p.get_subscription_count() for p in self._publishers if p not in aside)

    def publish_layers(self, local_map: LocalMap) -> None:
        """Publish the layers, and the city where it is another than before."""
        if local_map.location != self._located:
            self._located = local_map.location
            self._location.publish(String(data=self._located))
        for name, grid in to_occupancy_grids(local_map).items():
            self._layers[name].publish(grid)
        self._footprint.publish(to_footprint(local_map))

    def publish_extras(self, local_map: LocalMap, traversals: Traversals, *, hurry: bool) -> None:
        """Publish picture, elements and city, where somebody listens.

        :param hurry: a frame waits: its layers come first, so picture and elements are left to it, but for
            ``LONGEST_WITHOUT_S`` at most
        """
        if self._city:
            self._so_far.add(local_map)
        now = time.monotonic()
        if now - self._extras_s < (max(self._extras_every_s, LONGEST_WITHOUT_S) if hurry else self._extras_every_s):
            return
        self._extras_s = now
        if self._picture.get_subscription_count():
            self._picture.publish(to_image(self._draw(local_map), local_map.stamp_ns))
        if self._vectors is not None and self._vectors.get_subscription_count():
            self._vectors.publish(to_markers(self._tracker.update(local_map, traversals)))
        if self._city:
            self._publish_city(local_map.stamp_ns)

    def _publish_city(self, stamp_ns: int) -> None:
        """Publish the city when it is time for it, and at once for who has just come."""
        before, self._listeners = self._listeners, sum(p.get_subscription_count() for p in self._city.values())
        if self._listeners > before or (self._listeners and time.monotonic() - self._shown_s >= self._period_s):
            self._shown_s = time.monotonic()
            for name, grid in to_city_grids(self._so_far.overview(), stamp_ns).items():
                self._city[name].publish(grid)

    def reset(self) -> None:
        """Forget the city and the elements, and have everybody delete them: what is seen next gets new ids."""
        self._tracker = ElementTracker()
        self._so_far.clear()
        if self._vectors is not None:
            self._vectors.publish(MarkerArray(markers=[Marker(action=Marker.DELETEALL)]))

    def close(self) -> None:
        """Take the publishers down."""
        self._so_far.close()
        while self._publishers:
            self._node.destroy_lifecycle_publisher(self._publishers.pop())
