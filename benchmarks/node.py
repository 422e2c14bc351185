"""Run player and mapping node as two processes over DDS, and measure what is lost, how late layers are, and memory.

    python benchmarks/node.py BAG --seconds 120 [--fast] [--rate 1.0] [--set min_cameras=5 ...] [--out node.json]

The bag is played in a loop, with ``--fast`` as six cameras at 12 Hz (benchmarks/fast_cameras.py). The node has the
parameters of config/cpu.yaml. A third process (benchmarks/listener.py) listens to all that the node publishes, or with
``--listen layers`` to the layers alone, so that the node makes neither vectors nor pictures. Prints
(and writes) JSON: images of the front camera and layers a second, keyframes that were asked for and lost, latency from
a frame's last message to its layers as the node counts it (s), median seconds of each stage, the share of ROS in them
(taking messages apart and layers out; DDS itself is not in it), what the listener saw ("outside": from the publication
of a frame's last message until its layers had come, DDS on both ways in it), CPU time of both processes (of one core),
the node's memory every 10 s and its slope without the first quarter (MB, MB an hour), and how busy the machine was with
other things (of all cores). Drops count every jump of the clock, also where no frame is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from fast_cameras import write_fast_bag

from nmp.nodes.loopback import PROFILE, loopback

NO_LOSS = ("clock jump", "node ended")
"""drops that come from playing in a loop, and from the end"""
ROS_STAGES = ("assembling", "publishing")
NO_WORK = ("transport", "waiting")
"""stages in which the node does nothing"""
MEMORY_EVERY_S = 10.0


def start(role: str, environment: dict[str, str], **parameters: Any) -> subprocess.Popen[bytes]:
    """Start a node of nmp with these parameters."""
    given = [a for name, value in parameters.items() for a in ("-p", f"{name}:={value}")]
    config = ["--params-file", str(PROFILE.with_name("cpu.yaml"))]
    command = [sys.executable, "-m", f"nmp.nodes.{role}_node", "--ros-args", "--log-level", "warn", *config, *given]
    return subprocess.Popen(command, env=environment)


def listen(environment: dict[str, str], out: Path, to: str) -> subprocess.Popen[bytes]:
    """Start somebody who listens to ``all`` or to the ``layers``, and writes what came to a file in the end."""
    command = [sys.executable, str(Path(__file__).with_name("listener.py")), str(out), to]
    return subprocess.Popen(command, env=environment)


def slope_mb_h(memory: list[tuple[float, float]]) -> float | None:
    """Return how fast memory grows, MB an hour, of (s, MB) without the first quarter; None of less than three."""
    rest = np.array(memory[len(memory) // 4 :])
    return round(float(np.polyfit(rest[:, 0], rest[:, 1], 1)[0]) * 3600.0, 2) if len(rest) > 2 else None


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """Return the resident memory of a process that runs (Linux)."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Return the CPU time that a process has used, s (Linux)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Return the CPU time that all processes have used since the machine was started, s (Linux)."""
    user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    return sum(int(ticks) for ticks in (user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK")


def measure(bag: Path, seconds: float, rate: float, extra: dict[str, str], fast: bool, to: str) -> dict[str, Any]:
    """Play a bag into a node for so long, and return what it counted; ``to``: what is listened to, all or layers."""
    environment = os.environ | {
        "ROS_DOMAIN_ID": str(random.SystemRandom().randint(1, 101)),
        **loopback({}),
    }
    with tempfile.TemporaryDirectory() as folder:
        if fast:
            write_fast_bag(bag, bag := Path(folder) / f"{bag.name}-12hz")
        stats = Path(folder) / "stats.json"
        node = start("mapping", environment, stats_file=stats, prior_dir=f"{folder}/prior", **extra)
        outside = Path(folder) / "outside.json"
        listener = listen(environment, outside, to)
        player = start("player", environment, bag=bag, rate=rate, loop="true", wait_for_subscribers=120.0)
        memory: list[tuple[float, float]] = []
        used: list[tuple[float, float, float, float]] = []
        try:
            time.sleep(10.0)  # the network is loaded meanwhile
            end = (begin := time.monotonic()) + seconds
            while time.monotonic() < end and node.poll() is None and player.poll() is None:
                if time.monotonic() - begin >= MEMORY_EVERY_S * len(memory):
                    memory.append((round(time.monotonic() - begin, 1), round(memory_mb(node), 1)))
                used.append((time.monotonic(), cpu_s(node), cpu_s(player), busy_s()))
                time.sleep(1.0)
        finally:
            for process in (player, node, listener):
                process.send_signal(signal.SIGINT)
                process.wait(40)
        counted: dict[str, Any] = json.loads(stats.read_text())
        heard: dict[str, Any] = json.loads(outside.read_text())
    stages = counted["stages_s"]
    work = sum(value for name, value in stages.items() if name not in NO_WORK)
    lost = counted["frames_received"] - counted["frames_answered"] - sum(counted["skips"].values())
    last, first = np.array(used[-1]), np.array(used[0])
    spent, of_node, of_player, in_all = last - first
    return {
        "bag": bag.name,
        "rate": rate,
        "seconds": seconds,
        "parameters": extra,
        **counted,
        "lost": lost,
        "keyframes_lost": sum(count for cause, count in counted["drops"].items() if cause not in NO_LOSS),
        "images_hz": round(counted["frames_received"] / counted["seconds"], 2),
        "layers_hz": round(counted["frames_answered"] / counted["seconds"], 2),
        "cpu_of_node": round(of_node / spent, 3),
        "cpu_of_player": round(of_player / spent, 3),
        "busy_with_others": round((in_all - of_node - of_player) / spent / (os.cpu_count() or 1), 3),
        "ros_share": round(sum(stages[name] for name in ROS_STAGES) / work, 4),
        "outside": heard,
        "memory_mb": memory,
        "memory_slope_mb_h": slope_mb_h(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--fast", action="store_true", help="six cameras at 12 Hz, keyframes as in the bag")
    parser.add_argument("--listen", choices=("all", "layers"), default="all", help="to what (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the node")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    extra = dict(s.split("=", 1) for s in args.set)
    text = json.dumps(measure(args.bag, args.seconds, args.rate, extra, args.fast, args.listen), indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
