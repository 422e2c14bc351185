"""What ``ros2 param``, ``ros2 lifecycle get`` and ``ros2 bag`` ask of the nodes; the verbs themselves are no wheels."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ros_fixtures import Ros, ros, until

pytest.importorskip("nmp_msgs")

from lifecycle_msgs.srv import GetAvailableTransitions, GetState  # noqa: E402
from nav_msgs.msg import OccupancyGrid  # noqa: E402
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters  # noqa: E402
from rclpy.qos import HistoryPolicy, QoSProfile  # noqa: E402
from rosbags.rosbag2 import StoragePlugin, Writer  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.bags.nuscenes_to_bag import BAG_VERSION, STORE, offered_qos  # noqa: E402
from nmp.bags.reader import BagReader  # noqa: E402
from nmp.frame import CLASSES  # noqa: E402
from nmp.nodes.parameters import GATE, PARAMETERS  # noqa: E402
from nmp.nodes.player_node import PlayerNode, message_class  # noqa: E402
from tests.bag_fixtures import make_bag  # noqa: E402
from tests.test_mapping_node import Rig  # noqa: E402

SHOWN = ("/mapping_node/bev", "/diagnostics", *(f"/mapping_node/layers/{name}" for name in CLASSES))
"""what the rig itself listens to"""


@pytest.fixture
def world() -> Iterator[Ros]:
    with ros() as r:
        yield r


def ask(rig: Rig, kind: Any, name: str, **fields: Any) -> Any:
    client = rig.probe.create_client(kind, f"/mapping_node/{name}")
    assert client.wait_for_service(timeout_sec=5)
    future = client.call_async(kind.Request(**fields))
    assert until(future.done, 10)
    return future.result()


def test_param_and_lifecycle_get(world: Ros) -> None:
    rig = Rig(world)
    names = [p.name for p in PARAMETERS]
    assert set(names) <= set(ask(rig, ListParameters, "list_parameters").result.names)
    described = ask(rig, DescribeParameters, "describe_parameters", names=names).descriptors
    assert all(d.description for d in described)
    bounded = {d.name for d in described if d.floating_point_range or d.integer_range}
    assert bounded == {p.name for p in PARAMETERS if p.type in ("double", "integer")}
    value = ask(rig, GetParameters, "get_parameters", names=[f"{GATE}speed", "keyframe_rate"]).values
    assert [v.double_value for v in value] == [60.0, 2.0]

    def put(name: str, number: float) -> Any:
        new = Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=number))
        return ask(rig, SetParameters, "set_parameters", parameters=[new]).results[0]

    assert put("keyframe_rate", 1.0).successful and rig.node.assembler.limits.keyframe_rate == 1.0
    assert not put("keyframe_rate", -1.0).successful
    assert "deactivate" in put(f"{GATE}speed", 50.0).reason
    assert ask(rig, GetState, "get_state").current_state.label == "active"
    transitions = ask(rig, GetAvailableTransitions, "get_available_transitions").available_transitions
    assert {t.transition.label for t in transitions} == {"deactivate", "shutdown"}


def record(rig: Rig, folder: Path, drive: Path) -> Counter[str]:
    """Record all that the node publishes as ``ros2 bag record`` does: bytes, with the quality of service on offer."""
    taken: list[tuple[str, bytes]] = []

    def told() -> dict[str, list[str]]:
        return dict(rig.node.get_publisher_names_and_types_by_node("mapping_node", "/"))

    # which node an endpoint belongs to is told by a message of its own, a little later
    assert until(lambda: {p.topic_name for p in rig.node.publishers} <= told().keys())
    kinds = told()
    offers: dict[str, QoSProfile] = {}
    for name, (kind,) in kinds.items():
        offers[name] = rig.node.get_publishers_info_by_topic(name)[0].qos_profile
        asked = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=100,
            reliability=offers[name].reliability,
            durability=offers[name].durability,
        )
        take = lambda data, name=name: taken.append((name, data))  # noqa: E731
        rig.probe.create_subscription(message_class(kind), name, take, asked, raw=True)
    publishers = [p for p in rig.node.publishers if p.topic_name in offers]
    assert until(lambda: all(p.get_subscription_count() > (p.topic_name in SHOWN) for p in publishers))
    rig.play(drive)
    assert until(lambda: rig.node.statistics.answered == 4)
    time.sleep(0.5)  # what is published after the layers
    with Writer(folder, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
        latched = {name: str(q.durability).endswith("TRANSIENT_LOCAL") for name, q in offers.items()}
        connections = {
            name: writer.add_connection(
                name,
                kinds[name][0],
                typestore=STORE,
                offered_qos_profiles=[offered_qos(topics.TopicQos(depth=100, reliable=True, latched=latched[name]))],
            )
            for name in {topic for topic, _ in taken}
        }
        for i, (name, data) in enumerate(taken):
            writer.write(connections[name], time.time_ns() + i, data)
    return Counter(name for name, _ in taken)


def test_what_is_published_can_be_recorded_and_played(world: Ros, tmp_path: Path) -> None:
    rig = Rig(world, queue_size=10)  # the first picture takes a second
    counts = record(rig, tmp_path / "recorded", make_bag(tmp_path, frames=4))
    grids = [f"/mapping_node/layers/{name}" for name in CLASSES]
    assert [counts[name] for name in grids] == [4, 4, 4]
    # those of a frame behind which another one waits are left out
    assert 1 <= counts["/mapping_node/vectors"] == counts["/mapping_node/bev"] <= 4
    assert counts["/mapping_node/location"] == 1
    with BagReader(tmp_path / "recorded") as reader:
        read = [m for m in reader.messages() if m.topic == grids[0]]
        assert {m.topic for m in reader.messages()} >= {*grids, "/mapping_node/vectors", "/diagnostics"}
    sent = rig.layers[CLASSES[0]]
    assert [bytes(m.message.data) for m in read] == [bytes(m.data.tobytes()) for m in sent]

    # and what was recorded comes back on the same topics, for whoever has missed the node
    again: list[OccupancyGrid] = []
    rig.probe.create_subscription(OccupancyGrid, "/elsewhere/divider", again.append, 10)
    settings = {"bag": str(tmp_path / "recorded"), "rate": 10.0, "wait_for_subscribers": 0.0, "clock": False}
    options = world.options(**settings) | {"cli_args": ["--ros-args", "-r", f"{grids[0]}:=/elsewhere/divider"]}
    player = world.add(PlayerNode(threading.Event(), **options))
    assert until(player.stop.is_set, 20) and until(lambda: len(again) == 4)
    assert again == sent
