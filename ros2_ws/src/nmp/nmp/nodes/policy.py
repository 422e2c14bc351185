"""The SROS 2 policy of the nodes, as config/nmp.policy.xml: what each may publish, subscribe to and serve, no more.

Written by :mod:`nmp.nodes.reference` from the same declarations as docs/node.md. The form is version 0.2.0 of
https://design.ros2.org/articles/ros2_access_control_policies.html. Nothing here imports ROS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from nmp import topics
from nmp.frame import CAMERAS
from nmp.nodes import interface

VERSION = "0.2.0"
ENCLAVES = "/nmp"
"""what the paths of the enclaves begin with"""

_PARAMETERS = ("describe_parameters", "get_parameter_types", "get_parameters", "list_parameters")
_PARAMETERS_SET = ("set_parameters", "set_parameters_atomically")
_LIFECYCLE = ("change_state", "get_available_states", "get_available_transitions", "get_state", "get_transition_graph")
_EVERY_NODE = ("/parameter_events", "/rosout")


@dataclass(frozen=True)
class Rights:
    """What one node may do, by names: ``~/`` stands for the node's own, others are of the root namespace."""

    node: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    reply: tuple[str, ...]

    @property
    def enclave(self) -> str:
        """Path of the enclave."""
        return f"{ENCLAVES}/{self.node}"


def rights() -> tuple[Rights, ...]:
    """Return the rights of the nodes with default parameters."""
    served = tuple(f"~/{name}" for name in (*_PARAMETERS, *_PARAMETERS_SET, "get_type_description"))
    inputs = tuple(topic.name for topic in interface.inputs())
    recorded = tuple(_of_mapping(topic.name) for topic in interface.OUTPUTS if topic.name in _recorded())
    # a page draws the layers and the car itself
    own = (topics.BEV, topics.FOOTPRINT)
    shown = tuple(_of_mapping(topic.name) for topic in interface.OUTPUTS if topic.name not in own)
    watched = (*(topics.image_topic(name) for name in CAMERAS), topics.ODOM, topics.TF_STATIC)
    return (
        Rights(
            "mapping_node",
            (*(topic.name for topic in interface.OUTPUTS), "~/transition_event", *_EVERY_NODE),
            (*inputs, topics.CLOCK),
            (*(service.name for service in interface.SERVICES), *(f"~/{name}" for name in _LIFECYCLE), *served),
        ),
        Rights("player_node", (*inputs, topics.TF, topics.CLOCK, *_EVERY_NODE), (), ("~/pause", *served)),
        Rights("recorder_node", _EVERY_NODE, (*recorded, topics.CLOCK), served),
        Rights("viewer_node", _EVERY_NODE, (*shown, *watched), served),
    )


def policy() -> str:
    """Return the text of the policy file."""
    root = ElementTree.Element("policy", version=VERSION)
    enclaves = ElementTree.SubElement(root, "enclaves")
    for right in rights():
        enclave = ElementTree.SubElement(enclaves, "enclave", path=right.enclave)
        profile = ElementTree.SubElement(
            ElementTree.SubElement(enclave, "profiles"), "profile", ns="/", node=right.node
        )
        _list(profile, "topic", "publish", right.publish)
        _list(profile, "topic", "subscribe", right.subscribe)
        _list(profile, "service", "reply", right.reply)
    ElementTree.indent(root)
    note = "<!-- made by python -m nmp.nodes.reference; docs/security.md says how it is used -->"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{note}\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _list(profile: ElementTree.Element, kind: str, right: str, names: Iterable[str]) -> None:
    if names := sorted(set(names)):
        group = ElementTree.SubElement(profile, f"{kind}s", {right: "ALLOW"})
        for name in names:
            ElementTree.SubElement(group, kind).text = _expression(name)


def _expression(name: str) -> str:
    """Return a name as policies have it: ``~name`` below the node, else relative to the namespace."""
    return name.replace("~/", "~").lstrip("/")


def _of_mapping(name: str) -> str:
    """Return the name that a topic of the mapping node has for others."""
    return name.replace("~", "mapping_node")


def _recorded() -> tuple[str, ...]:
    return (*(topic.name for topic in interface.OUTPUTS if "/layers/" in topic.name), topics.MAPPED_LOCATION)
