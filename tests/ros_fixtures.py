"""Nodes on real DDS topics within one test process, apart from everything else on the machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nmp.nodes.loopback import loopback

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ros2_ws" / "src" / "nmp"
os.environ.update(loopback(os.environ))

rclpy = pytest.importorskip("rclpy")

from rclpy.context import Context  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402


def free_domain() -> int:
    """A domain that no other test is likely to use."""
    return random.SystemRandom().randrange(20, 101)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Wait for a condition; False when it did not come true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


class Ros:
    """A context of its own with an executor that spins in the background."""

    def __init__(self) -> None:
        self.domain = free_domain()
        self.context = Context()
        rclpy.init(args=[], context=self.context, domain_id=self.domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.nodes: list[Node] = []
        self.stop = threading.Event()
        self._thread: threading.Thread | None = None

    def options(self, **parameters: Any) -> dict[str, Any]:
        """Keyword arguments for a node in this context with these parameters."""
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        return {"context": self.context, "parameter_overrides": overrides}

    def add(self, node: Any) -> Any:
        self.nodes.append(node)
        self.executor.add_node(node)
        if self._thread is None:
            self._thread = threading.Thread(target=self._spin, daemon=True)
            self._thread.start()
        return node

    def _spin(self) -> None:
        # In slices: a node added while the executor sleeps is seen at once.
        while self.context.ok() and not self.stop.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def probe(self, name: str = "probe") -> Node:
        """A plain node to publish and listen with."""
        return self.add(Node(name, context=self.context))

    def close(self) -> None:
        self.stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self.executor.shutdown(timeout_sec=5)
        for node in self.nodes:
            node.destroy_node()
        rclpy.try_shutdown(context=self.context)


@contextmanager
def ros() -> Iterator[Ros]:
    world = Ros()
    try:
        yield world
    finally:
        world.close()


def node_process(code_or_module: str, *args: str, domain: int | None = None) -> subprocess.Popen[str]:
    """Start a node as users do, in a process of its own; a text with blanks is Python code to run."""
    env = dict(os.environ, ROS_DOMAIN_ID=str(domain or free_domain()), PYTHONPATH=f"{PACKAGE}:{ROOT}")
    how = ["-c", code_or_module] if " " in code_or_module else ["-m", code_or_module]
    return subprocess.Popen(
        [sys.executable, *how, *args], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
