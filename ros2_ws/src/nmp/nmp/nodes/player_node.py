"""Replays a bag on its topics, with its timing; what ``ros2 bag play`` does, where that is missing."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rosgraph_msgs.msg import Clock
from std_srvs.srv import SetBool
from tqdm import tqdm

from nmp import topics
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.nodes.conversions import to_time
from nmp.nodes.parameters import PLAYER
from nmp.nodes.qos import profile
from nmp.nodes.runtime import run_node
from nmp.nodes.settings import declare

CLOCK_PERIOD = 0.025
"""time between two /clock messages, s of wall time"""
FAREWELL = 1.0
"""from the last message to the end of the process, s: what others have not fetched by then from the memory that it
shares with them is lost, and best-effort readers, as those of sensors, acknowledge nothing that could be waited for"""
NS = 1e9


def message_class(msgtype: str) -> Any:
    """Return the class of a message type such as ``sensor_msgs/msg/Image``; ImportError when not installed."""
    package, _, name = msgtype.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except AttributeError as exc:
        raise ImportError(msgtype) from exc


class Timeline:
    """Bag time as a function of the wall clock: runs at a rate, can be held."""

    def __init__(self, rate: float, *, paused: bool = False) -> None:
        self.rate = rate
        self._wake = threading.Condition()
        self._paused = paused
        self._bag_s, self._wall_s = 0.0, time.monotonic()

    def start(self) -> None:
        """Set bag time to zero, now."""
        with self._wake:
            self._bag_s, self._wall_s = 0.0, time.monotonic()

    def now(self) -> float:
        """Return the bag time since the start, s."""
        with self._wake:
            return self._now()

    def _now(self) -> float:
        return self._bag_s if self._paused else self._bag_s + (time.monotonic() - self._wall_s) * self.rate

    def pause(self, paused: bool) -> None:
        """Hold bag time, or let it go on."""
        with self._wake:
            self._bag_s, self._wall_s, self._paused = self._now(), time.monotonic(), paused
            self._wake.notify_all()

    def wait_until(self, bag_s: float, at_most: float) -> bool:
        """Sleep until a bag time (s) or for ``at_most`` s of wall time; True when the bag time has come."""
        with self._wake:
            left = (bag_s - self._now()) / self.rate
            if left > 0 or self._paused:
                self._wake.wait(min(left, at_most) if not self._paused else at_most)
            return not self._paused and bag_s - self._now() <= 0


class PlayerNode(Node):
    """Publishes a bag's messages as they are, byte for byte."""

    def __init__(self, stop: threading.Event, **node_options: Any) -> None:
        super().__init__("player_node", **node_options)
        given = declare(self, PLAYER)
        path, self.loop, self.use_clock = given["bag"], given["loop"], given["clock"]
        self.patience, self.delay = given["wait_for_subscribers"], given["delay"]
        if not path:
            raise NmpError("parameter 'bag' is empty: name the bag to play (-p bag:=FOLDER)")
        self.reader = BagReader(Path(path).expanduser())
        self.stop = stop
        self.timeline = Timeline(given["rate"], paused=given["start_paused"])
        self.played = 0
        self.worst_lag_s = 0.0
        """longest delay of a message against its plan, s of wall time"""
        self.failure: NmpError | None = None
        self._over = False  # everything was played
        self.reader.__enter__()
        self._outputs: dict[str, Publisher] = {}
        for topic in self.reader.topics.values():
            try:
                kind = message_class(topic.msgtype)
            except ImportError:
                self.get_logger().warning(f"{topic.name} is left out: install the package of {topic.msgtype}")
                continue
            self._outputs[topic.name] = self.create_publisher(kind, topic.name, profile(topic.qos))
        if not self._outputs:
            raise NmpError(f"bag {path} has no topic that can be played: check that the message packages are installed")
        self._clock_output = self.create_publisher(Clock, topics.CLOCK, 10) if self.use_clock else None
        self.create_service(SetBool, "~/pause", self._on_pause)
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        self._thread.start()

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.timeline.pause(bool(request.data))
        response.success = True
        response.message = "paused" if request.data else "playing"
        return response

    def _run(self) -> None:
        try:
            self._wait_for_subscribers()
            self.stop.wait(self.delay)
            while not self.stop.is_set():
                self._play_once()
                if not self.loop:
                    self._over = not self.stop.is_set()
                    break
        except NmpError as exc:
            self.failure = exc
        finally:
            end = time.monotonic() + 2.0  # in all, also when a subscriber has died
            for publisher in self._outputs.values():
                publisher.wait_for_all_acked(Duration(seconds=max(end - time.monotonic(), 0.0)))
            self.stop.set()

    def _wait_for_subscribers(self) -> None:
        wanted = {topics.absolute(t) for t in (*topics.required_inputs(), *topics.required_inputs("raw"))}
        # Latched topics reach a late subscriber anyway, and not everybody needs them.
        waiting = [p for t, p in self._outputs.items() if t in wanted and not self.reader.topics[t].qos.latched]
        end = time.monotonic() + self.patience
        told = False
        while time.monotonic() < end and not self.stop.wait(0.05):
            waiting = [p for p in waiting if not p.get_subscription_count()]
            if not waiting:
                return
            if not told:
                self.get_logger().info(f"waiting up to {self.patience:g} s for subscribers")
                told = True
        if self.patience and waiting and not self.stop.is_set():
            names = ", ".join(sorted(p.topic_name for p in waiting))
            self.get_logger().warning(f"nobody subscribed within {self.patience:g} s to {names}: playing all the same")

    def _play_once(self) -> None:
        start, end = self.reader.start_ns, self.reader.end_ns
        bar = tqdm(total=(end - start) / NS, unit="s", unit_scale=True, desc=self.reader.path.name, disable=None)
        self.timeline.start()
        next_clock = 0.0
        with bar:
            for topic, stamp, data in self.reader.raw_messages(self._outputs):
                due = (stamp - start) / NS
                while not self.timeline.wait_until(due, at_most=CLOCK_PERIOD):
                    if self.stop.is_set():
                        return
                    next_clock = self._tick(start, due, next_clock)
                next_clock = self._tick(start, due, next_clock)
                self._outputs[topic].publish(data)
                self.played += 1
                self.worst_lag_s = max(self.worst_lag_s, (self.timeline.now() - due) / self.timeline.rate)
                bar.update(due - bar.n)

    def _tick(self, start_ns: int, due: float, next_clock: float) -> float:
        """Publish /clock when its time has come, never beyond the message that is due; return the next time."""
        now = time.monotonic()
        if self._clock_output is None or now < next_clock:
            return next_clock
        bag_ns = start_ns + int(min(self.timeline.now(), due) * NS)
        self._clock_output.publish(Clock(clock=to_time(bag_ns)))
        return now + CLOCK_PERIOD

    def shutdown(self) -> int:
        """End the playback and return the exit code."""
        self.stop.set()
        self._thread.join(timeout=10.0)
        if self._over:
            time.sleep(FAREWELL)
        self.reader.__exit__(None, None, None)
        if self.failure is not None:
            raise self.failure
        self.get_logger().info(f"played {self.played} messages, at most {self.worst_lag_s * 1e3:.1f} ms late")
        return 0


def main() -> None:
    """Entry point of ``ros2 run nmp player_node``."""
    sys.exit(run_node(PlayerNode))


if __name__ == "__main__":
    main()
