"""Small made-up drives: camera images, bags and nuScenes folders that are quick to write and read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer
from scipy.spatial.transform import Rotation

from nmp import topics
from nmp.assembly import FrameAssembler
from nmp.bags.nuscenes_to_bag import STORE, Shot, offered_qos, write_bag
from nmp.bags.reader import BagMessage, BagReader
from nmp.frame import CAMERAS, Frame

REAL_FRAMES = Path(__file__).resolve().parents[1] / ".." / "shared" / "real" / "frames"
"""Two real keyframes, where somebody put them."""

WIDTH, HEIGHT = 160, 90
START_NS = 1_532_402_927_000_000_000
LOCATION = "singapore-onenorth"
OFFSETS_MS = dict(zip(CAMERAS, (8, 16, 24, 33, 42, 0), strict=True))
"""When each camera fires within a turn of the LIDAR, as in nuScenes."""
HEADINGS = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55), strict=True))


def jpeg(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A small picture that compresses like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def camera_rig(name: str) -> tuple[list[float], list[float]]:
    """Translation and rotation [x, y, z, w] of a camera: optical frame to base_link."""
    optical = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    turned = Rotation.from_euler("z", HEADINGS[name], degrees=True)
    q = (turned * optical).as_quat()
    return [float(v) for v in turned.apply([0.8, 0.0, 0.0]) + [0.9, 0.0, 1.5]], [float(v) for v in q]


def ego(seconds: float) -> tuple[list[float], list[float]]:
    """The car's pose: 8 m/s on a gentle left turn."""
    yaw = 0.3 + 0.05 * seconds
    x, y = 400 + 160 * (math.sin(yaw) - math.sin(0.3)), 1100 - 160 * (math.cos(yaw) - math.cos(0.3))
    return [x, y, 0.0], [0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)]


def make_shots(folder: Path, frames: int = 3, period: float = 0.5) -> list[Shot]:
    """Write the images of a drive and describe them, in time order."""
    folder.mkdir(parents=True, exist_ok=True)
    intrinsics = np.array([[100.0, 0, WIDTH / 2], [0, 100.0, HEIGHT / 2], [0, 0, 1]])
    shots = []
    for i in range(frames):
        for c, camera in enumerate(CAMERAS):
            seconds = i * period + OFFSETS_MS[camera] * 1e-3
            stamp = START_NS + round(seconds * 1e6) * 1000
            path = folder / f"{camera}__{stamp}.jpg"
            path.write_bytes(jpeg(seed=6 * i + c))
            shots.append(Shot(camera, stamp, path, WIDTH, HEIGHT, intrinsics, camera_rig(camera), ego(seconds)))
    return sorted(shots, key=lambda s: s.stamp_ns)


def make_bag(folder: Path, frames: int = 3, period: float = 0.5) -> Path:
    """Write a bag of a drive; keyframes at 2 Hz unless told otherwise."""
    out = folder / "drive"
    write_bag(make_shots(folder / "images", frames, period), LOCATION, out)
    return out


def bag_messages(bag: Path) -> list[BagMessage]:
    with BagReader(bag) as reader:
        return list(reader.messages())


def feed(assembler: FrameAssembler, messages: list[BagMessage]) -> Iterator[Frame]:
    """Put messages into an assembler as the nodes do, and yield the frames as they come out."""
    takers: dict[str, Callable[[Any], None]] = {
        topics.TF_STATIC: assembler.add_static_transforms,
        topics.absolute(topics.ODOM): assembler.add_pose,
        topics.absolute(topics.LOCATION): lambda m: assembler.set_location(m.data),
    }
    for name in CAMERAS:
        info, image = topics.camera_info_topic(name), topics.image_topic(name)
        takers[topics.absolute(info)] = lambda m, name=name: assembler.add_camera_info(name, m)  # type: ignore[misc]
        takers[topics.absolute(image)] = lambda m, name=name: assembler.add_image(name, m)  # type: ignore[misc]
    for message in messages:
        if message.topic in takers:
            takers[message.topic](message.message)
            yield from assembler.pop_frames()


def make_nuscenes(root: Path, keyframes: int = 2, sweeps: int = 1, scene: str = "scene-0001") -> Path:
    """Write a nuScenes folder with one scene, six cameras and ``sweeps`` images between keyframes; no LIDAR."""
    tables: dict[str, list[dict[str, Any]]] = {t: [] for t in ("category", "attribute", "visibility", "instance")}
    for t in ("sensor", "calibrated_sensor", "ego_pose", "sample", "sample_data", "sample_annotation"):
        tables[t] = []
    tables["log"] = [{"token": "log", "logfile": "n", "vehicle": "n", "date_captured": "", "location": LOCATION}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/m.png"}]
    tables["scene"] = [
        {
            "token": "scene",
            "log_token": "log",
            "nbr_samples": keyframes,
            "first_sample_token": "sample0",
            "last_sample_token": f"sample{keyframes - 1}",
            "name": scene,
            "description": "",
        }
    ]
    for k in range(keyframes):
        after = f"sample{k + 1}" if k + 1 < keyframes else ""
        before = f"sample{k - 1}" if k else ""
        stamp = (START_NS + k * 500_000_000) // 1000
        tables["sample"].append(
            {"token": f"sample{k}", "timestamp": stamp, "prev": before, "next": after, "scene_token": "scene"}
        )
    (root / "maps").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "maps" / "m.png")

    images = (keyframes - 1) * (sweeps + 1) + 1
    for camera in CAMERAS:
        channel, (xyz, (x, y, z, w)) = camera.upper(), camera_rig(camera)
        tables["sensor"].append({"token": camera, "channel": channel, "modality": "camera"})
        tables["calibrated_sensor"].append(
            {
                "token": f"calibration-{camera}",
                "sensor_token": camera,
                "translation": xyz,
                "rotation": [w, x, y, z],
                "camera_intrinsic": [[100.0, 0, WIDTH / 2], [0, 100.0, HEIGHT / 2], [0, 0, 1]],
            }
        )
        for i in range(images):
            is_key = i % (sweeps + 1) == 0
            seconds = i * 0.5 / (sweeps + 1) + OFFSETS_MS[camera] * 1e-3
            stamp = (START_NS + round(seconds * 1e9)) // 1000
            name = f"{'samples' if is_key else 'sweeps'}/{channel}/{channel}__{stamp}.jpg"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(jpeg(seed=i))
            here, (x, y, z, w) = ego(seconds)
            token = f"{camera}-{i}"
            tables["ego_pose"].append(
                {"token": f"ego-{token}", "timestamp": stamp, "rotation": [w, x, y, z], "translation": here}
            )
            tables["sample_data"].append(
                {
                    "token": token,
                    "sample_token": f"sample{min(round(i / (sweeps + 1)), keyframes - 1)}",
                    "ego_pose_token": f"ego-{token}",
                    "calibrated_sensor_token": f"calibration-{camera}",
                    "timestamp": stamp,
                    "fileformat": "jpg",
                    "is_key_frame": is_key,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "filename": name,
                    "prev": f"{camera}-{i - 1}" if i else "",
                    "next": f"{camera}-{i + 1}" if i + 1 < images else "",
                }
            )
    (root / "v1.0-mini").mkdir()
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return root


def write_messages(path: Path, messages: list[BagMessage]) -> Path:
    """Write messages, for instance spoiled ones, as a bag; latched topics stay latched."""
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, stamp, message in messages:
            kind = message.__msgtype__
            if topic not in connections:
                latched = topic in (topics.TF_STATIC, topics.absolute(topics.LOCATION))
                qos = offered_qos(topics.LATCHED if latched else topics.SENSOR_OUT)
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE, offered_qos_profiles=[qos])
            writer.write(connections[topic], stamp, STORE.serialize_cdr(message, kind))
    return path
