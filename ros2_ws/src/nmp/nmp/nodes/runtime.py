"""What every node's ``main`` does alike: run until told to stop, and say errors in one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import LoggingSeverity
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from nmp.errors import NmpError

SAME_SIGNAL_S = 2.0
"""a Ctrl-C may come by two ways, from the terminal and from what has started the node: within so long it is one, s"""


def run_node(make: Callable[[threading.Event], Node], args: Sequence[str] | None = None) -> int:
    """Run a node until SIGINT, SIGTERM or its own end; return the exit code.

    :param make: builds the node; it may set the given event to end the run
    :param args: command line, None for ``sys.argv``

    The node must have ``shutdown() -> int``, called once while ROS is still up, for its exit code. A
    :class:`NmpError` or a bad parameter becomes one line on stderr and exit code 2.
    """
    stop = threading.Event()
    if not rclpy.ok():
        _init(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    executor = SingleThreadedExecutor()
    node: Any = None
    try:
        node = make(stop)
        executor.add_node(node)
        forward_log(node)
        spinner = threading.Thread(target=_spin, args=(executor, stop), name="executor", daemon=True)
        spinner.start()
        stop.wait()
        _end_at_second_signal(time.monotonic() + SAME_SIGNAL_S)
        executor.shutdown(timeout_sec=5.0)
        spinner.join(timeout=5.0)
        return int(node.shutdown())
    except (NmpError, ParameterException) as exc:
        print(f"nmp: error: {' '.join(str(exc).split())}", file=sys.stderr)
        return 2
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()


def _end_at_second_signal(from_s: float) -> None:
    """Let a signal end the process, if it comes after a moment (monotonic clock): a shutdown that takes too long."""

    def end(number: int, _: Any) -> None:
        if time.monotonic() >= from_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def open_ros() -> Node:
    """Open ROS before there is a node to run, and return a hidden one by which DDS gets to know this process.

    The caller destroys it once the other is there.
    """
    _init(None)
    # It serves nothing: under SROS 2 the names of its services would be in no policy.
    return rclpy.create_node(
        f"_nmp_spare_{os.getpid()}",
        use_global_arguments=False,
        enable_rosout=False,
        start_parameter_services=False,
        parameter_overrides=[Parameter("start_type_description_service", value=False)],
    )


def _init(args: Sequence[str] | None) -> None:
    # Own handlers: rclpy's would tear ROS down before the node could say and save anything.
    rclpy.init(args=list(args) if args is not None else None, signal_handler_options=SignalHandlerOptions.NO)


class ToRos(logging.Handler):
    """Sends what the library logs, for instance of a damaged prior, on to a node's log and so to ``/rosout``."""

    def __init__(self, node: Node) -> None:
        super().__init__(logging.DEBUG)
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        # A line of its own for each: rclpy raises an error where a line changes its severity from call to call.
        if record.levelno >= logging.ERROR:
            self._logger.error(record.getMessage())
        elif record.levelno >= logging.WARNING:
            self._logger.warning(record.getMessage())
        else:
            self._logger.debug(record.getMessage())


def forward_log(node: Node) -> None:
    """Send what the library logs to a node's log: warnings and errors, and with ``--log-level debug`` everything."""
    log = logging.getLogger("nmp")
    log.addHandler(ToRos(node))
    log.setLevel(logging.DEBUG if node.get_logger().is_enabled_for(LoggingSeverity.DEBUG) else logging.WARNING)


def _spin(executor: SingleThreadedExecutor, stop: threading.Event) -> None:
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
    finally:
        stop.set()
