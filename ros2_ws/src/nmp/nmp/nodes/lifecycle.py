"""A lifecycle node that says why a transition failed, and that no request can bring down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from nmp.errors import NmpError

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE
ERROR = TransitionCallbackReturn.ERROR

INTERNAL = "internal error"
"""cause of what no input explains"""


class ManagedNode(LifecycleNode):
    """What rclpy's lifecycle nodes lack."""

    def __init__(self, name: str, **node_options: Any) -> None:
        super().__init__(name, **node_options)
        self.failure = ""
        """why the last transition failed; empty when it did not"""
        self.quiet = False
        """True: whoever triggers transitions reports their failure"""
        self._change_state = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state

    @property
    def state(self) -> str:
        """The state of the lifecycle: unconfigured, inactive, active, finalized, or the one between two of them."""
        return str(self._state_machine.current_state[1])  # rclpy has no public name for it

    def destroy_node(self) -> None:
        """Destroy the node with its state machine, which rclpy forgets: the node would stay on the graph for ever."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    def transition(
        self,
        action: Callable[[], None],
        then: Callable[[LifecycleState], TransitionCallbackReturn],
        state: LifecycleState,
        fault: TransitionCallbackReturn = ERROR,
    ) -> TransitionCallbackReturn:
        """Run an action, then rclpy's own part of a transition; keep why it failed.

        :param fault: what a :class:`NmpError` means: FAILURE (all is as before), or ERROR (error processing)
        """
        self.failure, out = "", ERROR
        try:
            action()
            return then(state)
        except NmpError as exc:
            self.failure, out = str(exc), fault
        except Exception as exc:  # rclpy would drop it without a word
            self.failure = f"{INTERNAL} ({exc!r}): please report it with the log"
        if not self.quiet:
            self.get_logger().error(self.failure)
        return out

    def _on_change_state(self, request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        """Refuse a transition that the state does not have, which in rclpy ends the executor."""
        try:
            answer: ChangeState.Response = self._change_state(request, response)
            return answer
        except rclpy_implementation.RCLError as exc:
            self.get_logger().warning(f"the node is {self.state}, where this transition does not exist ({exc})")
            response.success = False
            return response
