"""A bag whose cameras run at 12 Hz, made of one with keyframes only: what lies between is shown again, later.

Between two keyframes every camera sends the image of the keyframe before once more, with a stamp and a pose of its own
(the pose between the two). The load is that of twelve images a second; what is mapped of them is only good for timing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from scipy.spatial.transform import Rotation, Slerp

from nmp import topics
from nmp.bags.nuscenes_to_bag import BAG_VERSION, STORE, offered_qos
from nmp.bags.reader import BagMessage, BagReader
from nmp.messages import NS

SWEEPS = 6
"""images of a camera from one keyframe to the next, as in nuScenes"""


def write_fast_bag(bag: Path, out: Path) -> int:
    """Write the bag with images between the keyframes; return how many keyframes it has."""
    with BagReader(bag) as reader:
        kinds = reader.topics
        messages = list(reader.messages())
    odometry = [m for m in messages if m.topic == topics.absolute(topics.ODOM)]
    added: list[BagMessage] = []
    for name, kind in kinds.items():
        if "image_raw" in name or "camera_info" in name:
            for first, second in pairwise(m for m in messages if m.topic == name):
                added += [_later(first, t) for t in _between(first.stamp_ns, second.stamp_ns)]
        elif kind.msgtype == "nav_msgs/msg/Odometry":
            # One pose an image: six cameras, so the pose six messages on is that of the same camera.
            for first, second in zip(odometry, odometry[SWEEPS:], strict=False):
                times = _between(first.stamp_ns, second.stamp_ns)
                added += [_moved(first, second, (i + 1) / SWEEPS, t) for i, t in enumerate(times)]
    with Writer(out, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
        written = {
            name: writer.add_connection(
                name, kind.msgtype, typestore=STORE, offered_qos_profiles=[offered_qos(kind.qos)]
            )
            for name, kind in kinds.items()
        }
        # An image goes after the pose and the calibration of its moment, as in every bag of nmp.
        for m in sorted(messages + added, key=lambda m: (m.stamp_ns, "image_raw" in m.topic)):
            writer.write(written[m.topic], m.stamp_ns, STORE.serialize_cdr(m.message, kinds[m.topic].msgtype))
    return max(kind.count for name, kind in kinds.items() if "cam_front/image_raw" in name)


def _between(first_ns: int, second_ns: int) -> Iterator[int]:
    step = (second_ns - first_ns) / SWEEPS
    return (first_ns + round(i * step) for i in range(1, SWEEPS))


def _later(message: BagMessage, stamp_ns: int) -> BagMessage:
    new = copy.copy(message.message)
    object.__setattr__(new, "header", copy.deepcopy(new.header))
    new.header.stamp.sec, new.header.stamp.nanosec = divmod(stamp_ns, NS)
    return BagMessage(message.topic, stamp_ns, new)


def _moved(first: BagMessage, second: BagMessage, share: float, stamp_ns: int) -> BagMessage:
    new = _later(first, stamp_ns)
    object.__setattr__(new.message, "pose", copy.deepcopy(new.message.pose))
    before, after, pose = first.message.pose.pose, second.message.pose.pose, new.message.pose.pose
    for axis in "xyz":
        a, b = (float(getattr(p.position, axis)) for p in (before, after))
        setattr(pose.position, axis, a + share * (b - a))
    turn = Slerp([0.0, 1.0], Rotation.from_quat([_xyzw(before), _xyzw(after)]))(share).as_quat()
    for axis, value in zip("xyzw", turn, strict=True):
        setattr(pose.orientation, axis, float(value))
    return new


def _xyzw(pose: Any) -> np.ndarray:
    q = pose.orientation
    return np.array([q.x, q.y, q.z, q.w])
