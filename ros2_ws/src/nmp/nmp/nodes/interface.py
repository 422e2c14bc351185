"""The topics and services of ``mapping_node`` as data, for docs/node.md. Nothing here imports ROS."""

from __future__ import annotations

from dataclasses import dataclass

from nmp import topics
from nmp.frame import CAMERAS, CLASSES


@dataclass(frozen=True)
class Topic:
    """A topic: its name (relative, or private with ~), message type, and what is on it."""

    name: str
    type: str
    description: str
    latched: bool = False


@dataclass(frozen=True)
class Service:
    """A service, and what it is for; its type says the rest."""

    name: str
    type: str
    description: str


def inputs(transport: str = "compressed", pose_type: str = "odometry") -> tuple[Topic, ...]:
    """Return what the node listens to with the default camera names."""
    image = "sensor_msgs/msg/CompressedImage" if transport == "compressed" else "sensor_msgs/msg/Image"
    pose = "nav_msgs/msg/Odometry" if pose_type == "odometry" else "geometry_msgs/msg/PoseWithCovarianceStamped"
    cameras = []
    for name in CAMERAS:
        cameras.append(Topic(topics.image_topic(name, transport), image, "the camera's images, rectified"))
        cameras.append(
            Topic(topics.camera_info_topic(name), "sensor_msgs/msg/CameraInfo", "calibration of the image as sent")
        )
    return (
        *cameras,
        Topic(topics.ODOM, pose, f"pose of {topics.BASE_FRAME} in {topics.MAP_FRAME}, with covariance"),
        Topic(topics.TF_STATIC, "tf2_msgs/msg/TFMessage", "mounting of the cameras, unless extrinsics_file", True),
        Topic(topics.LOCATION, "std_msgs/msg/String", "the city, unless the parameter location names it", True),
    )


OUTPUTS = (
    *(
        Topic(topics.layer_topic(name), "nav_msgs/msg/OccupancyGrid", f"{name}: 0 to 100 %, -1 where never seen", True)
        for name in CLASSES
    ),
    *(
        Topic(
            topics.city_topic(name), "nav_msgs/msg/OccupancyGrid", f"{name}, all that this run has seen; coarse", True
        )
        for name in CLASSES
    ),
    Topic(topics.MAPPED_LOCATION, "std_msgs/msg/String", "the city that the layers are of", True),
    Topic(topics.VECTORS, "visualization_msgs/msg/MarkerArray", "elements around the car, with lasting ids", True),
    Topic(
        topics.FOOTPRINT, "geometry_msgs/msg/PolygonStamped", "the car where the layers have it, nose in front", True
    ),
    Topic(topics.BEV, "sensor_msgs/msg/Image", "the layers as a picture, for looking"),
    Topic(topics.DIAGNOSTICS, "diagnostic_msgs/msg/DiagnosticArray", "once a second, in every state"),
)

SERVICES = (
    Service(topics.SAVE_PRIOR, "nmp_msgs/srv/SavePrior", "write the prior to disk now"),
    Service(topics.LOAD_PRIOR, "nmp_msgs/srv/LoadPrior", "the prior as it was after one of its drives"),
    Service(topics.EXPORT_PRIOR, "nmp_msgs/srv/ExportPrior", "all drives of a city into one file"),
    Service(topics.RESET, "nmp_msgs/srv/ResetMapping", "begin anew, and forget this drive if asked to"),
    Service(topics.PAUSE, "nmp_msgs/srv/PauseMapping", "hold mapping, or go on"),
)
