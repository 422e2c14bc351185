"""From single messages to whole frames: the images of one moment, calibrated, with the pose of each.

No ROS and no threads. Messages are duck-typed, so those of rclpy and of rosbags both work. What comes out
depends only on the messages and their order. Time is message stamps, never the wall clock. Everything that
cannot be used is counted by cause in :attr:`FrameAssembler.drops`, with the latest text in
:attr:`FrameAssembler.last_error`.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nmp import topics
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, CAMERAS, UNSTATED_STD, Camera, CameraShot, Frame
from nmp.geometry import Array, interpolate, inverse, yaw_of
from nmp.messages import NS, Picture, content, frame_id, seconds, stamp_ns, transform_of

log = logging.getLogger(__name__)

CLOCK_JUMP_NS = NS
"""A stamp further back than this starts a new time line (a looped bag, a reset clock)."""
JUMP = "clock jump"
"""cause of a frame that was not complete when such a jump came"""
POSES_KEPT = 2000
MISSING = "missing camera"
"""cause of a frame that lacks an image"""
JUMP_M, JUMP_RAD = 1.0, 0.2
MAX_SPEED, MAX_TURN = 100.0, 5.0
"""What a pose moves by from one to the next is a jump of the localisation where it is more than ``JUMP_M`` (m) at more
than ``MAX_SPEED`` (m/s), or ``JUMP_RAD`` (rad) at ``MAX_TURN`` (rad/s): no car does that."""


class _Waiting(Exception):
    """A frame cannot be completed yet, or ever: why."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class _Refused(_Waiting):
    """A frame that no further message can save."""


@dataclass(frozen=True)
class _Pose:
    stamp_ns: int
    map_from_base: Array
    position_std: float
    yaw_std: float


@dataclass(frozen=True)
class _Calibration:
    width: int
    height: int
    intrinsics: Array
    frame_id: str

    def same_as(self, other: _Calibration) -> bool:
        rest = (self.width, self.height, self.frame_id) == (other.width, other.height, other.frame_id)
        return rest and np.array_equal(self.intrinsics, other.intrinsics)


@dataclass(frozen=True)
class Limits:
    """What a frame may look like."""

    max_camera_spread: float = 0.1
    """longest time between the first and last image of a frame, s"""
    max_pose_age: float = 0.2
    """an image's pose is interpolated only between poses at most this far from it, s"""
    patience: float = 0.5
    """how far (s, in stamps) the other images may run on before a late message is given up"""
    min_cameras: int = len(CAMERAS)
    """cameras that a frame needs, the anchor among them; those that are lost are left out"""
    max_rate: float = 0.0
    """frames a second (of stamps) at most: anchor images between them are left alone; 0: every one makes a frame"""
    keyframe_rate: float = 0.0
    """keyframes a second (of stamps): the first frame, and each so long after the last one; 0: none"""

    def __post_init__(self) -> None:
        for name, value in (("max_camera_spread", self.max_camera_spread), ("max_pose_age", self.max_pose_age)):
            if not (math.isfinite(value) and value > 0):
                raise NmpError(f"{name} is {value}: give a time above 0 s")
        if not 1 <= self.min_cameras <= len(CAMERAS):
            raise NmpError(f"min_cameras is {self.min_cameras}: choose 1 to {len(CAMERAS)}")
        if not (math.isfinite(self.max_rate) and self.max_rate >= 0):
            raise NmpError(f"max_rate is {self.max_rate}: give frames a second, or 0 for all")
        if not (math.isfinite(self.keyframe_rate) and self.keyframe_rate >= 0):
            raise NmpError(f"keyframe_rate is {self.keyframe_rate}: give frames a second, or 0 for none")

    @property
    def spread_ns(self) -> int:
        return round(self.max_camera_spread * NS)

    @property
    def pose_age_ns(self) -> int:
        return round(self.max_pose_age * NS)

    @property
    def patience_ns(self) -> int:
        return round(self.patience * NS)

    @property
    def interval_ns(self) -> int:
        """Time between two anchors; 0 without a limit."""
        return round(NS / self.max_rate) if self.max_rate else 0


class FrameAssembler:
    """Collects messages and hands out complete frames, in the order of their anchor stamps.

    A frame is the anchor camera's image and, of every other camera, the image nearest to it in time. It is
    handed out as soon as no nearer image can be expected and a pose on either side of every image is known; it
    is given up when the stamps show that something will not come.
    """

    def __init__(
        self,
        *,
        max_camera_spread: float = 0.1,
        max_pose_age: float = 0.2,
        patience: float = 0.5,
        min_cameras: int = len(CAMERAS),
        max_rate: float = 0.0,
        queue_size: int = 10,
        prefixes: Sequence[str] = CAMERAS,
        extrinsics: Mapping[str, Array] | None = None,
    ) -> None:
        """Set the limits (see :class:`Limits`).

        :param queue_size: images kept per camera
        :param prefixes: of the cameras' topics, in the order of ``CAMERAS``
        :param extrinsics: base_from_camera [4, 4] by prefix, used instead of transforms that are received
        """
        if queue_size < 2:
            raise NmpError(f"queue_size is {queue_size}: at least 2 images per camera are needed")
        self.limits = Limits(max_camera_spread, max_pose_age, patience, min_cameras, max_rate)
        """may be replaced at any time"""
        self.prefixes = dict(zip(CAMERAS, prefixes, strict=True))
        """camera -> prefix of its topics"""
        self.drops: Counter[str] = Counter()
        """frames and messages that could not be used, by cause"""
        self.skipped = 0
        """anchor images that made no frame because of ``max_rate``"""
        self.last_error: dict[str, str] = {}
        """the latest text for each cause: what is wrong and what to do"""
        self.notes: dict[str, str] = {}
        """suspicious input that is used all the same, by topic"""
        self.location = ""
        self.epoch = 0
        """grows with every backward jump of the clock and every change of location"""
        self._queue_size = queue_size
        self._mounted = {c: extrinsics[p] for c, p in self.prefixes.items()} if extrinsics else {}
        self._calibrations: dict[str, _Calibration] = {}
        self._calibration_faults: dict[str, str] = {}
        self._static: dict[str, tuple[str, Array]] = {}  # child -> parent, parent_from_child
        self._rig: dict[str, Camera] = {}  # cameras with all that is known; emptied when any of it changes
        self._clear()

    def _clear(self) -> None:
        """Forget everything that belongs to a time line; calibration stays."""
        self._images: dict[str, list[Picture]] = {c: [] for c in CAMERAS}
        self._newest: dict[str, int] = {}  # stream -> newest stamp
        self._behind: set[str] = set()  # streams that have not come from the time line before to this one
        self._ended_ns = 0  # newest stamp of that
        self._poses: list[_Pose] = []
        self._anchors_seen: deque[int] = deque(maxlen=8 * self._queue_size)
        self._next_anchor_ns = -(2**63)
        self._next_key_ns = -(2**63)
        self._closed_ns = -(2**63)  # anchors up to this are answered or given up
        self._orphans: deque[int] = deque(maxlen=8 * self._queue_size)  # moments without an anchor, counted once
        self._ready: list[Frame] = []
        self._lost: set[str] = set()  # cameras that are not waited for: none of their images came since a frame
        self.lost: dict[str, str] = {}
        """prefixes of the cameras that the last frame was made without, and why"""

    def reset(self) -> None:
        """Forget every image and pose: a new time line. Calibration and location stay."""
        self._clear()
        self.epoch += 1

    # ------------------------------------------------------------------------------------------------------ input

    def set_location(self, location: str) -> None:
        """Name the city of the frames to come. A change drops what is queued: its poses are in another map."""
        if not location.strip():
            return self._drop("no location", f"{topics.LOCATION}: the name is empty: publish one like boston-seaport")
        if self.location and location != self.location:
            self._new_epoch("new location", f"{topics.LOCATION} became '{location}' before the frame was complete")
        self.location = location

    def add_camera_info(self, name: str, msg: Any) -> None:
        """Take the calibration of camera ``name`` from a sensor_msgs/CameraInfo."""
        k = np.asarray(msg.k, dtype=np.float64)
        topic = topics.camera_info_topic(self.prefixes[name])
        if k.size != 9 or not np.isfinite(k).all() or min(k[0], k[4]) <= 0 or min(msg.width, msg.height) <= 0:
            self._calibration_faults[name] = (
                f"{topic}: no usable calibration (k {k.tolist()}, {msg.width} x {msg.height}): calibrate the camera"
            )
            self._calibrations.pop(name, None)
            return
        d = np.asarray(msg.d, dtype=np.float64)
        if d.size and np.abs(d).max() > 1e-6:
            self.notes[topic] = f"{topic} has lens distortion, but images are taken as rectified: rectify them first"
        else:
            self.notes.pop(topic, None)
        new = _Calibration(
            int(msg.width), int(msg.height), k.reshape(3, 3), frame_id(msg) or topics.optical_frame(self.prefixes[name])
        )
        old = self._calibrations.get(name)
        if old is None or not old.same_as(new):
            self._calibrations[name] = new
            self._rig.pop(name, None)

    def add_static_transforms(self, msg: Any) -> None:
        """Take extrinsics from a tf2_msgs/TFMessage; chains through other frames are followed."""
        for t in msg.transforms:
            parent, child = t.header.frame_id.lstrip("/"), t.child_frame_id.lstrip("/")
            try:
                self._static[child] = parent, transform_of(t.transform.translation, t.transform.rotation)
            except NmpError as exc:
                self._drop("no extrinsics", f"{topics.TF_STATIC}: {parent} to {child}: {exc}")
        self._rig.clear()

    def add_pose(self, msg: Any) -> None:
        """Take the ego pose from a nav_msgs/Odometry or geometry_msgs/PoseWithCovarianceStamped in ``map``."""
        stamp = stamp_ns(msg)
        if (frame := frame_id(msg)) != topics.MAP_FRAME:
            return self._drop(
                "wrong pose frame",
                f"{topics.ODOM}: pose is in frame '{frame}', not '{topics.MAP_FRAME}': remap a map pose",
            )
        if (child := getattr(msg, "child_frame_id", "").lstrip("/")) not in ("", topics.BASE_FRAME):
            return self._drop(
                "wrong pose frame", f"{topics.ODOM}: pose is of '{child}', not '{topics.BASE_FRAME}': remap its pose"
            )
        covariance = np.asarray(msg.pose.covariance, dtype=np.float64)
        try:
            transform = transform_of(msg.pose.pose.position, msg.pose.pose.orientation)
        except NmpError as exc:
            return self._drop("pose not finite", f"{topics.ODOM} at {seconds(stamp)}: {exc}")
        if covariance.size != 36 or not np.isfinite(covariance).all():
            return self._drop(
                "pose not finite",
                f"{topics.ODOM} at {seconds(stamp)}: covariance is not finite: check the localisation",
            )
        if not self._advance(topics.ODOM, stamp):
            return
        x, y, yaw = (math.sqrt(max(float(covariance[i]), 0.0)) for i in (0, 7, 35))
        position_std, yaw_std = (max(x, y), yaw) if covariance.any() else UNSTATED_STD  # all zero: left out
        pose = _Pose(stamp, transform, position_std, yaw_std)
        at = bisect.bisect_left(self._poses, stamp, key=_by_stamp)
        if at < len(self._poses) and self._poses[at].stamp_ns == stamp:
            self._poses[at] = pose
        else:
            self._poses.insert(at, pose)
            del self._poses[:-POSES_KEPT]

    def add_image(self, name: str, msg: Any) -> None:
        """Take an image of camera ``name``: a sensor_msgs/CompressedImage or Image (of an encoding in ``CHANNELS``)."""
        self.add_sealed_image(name, stamp_ns(msg), lambda: msg, "raw" if hasattr(msg, "encoding") else "compressed")

    def add_sealed_image(self, name: str, stamp: int, fetch: Callable[[], Any], transport: str) -> None:
        """Take an image of which only the stamp (ns) is known; ``fetch`` is called if a frame is made of it."""
        topic = topics.image_topic(self.prefixes[name], transport)
        if not self._advance(name, stamp):
            if name == ANCHOR_CAMERA:
                self._drop(JUMP, f"{topic}: image of {seconds(stamp)} came after the clock had jumped back")
            return
        self._lost.discard(name)
        queue = self._images[name]
        at = bisect.bisect_left(queue, stamp, key=_by_stamp)
        if at < len(queue) and queue[at].stamp_ns == stamp:
            return self._drop("duplicate image", f"{topic}: two images at {seconds(stamp)}: check the camera's stamps")
        if name == ANCHOR_CAMERA:
            if stamp <= self._closed_ns:
                return self._drop("late image", f"{topic}: image of {seconds(stamp)} came after its frame was closed")
            # Of the images around the moment at which a frame is due, the nearest.
            slack = (stamp - self._anchors_seen[-1]) // 2 if self._anchors_seen else 0
            self._anchors_seen.append(stamp)
            if stamp < self._next_anchor_ns - slack:
                self.skipped += 1
                return
            # Counted on from that moment, so that cameras of any rate come to the one that is asked for.
            self._next_anchor_ns = max(self._next_anchor_ns, stamp - slack) + self.limits.interval_ns
        queue.insert(at, Picture(topic, stamp, fetch))
        if len(queue) > self._queue_size:
            if name == ANCHOR_CAMERA:
                self._settle(hurry=True)
            else:
                self._retire(name, 1)

    # ----------------------------------------------------------------------------------------------------- output

    def pop_frames(self) -> list[Frame]:
        """Return the frames that are complete by now, oldest first."""
        while self._settle():
            pass
        self._prune()
        out, self._ready = self._ready, []
        return out

    def flush(self) -> list[Frame]:
        """End of the recording: return what can still be completed, and give the rest up (counted)."""
        while self._settle(hurry=True):
            pass
        for name in CAMERAS:
            self._retire(name, len(self._images[name]))
        out, self._ready = self._ready, []
        return out

    # --------------------------------------------------------------------------------------------------- internal

    def _drop(self, cause: str, text: str) -> None:
        self.drops[cause] += 1
        self.last_error[cause] = text

    def _new_epoch(self, cause: str, text: str) -> None:
        """End a time line: the frames that are complete stay ready, the others are counted."""
        ready = self._ready
        for anchor in self._images[ANCHOR_CAMERA]:
            try:
                ready.append(self._build(anchor, final=True))
            except _Waiting:
                self._drop(cause, text)
        self._clear()
        self._ready = ready
        self.epoch += 1

    def _advance(self, stream: str, stamp: int) -> bool:
        """Note a new stamp of a stream; a jump backwards begins a new time line. False: it is of the line before.

        Streams are handed over in turn, not in the order of time: when one has jumped, others may still bring what was
        sent before. It would look like a camera that runs ahead of the rest, and cost the first frame of the new line.
        """
        if stream in self._behind:
            if max(self._newest.values()) + CLOCK_JUMP_NS < stamp <= self._ended_ns + self.limits.patience_ns:
                return False
            self._behind.discard(stream)
        newest = self._newest.get(stream, stamp)
        if stamp < newest - CLOCK_JUMP_NS:
            before = self.drops[JUMP]
            others, ended_ns = self._newest.keys() - {stream}, max(self._newest.values())
            text = (
                f"{stream}: stamps went back by {(newest - stamp) / NS:.1f} s: queues were cleared "
                "(normal when a bag starts again, else check the clock)"
            )
            self._new_epoch(JUMP, text)
            if self.drops[JUMP] == before:
                self._drop(JUMP, text)  # it is told also where it costs nothing
            self._behind, self._ended_ns = others, ended_ns
        self._newest[stream] = max(self._newest.get(stream, stamp), stamp)
        return True

    def _time(self, rank: int) -> int:
        """The newest (rank 0) or second newest (rank 1) of the latest stamps of the cameras that are not lost."""
        stamps = sorted((s for c, s in self._newest.items() if c in self._images and c not in self._lost), reverse=True)
        return stamps[min(rank, len(stamps) - 1)] if stamps else -(2**63)

    def _settle(self, *, hurry: bool = False) -> bool:
        """Answer or give up the oldest waiting anchor; False when it has to wait (never with ``hurry``)."""
        queue = self._images[ANCHOR_CAMERA]
        if not queue:
            return False
        anchor = queue[0]
        # One camera with a clock of its own must not make the others look late: hence the second newest.
        out_of_time = hurry or self._time(1) > anchor.stamp_ns + self.limits.spread_ns + self.limits.patience_ns
        try:
            self._ready.append(self._build(anchor, final=out_of_time))
        except _Waiting as exc:
            if not (out_of_time or isinstance(exc, _Refused)):
                return False
            self._drop(exc.cause, str(exc))
            if exc.cause == MISSING and self._is_key(anchor.stamp_ns):
                log.debug("keyframe %s is lost (%s); %s", seconds(anchor.stamp_ns), exc, self._stamps(anchor.stamp_ns))
        del queue[0]
        self._closed_ns = anchor.stamp_ns
        return True

    def _build(self, anchor: Picture, *, final: bool) -> Frame:
        """Return the frame of an anchor, or raise why it is not complete. ``final``: wait for nothing nearer."""
        pictures, lost = self._pictures(anchor, final)
        first, last = (f(pictures, key=lambda c: pictures[c].stamp_ns) for f in (min, max))
        if (spread := pictures[last].stamp_ns - pictures[first].stamp_ns) > self.limits.spread_ns:
            raise _Refused(
                "camera spread",
                f"images at {seconds(anchor.stamp_ns)} are {spread / NS:.3f} s apart ({first} to {last}): "
                f"synchronise the cameras or raise max_camera_spread ({self.limits.max_camera_spread:g} s)",
            )
        if not self.location:
            raise _Waiting("no location", f"no location yet: publish {topics.LOCATION} or set the parameter 'location'")
        poses = {c: self._pose_at(c, picture.stamp_ns) for c, picture in pictures.items()}
        self._check_continuity(pictures[first].stamp_ns, pictures[last].stamp_ns)
        try:
            shots = tuple(
                CameraShot(self._camera(c), picture.stamp_ns, content(picture.look.message), poses[c].map_from_base)
                for c, picture in pictures.items()
            )
        except (ValueError, TypeError) as exc:
            raise _Refused("bad image", f"images at {seconds(anchor.stamp_ns)} cannot be unpacked ({exc})") from exc
        self._lost = set(lost)
        self.lost = {self.prefixes[name]: text for name, text in lost.items()}
        ego = poses[ANCHOR_CAMERA]
        key = self._is_key(anchor.stamp_ns)
        if key:
            self._next_key_ns = anchor.stamp_ns + _interval_ns(self.limits.keyframe_rate)
        stds = ego.position_std, ego.yaw_std
        return Frame(anchor.stamp_ns, self.location, ego.map_from_base, shots, *stds, keyframe=key)

    def _is_key(self, anchor_ns: int) -> bool:
        return self.limits.keyframe_rate > 0 and anchor_ns >= self._next_key_ns

    def _stamps(self, anchor_ns: int) -> str:
        """Say which images of each camera wait, by their distance from an anchor: one that came late is there, one that
        was lost on the way is not."""
        told = []
        for name, queue in self._images.items():
            waiting = ", ".join(f"{(p.stamp_ns - anchor_ns) / NS:+.3f}" for p in queue)
            newest = self._newest.get(name)
            last = "none" if newest is None else f"{(newest - anchor_ns) / NS:+.3f}"
            told.append(f"{name}: newest {last}, waiting [{waiting}]")
        return "; ".join(told)

    def _pictures(self, anchor: Picture, final: bool) -> tuple[dict[str, Picture], dict[str, str]]:
        """Return the images that belong to an anchor, in the order of ``CAMERAS``, and why cameras have none.

        A camera is done without, as far as ``min_cameras`` allows, when its image will not come or cannot be used.
        One that was done without before is not waited for.
        """
        pictures: dict[str, Picture] = {}
        faults: dict[str, _Waiting] = {}
        for name in CAMERAS:
            try:
                picture = anchor if name == ANCHOR_CAMERA else self._nearest(name, anchor.stamp_ns, final)
                if picture.look.fault:
                    raise _Refused(*picture.look.fault)
                self._check_size(name, picture)
                pictures[name] = picture
            except _Waiting as exc:
                faults[name] = exc
        refused = {n: exc for n, exc in faults.items() if isinstance(exc, _Refused)}
        hopeless = ANCHOR_CAMERA in refused or len(CAMERAS) - len(refused) < self.limits.min_cameras
        waited_for = {n: exc for n, exc in faults.items() if not (final or n in refused or n in self._lost)}
        too_few = ANCHOR_CAMERA in faults or len(pictures) < self.limits.min_cameras
        if hopeless or waited_for or too_few:
            raise next(iter((refused if hopeless else waited_for or faults).values()))
        return pictures, {name: str(exc) for name, exc in faults.items()}

    def _check_size(self, name: str, picture: Picture) -> None:
        camera = self._camera(name)
        if picture.look.size != (camera.width, camera.height):
            got, info = "{} x {}".format(*picture.look.size), f"{camera.width} x {camera.height}"
            raise _Refused(
                "wrong image size",
                f"{name}: image is {got} pixels but {topics.camera_info_topic(self.prefixes[name])} says {info}: "
                "publish the calibration of the image as it is sent",
            )

    def _check_continuity(self, first_ns: int, last_ns: int) -> None:
        """Refuse images (stamps of the first and the last) between which the localisation has jumped."""
        begin = max(bisect.bisect_right(self._poses, first_ns, key=_by_stamp) - 1, 0)
        end = bisect.bisect_left(self._poses, last_ns, key=_by_stamp) + 1
        for before, after in pairwise(self._poses[begin:end]):
            metres = float(np.linalg.norm(after.map_from_base[:3, 3] - before.map_from_base[:3, 3]))
            turn = abs(yaw_of(inverse(before.map_from_base) @ after.map_from_base))
            gap = (after.stamp_ns - before.stamp_ns) / NS
            if (metres > JUMP_M and metres > MAX_SPEED * gap) or (turn > JUMP_RAD and turn > MAX_TURN * gap):
                raise _Refused(
                    "pose jump",
                    f"{topics.ODOM} jumps by {metres:.1f} m and {math.degrees(turn):.0f} degrees at "
                    f"{seconds(after.stamp_ns)} (normal after a relocalisation): the frame across it is left out",
                )

    def _nearest(self, name: str, stamp: int, final: bool) -> Picture:
        """Return a camera's image nearest to a stamp once no nearer one is to be expected."""
        queue = self._images[name]
        at = bisect.bisect_left(queue, stamp, key=_by_stamp)
        # The later of two equally near images comes first, so it wins.
        near = sorted(reversed(queue[max(at - 1, 0) : at + 1]), key=lambda p: abs(p.stamp_ns - stamp))
        best = near[0] if near else None
        newest = self._newest.get(name)
        distance = abs(best.stamp_ns - stamp) if best else None
        if best and distance is not None and distance <= self.limits.spread_ns:
            # Settled when the camera itself has passed the stamp, or when the others have run on by twice the
            # distance: the less an image fits, the longer a better one is waited for.
            if final or (newest is not None and newest >= stamp) or self._time(0) >= stamp + 2 * distance:
                return best
            raise _Waiting(MISSING, f"{name} may still come")
        topic = topics.image_topic(self.prefixes[name])
        limit = f"{self.limits.max_camera_spread:g} s"
        hint = "nothing was received" if newest is None else f"its newest is {(newest - stamp) / NS:+.3f} s from it"
        text = (
            f"{name} has no image within {limit} of {ANCHOR_CAMERA} at {seconds(stamp)} ({hint}): "
            f"check {topic} and its stamps"
        )
        passed = newest is not None and newest > stamp + self.limits.spread_ns
        raise (_Refused if passed else _Waiting)(MISSING, text)

    def _camera(self, name: str) -> Camera:
        if name in self._rig:
            return self._rig[name]
        info = self._calibrations.get(name)
        if info is None:
            topic = topics.camera_info_topic(self.prefixes[name])
            text = self._calibration_faults.get(name, f"no calibration of {name} was received: check the topic {topic}")
            raise _Waiting("no calibration", text)
        if name in self._mounted:
            self._rig[name] = Camera(name, info.width, info.height, info.intrinsics, self._mounted[name])
            return self._rig[name]
        frame, transform, seen = info.frame_id, np.eye(4), set[str]()
        while frame != topics.BASE_FRAME:
            if frame not in self._static or frame in seen:
                raise _Waiting(
                    "no extrinsics",
                    f"{topics.TF_STATIC} has no transform from {topics.BASE_FRAME} to {info.frame_id} "
                    f"(nothing leads to '{frame}'): publish the camera's mounting",
                )
            seen.add(frame)
            frame, parent_from_frame = self._static[frame]
            transform = parent_from_frame @ transform
        self._rig[name] = Camera(name, info.width, info.height, info.intrinsics, transform)
        return self._rig[name]

    def _pose_at(self, name: str, stamp: int) -> _Pose:
        """Return the pose at a stamp: a received one, or between its two neighbours."""
        at = bisect.bisect_left(self._poses, stamp, key=_by_stamp)
        after = self._poses[at] if at < len(self._poses) else None
        if after and after.stamp_ns == stamp:
            return after
        before = self._poses[at - 1] if at else None
        if before and after and max(stamp - before.stamp_ns, after.stamp_ns - stamp) <= self.limits.pose_age_ns:
            f = (stamp - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
            return _Pose(
                stamp,
                interpolate(before.map_from_base, after.map_from_base, f),
                max(before.position_std, after.position_std),
                max(before.yaw_std, after.yaw_std),
            )
        gaps = [f"{(p.stamp_ns - stamp) / NS:+.3f} s" for p in (before, after) if p]
        text = (
            f"no pose within {self.limits.pose_age_ns / NS:g} s on either side of {name} at {seconds(stamp)} "
            f"(nearest: {', '.join(gaps) or 'none received'}): check {topics.ODOM} or raise max_pose_age"
        )
        # Poses come in order, so one that lies beyond shows that no better one will.
        raise (_Refused if after else _Waiting)("no pose", text)

    def _prune(self) -> None:
        """Let go of images that no frame can use any more."""
        horizon = self._time(1) - self.limits.spread_ns - self.limits.patience_ns
        if anchors := self._images[ANCHOR_CAMERA]:
            horizon = min(horizon, anchors[0].stamp_ns - self.limits.spread_ns)
        for name in CAMERAS:
            if name != ANCHOR_CAMERA:
                self._retire(name, bisect.bisect_left(self._images[name], horizon, key=_by_stamp))

    def _retire(self, name: str, count: int) -> None:
        """Remove the oldest images of a camera; those that had no anchor are counted, once per moment."""
        queue = self._images[name]
        for picture in queue[:count] if name != ANCHOR_CAMERA else ():
            stamp = picture.stamp_ns
            if any(abs(stamp - a) <= self.limits.spread_ns for a in self._anchors_seen):
                continue
            if stamp > self._time(1):
                continue  # no other camera has come this far: a clock of its own
            if self._anchors_seen and stamp < self._anchors_seen[0] - self.limits.spread_ns:
                continue  # from before the anchor camera's start, or too old to know
            if all(abs(stamp - o) > self.limits.spread_ns // 2 for o in self._orphans):
                self._orphans.append(stamp)
                topic = topics.image_topic(self.prefixes[ANCHOR_CAMERA])
                limit = f"{self.limits.max_camera_spread:g} s"
                self._drop(
                    MISSING,
                    f"{ANCHOR_CAMERA} has no image within {limit} of {name} at {seconds(stamp)}: "
                    f"check {topic} and its stamps",
                )
        del queue[:count]


def _interval_ns(rate: float) -> int:
    """Return the time between frames at a rate (Hz, 0 for no limit); a tenth less, because cameras are not exact."""
    return round(0.9 * NS / rate) if rate else 0


def _by_stamp(item: Picture | _Pose) -> int:
    return item.stamp_ns
