"""The player over real DDS: every byte, in order, on time."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.ros_fixtures import Ros, node_process, ros, until

pytest.importorskip("rclpy")
pytest.importorskip("tf2_msgs")

from nav_msgs.msg import Odometry  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CompressedImage  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.bags.reader import BagReader  # noqa: E402
from nmp.errors import NmpError  # noqa: E402
from nmp.frame import CAMERAS  # noqa: E402
from nmp.nodes import reference  # noqa: E402
from nmp.nodes.parameters import PLAYER, RECORDER  # noqa: E402
from nmp.nodes.player_node import FAREWELL, PlayerNode, message_class  # noqa: E402
from nmp.nodes.qos import profile  # noqa: E402
from nmp.nodes.recorder_node import RecorderNode  # noqa: E402
from tests.bag_fixtures import LOCATION, make_bag  # noqa: E402

DEEP = profile(topics.TopicQos(depth=500))


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"), frames=4)


@pytest.fixture
def world() -> Iterator[Ros]:
    with ros() as r:
        yield r


def player(world: Ros, bag: Path, **parameters: Any) -> PlayerNode:
    given = {"rate": 10.0, "wait_for_subscribers": 0.0, "delay": 0.5, **parameters}
    return world.add(PlayerNode(threading.Event(), **world.options(bag=str(bag), **given)))


def test_every_byte_arrives_in_order(world: Ros, drive: Path) -> None:
    probe, got = world.probe(), []
    for camera in CAMERAS:
        topic = topics.image_topic(camera)
        take = partial(lambda t, data: got.append((f"/{t}", data)), topic)
        probe.create_subscription(CompressedImage, topic, take, DEEP, raw=True)
    node = player(world, drive)
    assert until(node.stop.is_set)
    with BagReader(drive) as reader:
        sent = [(t, d) for t, _, d in reader.raw_messages() if t.endswith("compressed")]
    assert until(lambda: len(got) == len(sent))
    # Order holds within a topic; DDS may interleave topics.
    for camera in CAMERAS:
        topic = f"/{topics.image_topic(camera)}"
        for (_, received), (_, recorded) in zip(
            [g for g in got if g[0] == topic], [s for s in sent if s[0] == topic], strict=True
        ):
            # DDS may pad the end to a multiple of four.
            assert received[: len(recorded)] == recorded and len(received) - len(recorded) < 4
    assert node.shutdown() == 0 and node.played == 2 + 4 * 24


@pytest.mark.parametrize(("rate", "frames"), [(0.1, 2), (1.0, 4), (4.0, 4), (10.0, 40)])
def test_timing(world: Ros, tmp_path: Path, rate: float, frames: int) -> None:
    drive = make_bag(tmp_path, frames=frames)
    probe, arrivals = world.probe(), []
    probe.create_subscription(Odometry, "odom", lambda m: arrivals.append((time.monotonic(), m.header.stamp)), DEEP)
    node = player(world, drive, rate=rate)
    before = time.process_time()
    assert until(lambda: len(arrivals) == 6 * frames, 20.0)
    first, last = arrivals[0], arrivals[-1]
    recorded = (last[1].sec - first[1].sec) + (last[1].nanosec - first[1].nanosec) * 1e-9
    assert last[0] - first[0] == pytest.approx(recorded / rate, abs=0.1)
    assert node.worst_lag_s < 0.1
    assert time.process_time() - before < 0.8 * (recorded / rate) + 0.5  # sleeps between messages
    assert until(node.stop.is_set)


def test_parameters_are_those_of_the_page(world: Ros, drive: Path, tmp_path: Path) -> None:
    page = reference.page()
    recorder = world.add(RecorderNode(threading.Event(), **world.options(out_dir=str(tmp_path / "out"))))
    playing = player(world, drive)
    for node, parameters in ((playing, PLAYER), (recorder, RECORDER)):
        declared = {p.name for p in node.get_parameters_by_prefix("").values()}
        assert declared - {"use_sim_time", "start_type_description_service"} == {p.name for p in parameters}
        for parameter in parameters:
            told = node.describe_parameter(parameter.name)
            assert told.description == parameter.description and told.read_only
            assert f"| `{parameter.name}` | {parameter.type} |" in page and parameter.description in page
    playing.shutdown()


def test_latched_topics_reach_a_late_subscriber(world: Ros, drive: Path) -> None:
    node, got = player(world, drive, delay=0.0, loop=True), []
    assert until(lambda: node.played > 30)
    world.probe().create_subscription(String, "location", lambda m: got.append(m.data), profile(topics.LATCHED))
    assert until(lambda: got)
    assert got[0] == LOCATION
    node.shutdown()


def test_waits_for_subscribers(world: Ros, tmp_path: Path) -> None:
    bag, got = make_bag(tmp_path, frames=1), []
    node = player(world, bag, wait_for_subscribers=30.0, delay=0.0)
    time.sleep(0.4)
    assert node.played == 0
    probe = world.probe()
    with BagReader(bag) as reader:
        kinds = {t.name: t for t in reader.topics.values() if t.name != "/tf"}
    for t in kinds.values():
        probe.create_subscription(message_class(t.msgtype), t.name, lambda m, n=t.name: got.append(n), profile(t.qos))
    assert until(lambda: len(got) == 2 + 3 * 6)
    node.shutdown()


def test_pause_and_loop(world: Ros, drive: Path) -> None:
    node = player(world, drive, delay=0.0, loop=True, start_paused=True)
    time.sleep(0.3)
    assert node.played <= 6  # the moment zero
    probe = world.probe()
    client = probe.create_client(SetBool, "/player_node/pause")
    assert client.wait_for_service(timeout_sec=5)

    def pause(value: bool) -> str:
        future = client.call_async(SetBool.Request(data=value))
        assert until(future.done)
        return str(future.result().message)

    assert pause(False) == "playing"
    assert until(lambda: node.played > 2 * 98)  # goes round
    assert pause(True) == "paused"
    time.sleep(0.1)
    count = node.played
    time.sleep(0.4)
    assert node.played == count
    node.shutdown()


def test_clock(world: Ros, drive: Path) -> None:
    probe, ticks = world.probe(), []
    probe.create_subscription(Clock, "/clock", lambda m: ticks.append(m.clock.sec * 10**9 + m.clock.nanosec), 100)
    node = player(world, drive, rate=2.0)
    assert until(node.stop.is_set)
    assert len(ticks) > 15 and ticks == sorted(ticks)
    assert node.reader.start_ns <= ticks[0] and ticks[-1] <= node.reader.end_ns
    node.shutdown()


def test_damage_in_the_middle_is_said(world: Ros, drive: Path, tmp_path: Path) -> None:
    bag = Path(shutil.copytree(drive, tmp_path / "drive"))
    data = bytearray((bag / "drive.mcap").read_bytes())
    data[len(data) // 3 : len(data) // 3 + 20_000] = b"\xff" * 20_000
    (bag / "drive.mcap").write_bytes(data)
    node = player(world, bag, delay=0.0)
    assert until(node.stop.is_set)
    with pytest.raises(NmpError, match="truncated or damaged"):
        node.shutdown()


def test_the_last_images_are_not_lost_with_the_process(world: Ros, drive: Path) -> None:
    """A reader on a busy computer must be able to fetch them from shared memory before that goes."""
    came: list[float] = []
    topic, qos = topics.image_topic("cam_back_left"), profile(topics.SENSOR_IN)
    world.probe().create_subscription(CompressedImage, topic, lambda m: came.append(time.monotonic()), qos)
    settings = ["-p", f"bag:={drive}", "-p", "rate:=10.0", "-p", "wait_for_subscribers:=0.0", "-p", "delay:=4.0"]
    process = node_process("nmp.nodes.player_node", "--ros-args", *settings, domain=world.domain)
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(came) == 4
    assert time.monotonic() - came[-1] >= 0.9 * FAREWELL


def test_as_a_process(drive: Path) -> None:
    settings = ["--ros-args", "-p", f"bag:={drive}", "-p", "rate:=10.0", "-p", "wait_for_subscribers:=0.0"]
    process = node_process("nmp.nodes.player_node", *settings)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "played 98 messages" in out + err

    process = node_process("nmp.nodes.player_node", *settings, "-p", "loop:=true")
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("bag:=/nowhere", "bag /nowhere does not exist"),
        ("loop:=true", "parameter 'bag' is empty"),
        ("rate:=100.0", "rate"),
        ("rate:=fast", "rate"),
    ],
)
def test_errors_are_one_line(parameter: str, text: str) -> None:
    process = node_process("nmp.nodes.player_node", "--ros-args", "-p", parameter)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.count("\n") == 1 and text in err and err.startswith("nmp: error: ")
