"""Turn a nuScenes scene into a rosbag2 (MCAP) with the topics that the mapping node listens to.

The images are the original JPEG bytes, and every image comes with the ego pose of its own moment: the true one, or
where the tables have ``ego_pose_estimate.json`` beside them, what the car believed it to be.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from nmp import topics
from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.geometry import Array

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types

BAG_VERSION: Final = 9
"""Version of the rosbag2 metadata; the newest that Jazzy reads."""

NS = 1_000
"""nanoseconds per nuScenes time unit (microseconds)"""


_ESTIMATE: Final = {"translation": (3,), "rotation": (4,), "covariance": (36,)}
"""columns of ego_pose_estimate.json and their shapes"""


@dataclass(frozen=True)
class Shot:
    """One camera image of a scene, as the tables describe it."""

    camera: str
    stamp_ns: int
    path: Path
    width: int
    height: int
    intrinsics: Array
    """[3, 3], pixels"""
    extrinsics: tuple[list[float], list[float]]
    """translation [x, y, z] (m) and rotation [x, y, z, w]: optical frame to base_link"""
    pose: tuple[list[float], list[float]]
    """translation and rotation [x, y, z, w]: base_link to map"""
    covariance: Array | None = None
    """[36] of ``pose`` as in nav_msgs/Odometry, where the tables tell it"""
    true_pose: tuple[list[float], list[float]] | None = None
    """like ``pose``, where that is only what the car believed"""


def load_nuscenes(dataroot: Path, version: str) -> NuScenes:
    """Open a nuScenes folder with the official devkit; :class:`NmpError` says what is missing."""
    if not dataroot.is_dir():
        raise NmpError(f"nuScenes folder {dataroot} does not exist: give the one that holds 'samples' and '{version}'")
    if not (dataroot / version).is_dir():
        found = ", ".join(sorted(p.name for p in dataroot.glob("v1.0-*"))) or "none"
        raise NmpError(f"{dataroot} has no tables '{version}' (found: {found}): check --dataroot and --version")
    from nuscenes.nuscenes import NuScenes  # slow to import (matplotlib), so only where it is needed

    try:
        return NuScenes(version=version, dataroot=str(dataroot), verbose=False)
    except (OSError, AssertionError, JSONDecodeError, KeyError) as exc:
        reason = f"{type(exc).__name__}: {exc}".replace("\n", " ")
        raise NmpError(f"{dataroot / version} is not a complete nuScenes release ({reason}): unpack it again") from exc


def read_pose_estimates(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read ``ego_pose_estimate.json`` of a release: rows by ego_pose token, or None where there is no such file."""
    path = folder / "ego_pose_estimate.json"
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            counts = tuple(np.asarray(row[k], dtype=np.float64).shape for k in _ESTIMATE)
            if counts != tuple(_ESTIMATE.values()) or not all(np.isfinite(row[k]).all() for k in _ESTIMATE):
                raise ValueError(f"row {row['token']} has not 3, 4 and 36 finite numbers")
        return {row["token"]: row for row in rows}
    except (OSError, JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as exc:
        reason = f"{type(exc).__name__}: {exc}".replace("\n", " ")
        raise NmpError(
            f"{path} is no file of pose estimates ({reason}): make the data set again, or use --true-poses"
        ) from exc


@functools.lru_cache(maxsize=1)
def _estimates(folder: Path, _changed_ns: int) -> dict[str, dict[str, Any]] | None:
    """Read once for all scenes of a release, and again when the file was written anew."""
    return read_pose_estimates(folder)


def scene_shots(
    nusc: NuScenes, scene_name: str, *, sweeps: bool = False, true_poses: bool = False
) -> tuple[str, list[Shot]]:
    """Return the location of a scene and its camera images in time order.

    Keyframes (2 Hz) only, or with ``sweeps`` every image (12 Hz). Poses are those that the car believed in, where the
    release has ``ego_pose_estimate.json`` and not ``true_poses``. Raises :class:`NmpError` on an unknown scene, a
    missing image file or a missing estimate.
    """
    scene = next((s for s in nusc.scene if s["name"] == scene_name), None)
    if scene is None:
        names = sorted(s["name"] for s in nusc.scene)
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise NmpError(f"scene '{scene_name}' is not in {nusc.dataroot} {nusc.version}: choose from {shown or 'none'}")
    location = nusc.get("log", scene["log_token"])["location"]

    records: list[dict[str, Any]] = []
    token = scene["first_sample_token"]
    first = nusc.get("sample", token)
    while token:
        sample = nusc.get("sample", token)
        if not sweeps:
            records += [nusc.get("sample_data", t) for c, t in sample["data"].items() if c.lower() in CAMERAS]
        token = sample["next"]
    if sweeps:
        for channel, token in first["data"].items():
            while token and channel.lower() in CAMERAS:
                records.append(nusc.get("sample_data", token))
                token = records[-1]["next"]

    folder = Path(nusc.dataroot) / nusc.version
    path = folder / "ego_pose_estimate.json"
    estimates = None if true_poses or not path.is_file() else _estimates(folder, path.stat().st_mtime_ns)
    if estimates is not None and (unknown := [t for r in records if (t := r["ego_pose_token"]) not in estimates]):
        raise NmpError(
            f"{folder / 'ego_pose_estimate.json'} has no estimate of ego pose {unknown[0]} (one of {len(unknown)}): "
            "make the data set again, or use --true-poses"
        )
    shots = [_shot(nusc, record, estimates and estimates[record["ego_pose_token"]]) for record in records]
    if missing := sorted({*CAMERAS} - {s.camera for s in shots}):
        raise NmpError(f"scene '{scene_name}' has no images of {', '.join(missing)}: all six cameras are needed")
    if lost := [s.path for s in shots if not s.path.is_file()]:
        raise NmpError(f"image {lost[0]} is missing (one of {len(lost)}): unpack the camera files of this scene")
    return location, sorted(shots, key=lambda s: (s.stamp_ns, CAMERAS.index(s.camera)))


def _shot(nusc: NuScenes, record: dict[str, Any], estimate: dict[str, Any] | None) -> Shot:
    calibration = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
    truth = _xyz_xyzw(nusc.get("ego_pose", record["ego_pose_token"]))
    return Shot(
        camera=record["channel"].lower(),
        stamp_ns=int(record["timestamp"]) * NS,
        path=Path(nusc.dataroot) / record["filename"],
        width=int(record["width"]),
        height=int(record["height"]),
        intrinsics=np.asarray(calibration["camera_intrinsic"], dtype=np.float64),
        extrinsics=_xyz_xyzw(calibration),
        pose=truth if estimate is None else _xyz_xyzw(estimate),
        covariance=None if estimate is None else np.asarray(estimate["covariance"], dtype=np.float64),
        true_pose=None if estimate is None else truth,
    )


def _xyz_xyzw(record: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Translation and rotation of a record; nuScenes writes quaternions as [w, x, y, z], ROS as [x, y, z, w]."""
    w, x, y, z = (float(v) for v in record["rotation"])
    return [float(v) for v in record["translation"]], [x, y, z, w]


# ---------------------------------------------------------------------------------------------------- messages


def _header(stamp_ns: int, frame_id: str) -> Any:
    stamp = TYPES["builtin_interfaces/msg/Time"](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return TYPES["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _vector(values: Sequence[float]) -> Any:
    return TYPES["geometry_msgs/msg/Vector3"](*(float(v) for v in values))


def _quaternion(xyzw: Sequence[float]) -> Any:
    return TYPES["geometry_msgs/msg/Quaternion"](*(float(v) for v in xyzw))


def _transform(stamp_ns: int, parent: str, child: str, xyz: Sequence[float], xyzw: Sequence[float]) -> Any:
    return TYPES["geometry_msgs/msg/TransformStamped"](
        header=_header(stamp_ns, parent),
        child_frame_id=child,
        transform=TYPES["geometry_msgs/msg/Transform"](translation=_vector(xyz), rotation=_quaternion(xyzw)),
    )


def _static_transforms(stamp_ns: int, shots: Sequence[Shot]) -> Any:
    rig = {s.camera: s.extrinsics for s in reversed(shots)}
    out = [_transform(stamp_ns, topics.MAP_FRAME, topics.ODOM_FRAME, [0, 0, 0], [0, 0, 0, 1])]
    out += [_transform(stamp_ns, topics.BASE_FRAME, topics.optical_frame(c), *rig[c]) for c in CAMERAS]
    return TYPES["tf2_msgs/msg/TFMessage"](transforms=out)


def _compressed_image(shot: Shot) -> Any:
    return TYPES["sensor_msgs/msg/CompressedImage"](
        header=_header(shot.stamp_ns, topics.optical_frame(shot.camera)),
        format="jpeg",
        data=np.frombuffer(shot.path.read_bytes(), dtype=np.uint8),
    )


def _camera_info(shot: Shot) -> Any:
    # nuScenes images are rectified: no distortion is left, and the projection is the intrinsic matrix.
    return TYPES["sensor_msgs/msg/CameraInfo"](
        header=_header(shot.stamp_ns, topics.optical_frame(shot.camera)),
        height=shot.height,
        width=shot.width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=shot.intrinsics.reshape(9),
        r=np.eye(3).reshape(9),
        p=np.hstack([shot.intrinsics, np.zeros((3, 1))]).reshape(12),
        binning_x=0,
        binning_y=0,
        roi=TYPES["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False),
    )


def _velocities(shots: Sequence[Shot], half_window: float = 0.1) -> Array:
    """Return [N, 3] forward and sideways speed (m/s) and yaw rate (rad/s) in base_link, by finite differences.

    Differences over a window: neighbouring poses are only milliseconds apart, and would mostly show noise.
    """
    seconds = np.array([(s.stamp_ns - shots[0].stamp_ns) * 1e-9 for s in shots])
    x, y, z, w = np.array([s.pose[1] for s in shots]).T
    yaw = np.unwrap(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
    states = np.column_stack([np.array([s.pose[0][:2] for s in shots]), yaw])
    late, early = np.minimum(seconds + half_window, seconds[-1]), np.maximum(seconds - half_window, seconds[0])
    moved = np.column_stack([np.interp(late, seconds, c) - np.interp(early, seconds, c) for c in states.T])
    rate = moved / np.maximum(late - early, 1e-3)[:, None]
    forward = rate[:, 0] * np.cos(yaw) + rate[:, 1] * np.sin(yaw)
    sideways = -rate[:, 0] * np.sin(yaw) + rate[:, 1] * np.cos(yaw)
    return np.column_stack([forward, sideways, rate[:, 2]])


def _odometry(shot: Shot, velocity: Array, covariance: Array) -> Any:
    t = TYPES
    xyz, xyzw = shot.pose
    pose = t["geometry_msgs/msg/Pose"](position=t["geometry_msgs/msg/Point"](*xyz), orientation=_quaternion(xyzw))
    twist = t["geometry_msgs/msg/Twist"](
        linear=_vector([velocity[0], velocity[1], 0.0]), angular=_vector([0.0, 0.0, velocity[2]])
    )
    return t["nav_msgs/msg/Odometry"](
        header=_header(shot.stamp_ns, topics.MAP_FRAME),
        child_frame_id=topics.BASE_FRAME,
        pose=t["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=covariance),
        twist=t["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=np.zeros(36)),
    )


# ----------------------------------------------------------------------------------------------------- writing


def offered_qos(qos: topics.TopicQos) -> Qos:
    """Return the quality of service in the form in which a bag stores it."""
    infinite = QosTime(9223372036, 854775807)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=qos.depth,
        reliability=QosReliability.RELIABLE if qos.reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if qos.latched else QosDurability.VOLATILE,
        deadline=infinite,
        lifespan=infinite,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=infinite,
        avoid_ros_namespace_conventions=False,
    )


def write_bag(
    shots: Sequence[Shot], location: str, out: Path, *, position_std: float = 0.05, yaw_std: float = 0.005
) -> int:
    """Write camera images (in time order) with calibration and poses as a bag folder; return the message count.

    ``position_std`` (m) and ``yaw_std`` (rad) only fill the covariance of ``/odom`` where a shot brings none: the poses
    stay as they are. The log time of a message is its header stamp. The bag appears under its name only when it is
    complete. Raises :class:`NmpError` when ``out`` exists, cannot be written, or the disk is full.
    """
    if not shots:
        raise NmpError(f"no images to write to {out}: choose a scene with camera images")
    if out.exists():
        raise NmpError(f"{out} already exists: remove it or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The mcap file is named after its folder, so the temporary folder holds one of the final name.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as partial:
            part = Path(partial) / out.name
            count = _write(shots, location, part, np.diag([position_std**2] * 3 + [yaw_std**2] * 3).reshape(36))
            part.rename(out)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            size = sum(s.path.stat().st_size for s in shots if s.path.is_file()) / 1e6
            raise NmpError(f"disk full while writing {out}: free about {size:.0f} MB and run again") from exc
        raise NmpError(f"cannot write {out} ({exc.strerror or exc}): check the path and its permissions") from exc
    return count


def _write(shots: Sequence[Shot], location: str, path: Path, covariance: Array) -> int:
    with Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
        count = 0

        def channel(topic: str, msgtype: str, qos: topics.TopicQos) -> Callable[[int, Any], None]:
            connection: Connection = writer.add_connection(
                topics.absolute(topic), msgtype, typestore=STORE, offered_qos_profiles=[offered_qos(qos)]
            )

            def put(stamp_ns: int, message: Any) -> None:
                nonlocal count
                writer.write(connection, stamp_ns, STORE.serialize_cdr(message, msgtype))
                count += 1

            return put

        out, latched = topics.SENSOR_OUT, topics.LATCHED
        put_static = channel(topics.TF_STATIC, "tf2_msgs/msg/TFMessage", latched)
        put_location = channel(topics.LOCATION, "std_msgs/msg/String", latched)
        put_odom = channel(topics.ODOM, "nav_msgs/msg/Odometry", out)
        put_tf = channel(topics.TF, "tf2_msgs/msg/TFMessage", out)
        put_info = {c: channel(topics.camera_info_topic(c), "sensor_msgs/msg/CameraInfo", out) for c in CAMERAS}
        put_image = {c: channel(topics.image_topic(c), "sensor_msgs/msg/CompressedImage", out) for c in CAMERAS}

        start = shots[0].stamp_ns
        put_static(start, _static_transforms(start, shots))
        put_location(start, TYPES["std_msgs/msg/String"](data=location))
        last_pose = -1
        progress = tqdm(shots, desc=path.name, unit="img", disable=None)
        for shot, velocity in zip(progress, _velocities(shots), strict=True):
            stamp = shot.stamp_ns
            if stamp != last_pose:  # two cameras may share a moment, and then its pose
                put_odom(stamp, _odometry(shot, velocity, covariance if shot.covariance is None else shot.covariance))
                moved = _transform(stamp, topics.ODOM_FRAME, topics.BASE_FRAME, *shot.pose)
                put_tf(stamp, TYPES["tf2_msgs/msg/TFMessage"](transforms=[moved]))
                last_pose = stamp
            put_info[shot.camera](stamp, _camera_info(shot))
            put_image[shot.camera](stamp, _compressed_image(shot))
        return count


def convert(
    dataroot: Path,
    version: str,
    scene: str,
    out: Path,
    *,
    sweeps: bool = False,
    position_std: float = 0.05,
    yaw_std: float = 0.005,
    true_poses: bool = False,
) -> int:
    """Write one nuScenes scene as a bag folder ``out``; return the number of messages.

    Poses as in :func:`scene_shots`. Raises :class:`NmpError` on anything that the user can put right.
    """
    if out.exists():  # before the slow loading of the tables
        raise NmpError(f"{out} already exists: remove it or choose another --out")
    location, shots = scene_shots(load_nuscenes(dataroot, version), scene, sweeps=sweeps, true_poses=true_poses)
    return write_bag(shots, location, out, position_std=position_std, yaw_std=yaw_std)


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp bag``."""
    parser.add_argument("--dataroot", type=Path, required=True, help="nuScenes folder")
    parser.add_argument("--version", default="v1.0-mini", help="its tables (default: %(default)s)")
    parser.add_argument("--scene", required=True, help="for instance scene-0061")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bag to write; must not exist")
    parser.add_argument("--sweeps", action="store_true", help="every image (12 Hz) instead of keyframes (2 Hz)")
    parser.add_argument(
        "--true-poses",
        action="store_true",
        help="write the poses of ego_pose.json also where the tables have ego_pose_estimate.json; by default /odom and "
        "/tf then hold these estimates, each with its covariance, as a car knows its pose only so well",
    )
    deviation = "deviation told in /odom with true poses (default: %(default)s)"
    parser.add_argument("--pose-std", type=float, default=0.05, metavar="M", help=f"position {deviation}")
    parser.add_argument("--yaw-std", type=float, default=0.005, metavar="RAD", help=f"heading {deviation}")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp bag``."""
    count = convert(
        args.dataroot,
        args.version,
        args.scene,
        args.out,
        sweeps=args.sweeps,
        position_std=args.pose_std,
        yaw_std=args.yaw_std,
        true_poses=args.true_poses,
    )
    print(f"wrote {args.out}: {count} messages")
