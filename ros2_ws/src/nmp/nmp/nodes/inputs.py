"""What the mapping node listens to: messages into the assembler, and which topic has fallen silent."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.callback_groups import CallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.messages import STAMP_END, stamp_of_cdr
from nmp.nodes.parameters import SILENT_AFTER
from nmp.nodes.qos import profile, reader_events
from nmp.nodes.settings import Settings

LOOK_EVERY_S = 0.01
"""from one look at the topics to the next, s"""


class Arrival(NamedTuple):
    """A message that the assembler took."""

    topic: str
    received_s: float
    """when it was taken from the middleware, monotonic clock"""
    transport_s: float | None
    """from its publication until then: on the way, and waiting to be taken. None where the middleware does not say
    when that was, or where the clock of the sender runs ahead of this one"""


class _Stream(NamedTuple):
    """A topic that is listened to."""

    topic: str
    kind: str
    """its type, as ROS names it"""
    subscription: Subscription
    take: Callable[[Any], bool | None]
    """hands a message to the assembler; False: it says nothing new"""
    sealed: bool
    """``take`` wants the bytes as they came"""


class Unwatched(CallbackGroup):
    """Subscriptions at which no executor looks."""

    def can_execute(self, entity: Any) -> bool:
        return False

    def beginning_execution(self, entity: Any) -> bool:
        return False

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: nothing was begun."""


class Inputs:
    """The subscriptions of one activation, and a thread that looks at them.

    For every message, and once more after it, an executor of rclpy makes a list of all that the node waits for: a sixth
    of a core with six cameras at 12 Hz, which the network lacks. And it serves one message of each topic in turn, so
    that after a pause some topics are ahead of others.

    :param lock: of the assembler, held while messages are taken
    :param arrived: called after every message that the assembler took, in that thread
    """

    def __init__(
        self,
        node: Node,
        settings: Settings,
        assembler: FrameAssembler,
        lock: AbstractContextManager[Any],
        arrived: Callable[[Arrival], None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        """messages received, by topic"""
        self.busy_s = 0.0
        """time spent on messages since somebody set this to zero, s"""
        self.anchor_topic = topics.image_topic(settings["cameras"][0], settings["image_transport"])
        self._node = node
        self._arrived = arrived
        self._heard: dict[str, tuple[float, int]] = {}  # topic -> last receipt, monotonic clock (s) and ROS time (ns)
        self._started_s = time.monotonic()
        self._clock = self._started_s, 0  # when the node's time last moved (monotonic, s), and to what (ns)
        self._lock = lock
        self._streams: list[_Stream] = []
        self._group = Unwatched()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._steady: set[str] = set()
        """topics that never pause while the car drives; the others may come once only"""
        self._subscribe(settings, assembler)

    def _subscribe(self, settings: Settings, assembler: FrameAssembler) -> None:
        transport = settings["image_transport"]
        image_type = CompressedImage if transport == "compressed" else Image
        pose_type = Odometry if settings["pose_type"] == "odometry" else PoseWithCovarianceStamped
        for name, prefix in assembler.prefixes.items():
            image = topics.image_topic(prefix, transport)
            keep = _sealed_image(assembler, name, image_type, transport)
            self._listen(image_type, image, topics.image_qos(transport), keep, steady=True, sealed=True)
            info = topics.camera_info_topic(prefix)
            self._listen(CameraInfo, info, topics.SENSOR_IN, _calibration(assembler, name), sealed=True)
        self._listen(pose_type, topics.ODOM, topics.POSE_IN, assembler.add_pose, steady=True)
        if not settings["extrinsics_file"]:
            static = topics.TopicQos(depth=100, latched=True)  # every broadcaster keeps a message of its own
            self._listen(TFMessage, topics.TF_STATIC, static, assembler.add_static_transforms)
        if settings["location"]:
            assembler.set_location(settings["location"])
        else:
            self._listen(String, topics.LOCATION, topics.LATCHED, lambda msg: assembler.set_location(msg.data))

    def _listen(
        self,
        kind: type,
        topic: str,
        qos: topics.TopicQos,
        take: Callable[[Any], bool | None],
        *,
        steady: bool = False,
        sealed: bool = False,
    ) -> None:
        """Subscribe.

        :param sealed: ``take`` wants the bytes as they came
        """
        self.counts[topic] = 0
        if steady:
            self._steady.add(topic)

        subscription = self._node.create_subscription(
            kind,
            topic,
            never_called,
            profile(qos),
            callback_group=self._group,
            event_callbacks=reader_events(qos),
            raw=sealed,
        )
        stream = _Stream(topic, f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}", subscription, take, sealed)
        self._streams.append(stream)

    def start(self) -> None:
        """Look at the topics every few milliseconds, in a thread of its own, until they are closed."""
        self._thread = threading.Thread(target=self._run, name="inputs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.is_set():
            time.sleep(LOOK_EVERY_S)
            try:
                self.look()
            except InvalidHandle:
                return  # the node was destroyed

    def look(self) -> None:
        """Take all messages that wait, in the order in which they came."""
        with self._lock:
            here = [(s, *taken) for s in self._streams for taken in waiting(s.subscription, sealed=s.sealed)]
            here.sort(key=lambda taken: int(taken[2]["received_timestamp"]))
            for taken in here:
                try:
                    self._take(*taken)
                except Exception as exc:  # the next message may be a better one
                    text = f"{taken[0].topic}: a message cannot be taken: {exc!r}"
                    self._node.get_logger().error(text, throttle_duration_sec=5.0)

    def _take(self, stream: _Stream, message: Any, info: Mapping[str, Any]) -> None:
        begin, published_ns = time.monotonic(), int(info["source_timestamp"])
        transport_s = (time.time_ns() - published_ns) / 1e9 if published_ns else -1.0
        self._heard[stream.topic] = begin, self._now_ns()
        self.counts[stream.topic] += 1
        if stream.take(message) is not False:
            self._arrived(Arrival(stream.topic, begin, transport_s if transport_s >= 0 else None))
        self.busy_s += time.monotonic() - begin

    def close(self) -> None:
        """Stop listening; not to be called with the lock held."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._streams:
            self._node.destroy_subscription(self._streams.pop().subscription)

    def silent(self) -> list[str]:
        """Return the inputs from which nothing comes, each with what is known of its publishers.

        With simulated time a topic is silent only when that time goes on without it: a recording may be held, or
        played at a tenth of its speed.
        """
        now = time.monotonic()
        if (ros_ns := self._now_ns()) != self._clock[1]:
            self._clock = now, ros_ns
        if now - self._started_s < SILENT_AFTER:
            return []
        if self._heard:
            last = max(list(self._heard.values()))
            if (quiet := now - last[0]) > SILENT_AFTER and self._missed(last):
                return [f"any input for {quiet:.0f} s: is the recording over, or the driver down?"]
            if quiet > SILENT_AFTER and (still := now - self._clock[0]) > SILENT_AFTER:
                return [f"{topics.CLOCK}: time stands still for {still:.0f} s: is the recording over, or held?"]
        out = []
        for stream in self._streams:
            topic, heard = stream.topic, self._heard.get(stream.topic)
            if heard is None or (topic in self._steady and now - heard[0] > SILENT_AFTER and self._missed(heard)):
                since = "never" if heard is None else f"for {now - heard[0]:.0f} s not"
                out.append(f"{topic} ({since} received, {self._publishers_of(stream)})")
        return out

    def _publishers_of(self, stream: _Stream) -> str:
        """Say how many publishers a topic has, and of which type where that is another one."""
        found = self._node.get_publishers_info_by_topic(stream.subscription.topic_name)
        text = f"{len(found)} publisher{'' if len(found) == 1 else 's'}"
        if others := sorted({publisher.topic_type for publisher in found} - {stream.kind}):
            text += f" of {', '.join(others)} instead of {stream.kind}"
        return text

    def _missed(self, heard: tuple[float, int]) -> bool:
        """Whether time went on, by the node's clock, since a message was heard."""
        clock: Any = self._node.get_clock()
        # asked each time: use_sim_time may change at any time
        return not clock.ros_time_is_active or abs(self._now_ns() - heard[1]) > SILENT_AFTER * 1e9

    def _now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)


def _sealed_image(assembler: FrameAssembler, name: str, kind: type, transport: str) -> Callable[[bytes], None]:
    """Return what takes the bytes of a camera's images: they become messages when a frame is made of them."""

    def take(data: bytes) -> None:
        assembler.add_sealed_image(name, stamp_of_cdr(data), lambda: deserialize_message(data, kind), transport)

    return take


def _calibration(assembler: FrameAssembler, name: str) -> Callable[[bytes], bool]:
    """Return what takes the bytes of a camera's calibrations: but for the stamp, one is like the other."""
    last = b""

    def take(data: bytes) -> bool:
        nonlocal last
        if data[STAMP_END:] == last:
            return False
        last = data[STAMP_END:]
        assembler.add_camera_info(name, deserialize_message(data, CameraInfo))
        return True

    return take


def never_called(msg: Any) -> None:
    """Stand for a callback: messages are taken by :meth:`Inputs.look`."""


def waiting(subscription: Subscription, *, sealed: bool) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Take the messages that wait at a subscription, each with what the middleware says of it.

    :param sealed: give the bytes as they came
    """
    with subscription.handle:
        while (taken := subscription.handle.take_message(subscription.msg_type, sealed)) is not None:
            yield taken
