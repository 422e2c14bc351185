"""One drive over DDS: player, mapping node and recorder, each a process of its own."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Child, Children

from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.nodes.loopback import loopback
from nmp.replay import keyframes_of

QUIET_S = 15.0
"""When the player is done and no layer has come for so long, none will."""


def environment() -> dict[str, str]:
    """Return the environment of the nodes: on this machine only, and apart from every other ROS on it."""
    return os.environ | {
        "ROS_DOMAIN_ID": str(random.SystemRandom().randint(1, 101)),
        **loopback({}),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True)
class Drive:
    """What a drive left behind."""

    name: str
    layers: Path
    keyframes: int
    """in the bag"""
    answered: int
    """layers that the recorder wrote"""
    statistics: dict[str, Any]
    """what the mapping node counted"""

    def to_json(self) -> dict[str, Any]:
        return {"keyframes": self.keyframes, "recorded": self.answered, **self.statistics}


def run_drive(
    children: Children,
    name: str,
    bag: Path,
    *,
    layers: Path,
    prior: Path,
    weights: Path | None,
    progress: Callable[[int, int], None],
) -> Drive:
    """Play a bag once, in real time, and wait until every keyframe is answered (or none more comes)."""
    with BagReader(bag) as reader:
        keyframes = keyframes_of(reader)
        seconds = (reader.end_ns - reader.start_ns) * 1e-9
    stats = children.logs / f"{name}-statistics.json"
    stats.unlink(missing_ok=True)
    recorder = _node(children, name, "recorder", out_dir=str(layers))
    mapper = _node(
        children, name, "mapping", prior_dir=str(prior), stats_file=str(stats), weights=str(weights) if weights else ""
    )
    player = _node(children, name, "player", bag=str(bag), wait_for_subscribers=60.0)

    deadline = time.monotonic() + 120.0 + seconds
    answered = -1
    quiet_since = time.monotonic()
    while True:
        for node in (mapper, recorder):
            if node.code is not None:
                raise node.failed()
        if player.code:
            raise player.failed()
        count = len(list(layers.glob("*.npz")))
        if count != answered or player.code is None:
            quiet_since = time.monotonic()
        if count != answered:
            answered = count
            progress(answered, keyframes)
        if answered >= keyframes and player.code is not None:
            break
        if time.monotonic() - quiet_since > QUIET_S:
            break
        if time.monotonic() > deadline:
            raise NmpError(f"{player.name} is still playing after {deadline - quiet_since:.0f} s: see {player.log}")
        time.sleep(0.1)
    for node in (mapper, recorder):
        if node.stop():
            raise node.failed()
    if not stats.is_file():
        raise NmpError(f"{mapper.name} left no statistics: see {mapper.log}")
    statistics = json.loads(stats.read_text())
    answered = len(list(layers.glob("*.npz")))
    if not answered:
        why = (
            "; ".join(f"{count} x {cause}" for cause, count in statistics.get("drops", {}).items())
            or "no frame was complete"
        )
        raise NmpError(f"no keyframe of {bag} was answered ({why}): see {mapper.log}")
    return Drive(name, layers, keyframes, answered, statistics)


def _node(children: Children, drive: str, role: str, **parameters: str | float | bool) -> Child:
    command = [sys.executable, "-m", f"nmp.nodes.{role}_node", "--ros-args"]
    for key, value in parameters.items():
        # The value is read as YAML: in quotes, a path stays text whatever it looks like.
        text = "'{}'".format(value.replace("'", "''")) if isinstance(value, str) else str(value).lower()
        command += ["-p", f"{key}:={text}"]
    return children.start(f"{drive}-{role}", command)
