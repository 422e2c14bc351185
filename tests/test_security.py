"""Security: the policy is that of the nodes as they are, and nothing from outside names files or runs code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from xml.etree import ElementTree

import pytest

from tests.ros_fixtures import Ros, rclpy, until  # isort: skip  # before rclpy is imported: it sets up DDS, or skips
from nmp.errors import NmpError
from nmp.mapper import OnlineMapper
from nmp.model.weights import DEFAULT_WEIGHTS
from nmp.nodes.mapping_node import MappingNode
from nmp.nodes.player_node import PlayerNode
from nmp.nodes.policy import policy, rights
from nmp.nodes.recorder_node import RecorderNode
from nmp.nodes.runtime import open_ros
from nmp.nodes.viewer_node import ViewerNode
from nmp.prior import CityPrior, PriorSpec
from tests.bag_fixtures import make_bag
from tests.test_mapping_node import FakeMapper

CHILDREN = {
    "policy": {"enclaves"},
    "enclaves": {"enclave"},
    "enclave": {"profiles"},
    "profiles": {"profile"},
    "profile": {"topics", "services"},
    "topics": {"topic"},
    "services": {"service"},
    "topic": set(),
    "service": set(),
}
ATTRIBUTES = {
    "policy": {"version"},
    "enclave": {"path"},
    "profile": {"ns", "node"},
    "topics": {"publish", "subscribe"},
    "services": {"reply", "request"},
}
"""elements and attributes of the schema of the policies (design.ros2.org, version 0.2.0) without actions"""


@pytest.fixture
def world() -> Iterator[Ros]:
    ros = Ros()
    yield ros
    ros.close()


def test_the_policy_has_the_form_of_the_schema() -> None:
    root = ElementTree.fromstring(policy().encode())
    assert root.tag == "policy" and root.attrib == {"version": "0.2.0"}
    for element in root.iter():
        assert {child.tag for child in element} <= CHILDREN[element.tag]
        assert bool(CHILDREN[element.tag]) == bool(len(element)), "empty lists are not allowed"
        assert set(element.attrib) <= ATTRIBUTES.get(element.tag, set())
        if element.tag in ("topics", "services"):
            assert set(element.attrib.values()) == {"ALLOW"}
        if element.tag in ("topic", "service"):
            assert element.text and not element.text.startswith("/")
    assert [e.get("path") for e in root.iter("enclave")] == [r.enclave for r in rights()]


def allowed(node: str) -> dict[str, set[str]]:
    """What the policy allows a node in the root namespace: right to absolute names."""
    out: dict[str, set[str]] = {"publish": set(), "subscribe": set(), "reply": set()}
    for profile in ElementTree.fromstring(policy().encode()).iter("profile"):
        for group in profile if profile.get("node") == node else ():
            for right in group.attrib:
                names = (str(e.text) for e in group)
                out[right] |= {f"/{node}/{n[1:]}" if n.startswith("~") else f"/{n}" for n in names}
    return out


def used(node: Any) -> dict[str, set[str]]:
    """What a node has opened, as the graph tells it: right to absolute names."""
    kinds = (("publish", "publisher"), ("subscribe", "subscriber"), ("reply", "service"))
    ask = {right: getattr(node, f"get_{kind}_names_and_types_by_node") for right, kind in kinds}
    return {right: {topic for topic, _ in names(node.get_name(), "/")} for right, names in ask.items()}


def test_the_policy_allows_what_the_nodes_use_and_no_more(world: Ros, tmp_path: Path) -> None:
    made: list[Any] = [
        MappingNode(threading.Event(), make_mapper=lambda s: FakeMapper(), **world.options(use_sim_time=True)),
        RecorderNode(threading.Event(), **world.options(out_dir=str(tmp_path / "out"), use_sim_time=True)),
        PlayerNode(
            threading.Event(), **world.options(bag=str(make_bag(tmp_path, frames=1)), wait_for_subscribers=60.0)
        ),
        ViewerNode(MagicMock(), "mapping_node", **world.options()),
    ]
    for node in made:
        world.add(node)
        name = node.get_name()
        # which node an endpoint belongs to is told by a message of its own, a little later
        until(lambda node=node, name=name: used(node) == allowed(name))
        assert used(node) == allowed(name)
        assert not node.get_client_names_and_types_by_node(name, "/")
    made[2].shutdown()


def test_the_node_that_only_makes_a_process_known_needs_no_other_rights() -> None:
    node = open_ros()
    try:
        until(lambda: "/parameter_events" in used(node)["publish"])
        for right, names in used(node).items():
            assert names <= allowed("mapping_node")[right], right
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


@pytest.mark.parametrize("name", ["..", "../other", "/etc", ".hidden", "a/b", "a\0b", ""])
def test_a_location_from_outside_names_no_other_folder(tmp_path: Path, name: str) -> None:
    prior = tmp_path / "prior"
    prior.mkdir()
    with pytest.raises(NmpError, match="cannot name a folder"):
        CityPrior.open(prior, name, PriorSpec(4, 0.3, "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["prior"] and not list(prior.iterdir())


def test_weights_that_are_pickles_are_not_opened(tmp_path: Path) -> None:
    bad = tmp_path / "weights.safetensors"
    mark = tmp_path / "ran"
    # what a pickle of a call looks like: os.system("touch ...")
    bad.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    bad.with_suffix(".json").write_bytes(DEFAULT_WEIGHTS.with_suffix(".json").read_bytes())
    with pytest.raises(NmpError, match="not a readable safetensors file"):
        OnlineMapper(bad, tmp_path / "prior")
    assert not mark.exists()
