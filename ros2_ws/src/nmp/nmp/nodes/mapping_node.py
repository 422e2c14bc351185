"""Cameras and pose in, map layers out: the ROS shell around the assembler and the online mapper.

Callbacks only sort messages into the assembler and put whole frames into a queue. One worker thread owns the
mapper: everything that touches it runs there.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import OccupancyGrid, Odometry
from nmp_msgs.srv import SavePrior
from numpy.typing import NDArray
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import MarkerArray

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, CAMERAS, CLASSES, Frame, LocalMap
from nmp.gate import PoseGate
from nmp.nodes.conversions import to_image, to_markers, to_occupancy_grids
from nmp.nodes.qos import profile
from nmp.nodes.runtime import run_node
from nmp.nodes.statistics import RunStatistics
from nmp.vectors.tracker import ElementTracker

SILENT_AFTER = 2.0
"""a topic without messages for so long (s, wall time) is reported"""
SAVE_TIMEOUT = 10.0
"""longest wait of ~/save_prior for the worker, s"""
REFUSED, INTERNAL, QUEUE_FULL = "refused by the mapper", "internal error", "queue full"


class Mapper(Protocol):
    """What the node needs of :class:`nmp.mapper.OnlineMapper`."""

    prior_error: str
    gates: PoseGate

    def update(self, frame: Frame) -> LocalMap: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Waiting(NamedTuple):
    frame: Frame
    received_s: float
    """when its last message came, monotonic clock"""


def _load_mapper(node: MappingNode) -> Mapper:
    from nmp.mapper import OnlineMapper  # brings torch, which takes its time

    weights, prior_dir = node.settings["weights"], node.settings["prior_dir"]
    return OnlineMapper(
        Path(weights).expanduser() if weights else None,
        Path(prior_dir).expanduser() if prior_dir else None,
        use_prior=node.settings["use_prior"],
        flush_interval_s=node.settings["flush_interval"],
        device=node.settings["device"],
        precision=node.settings["precision"],
        compiled=node.settings["compile"],
    )


def _draw(local_map: LocalMap) -> NDArray[np.uint8]:
    from nmp.draw import bev_picture

    return bev_picture(local_map)


class MappingNode(Node):
    """The node ``mapping_node``; README.md lists its topics and parameters."""

    def __init__(
        self,
        stop: threading.Event,
        make_mapper: Callable[[MappingNode], Mapper] = _load_mapper,
        draw: Callable[[LocalMap], NDArray[np.uint8]] = _draw,
        **node_options: Any,
    ) -> None:
        """Load the mapper, then subscribe. Raises :class:`NmpError` when weights or prior cannot be used."""
        super().__init__("mapping_node", **node_options)
        self.settings: dict[str, Any] = {}
        self._declare_parameters()
        s = self.settings
        self.assembler = FrameAssembler(max_camera_spread=s["max_camera_spread"], max_pose_age=s["max_pose_age"])
        self.statistics = RunStatistics()
        self.mapper = make_mapper(self)
        self._draw = draw
        self._stop = stop
        self._wake = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = False
        self._failing = ""  # text of the last frame's failure; empty when it was answered
        self._newest_ns = 0
        self._epoch = 0
        self._drops_told: Counter[str] = Counter()
        self._answered_told = 0
        self._heard: dict[str, float] = {}  # topic -> last receipt, monotonic clock
        self._started_s = time.monotonic()

        self._layers = {
            c: self.create_publisher(OccupancyGrid, topics.layer_topic(c), profile(topics.LATCHED)) for c in CLASSES
        }
        self._located = ""  # what was last said on the next
        self._location = self.create_publisher(String, topics.MAPPED_LOCATION, profile(topics.LATCHED))
        self._picture = self.create_publisher(Image, topics.BEV, profile(topics.PICTURE))
        self._tracker = ElementTracker()
        self._vectors = (
            self.create_publisher(MarkerArray, topics.VECTORS, profile(topics.LATCHED)) if s["vectors"] else None
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, topics.DIAGNOSTICS, 10)
        self.create_service(SavePrior, topics.SAVE_PRIOR, self._on_save)
        self._subscribe()
        # Steady time: diagnostics must come also when /clock does not.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._report, clock=self._steady)
        self._worker = threading.Thread(target=self._work, name="mapper", daemon=True)
        self._worker.start()
        self.get_logger().info(f"ready; waiting for {len(CAMERAS)} cameras and {topics.ODOM}")

    # ------------------------------------------------------------------------------------------------------- set-up

    def _declare_parameters(self) -> None:
        def declare(name: str, default: Any, description: str, low: float = 0, high: float = 0) -> None:
            descriptor = ParameterDescriptor(description=description, read_only=True)
            if isinstance(default, float):
                descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
            elif isinstance(default, int) and not isinstance(default, bool):
                descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
            self.settings[name] = self.declare_parameter(name, default, descriptor).value

        declare("weights", "", "Network weights (.safetensors); empty: those in the package.")
        declare("prior_dir", "", "Folder of the stored city map; empty: ~/.local/share/nmp/prior.")
        declare("location", "", "City of the prior, e.g. boston-seaport; empty: wait for the topic 'location'.")
        declare("use_prior", True, "False: the network alone, nothing is remembered.")
        declare("device", "auto", "What computes the network: cpu, cuda, cuda:1 ... or auto, a GPU where there is one.")
        declare("precision", "auto", "Of the network: fp32, bf16, or auto, bf16 where the device computes in it.")
        declare("compile", False, "Compile the network for the GPU: a minute at the start, then faster frames.")
        declare("max_camera_spread", 0.1, "Longest time, s, between the first and last image of a frame.", 1e-3, 10.0)
        declare("max_pose_age", 0.2, "Longest time, s, between an image and the poses around it.", 1e-3, 10.0)
        declare("queue_size", 2, "Frames that may wait for the network; when full, the oldest is dropped.", 1, 1000)
        declare("flush_interval", 2.0, "Longest time, s, that a change of the prior stays in memory.", 0.1, 3600.0)
        declare("image_transport", "compressed", "Images to subscribe to: compressed or raw.")
        declare("pose_type", "odometry", "Message of the topic 'odom': odometry or pose_with_covariance.")
        declare("vectors", True, "Publish lines and polygons on ~/vectors while somebody listens; false: never.")
        declare("stats_file", "", "JSON file to write counts and latency to at the end; empty: none.")
        self._choice("image_transport", "compressed", "raw")
        self._choice("pose_type", "odometry", "pose_with_covariance")

    def _choice(self, name: str, *allowed: str) -> None:
        if self.settings[name] not in allowed:
            raise NmpError(f"parameter '{name}' is '{self.settings[name]}': choose {' or '.join(allowed)}")

    def _subscribe(self) -> None:
        s, a = self.settings, self.assembler
        image_type = CompressedImage if s["image_transport"] == "compressed" else Image
        pose_type = Odometry if s["pose_type"] == "odometry" else PoseWithCovarianceStamped
        for name in CAMERAS:
            image = topics.image_topic(name, s["image_transport"])
            self._listen(image_type, image, topics.SENSOR_IN, partial(a.add_image, name))
            info = topics.camera_info_topic(name)
            self._listen(CameraInfo, info, topics.SENSOR_IN, partial(a.add_camera_info, name))
        self._listen(pose_type, topics.ODOM, topics.POSE_IN, a.add_pose)
        static = topics.TopicQos(depth=100, latched=True)  # every broadcaster keeps a message of its own
        self._listen(TFMessage, topics.TF_STATIC, static, a.add_static_transforms)
        if s["location"]:
            a.set_location(s["location"])
        else:
            self._listen(String, topics.LOCATION, topics.LATCHED, lambda msg: a.set_location(msg.data))

    def _listen(self, kind: type, topic: str, qos: topics.TopicQos, take: Callable[[Any], None]) -> None:
        anchor = topic == topics.image_topic(ANCHOR_CAMERA, self.settings["image_transport"])

        def on_message(msg: Any) -> None:
            self._heard[topic] = time.monotonic()
            self.statistics.received += anchor
            take(msg)
            self._enqueue(self.assembler.pop_frames())

        self.create_subscription(kind, topic, on_message, profile(qos))

    # ----------------------------------------------------------------------------------------------------- frames

    def _enqueue(self, frames: list[Frame]) -> None:
        if self.assembler.epoch != self._epoch:
            self._epoch = self.assembler.epoch
            with self._wake:
                for _ in self._queue:
                    self.statistics.drop("clock jump", "a frame from before the jump waited for the network")
                self._queue.clear()
        if not frames:
            return
        now = time.monotonic()
        with self._wake:
            self._queue.extend(_Waiting(f, now) for f in frames)
            while len(self._queue) > self.settings["queue_size"]:
                old = self._queue.popleft()
                text = f"frame {old.frame.stamp_ns}: the network is slower than the cameras: lower their rate"
                self.statistics.drop(QUEUE_FULL, text)
            self._wake.notify()

    def _work(self) -> None:
        """The worker thread: jobs first, then frames, until the node ends."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._queue or self._closing)
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closing:
                    return
                waiting = self._queue.popleft() if job is None else None
            if job is not None:
                _carry_out(*job)
            elif waiting is not None:
                self._answer(waiting)

    def _answer(self, waiting: _Waiting) -> None:
        try:
            local_map = self.mapper.update(waiting.frame)
            if local_map.location != self._located:
                self._located = local_map.location
                self._location.publish(String(data=self._located))
            for name, grid in to_occupancy_grids(local_map).items():
                self._layers[name].publish(grid)
            self.statistics.answer(time.monotonic() - waiting.received_s)
            self._newest_ns = local_map.stamp_ns
            self._failing = ""
            if self._picture.get_subscription_count():
                self._picture.publish(to_image(self._draw(local_map), local_map.stamp_ns))
            if self._vectors is not None and self._vectors.get_subscription_count():
                self._vectors.publish(to_markers(self._tracker.update(local_map)))
        except NmpError as exc:
            self._fail(REFUSED, str(exc))
        except Exception as exc:  # the node lives on: the next frame may be a better one
            self.get_logger().error(f"{INTERNAL}: {exc!r}", throttle_duration_sec=5.0)
            self._fail(INTERNAL, f"{INTERNAL} ({exc!r}): please report it with the log")

    def _fail(self, cause: str, text: str) -> None:
        self.statistics.drop(cause, text)
        self._failing = text

    # ---------------------------------------------------------------------------------------------------- service

    def _on_save(self, request: SavePrior.Request, response: SavePrior.Response) -> SavePrior.Response:
        if not (self.settings["use_prior"] and self.statistics.answered):
            response.result = SavePrior.Response.RESULT_NOT_READY
            response.message = "nothing to save yet: no frame has been mapped with a prior"
            return response
        done: Future[None] = Future()
        with self._wake:
            self._jobs.append((self.mapper.flush, done))
            self._wake.notify()
        try:
            done.result(timeout=SAVE_TIMEOUT)
            response.result, response.message = SavePrior.Response.RESULT_SUCCESS, "saved"
        except TimeoutError:
            response.result = SavePrior.Response.RESULT_FAILED
            response.message = f"not done after {SAVE_TIMEOUT:g} s: it is saved later; check the disk"
        except Exception as exc:  # whatever it was, the caller gets an answer
            response.result, response.message = SavePrior.Response.RESULT_FAILED, str(exc) or repr(exc)
        return response

    # ------------------------------------------------------------------------------------------------ diagnostics

    def _silent(self) -> list[str]:
        """Return the inputs from which nothing comes, each with what is known of its publishers."""
        now = time.monotonic()
        if now - self._started_s < SILENT_AFTER:
            return []
        if self._heard and (quiet := now - max(self._heard.values())) > SILENT_AFTER:
            return [f"any input for {quiet:.0f} s: is the recording over, or the driver down?"]
        out = []
        for topic in topics.required_inputs(self.settings["image_transport"]):
            if topic == topics.LOCATION and self.settings["location"]:
                continue
            # Calibration, mounting and location may come once only.
            steady = "image_raw" in topic or topic == topics.ODOM
            last = self._heard.get(topic)
            if last is None or (steady and now - last > SILENT_AFTER):
                count = self.count_publishers(topic)
                since = "never" if last is None else f"for {now - last:.0f} s not"
                out.append(f"{topic} ({since} received, {count} publisher{'' if count == 1 else 's'})")
        return out

    def _report(self) -> None:
        stats = self.statistics
        drops = stats.drops + self.assembler.drops
        fresh = drops - self._drops_told
        answered = stats.answered - self._answered_told
        self._drops_told, self._answered_told = drops, stats.answered
        errors = {**self.assembler.last_error, **stats.last_error}
        worst = fresh.most_common(1)[0][0] if fresh else ""
        silent = self._silent()

        status = DiagnosticStatus(name=f"{self.get_name()}: mapping", hardware_id="nmp")
        status.level, status.message = DiagnosticStatus.OK, f"{answered} frames in the last second"
        if self._failing or (worst and not answered):
            status.level, status.message = DiagnosticStatus.ERROR, self._failing or f"{worst}: {errors[worst]}"
        elif self.mapper.prior_error:
            status.level, status.message = DiagnosticStatus.ERROR, self.mapper.prior_error
        elif self.mapper.gates.text:
            status.level, status.message = DiagnosticStatus.WARN, self.mapper.gates.text
        elif silent:
            status.level, status.message = DiagnosticStatus.WARN, f"nothing comes from {', '.join(silent)}"
        elif worst:
            status.level, status.message = DiagnosticStatus.WARN, f"{worst}: {errors[worst]}"
        elif self.assembler.notes:
            status.level, status.message = DiagnosticStatus.WARN, next(iter(self.assembler.notes.values()))
        if status.level != DiagnosticStatus.OK:
            self.get_logger().warning(status.message, throttle_duration_sec=5.0)

        values = {
            "frames received": stats.received,
            "frames answered": stats.answered,
            "frames waiting": len(self._queue),
            **{f"dropped: {cause}": count for cause, count in sorted(drops.items())},
            **{f"gate: {cause}": count for cause, count in sorted(self.mapper.gates.counts.items())},
            "latency median (s)": f"{stats.latency(50, newest=100):.3f}",
            "latency p95 (s)": f"{stats.latency(95, newest=100):.3f}",
            "stamp age (s)": f"{(self.get_clock().now().nanoseconds - self._newest_ns) / 1e9:.3f}",
            "prior location": self.assembler.location or "none",
            "silent topics": ", ".join(silent) or "none",
        }
        if not stats.answered:
            values.pop("stamp age (s)")
        status.values = [KeyValue(key=k, value=str(v)) for k, v in values.items()]
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    # --------------------------------------------------------------------------------------------------------- end

    def shutdown(self) -> int:
        """Stop the worker, save the prior, say what was done; return the exit code."""
        with self._wake:
            self._closing = True
            for _ in self._queue:
                self.statistics.drop("node ended", "the frame still waited for the network")
            self._queue.clear()
            self._wake.notify()
        self._worker.join(timeout=30.0)
        if self._worker.is_alive():
            raise NmpError("the network did not come back within 30 s: the last seconds of the prior are not saved")
        try:
            self.mapper.close()
        finally:
            self._sum_up()
        return 0

    def _sum_up(self) -> None:
        summary = self.statistics.summary(self.assembler.drops)
        drops = ", ".join(f"{count} {cause}" for cause, count in summary["drops"].items()) or "none"
        latency = [f"{1e3 * summary[f'latency_{n}_s']:.0f} ms" if summary["frames_answered"] else "-" for n in _NAMES]
        self.get_logger().info(
            f"{summary['frames_received']} frames received, {summary['frames_answered']} answered, dropped: {drops}; "
            f"latency median {latency[0]}, p95 {latency[1]}"
        )
        if path := self.settings["stats_file"]:
            try:
                Path(path).expanduser().write_text(json.dumps(summary, indent=2) + "\n")
            except OSError as exc:
                raise NmpError(f"cannot write stats_file {path} ({exc.strerror}): choose another path") from exc


_NAMES = ("median", "p95")


def _carry_out(job: Callable[[], None], done: Future[None]) -> None:
    try:
        job()
        done.set_result(None)
    except Exception as exc:  # belongs to the one who waits for it
        done.set_exception(exc)


def main() -> None:
    """Entry point of ``ros2 run nmp mapping_node``."""
    sys.exit(run_node(MappingNode))


if __name__ == "__main__":
    main()
