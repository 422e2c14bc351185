"""Topic names and their quality of service: the one place where they are written down.

Names are relative, so a launch file may push a namespace or remap them; in a bag they carry a leading
slash (:func:`absolute`). Nothing here imports ROS: nodes turn a :class:`TopicQos` into a QoSProfile, bags
into metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmp.frame import CAMERAS

ODOM = "odom"
"""nav_msgs/Odometry: pose of ``base_link`` in ``map``, with covariance."""
TF = "/tf"
TF_STATIC = "/tf_static"
"""tf2_msgs/TFMessage: among others the camera extrinsics, ``base_link`` to ``<camera>_optical_frame``."""
LOCATION = "location"
"""std_msgs/String, latched: the nuScenes location, which names the map frame and the prior."""
MAPPED_LOCATION = "~/location"
"""std_msgs/String, latched: the location that the layers are of, for who comes after its first announcer has gone."""
DIAGNOSTICS = "/diagnostics"
CLOCK = "/clock"
BEV = "~/bev"
"""sensor_msgs/Image: the layers as a picture, for looking."""
VECTORS = "~/vectors"
"""visualization_msgs/MarkerArray, latched: the elements around the car, with lasting ids."""
FOOTPRINT = "~/footprint"
"""geometry_msgs/PolygonStamped, latched: where the car stands in the layers, for looking."""
SAVE_PRIOR = "~/save_prior"
LOAD_PRIOR = "~/load_prior"
EXPORT_PRIOR = "~/export_prior"
RESET = "~/reset"
PAUSE = "~/pause"

MAP_FRAME = "map"
ODOM_FRAME = "odom"
BASE_FRAME = "base_link"


@dataclass(frozen=True)
class TopicQos:
    """Quality of service of a topic: keep-last ``depth``, reliable or best effort, latched or not."""

    depth: int
    reliable: bool = True
    latched: bool = False
    """transient local: a late subscriber gets the last ``depth`` messages"""


LATCHED = TopicQos(depth=1, latched=True)
"""Layers, location and static transforms."""
SENSOR_IN = TopicQos(depth=30, reliable=False)
"""How sensors are subscribed to: a best-effort reader matches every publisher, a reliable one does not. Deep enough for
2.5 s at 12 Hz in which nobody reads, as on a computer that others keep busy. With a depth of 10 that was 0.8 s, or a
tenth of it in a bag played at ten times its speed: a camera then lost several images in a row, which no neighbour makes
good, and so a keyframe. Full, with images of 200 kB, the queues of six cameras hold 36 MB."""
RAW_IN = TopicQos(depth=10, reliable=False)
"""Raw images are twenty times as large: 0.8 s of them at 12 Hz take 260 MB."""
POSE_IN = TopicQos(depth=500, reliable=False)
"""Poses are small and fast: deep enough for as long at 200 Hz."""
SENSOR_OUT = TopicQos(depth=20)
"""How recorded sensors are offered: a reliable writer serves every subscriber."""
PICTURE = TopicQos(depth=2, reliable=False)
"""Pictures for looking: a lost one does not matter."""


def image_topic(camera: str, transport: str = "compressed") -> str:
    """Return the image topic of a camera; ``transport`` is "compressed" or "raw"."""
    return f"{camera}/image_raw/compressed" if transport == "compressed" else f"{camera}/image_raw"


def image_qos(transport: str) -> TopicQos:
    """Return how images are subscribed to."""
    return SENSOR_IN if transport == "compressed" else RAW_IN


def camera_info_topic(camera: str) -> str:
    """Return the calibration topic of a camera."""
    return f"{camera}/camera_info"


def layer_topic(name: str) -> str:
    """Return the (private) topic of a layer, for instance ``~/layers/divider``."""
    return f"~/layers/{name}"


def city_topic(name: str) -> str:
    """Return the (private) topic of a layer of the whole city, for instance ``~/city/divider``."""
    return f"~/city/{name}"


def optical_frame(camera: str) -> str:
    """Return the TF frame of a camera: x right, y down, z forward."""
    return f"{camera}_optical_frame"


def absolute(topic: str) -> str:
    """Return a relative topic name as it stands in a bag recorded without a namespace."""
    return topic if topic.startswith("/") else f"/{topic}"


def required_inputs(transport: str = "compressed") -> tuple[str, ...]:
    """Return the relative names of every topic without which no frame can be answered."""
    cameras = [t for c in CAMERAS for t in (image_topic(c, transport), camera_info_topic(c))]
    return (*cameras, ODOM, TF_STATIC, LOCATION)
