"""A running node is looked at over real ROS 2 topics."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from tests.ros_fixtures import Ros, node_process, ros, until

pytest.importorskip("tf2_msgs")

from builtin_interfaces.msg import Time  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from geometry_msgs.msg import TransformStamped  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from tf2_msgs.msg import TFMessage  # noqa: E402
from visualization_msgs.msg import Marker, MarkerArray  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.cli import main  # noqa: E402
from nmp.frame import CAMERAS, LocalMap  # noqa: E402
from nmp.grids import from_city_grids  # noqa: E402
from nmp.layers import to_occupancy  # noqa: E402
from nmp.nodes.city import CitySoFar  # noqa: E402
from nmp.nodes.conversions import (  # noqa: E402
    from_markers,
    to_city_grids,
    to_image,
    to_markers,
    to_occupancy_grids,
    to_time,
)
from nmp.nodes.loopback import PROFILE, PROFILES, RANGE  # noqa: E402
from nmp.nodes.qos import profile  # noqa: E402
from nmp.nodes.viewer_node import ViewerNode  # noqa: E402
from nmp.vectors.raster import Overview  # noqa: E402
from nmp.vectors.tracker import ElementTracker  # noqa: E402
from nmp.view.live import LiveScreen  # noqa: E402
from nmp.view.sink import Elements, Mounting, Note, Pose, Sink  # noqa: E402
from tests.bag_fixtures import LOCATION, jpeg  # noqa: E402
from tests.view_fixtures import layers_at  # noqa: E402

NODE = "mapping_node"


class Seen(Sink):
    """Notes what is passed on."""

    def __init__(self) -> None:
        self.images: dict[str, list[tuple[int, bytes]]] = {}
        self.poses: list[Pose] = []
        self.mounted: Sequence[Mounting] = ()
        self.maps: list[LocalMap] = []
        self.cities: list[Overview] = []
        self.drawn: list[Elements] = []
        self.notes: list[Note] = []

    def image(self, camera: str, stamp_ns: int, data: bytes) -> None:
        self.images.setdefault(camera, []).append((stamp_ns, data))

    def pose(self, pose: Pose) -> None:
        self.poses.append(pose)

    def mountings(self, stamp_ns: int, mountings: Sequence[Mounting]) -> None:
        self.mounted = mountings

    def layers(self, local_map: LocalMap) -> None:
        self.maps.append(local_map)

    def city(self, stamp_ns: int, overview: Overview) -> None:
        self.cities.append(overview)

    def elements(self, elements: Elements) -> None:
        self.drawn.append(elements)

    def note(self, note: Note) -> None:
        self.notes.append(note)


@pytest.fixture
def world() -> Iterator[Ros]:
    with ros() as found:
        yield found


class Car:
    """Publishes what cameras, localisation and mapping node do."""

    def __init__(self, world: Ros) -> None:
        self._node = world.probe("car")
        self._publishers: dict[str, Any] = {}

    def say(self, topic: str, msg: Any, qos: topics.TopicQos = topics.LATCHED) -> None:
        name = topic.replace("~", NODE)
        if name not in self._publishers:
            self._publishers[name] = self._node.create_publisher(type(msg), name, profile(qos))
            # a sensor's message that is sent before they know each other is lost
            assert qos.latched or until(lambda: self._publishers[name].get_subscription_count())
        self._publishers[name].publish(msg)

    def drive(self, index: int, tracker: ElementTracker, city: CitySoFar) -> LocalMap:
        """Publish everything of one moment."""
        local_map = layers_at(index)
        stamp = to_time(local_map.stamp_ns)
        for number, camera in enumerate(CAMERAS):
            image = CompressedImage(format="jpeg", data=jpeg(6 * index + number))
            image.header.stamp = stamp
            self.say(topics.image_topic(camera), image, topics.SENSOR_OUT)
        odom = Odometry()
        odom.header.stamp = stamp
        odom.pose.pose.position.x, odom.pose.pose.position.y = (float(v) for v in local_map.map_from_base[:2, 3])
        odom.pose.pose.orientation.w = 1.0
        self.say(topics.ODOM, odom, topics.SENSOR_OUT)
        for name, grid in to_occupancy_grids(local_map).items():
            self.say(topics.layer_topic(name), grid)
        city.add(local_map)
        for name, grid in to_city_grids(city.overview(), local_map.stamp_ns).items():
            self.say(topics.city_topic(name), grid)
        self.say(topics.VECTORS, to_markers(tracker.update(local_map)))
        return local_map


def test_everything_arrives(world: Ros) -> None:
    seen = Seen()
    viewer = world.add(ViewerNode(seen, NODE, context=world.context))
    car, tracker, city = Car(world), ElementTracker(), CitySoFar()
    car.say(topics.MAPPED_LOCATION, String(data=LOCATION))
    mounted = TransformStamped(child_frame_id="cam_back_optical_frame")
    mounted.header.frame_id = topics.BASE_FRAME
    mounted.transform.translation.x, mounted.transform.rotation.w = -0.5, 1.0
    car.say(topics.TF_STATIC, TFMessage(transforms=[mounted]))
    assert until(lambda: viewer._location and viewer._mountings)
    expected = []
    for index in range(3):
        expected.append(car.drive(index, tracker, city))
        assert until(lambda n=index: min(len(seen.drawn), len(seen.cities), len(seen.maps)) > n)
    assert [m.stamp_ns for m in seen.maps] == [m.stamp_ns for m in expected]
    assert np.array_equal(to_occupancy(seen.maps[2]), to_occupancy(expected[2]))
    assert np.allclose(seen.maps[2].map_from_base, expected[2].map_from_base, atol=1e-6)
    assert seen.maps[2].location == LOCATION
    assert until(lambda: all(len(seen.images.get(c, ())) == 3 for c in CAMERAS) and len(seen.poses) == 3)
    for number, camera in enumerate(CAMERAS):
        assert seen.images[camera] == [(m.stamp_ns, jpeg(6 * i + number)) for i, m in enumerate(expected)]
    assert seen.poses[1].map_from_base[0, 3] == expected[1].map_from_base[0, 3]
    assert [(m.child, m.parent_from_child[0, 3]) for m in seen.mounted] == [("cam_back_optical_frame", -0.5)]
    whole = city.overview()
    assert seen.cities[2].corner == pytest.approx(whole.corner) and seen.cities[2].resolution == whole.resolution
    assert np.array_equal(seen.cities[2].probabilities > 0.5, (whole.probabilities > 0.5) & (whole.seen > 0))
    elements = ElementTracker().update(expected[0]).elements
    assert [(line.name, line.id) for line in seen.drawn[0].lines] == [(e.name, e.id) for e in elements]
    assert [line.confidence for line in seen.drawn[0].lines] == pytest.approx([e.confidence for e in elements])
    city.close()


def test_complaints_and_damage(world: Ros) -> None:
    seen = Seen()
    world.add(ViewerNode(seen, NODE, context=world.context))
    car = Car(world)
    status = [DiagnosticStatus(level=DiagnosticStatus.OK, name="a", message="fine")]
    status.append(DiagnosticStatus(level=DiagnosticStatus.ERROR, name=NODE, message="cam_back is silent"))
    car.say(topics.DIAGNOSTICS, DiagnosticArray(status=status), topics.TopicQos(depth=10))
    assert until(lambda: seen.notes)
    assert [(n.level, n.text) for n in seen.notes] == [(2, f"{NODE}: cam_back is silent")]
    topic = topics.image_topic("cam_front")
    broken = CompressedImage(format="jpeg", data=jpeg()[:200])
    for msg in (broken, broken, CompressedImage(header=broken.header, format="jpeg", data=jpeg(1))):
        msg.header.stamp = Time(sec=5)
        car.say(topic, msg, topics.SENSOR_OUT)
    assert until(lambda: "cam_front" in seen.images)  # the node has survived the others
    assert [data for _, data in seen.images["cam_front"]] == [jpeg(1)]


def test_raw_images_become_jpegs(world: Ros) -> None:
    seen = Seen()
    world.add(ViewerNode(seen, NODE, raw=True, context=world.context))
    car = Car(world)
    picture: Image = to_image(np.full((20, 40, 3), 200, np.uint8), 5)
    car.say(topics.image_topic("cam_front", "raw"), picture, topics.SENSOR_OUT)
    assert until(lambda: "cam_front" in seen.images)
    assert seen.images["cam_front"][0][0] == 5 and seen.images["cam_front"][0][1].startswith(b"\xff\xd8")


def test_a_page_is_filled_from_topics(world: Ros) -> None:
    screen = LiveScreen(NODE, "waiting")
    world.add(ViewerNode(screen, NODE, context=world.context))
    car, tracker, city = Car(world), ElementTracker(), CitySoFar()
    car.say(topics.MAPPED_LOCATION, String(data=LOCATION))
    for index in range(3):
        car.drive(index, tracker, city)
        assert until(lambda n=index: len(screen._layers.items) > n and screen._layers.items[-1][1].lines)
    content = screen.content()
    assert content["location"] == LOCATION and len(content["layers"]) == 3 and content["city"]
    city.close()


def test_the_command_waits_for_a_node_and_ends_quietly() -> None:
    process = node_process("nmp.cli", "view", "--live", "--port", "0")
    assert process.stdout is not None
    address = process.stdout.readline().split()[1]
    with urlopen(address, timeout=10) as answer:
        page = answer.read().decode()
    assert answer.url == f"{address}live/" and "waiting for the layers of mapping_node" in page
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_the_command_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def listening(*_: object, **__: object) -> None:
        raise Asked

    monkeypatch.setattr("nmp.nodes.viewer_node.listening", listening)
    for given in ("", "SUBNET"):
        for name in (RANGE, *PROFILES):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        if given:
            monkeypatch.setenv(RANGE, given)
        with pytest.raises(Asked):
            main(["view", "--live", "--port", "0"])
        assert os.environ[RANGE] == (given or "LOCALHOST")
        assert [os.environ.get(name) for name in PROFILES] == [None if given else str(PROFILE)] * 2


def test_markers_and_city_survive_the_way_there_and_back() -> None:
    tracker = ElementTracker()
    tracker.update(layers_at(0))
    empty = replace(layers_at(1), probabilities=np.zeros_like(layers_at(1).probabilities))
    gone = from_markers(to_markers(tracker.update(empty)))
    assert not gone.lines and {name for name, _ in gone.gone} == {"divider", "crossing", "boundary"}
    assert from_markers(MarkerArray(markers=[Marker(action=Marker.DELETEALL)])).afresh
    city = CitySoFar()
    city.add(layers_at(0))
    there = city.overview()
    back = from_city_grids(to_city_grids(there, 5))
    assert np.allclose(back.probabilities, there.probabilities * (there.seen > 0), atol=0.011)
    assert np.array_equal(back.seen > 0, there.seen > 0)
    city.close()
