"""A recorded drive, opened for looking: its pictures, its way, its layers, each found when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nmp import topics
from nmp.bags.reader import BagMessage, BagReader
from nmp.errors import NmpError
from nmp.evaluation import CityMaps, nan_as_null
from nmp.frame import CAMERAS, CLASSES, LocalMap
from nmp.geometry import Array, BevGrid
from nmp.grids import from_occupancy_grids
from nmp.layers import layer_files, read_layer
from nmp.messages import content, frame_id, look_at, stamp_ns, transform_of
from nmp.metrics import IouMeter
from nmp.vectors.raster import FARTHEST_M
from nmp.view.find import Recording, layer_topics
from nmp.view.sink import Mounting, Note, Pose

JPEG_QUALITY = 85
_OVERLAP_NS = 2_000_000_000
"""layers may reach so far over the ends of their bag"""


@dataclass(frozen=True)
class Shot:
    """Where an image stands in the bag."""

    stamp_ns: int
    """of its header"""
    log_ns: int


@dataclass(frozen=True)
class Keyframe:
    """Layers on disk."""

    stamp_ns: int
    map_from_base: Array
    """[4, 4]"""
    grid: BevGrid
    path: Path | None
    """None where they are in the bag"""
    logged: Mapping[str, int]
    """log times (ns) of the grids in the bag, by class"""


class RecordedDrive:
    """A bag and its layers; may be asked by several threads at once."""

    def __init__(self, recording: Recording, maps: CityMaps | None = None) -> None:
        """Read through the bag once and note where everything is.

        :param maps: where the true map is, if it is known

        Raises :class:`NmpError` for a bag without images, for a damaged one, and for layers of another drive.
        """
        self.recording = recording
        self.shots: dict[str, list[Shot]] = {}
        """by camera, in the order of time"""
        self.poses: list[Pose] = []
        self.mountings: list[Mounting] = []
        self.notes: list[Note] = []
        self._maps = maps
        self._lock = threading.Lock()
        self._reader = BagReader(recording.bag)
        self._reader.__enter__()
        try:
            self._image_topics = self._cameras()
            self._layer_topics = layer_topics(self._reader) if recording.layers == recording.bag else {}
            self.keyframes: list[Keyframe] = []
            self._location = ""  # that the bag names
            self._read_bag()
            if not self._layer_topics:
                self.keyframes = [_keyframe(read_layer(path), path, {}) for path in layer_files(recording.layers)]
            self._check()
            first = self._layers(0)
        except BaseException:
            self.close()
            raise
        self.location, self.grid = first.location, first.grid
        if not self.poses:
            self.poses = [Pose(k.stamp_ns, k.map_from_base) for k in self.keyframes]
        self.layers = lru_cache(maxsize=8)(self._layers)

    def _cameras(self) -> dict[str, str]:
        """Return the topic of each camera that the bag has images of, the compressed ones where there are both."""
        counts = {name: topic.count for name, topic in self._reader.topics.items()}
        found = {}
        for camera in CAMERAS:
            names = [topics.absolute(topics.image_topic(camera, kind)) for kind in ("compressed", "raw")]
            if name := next((n for n in names if counts.get(n)), None):
                found[camera] = name
        if not found:
            wanted = topics.absolute(topics.image_topic(CAMERAS[0]))
            raise NmpError(f"bag {self._reader.path} has no images (such as on {wanted}): record or remap the cameras")
        return found

    def _read_bag(self) -> None:
        of_topic = {topic: camera for camera, topic in self._image_topics.items()}
        odom, located = topics.absolute(topics.ODOM), topics.absolute(topics.LOCATION)
        layers = {topic: name for name, topic in self._layer_topics.items()}
        moments: dict[int, dict[str, BagMessage]] = {}
        self.shots = {camera: [] for camera in self._image_topics}
        wanted = {*of_topic, *layers, odom, located, topics.TF_STATIC, topics.DIAGNOSTICS} & set(self._reader.topics)
        for message in self._reader.messages(wanted):
            msg = message.message
            if message.topic in of_topic:
                self.shots[of_topic[message.topic]].append(Shot(stamp_ns(msg), message.stamp_ns))
            elif message.topic in layers:
                moment = moments.setdefault(stamp_ns(msg), {})
                moment[layers[message.topic]] = message
                if len(moment) == len(layers):
                    self._take_layers(moments.pop(stamp_ns(msg)))
            elif message.topic == odom:
                self._take_pose(msg)
            elif message.topic == located:
                self._location = str(msg.data)
            elif message.topic == topics.TF_STATIC:
                self.mountings += [mounting_of(t) for t in msg.transforms]
            else:
                self.notes += notes_of(msg)
        for shots in self.shots.values():
            shots.sort(key=lambda s: s.stamp_ns)
        self.poses.sort(key=lambda p: p.stamp_ns)
        self.keyframes.sort(key=lambda k: k.stamp_ns)
        self.notes.sort(key=lambda n: n.stamp_ns)

    def _take_pose(self, msg: Any) -> None:
        pose = msg.pose.pose
        try:
            self.poses.append(Pose(stamp_ns(msg), transform_of(pose.position, pose.orientation)))
        except NmpError as error:  # one that is not finite; the others can be shown
            self.notes.append(Note(stamp_ns(msg), 1, str(error)))

    def _take_layers(self, moment: Mapping[str, BagMessage]) -> None:
        """Take in the grids of one moment."""
        local_map = from_occupancy_grids({name: m.message for name, m in moment.items()}, "")
        logged = {name: message.stamp_ns for name, message in moment.items()}
        self.keyframes.append(_keyframe(local_map, None, logged))

    def _check(self) -> None:
        begin = min(shots[0].stamp_ns for shots in self.shots.values()) - _OVERLAP_NS
        end = max(shots[-1].stamp_ns for shots in self.shots.values()) + _OVERLAP_NS
        if not self.keyframes:
            raise NmpError(
                f"bag {self.recording.bag} holds no moment with all layers: record all of {', '.join(CLASSES)}"
            )
        if not any(begin <= k.stamp_ns <= end for k in self.keyframes):
            raise NmpError(
                f"the layers in {self.recording.layers} are not of the time of bag {self.recording.bag}: give the "
                "layers that were made of it"
            )

    @property
    def start_ns(self) -> int:
        """Stamp of the first image or layers."""
        return min(self.keyframes[0].stamp_ns, *(s[0].stamp_ns for s in self.shots.values()))

    @property
    def end_ns(self) -> int:
        """Stamp of the last image or layers."""
        return max(self.keyframes[-1].stamp_ns, *(s[-1].stamp_ns for s in self.shots.values()))

    def image(self, camera: str, index: int) -> bytes:
        """Return an image as a JPEG or PNG file; :class:`NmpError` when it is damaged."""
        log_ns = self.shots[camera][index].log_ns
        with self._lock:
            found = self._reader.messages_at(self._image_topics[camera], log_ns)
        stamp = self.shots[camera][index].stamp_ns
        return encoded(camera, next(m.message for m in found if stamp_ns(m.message) == stamp))

    def _layers(self, index: int) -> LocalMap:
        frame = self.keyframes[index]
        if frame.path is not None:
            return read_layer(frame.path)
        grids = {}
        with self._lock:
            for name, log_ns in frame.logged.items():
                found = self._reader.messages_at(self._layer_topics[name], log_ns)
                grids[name] = next(m.message for m in found if stamp_ns(m.message) == frame.stamp_ns)
        return from_occupancy_grids(grids, self._location)

    def truth(self, index: int) -> NDArray[np.uint8] | None:
        """Return the true layers [3, rows, cols] at the pose of a keyframe, None where no true map is known."""
        if self._maps is None:
            return None
        local_map = self.layers(index)
        with self._lock:
            return self._maps.truth_of(local_map)

    @cached_property
    def scores(self) -> list[list[float | None]] | None:
        """IoU (percent) of every class and their mean, from the first keyframe to each; None without a true map.

        None in place of a score that is not defined: neither layers nor truth have that class.
        """
        meter, out = IouMeter(), []
        for index in range(len(self.keyframes)):
            truth = self.truth(index)
            if truth is None:
                return None
            meter.add(self.layers(index).masks, truth)
            percent = meter.percent()
            out.append([round(percent[key], 2) for key in (*CLASSES, "miou")])
        rows: list[list[float | None]] = nan_as_null(out)
        return rows

    def close(self) -> None:
        """Close the bag."""
        self._reader.__exit__(None, None, None)

    def __enter__(self) -> RecordedDrive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keyframe(local_map: LocalMap, path: Path | None, logged: Mapping[str, int]) -> Keyframe:
    pose = local_map.map_from_base
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or np.abs(pose[:2, 3]).max() > FARTHEST_M:
        where = f"layers of {local_map.stamp_ns}" + (f" in {path}" if path else "")
        raise NmpError(f"{where}: the pose is not finite, or further than {FARTHEST_M / 1e3:.0f} km away: map again")
    return Keyframe(local_map.stamp_ns, local_map.map_from_base, local_map.grid, path, logged)


def encoded(camera: str, msg: Any) -> bytes:
    """Return the image of a sensor_msgs/CompressedImage or Image as a JPEG or PNG file.

    Raises :class:`NmpError` for one that is damaged, or of an encoding that is not known.
    """
    if fault := look_at(camera, stamp_ns(msg), lambda: msg).fault:
        raise NmpError(fault[1])
    image = content(msg)
    return image if isinstance(image, bytes) else jpeg_of(image)


def jpeg_of(rgb: NDArray[np.uint8]) -> bytes:
    """Return an RGB picture [H, W, 3] as a JPEG file."""
    return bytes(cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def mounting_of(transform: Any) -> Mounting:
    """Return a geometry_msgs/TransformStamped."""
    matrix = transform_of(transform.transform.translation, transform.transform.rotation)
    return Mounting(frame_id(transform), str(transform.child_frame_id).lstrip("/"), matrix)


def notes_of(msg: Any) -> list[Note]:
    """Return what a diagnostic_msgs/DiagnosticArray complains about."""
    statuses = [(_level(status.level), status) for status in msg.status]
    return [Note(stamp_ns(msg), level, f"{s.name}: {s.message}") for level, s in statuses if level]


def _level(value: Any) -> int:
    return value[0] if isinstance(value, bytes) else int(value)
