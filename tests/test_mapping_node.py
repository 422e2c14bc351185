"""The mapping node over real DDS, with a made-up mapper and with the real one."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.ros_fixtures import Ros, free_domain, node_process, ros, until

pytest.importorskip("rclpy")
pytest.importorskip("tf2_msgs")
pytest.importorskip("nmp_msgs")

import rclpy  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from geometry_msgs.msg import PolygonStamped  # noqa: E402
from nav_msgs.msg import OccupancyGrid  # noqa: E402
from nmp_msgs.srv import SavePrior  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.node import Node  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, Image  # noqa: E402
from visualization_msgs.msg import Marker, MarkerArray  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.assembly import FrameAssembler  # noqa: E402
from nmp.bags.reader import BagMessage  # noqa: E402
from nmp.errors import NmpError  # noqa: E402
from nmp.frame import CLASSES, Frame, LocalMap  # noqa: E402
from nmp.gate import CAUSES, JUMPS, PoseGate  # noqa: E402
from nmp.geometry import BevGrid, inverse, yaw_of  # noqa: E402
from nmp.grids import from_occupancy_grids  # noqa: E402
from nmp.layers import read_layers, to_occupancy  # noqa: E402
from nmp.nodes import tf_compat  # noqa: E402
from nmp.nodes.conversions import to_ns, to_occupancy_grids, to_time  # noqa: E402
from nmp.nodes.inputs import Arrival, Inputs  # noqa: E402
from nmp.nodes.lifecycle import INTERNAL  # noqa: E402
from nmp.nodes.mapping_node import OVERTAKEN, QUEUE_FULL, REFUSED, MappingNode  # noqa: E402
from nmp.nodes.parameters import PARAMETERS  # noqa: E402
from nmp.nodes.player_node import PlayerNode  # noqa: E402
from nmp.nodes.qos import profile  # noqa: E402
from nmp.nodes.recorder_node import RecorderNode  # noqa: E402
from nmp.prior.ledger import Ledger  # noqa: E402
from nmp.prior.record import Record  # noqa: E402
from nmp.prior.storage import Storage  # noqa: E402
from nmp.prior.upkeep import digests  # noqa: E402
from tests.bag_fixtures import LOCATION, START_NS, bag_messages, jpeg, make_bag, write_messages  # noqa: E402
from tests.test_assembly import moved  # noqa: E402

GRID = BevGrid(12.0, 6.0, 0.15)
FIRST_NS = START_NS + 8_000_000
"""stamp of the first front image"""


class FakeMapper:
    """Answers with a pattern that tells frames apart; may be slow or fail."""

    def __init__(self, seconds: float = 0.0, failing: dict[int, Exception] | None = None) -> None:
        self.seconds, self.failing = seconds, failing or {}
        self.frames: list[Frame] = []
        self.flushed = self.closed = 0
        self.flush_error: Exception | None = None
        self.prior_error = ""
        self.gates = PoseGate()
        self.prior_dir = Path("nowhere")
        self.stages_s = {"network": seconds}
        self.threads: set[str] = set()
        self.damage = ""
        self.closing_s = 0.0

    def update(self, frame: Frame) -> LocalMap:
        self.threads.add(threading.current_thread().name)
        self.frames.append(frame)
        time.sleep(self.seconds)
        if error := self.failing.get(len(self.frames) - 1):
            raise error
        return pattern(frame)

    def flush(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.flush_error:
            raise self.flush_error
        self.flushed += 1

    def traversals(self, location: str, points: Any) -> Any:
        return np.full(len(points), 3)

    def prior_counts(self) -> dict[str, int]:
        return {"tiles": 7}

    def close(self) -> dict[str, Record]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.closing_s)
        self.closed += 1
        return {}


def pattern(frame: Frame) -> LocalMap:
    rng = np.random.default_rng(frame.stamp_ns % 2**32)
    evidence = np.ones(GRID.shape, np.float32)
    evidence[:3] = 0
    probabilities = rng.random((3, *GRID.shape), dtype=np.float32)
    return LocalMap(frame.stamp_ns, frame.location, frame.map_from_base, GRID, probabilities, evidence)


def make_mapping_process(seconds: float = 0.0, closing_s: float = 0.0) -> None:
    """What a process with a made-up mapper runs (see test_signals)."""
    from nmp.nodes.runtime import run_node

    mapper = FakeMapper(seconds)
    mapper.closing_s = closing_s
    code = run_node(lambda stop: MappingNode(stop, make_mapper=lambda node: mapper))
    print(f"flushed and closed {mapper.closed} time(s)")
    raise SystemExit(code)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"), frames=4)


@pytest.fixture(scope="module")
def messages(drive: Path) -> list[BagMessage]:
    return bag_messages(drive)


@pytest.fixture
def world() -> Iterator[Ros]:
    with ros() as r:
        yield r


class Rig:
    """A mapping node with a fake mapper, and everything that it publishes."""

    def __init__(self, world: Ros, mapper: Any = None, **parameters: Any) -> None:
        self.world = world
        self.mapper = mapper or FakeMapper()
        self.layers: dict[str, list[OccupancyGrid]] = {c: [] for c in CLASSES}
        self.pictures: list[Image] = []
        self.statuses: list[DiagnosticStatus] = []
        probe = world.probe()
        self.probe = probe
        deep = profile(topics.TopicQos(depth=100))
        for name in CLASSES:
            topic = f"/mapping_node/layers/{name}"
            probe.create_subscription(OccupancyGrid, topic, self.layers[name].append, deep)
        self.cars: list[PolygonStamped] = []
        probe.create_subscription(PolygonStamped, "/mapping_node/footprint", self.cars.append, deep)
        sensor = profile(topics.PICTURE)
        probe.create_subscription(Image, "/mapping_node/bev", self.pictures.append, sensor)
        probe.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.statuses.extend(m.status), 10)
        self.node: MappingNode = world.add(
            MappingNode(world.stop, make_mapper=lambda node: self.mapper, **world.options(**parameters))
        )

    def play(self, bag: Path, rate: float = 4.0, seconds: float = 0.4, delay: float = 0.3) -> None:
        """Play a bag to its end, and let what is under way arrive."""
        settings = {"bag": str(bag), "rate": rate, "wait_for_subscribers": 10.0, "delay": delay, "clock": False}
        player = self.world.add(PlayerNode(threading.Event(), **self.world.options(**settings)))
        assert until(player.stop.is_set, 20)
        time.sleep(seconds)
        self.world.executor.remove_node(player)

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.node.statistics.drops + self.node.assembler.drops)

    def status(self, level: bytes, part: str = "") -> bool:
        """Whether a diagnostic of this level with this text was published."""
        return until(lambda: any(s.level == level and part in s.message for s in self.statuses), 5.0)

    def report(self) -> DiagnosticStatus:
        """The next diagnostic."""
        count = len(self.statuses)
        assert until(lambda: len(self.statuses) > count, 5.0)
        return self.statuses[-1]

    def save(self) -> SavePrior.Response:
        client = self.probe.create_client(SavePrior, "/mapping_node/save_prior")
        assert client.wait_for_service(timeout_sec=5)
        future = client.call_async(SavePrior.Request())
        assert until(future.done, 15)
        return future.result()


def spoiled(messages: list[BagMessage], topic: str, index: int, change: Callable[[Any], None]) -> list[BagMessage]:
    at = [i for i, m in enumerate(messages) if m.topic == topic][index]
    new = copy.deepcopy(messages[at])
    change(new.message)
    return [*messages[:at], new, *messages[at + 1 :]]


# ------------------------------------------------------------------------------------------------------ good input


def test_layers_are_published(world: Ros, drive: Path) -> None:
    rig = Rig(world, queue_size=10)  # the first picture takes a second or more
    rig.play(drive)
    assert until(lambda: all(len(v) == 4 for v in rig.layers.values())), rig.drops
    assert not rig.drops
    assert [f.stamp_ns for f in rig.mapper.frames] == [FIRST_NS + i * 500_000_000 for i in range(4)]
    assert rig.mapper.frames[0].location == LOCATION
    assert rig.mapper.threads == {"mapper"}
    for i, frame in enumerate(rig.mapper.frames):
        expected = pattern(frame)
        grids = {c: rig.layers[c][i] for c in CLASSES}
        for plane, name in zip(to_occupancy(expected), CLASSES, strict=True):
            grid = grids[name]
            assert (grid.header.frame_id, to_ns(grid.header.stamp)) == ("map", frame.stamp_ns)
            np.testing.assert_array_equal(np.array(grid.data, np.int8).reshape(GRID.shape), plane)
        back = from_occupancy_grids(grids, LOCATION)
        assert back.grid == GRID
        np.testing.assert_allclose(back.map_from_base[:2, 3], frame.map_from_base[:2, 3], atol=1e-6)
        assert yaw_of(back.map_from_base) == pytest.approx(yaw_of(frame.map_from_base))
        car = rig.cars[i]
        assert (car.header.frame_id, to_ns(car.header.stamp)) == ("map", frame.stamp_ns)
        nose = inverse(frame.map_from_base) @ [car.polygon.points[2].x, car.polygon.points[2].y, 0.0, 1.0]
        np.testing.assert_allclose(nose[:2], (3.6, 0.0), atol=1e-3)
    assert rig.pictures and rig.pictures[0].encoding == "rgb8"
    assert rig.status(DiagnosticStatus.OK, "frames in the last second")

    # Latched: who comes later gets the last one.
    late: list[OccupancyGrid] = []
    world.probe("late").create_subscription(
        OccupancyGrid, "/mapping_node/layers/divider", late.append, profile(topics.LATCHED)
    )
    assert until(lambda: late)
    assert to_ns(late[0].header.stamp) == rig.mapper.frames[-1].stamp_ns


def test_recorder_writes_what_was_mapped(world: Ros, drive: Path, tmp_path: Path) -> None:
    rig = Rig(world)
    recorder = world.add(RecorderNode(threading.Event(), **world.options(out_dir=str(tmp_path / "out"))))
    rig.play(drive)
    assert until(lambda: recorder.written == 4)
    assert recorder.shutdown() == 0
    for local_map, frame in zip(read_layers(tmp_path / "out"), rig.mapper.frames, strict=True):
        assert (local_map.stamp_ns, local_map.location) == (frame.stamp_ns, LOCATION)
        np.testing.assert_array_equal(to_occupancy(local_map), to_occupancy(pattern(frame)))


def test_location_by_parameter(world: Ros, drive: Path) -> None:
    rig = Rig(world, location="boston-seaport")
    rig.play(drive)
    assert [f.location for f in rig.mapper.frames] == ["boston-seaport"] * 4


class Street(FakeMapper):
    """Sees a line 2 m to the left of the first pose, in all frames but one, and a crossing in the first only."""

    def update(self, frame: Frame) -> LocalMap:
        answer = super().update(frame)
        begin = self.frames[0].map_from_base
        layers = np.zeros_like(answer.probabilities)
        if len(self.frames) != 3:
            ego = inverse(frame.map_from_base) @ begin
            points = np.array([(x, 2.0, 0.0, 1.0) for x in np.linspace(-20.0, 20.0, 30)]) @ ego.T
            pixels = (points[:, :2] + [GRID.length / 2, GRID.width / 2]) / GRID.resolution
            cv2.polylines(layers[0], [pixels.astype(np.int32)], False, 0.8, 5)
        if len(self.frames) == 1:
            layers[1, 10:30, 20:60] = 0.9
        return replace(answer, probabilities=layers, evidence=np.full(GRID.shape, 3.0, np.float32))


def test_vectors_are_markers_with_lasting_ids(world: Ros, drive: Path) -> None:
    rig = Rig(world, Street())
    rig.play(drive)
    late: list[MarkerArray] = []
    # Nobody listened: nothing was made.
    world.probe("late").create_subscription(
        MarkerArray, "/mapping_node/vectors", late.append, profile(topics.TopicQos(depth=10, latched=True))
    )
    time.sleep(0.3)
    assert not late and len(rig.mapper.frames) == 4
    rig.mapper.frames.clear()
    rig.play(drive)
    assert until(lambda: len(late) == 4), len(late)

    def shown(array: MarkerArray, action: int) -> set[tuple[str, int]]:
        return {(m.ns, m.id) for m in array.markers if m.action == action}

    line = next(m for m in late[0].markers if m.ns == "divider")
    crossing = next(m for m in late[0].markers if m.ns == "crossing")
    both = {("divider", line.id), ("crossing", crossing.id)}
    assert [shown(a, Marker.ADD) for a in late] == [both, {("divider", line.id)}, set(), {("divider", line.id)}]
    assert [shown(a, Marker.DELETE) for a in late] == [
        set(),
        both - {("divider", line.id)},
        both,
        both - {("divider", line.id)},
    ]
    begin = rig.mapper.frames[0].map_from_base
    for array, frame in zip(late, rig.mapper.frames, strict=True):
        assert all((m.header.frame_id, to_ns(m.header.stamp)) == ("map", frame.stamp_ns) for m in array.markers)
    assert line.type == Marker.LINE_STRIP and line.pose.orientation.w == 1.0 and line.scale.x > 0
    for point in line.points:
        assert (inverse(begin) @ [point.x, point.y, 0.0, 1.0])[1] == pytest.approx(2.0, abs=0.25)
    assert crossing.points[0] == crossing.points[-1]
    last = next(m for m in late[3].markers if m.ns == "divider")
    said = json.loads(last.text)
    assert (said["frames"], said["age_s"], said["evidence"]) == (3, pytest.approx(1.5), 3.0)
    assert said["traversals"] == 3
    assert said["confidence"] == pytest.approx(0.8, abs=0.05) and last.color.a == pytest.approx(0.86, abs=0.04)


def test_lines_and_pictures_come_no_faster_than_wanted(world: Ros, drive: Path) -> None:
    rig = Rig(world, Street(), extras_rate=1.0)
    lines: list[MarkerArray] = []
    rig.probe.create_subscription(MarkerArray, "/mapping_node/vectors", lines.append, profile(topics.LATCHED))
    rig.play(drive)  # four frames in 0.4 s
    assert until(lambda: len(rig.layers["divider"]) == 4)
    time.sleep(0.3)
    assert len(lines) == len(rig.pictures) == 1


def test_lines_and_pictures_are_left_to_the_frame_that_waits(world: Ros, tmp_path: Path) -> None:
    rig = Rig(world, Street(seconds=0.3), queue_size=10)
    lines: list[MarkerArray] = []
    rig.probe.create_subscription(
        MarkerArray, "/mapping_node/vectors", lines.append, profile(topics.TopicQos(depth=10, latched=True))
    )
    rig.play(make_bag(tmp_path, frames=8), rate=10.0)
    assert until(lambda: len(rig.layers["divider"]) == 8)
    time.sleep(0.3)
    # of the first, of each second in which frames waited, and of the last
    assert 3 <= len(lines) < 8
    assert to_ns(lines[-1].markers[0].header.stamp) == rig.mapper.frames[-1].stamp_ns


def test_vectors_can_be_switched_off(world: Ros) -> None:
    rig = Rig(world, vectors=False)
    assert "/mapping_node/vectors" not in dict(rig.node.get_topic_names_and_types())


INFO = "sensor_msgs/msg/CameraInfo"


class Busy:
    """Inputs whose thread does something else until it is told to look."""

    def __init__(self, world: Ros, assembler: FrameAssembler) -> None:
        self._node = Node("listener", context=world.context)
        self.arrivals: list[tuple[Arrival, float]] = []
        settings: Any = {p.name: p.default for p in PARAMETERS} | {"location": LOCATION}
        self.inputs = Inputs(
            self._node,
            settings,
            assembler,
            threading.RLock(),
            lambda arrival: self.arrivals.append((arrival, time.monotonic())),
        )

    def look(self, count: int) -> None:
        """Take messages until so many have come, or nothing comes any more."""
        quiet = time.monotonic() + 5.0
        while (before := len(self.arrivals)) < count and time.monotonic() < quiet:
            self.inputs.look()
            time.sleep(0.01)
            if len(self.arrivals) > before:
                quiet = time.monotonic() + 5.0

    def close(self) -> None:
        self.inputs.close()
        self._node.destroy_node()


def test_time_counts_from_the_publication_of_the_last_message(world: Ros) -> None:
    """What DDS, a busy thread and putting a frame together take is not left out."""
    assembler = FrameAssembler()

    def slow(name: str, message: CameraInfo) -> None:
        time.sleep(0.2)

    assembler.add_camera_info = slow  # type: ignore[method-assign]
    busy = Busy(world, assembler)
    sender = world.probe().create_publisher(CameraInfo, "cam_back/camera_info", 10)
    assert until(sender.get_subscription_count)
    sender.publish(CameraInfo())
    time.sleep(0.3)
    begin = time.monotonic()
    busy.look(1)
    ((arrival, done_s),) = busy.arrivals
    assert arrival.topic == "cam_back/camera_info" and arrival.transport_s is not None
    assert 0.3 <= arrival.transport_s < 10 and begin <= arrival.received_s <= done_s - 0.2
    busy.close()


def test_no_image_is_lost_while_nobody_looks_for_two_seconds(world: Ros) -> None:
    busy = Busy(world, FrameAssembler())
    topic = "cam_back/image_raw/compressed"
    sender = world.probe().create_publisher(CompressedImage, topic, profile(topics.SENSOR_OUT))
    assert until(sender.get_subscription_count)
    image = CompressedImage(data=jpeg(1))
    for number in range(24):  # at 12 Hz
        image.header.stamp = to_time(START_NS + number * 83_000_000)
        sender.publish(image)
        time.sleep(0.005)
    busy.look(24)
    assert busy.inputs.counts[topic] == 24
    busy.close()


def test_messages_are_taken_in_the_order_in_which_they_came(world: Ros) -> None:
    """Also those of different topics after a pause: else the cameras that are looked at first would run ahead."""
    busy = Busy(world, FrameAssembler())
    names = "cam_front", "cam_back"
    offered = profile(topics.SENSOR_OUT)
    senders = [
        world.probe(name).create_publisher(CompressedImage, f"{name}/image_raw/compressed", offered) for name in names
    ]
    assert until(lambda: all(sender.get_subscription_count() for sender in senders))
    for number in range(6):
        image = CompressedImage(data=jpeg(1))
        image.header.stamp = to_time(START_NS + number * 40_000_000)
        senders[number % 2].publish(image)
        time.sleep(0.02)
    busy.look(6)
    assert [arrival.topic.split("/")[0] for arrival, _ in busy.arrivals] == 3 * ["cam_front", "cam_back"]
    busy.close()


def test_a_message_that_cannot_be_taken_stops_nothing(world: Ros) -> None:
    assembler = FrameAssembler()
    broken = ["cam_back"]

    def take(name: str, message: CameraInfo) -> None:
        if broken:
            raise RuntimeError(broken.pop())

    assembler.add_camera_info = take  # type: ignore[method-assign]
    busy = Busy(world, assembler)
    busy.inputs.start()
    sender = world.probe().create_publisher(CameraInfo, "cam_back/camera_info", 10)
    assert until(sender.get_subscription_count)
    sender.publish(CameraInfo(width=1))
    sender.publish(CameraInfo(width=2))
    assert until(lambda: len(busy.arrivals) == 1) and busy.inputs.counts["cam_back/camera_info"] == 2
    busy.close()


def test_a_topic_of_another_type_is_told(world: Ros) -> None:
    busy = Busy(world, FrameAssembler())
    elsewhere = Context()  # as in another process: in one, DDS refuses two types of a topic
    rclpy.init(args=[], context=elsewhere, domain_id=world.domain)
    sender = Node("sender", context=elsewhere)
    sender.create_publisher(Image, "cam_back/camera_info", 10)
    text = f"cam_back/camera_info (never received, 1 publisher of sensor_msgs/msg/Image instead of {INFO})"
    assert until(lambda: text in busy.inputs.silent()), busy.inputs.silent()
    sender.destroy_node()
    rclpy.try_shutdown(context=elsewhere)
    busy.close()


# ------------------------------------------------------------------------------------------------------- bad input


def test_missing_camera(world: Ros, messages: list[BagMessage], tmp_path: Path) -> None:
    rig = Rig(world)
    some = [m for m in messages if m.topic != "/cam_back/image_raw/compressed"]
    rig.play(write_messages(tmp_path / "bag", some))
    assert not rig.mapper.frames and rig.drops["missing camera"] >= 2
    assert rig.status(DiagnosticStatus.ERROR, "cam_back has no image within 0.1 s")


def test_wrong_image_size(world: Ros, messages: list[BagMessage], tmp_path: Path) -> None:
    def shrink(message: Any) -> None:
        message.data = np.frombuffer(jpeg(1, 80, 45), np.uint8)

    rig = Rig(world)
    rig.play(write_messages(tmp_path / "bag", spoiled(messages, "/cam_back/image_raw/compressed", 1, shrink)))
    assert rig.drops == {"wrong image size": 1} and len(rig.mapper.frames) == 3
    assert rig.status(DiagnosticStatus.WARN, "cam_back: image is 80 x 45") or rig.status(
        DiagnosticStatus.ERROR, "80 x 45"
    )


def test_pose_not_finite(world: Ros, messages: list[BagMessage], tmp_path: Path) -> None:
    rig = Rig(world)
    for index in range(6, 12):  # all poses of the second frame
        messages = spoiled(messages, "/odom", index, lambda m: setattr(m.pose.pose.position, "x", float("nan")))
    rig.play(write_messages(tmp_path / "bag", messages))
    assert rig.drops == {"pose not finite": 6, "no pose": 1} and len(rig.mapper.frames) == 3
    assert all(np.isfinite(s.map_from_base).all() for f in rig.mapper.frames for s in f.shots)


def test_clock_jump(world: Ros, drive: Path) -> None:
    """The same bag again: queues are cleared, and mapping goes on."""
    rig = Rig(world)
    rig.play(drive)
    rig.play(drive)
    assert rig.drops == {"clock jump": 1}
    assert [f.stamp_ns for f in rig.mapper.frames] == 2 * [FIRST_NS + i * 500_000_000 for i in range(4)]


def test_a_forward_jump_of_the_clock(world: Ros, drive: Path, messages: list[BagMessage], tmp_path: Path) -> None:
    """An hour on, and back again: the node maps on at once."""
    rig, hour_ns = Rig(world), 3600 * 10**9
    later = [moved(m, hour_ns) for m in messages if m.topic not in ("/tf_static", "/location", "/tf")]
    rig.play(drive)
    rig.play(write_messages(tmp_path / "later", later))
    stamps = [FIRST_NS + i * 500_000_000 for i in range(4)]
    assert [f.stamp_ns for f in rig.mapper.frames] == [*stamps, *(s + hour_ns for s in stamps)]
    assert not rig.drops
    rig.play(drive)
    assert [f.stamp_ns for f in rig.mapper.frames][8:] == stamps and rig.drops == {"clock jump": 1}
    assert all(len(grids) == 12 for grids in rig.layers.values())


@pytest.mark.parametrize(
    ("error", "cause", "text"),
    [
        (NmpError("cam_back: image data cannot be decoded"), REFUSED, "cam_back: image data cannot be decoded"),
        (RuntimeError("oops"), INTERNAL, "RuntimeError('oops')"),
    ],
)
def test_mapper_fails_and_the_node_lives_on(world: Ros, drive: Path, error: Exception, cause: str, text: str) -> None:
    rig = Rig(world, FakeMapper(failing={1: error, 3: error}))
    rig.play(drive)
    assert rig.drops == {cause: 2}
    assert [to_ns(m.header.stamp) - FIRST_NS for m in rig.layers["divider"]] == [0, 1_000_000_000]
    assert rig.status(DiagnosticStatus.ERROR, text)


def test_slow_mapper_drops_the_oldest(world: Ros, tmp_path: Path) -> None:
    rig = Rig(world, FakeMapper(seconds=0.3), queue_size=1, keyframe_rate=100.0)
    rig.play(make_bag(tmp_path, frames=12, period=1 / 12), rate=1.0, seconds=1.0)
    answered = len(rig.mapper.frames)
    assert 3 <= answered <= 9
    assert rig.drops == {QUEUE_FULL: 12 - answered}
    assert rig.mapper.frames[-1].stamp_ns == FIRST_NS + round(11 / 12 * 1e6) * 1000  # the newest survives
    assert rig.node.statistics.latency(50) < 0.8


def test_fast_cameras_lose_no_keyframe_and_the_newest_frames_fill_in(world: Ros, tmp_path: Path) -> None:
    rig = Rig(world, FakeMapper(seconds=0.2))
    rig.play(make_bag(tmp_path, frames=13, period=1 / 12), rate=1.0, seconds=1.2)
    stamps = [frame.stamp_ns for frame in rig.mapper.frames]
    keys = [FIRST_NS + round(i / 12 * 1e6) * 1000 for i in (0, 6, 12)]
    assert set(keys) <= set(stamps) and stamps == sorted(stamps) and len(stamps) < 13
    assert not rig.drops and rig.node.statistics.skips == {OVERTAKEN: 13 - len(stamps)}
    assert [frame.keyframe for frame in rig.mapper.frames] == [stamp in keys for stamp in stamps]


def test_a_prior_that_cannot_be_saved_is_an_error_while_layers_go_out(world: Ros, drive: Path) -> None:
    rig = Rig(world)
    rig.mapper.prior_error = "cannot write tile 3 of boston-seaport (No space left on device): free some space"
    rig.play(drive)
    assert len(rig.mapper.frames) == len(rig.layers["divider"]) == 4
    assert rig.status(DiagnosticStatus.ERROR, "No space left")


def test_damage_of_the_prior_is_a_warning(world: Ros, drive: Path) -> None:
    rig = Rig(world)
    rig.mapper.damage = "boston-seaport: tile 3.4 of drive 5fa1 fails its checksum: nmp prior verify --repair"
    rig.play(drive)
    assert len(rig.layers["divider"]) == 4
    assert rig.status(DiagnosticStatus.WARN, "the prior is damaged: boston-seaport: tile 3.4")
    assert {v.key: v.value for v in rig.report().values}["prior damage"] == rig.mapper.damage


def test_a_gate_that_closes_is_a_warning_and_is_counted(world: Ros, drive: Path) -> None:
    rig = Rig(world)
    rig.mapper.gates.text = "pose jumped by 3.0 m against its motion"
    rig.mapper.gates.counts[JUMPS] = 2
    rig.play(drive)
    assert rig.status(DiagnosticStatus.WARN, "pose jumped by 3.0 m")
    values = {v.key: v.value for v in rig.statuses[-1].values}
    assert {k: v for k, v in values.items() if k.startswith("gate: ")} == {
        f"gate: {cause}": "2" if cause == JUMPS else "0" for cause in CAUSES
    }


def test_silence_names_the_topics(world: Ros) -> None:
    rig = Rig(world)
    assert rig.status(DiagnosticStatus.WARN, "cam_front_left/camera_info (never received, 0 publishers)")
    assert rig.status(DiagnosticStatus.WARN, "odom (never received, 0 publishers), /tf_static")


def test_end_of_the_input_is_said_shortly(world: Ros, drive: Path) -> None:
    rig = Rig(world)
    rig.play(drive)
    assert rig.status(DiagnosticStatus.WARN, "nothing comes from any input for")


# ------------------------------------------------------------------------------------------------- service and end


def test_save_prior(world: Ros, drive: Path) -> None:
    rig = Rig(world)
    assert rig.save().result == SavePrior.Response.RESULT_NOT_READY
    rig.play(drive)
    assert rig.save().result == SavePrior.Response.RESULT_SUCCESS and rig.mapper.flushed == 1
    rig.mapper.flush_error = NmpError("disk full")
    response = rig.save()
    assert (response.result, response.message) == (SavePrior.Response.RESULT_FAILED, "disk full")
    assert rig.mapper.threads == {"mapper"}


def test_save_prior_never_hangs(world: Ros, drive: Path) -> None:
    rig = Rig(world, service_timeout=0.3)
    rig.play(drive)
    rig.mapper.flush = lambda: time.sleep(2)
    response = rig.save()
    assert response.result == SavePrior.Response.RESULT_TIMEOUT and "not done after" in response.message


def test_shutdown_saves_and_sums_up(world: Ros, drive: Path, tmp_path: Path) -> None:
    rig = Rig(world, stats_file=str(tmp_path / "stats.json"))
    rig.play(drive)
    assert rig.node.shutdown() == 0
    assert rig.mapper.closed == 1
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["frames_received"], stats["frames_answered"], stats["drops"]) == (4, 4, {})
    assert 0 < stats["latency_median_s"] <= stats["latency_p95_s"] < 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: int, drive: Path, tmp_path: Path) -> None:
    code = "from tests.test_mapping_node import make_mapping_process as run; run(0.05)"
    domain = free_domain()
    stats = tmp_path / "stats.json"
    node = node_process(code, "--ros-args", "-p", f"stats_file:={stats}", domain=domain)
    settings = ["-p", f"bag:={drive}", "-p", "rate:=4.0", "-p", "clock:=false"]
    player = node_process("nmp.nodes.player_node", "--ros-args", *settings, domain=domain)
    _, err = player.communicate(timeout=40)
    assert player.returncode == 0, err
    time.sleep(0.5)
    node.send_signal(number)
    out, err = node.communicate(timeout=20)
    assert node.returncode == 0 and "Traceback" not in err, err
    assert "closed 1 time" in out
    assert "4 frames received, 4 answered, dropped: none; latency median" in out + err
    assert json.loads(stats.read_text())["frames_answered"] == 4


@pytest.mark.parametrize(("pause_s", "code"), [(0.3, 0), (3.0, -signal.SIGINT)])
def test_only_a_second_signal_after_a_while_ends_a_node_that_saves(pause_s: float, code: int) -> None:
    """A Ctrl-C comes from the terminal and from ros2 launch; a person presses it again when nothing happens."""
    node = node_process("from tests.test_mapping_node import make_mapping_process as run; run(0.0, 5.0)")
    assert node.stderr is not None
    while "ready; waiting" not in node.stderr.readline():
        assert node.poll() is None
    node.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    node.send_signal(signal.SIGINT)
    out, _ = node.communicate(timeout=30)
    assert (node.returncode, "closed 1 time" in out) == (code, code == 0)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("weights:=/nowhere.safetensors", "/nowhere.safetensors"),
        ("max_camera_spread:=0.0", "max_camera_spread"),
        ("image_transport:=theora", "choose compressed or raw"),
    ],
)
def test_errors_at_the_start_are_one_line(parameter: str, text: str) -> None:
    process = node_process("nmp.nodes.mapping_node", "--ros-args", "-p", parameter)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1 and text in err and err.startswith("nmp: error: "), err


def test_recorder_errors(world: Ros, tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="'out_dir' is empty"):
        RecorderNode(threading.Event(), **world.options())
    recorder = RecorderNode(threading.Event(), **world.options(out_dir=str(tmp_path / "out")))
    frame = Frame(FIRST_NS, LOCATION, np.eye(4), ())
    for name, grid in to_occupancy_grids(pattern(frame)).items():
        recorder._on_layer(name, grid)
    with pytest.raises(NmpError, match="set parameter 'location'"):
        recorder.shutdown()
    recorder.destroy_node()


# ------------------------------------------------------------------------------------------------ the real mapper


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learnt nothing."""
    import torch

    from nmp.model.config import NetworkConfig
    from nmp.model.network import BEVNetwork
    from nmp.model.weights import save_network

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_network(BEVNetwork(NetworkConfig(input_width=176, input_height=96)), path, {})
    return path


def stored_evidence(weights: Path, prior: Path) -> int:
    """All evidence that a prior holds around the drive."""
    from nmp.mapper import OnlineMapper
    from nmp.prior import Window

    with OnlineMapper(weights, prior) as mapper:
        _, evidence = mapper.city(LOCATION).read(Window.around(405.0, 1102.0, 0.3, 400, 400))
    return int(evidence.astype(np.int64).sum())


def test_real_mapper_as_processes(drive: Path, weights: Path, tmp_path: Path) -> None:
    """Player, mapping node and recorder as users start them; then a second drive over the same prior."""
    prior = tmp_path / "prior"
    evidence = []
    for trip in ("first", "second"):
        stats, out = tmp_path / f"{trip}.json", tmp_path / trip
        settings = {"weights": weights, "prior_dir": prior, "stats_file": stats, "queue_size": 10}
        arguments = [a for k, v in settings.items() for a in ("-p", f"{k}:={v}")]
        with ros() as world:
            node = node_process("nmp.nodes.mapping_node", "--ros-args", *arguments, domain=world.domain)
            recorder = node_process(
                "nmp.nodes.recorder_node", "--ros-args", "-p", f"out_dir:={out}", domain=world.domain
            )
            probe = world.probe()
            # The player waits for the node, not for the recorder: that one has to listen before it starts.
            for topic in ("/location", "/mapping_node/layers/boundary", "/mapping_node/location"):
                assert until(partial(probe.count_subscribers, topic), 40)
            player = node_process(
                "nmp.nodes.player_node", "--ros-args", "-p", f"bag:={drive}", "-p", "rate:=2.0", domain=world.domain
            )
            _, err = player.communicate(timeout=60)
            assert player.returncode == 0, err
            until(lambda folder=out: len(list(folder.glob("*.npz"))) == 4, 20)
            for process in (node, recorder):
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=40)
                assert process.returncode == 0, err
            summary = json.loads(stats.read_text())
            assert (summary["frames_answered"], summary["drops"]) == (4, {}), summary
            assert len(list(read_layers(out))) == 4
            evidence.append(stored_evidence(weights, prior))
    assert 0 < evidence[0] < evidence[1]

    foreign = weights.with_name("foreign.safetensors")
    foreign.write_bytes(weights.read_bytes())
    description = json.loads(weights.with_suffix(".json").read_text())
    description["network"]["evidence_cap"] = 8.0
    foreign.with_suffix(".json").write_text(json.dumps(description))
    process = node_process(
        "nmp.nodes.mapping_node", "--ros-args", "-p", f"weights:={foreign}", "-p", f"prior_dir:={prior}"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "prior" in err, err


def test_a_node_that_is_killed_maps_on_and_keeps_what_was_saved(
    world: Ros, drive: Path, weights: Path, tmp_path: Path
) -> None:
    """The real node under its supervisor; the other tests of the supervisor have made-up nodes."""
    prior = tmp_path / "prior"
    settings = {"weights": weights, "prior_dir": prior, "device": "cpu", "flush_interval": 0.1, "queue_size": 10}
    given = [a for k, v in settings.items() for a in ("-p", f"{k}:={v}")]
    supervisor = node_process("nmp.nodes.supervisor", "--ros-args", *given, domain=world.domain)
    playing = ["-p", f"bag:={drive}", "-p", "loop:=true", "-p", "wait_for_subscribers:=60.0"]
    player = node_process("nmp.nodes.player_node", "--ros-args", *playing, domain=world.domain)
    layers: list[OccupancyGrid] = []
    probe = world.probe()
    probe.create_subscription(OccupancyGrid, "/mapping_node/layers/divider", layers.append, 10)

    def saved() -> list[Record]:
        ledger = Ledger.open(Storage(prior / LOCATION), read_only=True)
        assert all(ledger.load(record, digests(record)) for record in ledger.drives())
        return ledger.drives()

    try:
        assert until(lambda: len(layers) > 2, 40), "no layers"
        client = probe.create_client(SavePrior, "/mapping_node/save_prior")
        assert client.wait_for_service(timeout_sec=5)
        answer = client.call_async(SavePrior.Request())
        assert until(answer.done, 15) and answer.result().result == SavePrior.Response.RESULT_SUCCESS
        assert not saved()  # the drive is not over
        node = int(Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()[0])
        os.kill(node, signal.SIGKILL)
        time.sleep(0.5)  # what was still on its way is here
        layers.clear()
        assert until(lambda: len(layers) > 2, 40), "no layers after the kill"
        assert len(saved()) == 1  # what the killed one had saved
        supervisor.send_signal(signal.SIGINT)
        _, err = supervisor.communicate(timeout=40)
        assert supervisor.returncode == 0 and "was killed (SIGKILL): starting it" in err, err
        assert len(saved()) == 2
    finally:
        for process in (player, supervisor):
            process.kill()
            process.communicate()


# ---------------------------------------------------------------------------------------------------- conversions


def test_grids_that_do_not_match() -> None:
    frame = Frame(FIRST_NS, LOCATION, np.eye(4), ())
    grids = to_occupancy_grids(pattern(frame))
    other = to_occupancy_grids(pattern(replace(frame, stamp_ns=FIRST_NS + 1)))
    with pytest.raises(NmpError, match="'crossing' does not match"):
        from_occupancy_grids({**grids, "crossing": other["crossing"]}, LOCATION)
    with pytest.raises(NmpError, match="no layer 'boundary'"):
        from_occupancy_grids({c: grids[c] for c in ("divider", "crossing")}, LOCATION)


def test_tf_compat() -> None:
    rng = np.random.default_rng(0)
    for roll, pitch, yaw in rng.uniform(-1.4, 1.4, (20, 3)):
        q = tf_compat.quaternion_from_euler(roll, pitch, yaw)
        np.testing.assert_allclose(tf_compat.euler_from_quaternion(q), (roll, pitch, yaw), atol=1e-9)
        matrix = tf_compat.quaternion_matrix(q)
        np.testing.assert_allclose(matrix, tf_compat.euler_matrix(roll, pitch, yaw), atol=1e-9)
        np.testing.assert_allclose(tf_compat.euler_from_matrix(matrix), (roll, pitch, yaw), atol=1e-9)
        np.testing.assert_allclose(abs(tf_compat.quaternion_from_matrix(matrix) @ q), 1.0, atol=1e-9)
        twice = tf_compat.quaternion_matrix(tf_compat.quaternion_multiply(q, q))
        np.testing.assert_allclose(twice, matrix @ matrix, atol=1e-9)
    np.testing.assert_allclose(tf_compat.quaternion_from_euler(0, 0, np.pi / 2), [0, 0, 0.5**0.5, 0.5**0.5])
