"""Reading ROS messages without ROS: by attribute name, so those of rclpy and of rosbags both fit."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nmp.errors import NmpError
from nmp.frame import IMAGE_FORMATS
from nmp.geometry import Array, transform_from

NS = 1_000_000_000
"""nanoseconds per second"""
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
"""encodings of raw images, with the bytes of a pixel"""
_FROM = {
    "bgr8": cv2.COLOR_BGR2RGB,
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
}
STAMP_END = 12
"""bytes of a serialised message up to the end of the stamp of its header"""


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


def stamp_of_cdr(data: bytes) -> int:
    """Return the stamp (ns) of a serialised message that begins with a std_msgs/Header.

    It follows the four bytes that tell the encoding (OMG DDS-XTypes 1.3, 7.6.3.1.2; odd is little endian).
    """
    if len(data) < STAMP_END:
        raise NmpError(f"a message of {len(data)} bytes has no header")
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(sec) * NS + int(nanosec)


class Look(NamedTuple):
    """What was found out about an image without decoding it."""

    size: tuple[int, int]
    """width, height, pixels"""
    message: Any
    fault: tuple[str, str] | None = None
    """cause and text when it cannot be used; it then stands for the image that should have been"""


@dataclass(frozen=True)
class Picture:
    """A received image, looked at when a frame wants it: most images of a fast camera are in no frame."""

    topic: str
    stamp_ns: int
    fetch: Callable[[], Any]
    """gives the message"""

    @cached_property
    def look(self) -> Look:
        """What a first look says, taken once."""
        return look_at(self.topic, self.stamp_ns, self.fetch)


def look_at(topic: str, stamp: int, fetch: Callable[[], Any]) -> Look:
    """Look at a sensor_msgs/CompressedImage or Image: its size, and whether it can be whole."""
    try:
        msg = fetch()
    except Exception as exc:  # a middleware says in its own ways that bytes are no message
        text = f"{topic} at {seconds(stamp)}: this is no message ({exc}): check the camera driver"
        return Look((0, 0), None, ("bad image", text))
    if hasattr(msg, "encoding"):
        size, need = (int(msg.width), int(msg.height)), CHANNELS.get(msg.encoding, 0) * int(msg.width)
        fault = None
        if not need:
            known = ", ".join(CHANNELS)
            hint = "let image_proc debayer it" if msg.encoding.startswith("bayer") else f"publish one of {known}"
            fault = f"{topic}: encoding '{msg.encoding}' is not supported: {hint}"
        elif min(size) <= 0 or msg.step < need or len(msg.data) < msg.step * msg.height:
            fault = f"{topic}: {len(msg.data)} bytes do not hold {size[0]} x {size[1]} pixels: check the camera driver"
        return Look(size, msg, ("bad image", fault) if fault else None)
    try:
        data = bytes_of(msg)
        with Image.open(io.BytesIO(cast(bytes, data)), formats=IMAGE_FORMATS) as header:  # reads the header only
            size, kind = header.size, header.format
        if kind == "JPEG" and b"\xff\xd9" not in data[-1024:].tobytes():
            raise ValueError("its end is cut off")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as exc:
        reason = "neither JPEG nor PNG" if isinstance(exc, Image.UnidentifiedImageError) else " ".join(str(exc).split())
        text = f"{topic} at {seconds(stamp)}: {len(msg.data)} bytes are damaged ({reason}): check the camera driver"
        return Look((0, 0), None, ("bad image", text))
    return Look(size, msg)


def content(msg: Any) -> bytes | NDArray[np.uint8]:
    """Return the image of a message: encoded bytes, or decoded RGB [height, width, 3]."""
    data = bytes_of(msg)
    if not hasattr(msg, "encoding"):
        return data.tobytes()
    # Not by imgmsg_to_cv2 of cv_bridge: the one of its wheel takes padded rows for pixels.
    rows = data[: msg.step * msg.height].reshape(msg.height, msg.step)
    channels = CHANNELS[msg.encoding]
    pixels = rows[:, : channels * msg.width].reshape(msg.height, msg.width, channels)
    if msg.encoding == "rgb8":
        return np.ascontiguousarray(pixels)
    return _to_rgb()(pixels[..., 0] if channels == 1 else pixels, msg.encoding)


@cache
def _to_rgb() -> Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]:
    """Return what turns pixels of an encoding into RGB: cv_bridge where ROS is, OpenCV alone gives the same."""
    try:
        from cv_bridge.boost.cv_bridge_boost import cvtColor2
    except ImportError:
        return lambda pixels, encoding: cast("NDArray[np.uint8]", cv2.cvtColor(pixels, _FROM[encoding]))
    return lambda pixels, encoding: cast("NDArray[np.uint8]", cvtColor2(pixels, encoding, "rgb8"))
