"""Listens to a mapping node from a process of its own, as a planner does: how long after a frame's publication are its
layers there? Started by benchmarks/node.py; SIGINT or SIGTERM ends it, and it writes JSON to the file it was given.

When a frame was published is told by the calibration of its last image, which every bag of nmp has just before that
image: images themselves would be a load that nobody else has to carry. Calibrations are taken only when layers have
come: when an executor took each of them, this process needed 9 % of a core, most of it for these.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nav_msgs.msg import OccupancyGrid
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image
from visualization_msgs.msg import MarkerArray

from nmp import topics
from nmp.frame import CAMERAS, CLASSES
from nmp.messages import stamp_of_cdr
from nmp.nodes.inputs import Unwatched, never_called, waiting
from nmp.nodes.qos import profile
from nmp.nodes.recorder_node import LAYERS_IN
from nmp.nodes.runtime import run_node

SPREAD_NS = 100_000_000
KEPT = 60
"""calibrations of a camera, and moments of which a layer is missing, that are remembered"""


class Listener(Node):
    """Notes when calibrations were published, and when layers came."""

    def __init__(self, out: Path, to: str, stop: threading.Event) -> None:
        """:param to: ``all`` that the node publishes, or its ``layers`` alone"""
        super().__init__("listener")
        self._out = out
        self._sent: defaultdict[str, deque[tuple[int, int]]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._parts: dict[int, set[str]] = {}
        self._seconds: list[float] = []
        self._counts: Counter[str] = Counter()
        group, qos = Unwatched(), profile(topics.SENSOR_IN)
        self._infos = {
            camera: self.create_subscription(
                CameraInfo, topics.camera_info_topic(camera), never_called, qos, callback_group=group, raw=True
            )
            for camera in CAMERAS
        }
        for name in CLASSES:
            self._listen(OccupancyGrid, topics.layer_topic(name), LAYERS_IN, partial(self._on_layer, name))
        if to == "all":
            for name in CLASSES:
                self._listen(OccupancyGrid, topics.city_topic(name), topics.LATCHED)
            self._listen(MarkerArray, topics.VECTORS, topics.LATCHED)
            self._listen(Image, topics.BEV, topics.PICTURE)

    def _listen(self, kind: type, topic: str, qos: topics.TopicQos, take: Any = None) -> None:
        def on_message(data: bytes) -> None:
            self._counts[topic] += 1
            if take is not None:
                take(data)

        self.create_subscription(kind, topic.replace("~", "mapping_node"), on_message, profile(qos), raw=True)

    def _take_infos(self) -> None:
        for camera, subscription in self._infos.items():
            for data, info in waiting(subscription, sealed=True):
                self._sent[camera].append((stamp_of_cdr(data), int(info["source_timestamp"])))

    def _on_layer(self, name: str, data: bytes) -> None:
        now, stamp = time.time_ns(), stamp_of_cdr(data)
        parts = self._parts.setdefault(stamp, set())
        parts.add(name)
        while len(self._parts) > KEPT:
            del self._parts[next(iter(self._parts))]
        if len(parts) < len(CLASSES):
            return
        del self._parts[stamp]
        self._take_infos()
        # of each camera the calibration nearest to the moment; in a loop the newest of those that are equally near
        near = [min(reversed(sent), key=lambda s: abs(s[0] - stamp)) for sent in self._sent.values() if sent]
        if len(near) == len(CAMERAS) and all(abs(s - stamp) < SPREAD_NS for s, _ in near):
            self._seconds.append((now - max(published for _, published in near)) / 1e9)

    def shutdown(self) -> int:
        """Write what was heard."""
        percentiles = zip(("median", "p95", "p99", "max"), (50, 95, 99, 100), strict=True)
        told = {f"{n}_s": round(float(np.percentile(self._seconds, p)), 4) for n, p in percentiles if self._seconds}
        self._out.write_text(json.dumps({"frames": len(self._seconds), **told, "messages": dict(self._counts)}))
        return 0


if __name__ == "__main__":
    sys.exit(run_node(partial(Listener, Path(sys.argv.pop(1)), sys.argv.pop(1))))
