"""Reading ROS messages without ROS: by attribute name, so those of rclpy and of rosbags both fit."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nmp.geometry import Array, transform_from

NS = 1_000_000_000
"""nanoseconds per second"""


def stamp_ns(msg: Any) -> int:
    """Return the header stamp in ns."""
    return int(msg.header.stamp.sec) * NS + int(msg.header.stamp.nanosec)


def seconds(stamp: int) -> str:
    """Return a stamp (ns) as people read it in an error."""
    return f"{stamp / NS:.3f}"


def frame_id(msg: Any) -> str:
    """Return the header's frame without the leading slash of ROS 1 days."""
    return str(msg.header.frame_id).lstrip("/")


def transform_of(translation: Any, rotation: Any) -> Array:
    """Return the 4 x 4 transform of a Vector3 or Point and a Quaternion; :class:`NmpError` when not finite."""
    return transform_from(
        np.array([translation.x, translation.y, translation.z]),
        np.array([rotation.x, rotation.y, rotation.z, rotation.w]),
    )


def bytes_of(msg: Any) -> NDArray[np.uint8]:
    """Return the data of a message as an array, whatever kind of sequence it is; a view where possible."""
    data = msg.data
    if isinstance(data, list | tuple):
        return np.asarray(data, dtype=np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


@dataclass(frozen=True)
class Picture:
    """A received image that was looked at but not decoded."""

    stamp_ns: int
    size: tuple[int, int]
    """width, height, pixels"""
    message: Any
    fault: tuple[str, str] | None = None
    """cause and text when it cannot be used; it then stands for the image that should have been"""


def picture_of(topic: str, stamp: int, msg: Any) -> Picture:
    """Look at a sensor_msgs/CompressedImage or Image: its size, and whether it can be whole."""
    if hasattr(msg, "encoding"):
        size, need = (int(msg.width), int(msg.height)), 3 * int(msg.width)
        fault = None
        if msg.encoding not in ("rgb8", "bgr8"):
            fault = f"{topic}: encoding '{msg.encoding}' is not supported: publish rgb8 or bgr8"
        elif min(size) <= 0 or msg.step < need or len(msg.data) < msg.step * msg.height:
            fault = f"{topic}: {len(msg.data)} bytes do not hold {size[0]} x {size[1]} pixels: check the camera driver"
        return Picture(stamp, size, msg, ("bad image", fault) if fault else None)
    try:
        data = bytes_of(msg)
        with Image.open(io.BytesIO(cast(bytes, data))) as header:  # reads the header only
            size, kind = header.size, header.format
        if kind == "JPEG" and b"\xff\xd9" not in data[-1024:].tobytes():
            raise ValueError("its end is cut off")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as exc:
        reason = "not an image" if isinstance(exc, Image.UnidentifiedImageError) else " ".join(str(exc).split())
        text = f"{topic} at {seconds(stamp)}: {len(msg.data)} bytes are damaged ({reason}): check the camera driver"
        return Picture(stamp, (0, 0), None, ("bad image", text))
    return Picture(stamp, size, msg)


def content(msg: Any) -> bytes | NDArray[np.uint8]:
    """Return the image of a message: encoded bytes, or decoded RGB [height, width, 3]."""
    data = bytes_of(msg)
    if not hasattr(msg, "encoding"):
        return data.tobytes()
    rows = data[: msg.step * msg.height].reshape(msg.height, msg.step)
    pixels = rows[:, : 3 * msg.width].reshape(msg.height, msg.width, 3)
    if msg.encoding == "bgr8":
        return cast("NDArray[np.uint8]", cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return np.ascontiguousarray(pixels)
