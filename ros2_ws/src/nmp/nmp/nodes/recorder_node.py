"""Records the layers of a mapping node to disk, for ``nmp eval`` to score a live run."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

from nav_msgs.msg import OccupancyGrid
from rclpy.node import Node
from std_msgs.msg import String

from nmp import topics
from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.grids import from_occupancy_grids
from nmp.layers import LayerWriter
from nmp.nodes.conversions import to_ns
from nmp.nodes.parameters import RECORDER
from nmp.nodes.qos import profile
from nmp.nodes.runtime import run_node
from nmp.nodes.settings import declare

LAYERS_IN = topics.TopicQos(depth=100)
"""Reliable and deep: eight seconds at 12 Hz. Not latched: what was mapped before the start is not asked for."""
WAITING = 50
"""Stamps of which some layer is missing, at most."""


class RecorderNode(Node):
    """Joins the three layers by stamp and writes each moment as one file."""

    def __init__(self, stop: threading.Event, **node_options: Any) -> None:
        super().__init__("recorder_node", **node_options)
        given = declare(self, RECORDER)
        out_dir, source, self.location = given["out_dir"], given["mapping_node"], given["location"]
        if not out_dir:
            raise NmpError("parameter 'out_dir' is empty: name a folder for the layers (-p out_dir:=FOLDER)")
        self.folder = Path(out_dir).expanduser()
        self.writer = LayerWriter(self.folder)
        self.stop = stop
        self.written = 0
        self.incomplete = 0
        self.failure: NmpError | None = None
        self._parts: OrderedDict[int, dict[str, OccupancyGrid]] = OrderedDict()
        for name in CLASSES:
            topic = topics.layer_topic(name).replace("~", source)
            self.create_subscription(OccupancyGrid, topic, partial(self._on_layer, name), profile(LAYERS_IN))
        self.located = topics.MAPPED_LOCATION.replace("~", source)
        if not self.location:
            self.create_subscription(String, self.located, self._on_location, profile(topics.LATCHED))

    def _on_location(self, msg: String) -> None:
        self.location = msg.data
        self._write_complete()

    def _on_layer(self, name: str, msg: OccupancyGrid) -> None:
        stamp = to_ns(msg.header.stamp)
        self._parts.setdefault(stamp, {})[name] = msg
        self._write_complete()
        while len(self._parts) > WAITING:
            self._parts.popitem(last=False)
            self.incomplete += 1

    def _write_complete(self) -> None:
        if not self.location:
            return
        for stamp in [s for s, grids in self._parts.items() if len(grids) == len(CLASSES)]:
            try:
                self.writer.write(from_occupancy_grids(self._parts.pop(stamp), self.location))
                self.written += 1
            except NmpError as exc:  # a full disk does not get better by itself
                self.failure = exc
                self.stop.set()

    def shutdown(self) -> int:
        """Say what was written and return the exit code; raises :class:`NmpError` when writing failed."""
        self.incomplete += len(self._parts)
        if self._parts and not self.location:
            self.failure = NmpError(
                f"no message on {self.located}, so {len(self._parts)} moments are lost: set parameter 'location'"
            )
        self.get_logger().info(f"wrote {self.written} moments to {self.folder}, {self.incomplete} were incomplete")
        if self.failure:
            raise self.failure
        return 0


def main() -> None:
    """Entry point of ``ros2 run nmp recorder_node``."""
    sys.exit(run_node(RecorderNode))


if __name__ == "__main__":
    main()
