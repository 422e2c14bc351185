"""Inject faults into one run of the mapping node, and measure how soon after each it is mapping again.

    python benchmarks/faults.py BAG [--hold 4] [--out faults.json]

A driver plays the bag in a loop with stamps that go on, in real time, and spoils what it publishes while a fault
lasts. Prints (and writes) JSON: for each fault the seconds from its end to the first layers of a later moment (for
kill -9: from the kill; the supervisor starts the node anew), what /diagnostics said at its worst, and whether what was
stored before is still there, by the cells that `nmp prior verify` finds whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nmp.nodes.loopback import loopback

DOMAIN = random.SystemRandom().randint(1, 101)
os.environ |= {
    "ROS_DOMAIN_ID": str(DOMAIN),
    **loopback({}),
}

import rclpy  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from nav_msgs.msg import OccupancyGrid  # noqa: E402
from nmp_msgs.srv import ResetMapping  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.serialization import deserialize_message  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.bags.reader import BagReader  # noqa: E402
from nmp.errors import NmpError  # noqa: E402
from nmp.nodes.conversions import to_ns, to_time  # noqa: E402
from nmp.nodes.player_node import message_class  # noqa: E402
from nmp.nodes.qos import profile  # noqa: E402
from nmp.prior import upkeep  # noqa: E402
from nmp.prior.ledger import Ledger  # noqa: E402
from nmp.prior.storage import Storage  # noqa: E402

Spoil = Callable[[str, Any], bool]
"""changes a message of a topic in place; False: it is not published"""
LAST_RESORT_S = 40.0


def as_it_is(topic: str, message: Any) -> bool:
    return True


class Driver(Node):
    """Publishes the bag for ever, and listens to what comes of it."""

    def __init__(self, bag: Path) -> None:
        super().__init__("driver")
        self.spoil: Spoil = as_it_is
        self.shift_ns = 0
        """added to every stamp"""
        self.moments: dict[int, float] = {}
        """stamps (ns) of front images, and when they were published (monotonic, s)"""
        self.layers: list[tuple[float, int]] = []
        """when layers came (monotonic, s), and their stamp (ns)"""
        self.said: list[tuple[bytes, str]] = []
        self._stop = threading.Event()
        with BagReader(bag) as reader:
            known = [t for t in reader.topics.values() if t.msgtype.split("/")[0] != "foxglove_msgs"]
            kinds = {t.name: message_class(t.msgtype) for t in known}
            self._messages = list(reader.raw_messages(list(kinds)))
            self._length_ns = reader.end_ns - reader.start_ns + 500_000_000
            self._publishers_by_topic = {
                t.name: self.create_publisher(kinds[t.name], t.name, profile(t.qos)) for t in known
            }
        self._kinds = kinds
        self.create_subscription(OccupancyGrid, "/mapping_node/layers/divider", self._on_layer, 10)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_report, 10)
        self._thread = threading.Thread(target=self._drive, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def locate(self, name: str = "") -> None:
        """Say that the car is in a city; in that of the bag unless one is named."""
        topic = topics.absolute(topics.LOCATION)
        said = next(deserialize_message(data, String) for t, _, data in self._messages if t == topic)
        self._publishers_by_topic[topic].publish(String(data=name) if name else said)

    def _on_layer(self, message: OccupancyGrid) -> None:
        self.layers.append((time.monotonic(), to_ns(message.header.stamp)))

    def _on_report(self, message: DiagnosticArray) -> None:
        self.said += [(s.level, s.message) for s in message.status]

    def _drive(self) -> None:
        begin, rounds = time.monotonic(), 0
        while not self._stop.is_set():
            first = self._messages[0][1]
            for topic, stamp, data in self._messages:
                due = begin + (stamp - first + rounds * self._length_ns) / 1e9
                if self._stop.wait(max(due - time.monotonic(), 0.0)):
                    return
                if rounds and topic in (topics.TF_STATIC, topics.absolute(topics.LOCATION)):
                    continue
                message = deserialize_message(data, self._kinds[topic])
                if hasattr(message, "header"):
                    now = to_ns(message.header.stamp) + rounds * self._length_ns + self.shift_ns
                    message.header.stamp = to_time(now)
                    if topic.startswith("/cam_front/image"):
                        self.moments[now] = time.monotonic()
                if self.spoil(topic, message):
                    self._publishers_by_topic[topic].publish(message)
            rounds += 1


class Bench:
    """The driver, the node's process, and the prior."""

    def __init__(self, bag: Path, folder: Path, hold_s: float) -> None:
        self.bag, self.folder, self.hold_s = bag, folder, hold_s
        self.prior = folder / "prior"
        rclpy.init()
        self.driver = Driver(bag)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.driver)
        threading.Thread(target=self.executor.spin, daemon=True).start()
        self.node = self.start_node()
        self.driver.start()
        self.recovered(time.monotonic())

    def start_node(self) -> subprocess.Popen[bytes]:
        parameters = {"prior_dir": self.prior, "flush_interval": 1.0, "min_cameras": 5, "device": "cpu"}
        given = [a for name, value in parameters.items() for a in ("-p", f"{name}:={value}")]
        log = ["--log-level", "fatal"]
        return subprocess.Popen([sys.executable, "-m", "nmp.nodes.supervisor", "--ros-args", *log, *given])

    @property
    def node_pid(self) -> int:
        """The process that maps: the child of the supervisor."""
        return int(Path(f"/proc/{self.node.pid}/task/{self.node.pid}/children").read_text().split()[0])

    def close(self) -> int:
        self.driver.end()
        self.node.send_signal(signal.SIGINT)
        code = self.node.wait(60)
        self.executor.shutdown()
        rclpy.shutdown()
        return code

    def recovered(self, since: float) -> float | None:
        """Wait for layers of a moment that was published after ``since`` (monotonic); return how long that took, s."""
        while time.monotonic() < since + LAST_RESORT_S:
            for came, stamp in list(self.driver.layers):
                if self.driver.moments.get(stamp, 0.0) > since:
                    return round(came - since, 2)
            time.sleep(0.02)
        return None

    def cells(self) -> int:
        """Cells of whole drives and tiles in the stored city; what is damaged does not count."""
        total = 0
        for city in self.prior.glob("*/city.json"):
            with contextlib.suppress(NmpError):
                ledger = Ledger.open(Storage(city.parent), read_only=True)
                for record in ledger.active():
                    total += sum(
                        int((c.evidence > 0).sum()) for c in ledger.load(record, upkeep.digests(record)).values()
                    )
        return total

    def commit(self) -> None:
        """End the drive, so that it counts as stored."""
        client = self.driver.create_client(ResetMapping, "/mapping_node/reset")
        client.wait_for_service(10.0)
        future = client.call_async(ResetMapping.Request())
        end = time.monotonic() + 15.0
        while not future.done() and time.monotonic() < end:
            time.sleep(0.05)

    def inject(self, name: str, fault: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
        self.commit()
        self.recovered(time.monotonic())
        stored = self.cells()
        before = len(self.driver.said)
        with fault:
            time.sleep(self.hold_s)
        ended = time.monotonic()
        seconds = self.recovered(ended)
        said = [text for level, text in sorted(self.driver.said[before:], key=lambda s: s[0]) if level != b"\x00"]
        out = {
            "fault": name,
            "mapping_again_s": seconds,
            "said": said[-1] if said else "",
            "cells_before": stored,
            "cells_after": self.cells(),
        }
        print(json.dumps(out), file=sys.stderr)
        return out

    # ------------------------------------------------------------------------------------------------------- faults

    @contextlib.contextmanager
    def spoiling(self, spoil: Spoil) -> Iterator[None]:
        self.driver.spoil = spoil
        try:
            yield
        finally:
            self.driver.spoil = as_it_is

    @contextlib.contextmanager
    def clock(self, seconds: float) -> Iterator[None]:
        """Stamps jump, and jump back."""
        self.driver.shift_ns += round(seconds * 1e9)
        try:
            yield
        finally:
            self.driver.shift_ns -= round(seconds * 1e9)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the node can grow (EFBIG, where a full disk says ENOSPC)."""
        pid = self.node_pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    @contextlib.contextmanager
    def full_from_the_beginning(self) -> Iterator[None]:
        """The disk is full when a drive begins in a city that is not stored yet. Layers must come all the same."""
        with self.full_disk():
            self.commit()  # the next frame is of another drive
            self.driver.locate("a-city-never-seen")
            begin = time.monotonic()
            yield
            if self.recovered(begin) is None:
                self.driver.said.append((b"\x03", "no layers while the disk was full"))
        self.driver.locate()

    @contextlib.contextmanager
    def corrupted(self) -> Iterator[None]:
        """A tile of a committed drive is overwritten, and put right at the end."""
        tile = max(self.prior.glob("*/drives/*/c/*/*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        files = [tile] if tile.is_file() else [p for p in tile.rglob("*") if p.is_file()]
        kept = {p: p.read_bytes() for p in files}
        for path, content in kept.items():
            path.write_bytes(bytes(len(content)))
        self.commit()  # so that it is read again
        try:
            yield
        finally:
            for path, content in kept.items():
                path.write_bytes(content)

    @contextlib.contextmanager
    def flood(self) -> Iterator[None]:
        """Two processes with a hundred subscriptions each to all that the node publishes."""
        code = "\n".join(
            (
                "import os, rclpy",
                "from nav_msgs.msg import OccupancyGrid",
                "from sensor_msgs.msg import Image",
                "rclpy.init()",
                "n = rclpy.create_node(f'flood{os.getpid()}')",
                "for i in range(50):",
                "    n.create_subscription(OccupancyGrid, '/mapping_node/layers/divider', lambda m: None, 10)",
                "    n.create_subscription(Image, '/mapping_node/bev', lambda m: None, 10)",
                "rclpy.spin(n)",
            )
        )
        many = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
        try:
            yield
        finally:
            for process in many:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        yield
        os.kill(self.node_pid, signal.SIGKILL)

    @contextlib.contextmanager
    def truncated(self) -> Iterator[None]:
        """A player of its own, in another domain, is given a bag that was cut in half."""
        copy = self.folder / "truncated"
        shutil.copytree(self.bag, copy)
        data = next(copy.glob("*.mcap"))
        os.truncate(data, data.stat().st_size // 2)
        command = [sys.executable, "-m", "nmp.nodes.player_node", "--ros-args", "-p", f"bag:={copy}"]
        settings = ["-p", "wait_for_subscribers:=0.0", "-p", "rate:=10.0"]
        other = os.environ | {"ROS_DOMAIN_ID": str(DOMAIN % 100 + 1)}
        player = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=60, env=other)
        self.driver.said.append((b"\x03", f"player_node, code {player.returncode}: {player.stderr.strip()[-300:]}"))
        yield


def faults(bench: Bench) -> Iterator[tuple[str, contextlib.AbstractContextManager[Any]]]:
    def no_camera(topic: str, message: Any) -> bool:
        return not topic.startswith("/cam_back/image")

    def no_front(topic: str, message: Any) -> bool:
        return not topic.startswith("/cam_front/image")

    def no_pose(topic: str, message: Any) -> bool:
        return topic != "/odom"

    def elsewhere(topic: str, message: Any) -> bool:
        if topic == "/odom":
            message.pose.pose.position.x += 30.0
        return True

    def wrong(topic: str, message: Any) -> bool:
        if topic == "/cam_back_left/camera_info":
            message.width //= 2
        return True

    yield "a camera lost and back", bench.spoiling(no_camera)
    yield "the front camera lost and back", bench.spoiling(no_front)
    yield "pose lost and back", bench.spoiling(no_pose)
    yield "clock an hour back, and forth", bench.clock(-3600.0)
    yield "clock an hour forth, and back", bench.clock(3600.0)
    yield "relocalisation: 30 m away, and back", bench.spoiling(elsewhere)
    yield "wrong calibration of a camera", bench.spoiling(wrong)
    yield "disk full", bench.full_disk()
    yield "disk full when a drive begins", bench.full_from_the_beginning()
    yield "a tile of the prior corrupted", bench.corrupted()
    yield "subscriber flood", bench.flood()
    yield "a truncated bag is played", bench.truncated()
    yield "kill -9", bench.killed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path)
    parser.add_argument("--hold", type=float, default=4.0, help="how long a fault lasts, s")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.bag, Path(folder), args.hold)
        found = [bench.inject(name, fault) for name, fault in faults(bench) if args.only in name]
        result = {"bag": args.bag.name, "hold_s": args.hold, "faults": found, "exit_code": bench.close()}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
