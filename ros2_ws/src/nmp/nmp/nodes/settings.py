"""Parameters declared to ROS, validated when they are changed, and read by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from nmp.nodes.parameters import Change, Parameter


class Settings:
    """The parameters of one node.

    :param unconfigured: tells whether the node is in the state in which everything may be changed
    :param changed: called after a change, with the names

    Raises rclpy's ParameterException for a value from the command line that cannot be used.
    """

    def __init__(
        self,
        node: Node,
        parameters: Sequence[Parameter],
        unconfigured: Callable[[], bool],
        changed: Callable[[set[str]], None],
    ) -> None:
        self._parameters = {p.name: p for p in parameters}
        self._unconfigured = unconfigured
        self._changed = changed
        self._values: dict[str, Any] = {}
        node.add_on_set_parameters_callback(self._check)
        for parameter in parameters:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            found = node.declare_parameter(parameter.name, default, descriptor_of(parameter))
            self._values[parameter.name] = _plain(found.value)
        node.add_post_set_parameters_callback(self._take)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def _check(self, wanted: list[RosParameter]) -> SetParametersResult:
        for new in wanted:
            parameter = self._parameters.get(new.name)
            if parameter is None:
                continue
            declared = parameter.name in self._values
            if declared and parameter.change is Change.UNCONFIGURED and not self._unconfigured():
                reason = f"parameter '{new.name}' cannot change now: deactivate and clean up the node first"
            else:
                reason = parameter.fault(_plain(new.value))
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _take(self, new: list[RosParameter]) -> None:
        values = {p.name: _plain(p.value) for p in new if p.name in self._values}
        self._values |= values
        if values:
            self._changed(set(values))


def declare(node: Node, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Declare parameters that do not change, and return their values.

    Raises rclpy's ParameterException for one that cannot be used.
    """
    return {p.name: node.declare_parameter(p.name, p.default, descriptor_of(p)).value for p in parameters}


def descriptor_of(parameter: Parameter) -> ParameterDescriptor:
    """Return what ROS is told of a parameter."""
    out = ParameterDescriptor(description=parameter.description, read_only=parameter.change is Change.NEVER)
    if parameter.choices:
        out.additional_constraints = f"one of: {', '.join(parameter.choices)}"
    if isinstance(parameter.default, float):
        out.floating_point_range = [FloatingPointRange(from_value=parameter.low, to_value=parameter.high, step=0.0)]
    elif isinstance(parameter.default, int) and not isinstance(parameter.default, bool):
        out.integer_range = [IntegerRange(from_value=int(parameter.low), to_value=int(parameter.high), step=1)]
    return out


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
