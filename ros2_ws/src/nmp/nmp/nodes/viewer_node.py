"""Listens to a mapping node and its cameras, and hands everything to whoever shows it (``nmp view --live``)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import OccupancyGrid, Odometry
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import MarkerArray

from nmp import topics
from nmp.errors import NmpError
from nmp.frame import CAMERAS, CLASSES
from nmp.grids import from_city_grids, from_occupancy_grids
from nmp.messages import stamp_ns, transform_of
from nmp.nodes.conversions import from_markers
from nmp.nodes.qos import profile
from nmp.view.drive import encoded, mounting_of, notes_of
from nmp.view.sink import Mounting, Pose, Sink

WAITING = 8
"""stamps of which some layer is missing, at most"""
_STATIC = topics.TopicQos(depth=100, latched=True)
"""every broadcaster of static transforms keeps a message of its own"""


class ViewerNode(Node):
    """Joins what belongs together and passes it on; a message that cannot be read is told once."""

    def __init__(self, sink: Sink, source: str, *, raw: bool = False, **node_options: Any) -> None:
        """Subscribe to everything.

        :param source: name of the mapping node
        :param raw: the cameras publish raw images
        """
        super().__init__("viewer_node", **node_options)
        self._sink = sink
        self._location = ""
        self._stamp_ns = 0  # of the newest layers
        self._mountings: dict[str, Mounting] = {}
        self._told: set[str] = set()
        transport = "raw" if raw else "compressed"
        for camera in CAMERAS:
            kind = Image if raw else CompressedImage
            topic = topics.image_topic(camera, transport)
            self._listen(kind, topic, topics.image_qos(transport), partial(self._on_image, camera))
        self._listen(Odometry, topics.ODOM, topics.POSE_IN, self._on_pose)
        self._listen(TFMessage, topics.TF_STATIC, _STATIC, self._on_static)
        self._listen(DiagnosticArray, topics.DIAGNOSTICS, topics.TopicQos(depth=10), self._on_diagnostics)
        self._listen(String, topics.MAPPED_LOCATION.replace("~", source), topics.LATCHED, self._on_location)
        self._listen(MarkerArray, topics.VECTORS.replace("~", source), topics.LATCHED, self._on_markers)
        for name_of, take in ((topics.layer_topic, self._on_layers), (topics.city_topic, self._on_city)):
            parts: OrderedDict[int, dict[str, OccupancyGrid]] = OrderedDict()
            for name in CLASSES:
                topic = name_of(name).replace("~", source)
                self._listen(OccupancyGrid, topic, topics.LATCHED, partial(_join, parts, name, take))

    def _listen(self, kind: type, topic: str, qos: topics.TopicQos, take: Callable[[Any], None]) -> None:
        def on_message(msg: Any) -> None:
            try:
                take(msg)
            except NmpError as error:
                if topic not in self._told:
                    self._told.add(topic)
                    self.get_logger().warning(f"{topic}: {error}")

        self.create_subscription(kind, topic, on_message, profile(qos))

    def _on_image(self, camera: str, msg: Any) -> None:
        if self._sink.wants_image(camera):
            self._sink.image(camera, stamp_ns(msg), encoded(camera, msg))

    def _on_pose(self, msg: Odometry) -> None:
        pose = msg.pose.pose
        self._sink.pose(Pose(stamp_ns(msg), transform_of(pose.position, pose.orientation)))

    def _on_static(self, msg: TFMessage) -> None:
        self._mountings |= {m.child: m for m in map(mounting_of, msg.transforms)}

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for note in notes_of(msg):
            self._sink.note(note)

    def _on_location(self, msg: String) -> None:
        self._location = msg.data

    def _on_layers(self, grids: dict[str, OccupancyGrid]) -> None:
        local_map = from_occupancy_grids(grids, self._location)
        self._stamp_ns = local_map.stamp_ns
        # again and again: who comes later needs them, too
        self._sink.mountings(local_map.stamp_ns, list(self._mountings.values()))
        self._sink.layers(local_map)

    def _on_city(self, grids: dict[str, OccupancyGrid]) -> None:
        self._sink.city(stamp_ns(grids[CLASSES[0]]), from_city_grids(grids))

    def _on_markers(self, msg: MarkerArray) -> None:
        if msg.markers:
            elements = from_markers(msg)
            # a marker that deletes all has no stamp
            self._sink.elements(replace(elements, stamp_ns=elements.stamp_ns or self._stamp_ns))


def _join(
    parts: OrderedDict[int, dict[str, OccupancyGrid]],
    name: str,
    take: Callable[[dict[str, OccupancyGrid]], None],
    msg: OccupancyGrid,
) -> None:
    """Collect the grids of one moment, and pass them on when all are there."""
    stamp = stamp_ns(msg)
    grids = parts.setdefault(stamp, {})
    grids[name] = msg
    if len(grids) == len(CLASSES):
        del parts[stamp]
        take(grids)
    while len(parts) > WAITING:
        parts.popitem(last=False)


@contextmanager
def listening(sink: Sink, source: str, *, raw: bool = False) -> Iterator[ViewerNode]:
    """Listen in a thread of its own while the block runs. Ctrl-C is left to the block."""
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    executor = SingleThreadedExecutor()
    try:
        node = ViewerNode(sink, source, raw=raw)
        executor.add_node(node)
        thread = threading.Thread(target=_spin, args=(executor,), name="executor", daemon=True)
        thread.start()
        try:
            yield node
        finally:
            executor.shutdown(timeout_sec=5.0)
            thread.join(timeout=5.0)
            node.destroy_node()
    finally:
        rclpy.try_shutdown()


def _spin(executor: SingleThreadedExecutor) -> None:
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
