"""A running node in a browser: the last half minute of what it says, which can be played again."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import cv2
import numpy as np

from nmp.draw import coloured, opacity
from nmp.frame import CAMERAS, LocalMap
from nmp.geometry import Array, BevGrid, flatten_to_plane, inverse
from nmp.vectors.raster import Overview
from nmp.view.pictures import CITY_PX, draw_line, faint_layers, layers_png, png_of, small_camera
from nmp.view.sink import Elements, Mounting, Note, Pose, Sink
from nmp.view.site import Screen, clock, common, planar

KEEP_S = 30.0
"""what is older is forgotten"""
PICTURES_HZ, POSES_HZ = 5.0, 10.0
"""what comes more often is left out: a browser does not have to see every image"""
NEWS_HZ = 5.0
ALIVE_S = 5.0
"""a page that hears nothing for longer thinks that the connection is lost"""
JUMP_NS = 2_000_000_000
"""a stamp so much older than the newest begins another drive"""

T = TypeVar("T")


class _Kept(Generic[T]):
    """The newest items, each with its stamp; their numbers go on counting when the oldest are forgotten."""

    def __init__(self, rate: float) -> None:
        self.items: deque[tuple[int, T]] = deque()
        self.first = 0
        """number of the oldest item"""
        # a little less: stamps jitter
        self._gap_ns = round(0.9e9 / rate)

    def wants(self, stamp_ns: int) -> bool:
        """Whether an item with this stamp is far enough from the last."""
        return not self.items or abs(stamp_ns - self.items[-1][0]) >= self._gap_ns

    def add(self, stamp_ns: int, item: T) -> None:
        self.items.append((stamp_ns, item))

    def forget(self, before_ns: int, least: int = 1) -> None:
        """Forget what is older, but for the newest ``least``."""
        while len(self.items) > least and self.items[0][0] < before_ns:
            self.items.popleft()
            self.first += 1

    def clear(self) -> None:
        """Forget everything."""
        self.first += len(self.items)
        self.items.clear()

    def get(self, number: str) -> T | None:
        """Return the item of a number, None where it is forgotten or never was."""
        if not (number.isascii() and number.isdigit() and len(number) < 12):
            return None
        at = int(number) - self.first
        return self.items[at][1] if 0 <= at < len(self.items) else None


@dataclass
class _Seen:
    """Layers around the car."""

    pose: list[float]
    png: bytes
    lines: bytes | None = None


@dataclass(frozen=True)
class _Whole:
    """The city at one moment."""

    edges: tuple[float, float, float, float]
    png: bytes


class LiveScreen(Screen, Sink):
    """What a running node says; filled by one thread, asked by others."""

    slug = "live"

    def __init__(self, name: str, waiting: str) -> None:
        """Begin with nothing.

        :param name: of the node
        :param waiting: what to say until layers have come
        """
        self.name = name
        self._waiting = waiting
        self._changed = threading.Condition()
        self._cameras: dict[str, _Kept[bytes]] = {name: _Kept(PICTURES_HZ) for name in CAMERAS}
        self._poses: _Kept[list[float]] = _Kept(POSES_HZ)
        self._layers: _Kept[_Seen] = _Kept(PICTURES_HZ)
        self._city: _Kept[_Whole] = _Kept(PICTURES_HZ)
        self._notes: _Kept[Note] = _Kept(1e9)
        self._recent: deque[LocalMap] = deque(maxlen=4)
        self._grid = BevGrid()
        self._location = ""
        self._heard_odometry = self._led = False
        self._start_ns = self._newest_ns = 0
        self._version = 0

    # ------------------------------------------------------------------------------------------------- arriving

    def image(self, camera: str, stamp_ns: int, data: bytes) -> None:
        with self._news(stamp_ns, leading=True):
            if self._cameras[camera].wants(stamp_ns):
                self._cameras[camera].add(stamp_ns, data)

    def pose(self, pose: Pose) -> None:
        with self._news(pose.stamp_ns, leading=True):
            if not self._heard_odometry:
                self._heard_odometry = True
                self._poses.clear()
            self._take_pose(pose.stamp_ns, pose.map_from_base)

    def _take_pose(self, stamp_ns: int, map_from_base: Array) -> None:
        if self._poses.wants(stamp_ns):
            self._poses.add(stamp_ns, planar(map_from_base))

    def mountings(self, stamp_ns: int, mountings: Sequence[Mounting]) -> None:
        """Do nothing: a page puts the cameras where they usually are."""

    def layers(self, local_map: LocalMap) -> None:
        stamp = local_map.stamp_ns
        if not self._layers.wants(stamp):
            return
        png = layers_png(local_map.probabilities, local_map.evidence)
        with self._news(stamp) as in_time:
            if not in_time:
                return
            self._layers.add(stamp, _Seen(planar(local_map.map_from_base), png))
            self._recent.append(local_map)
            self._grid, self._location = local_map.grid, local_map.location
            if not self._heard_odometry:
                self._take_pose(stamp, local_map.map_from_base)

    def elements(self, elements: Elements) -> None:
        local_map = next((m for m in self._recent if m.stamp_ns == elements.stamp_ns), None)
        if local_map is None:
            return
        png = _lines_png(local_map, elements)
        with self._news(elements.stamp_ns):
            seen = next((item for stamp, item in self._layers.items if stamp == elements.stamp_ns), None)
            if seen is not None:
                seen.lines = png

    def city(self, stamp_ns: int, overview: Overview) -> None:
        png = _city_png(overview)
        rows, cols = overview.seen.shape
        west, south = overview.corner
        edges = (west, south, west + cols * overview.resolution, south + rows * overview.resolution)
        with self._news(stamp_ns) as in_time:
            if in_time:
                self._city.add(stamp_ns, _Whole(edges, png))

    def note(self, note: Note) -> None:
        # A clock of its own: diagnoses are stamped when they are made, not with the time of the images.
        with self._news(None):
            self._notes.add(self._newest_ns, note)

    @property
    def _dated(self) -> list[_Kept[Any]]:
        """What has the stamps of the images."""
        return [*self._cameras.values(), self._poses, self._layers, self._city]

    @contextmanager
    def _news(self, stamp_ns: int | None, *, leading: bool = False) -> Iterator[bool]:
        """Take something in, and wake who waits for news; gives whether it is of this drive.

        :param leading: it comes straight from a sensor: it tells the time, and one that lies far back begins another
            drive. What was made of it may be late.
        """
        with self._changed:
            self._version += 1
            self._led = self._led or leading
            if stamp_ns is None:
                yield True
            elif leading or not self._led:
                self._advance(stamp_ns)
                yield True
            else:
                yield self._start_ns <= stamp_ns <= self._newest_ns + JUMP_NS
            self._changed.notify_all()

    def _advance(self, stamp_ns: int) -> None:
        if stamp_ns < self._newest_ns - JUMP_NS:
            for kept in (*self._dated, self._notes):
                kept.clear()
            self._recent.clear()
            self._start_ns = self._newest_ns = 0
        self._start_ns = self._start_ns or stamp_ns
        self._newest_ns = max(self._newest_ns, stamp_ns)
        horizon = self._newest_ns - round(KEEP_S * 1e9)
        for kept in self._dated:
            kept.forget(horizon)
        self._notes.forget(horizon, least=0)

    # --------------------------------------------------------------------------------------------------- asked

    def content(self) -> dict[str, Any]:
        with self._changed:
            return {**common(), "live": True, "name": self.name, "scores": None, "bounds": None, **self._rows()}

    def _rows(self) -> dict[str, Any]:
        start = self._start_ns

        def seconds(stamp_ns: int) -> float:
            return round((stamp_ns - start) / 1e9, 3)

        shown = list(self._layers.items)
        if shown and shown[-1][1].lines is None:
            shown = shown[:-1] or shown  # its lines may still come
        oldest = max(self._newest_ns - round(KEEP_S * 1e9), start)
        return {
            "location": self._location or self._waiting,
            "began": clock(start) if start else "",
            "from": seconds(oldest),
            "seconds": seconds(self._newest_ns),
            "grid": [self._grid.length, self._grid.width],
            "cameras": {c: [seconds(s) for s, _ in kept.items] for c, kept in self._cameras.items()},
            "poses": [[seconds(s), *pose] for s, pose in self._poses.items],
            "layers": [[seconds(s), *seen.pose] for s, seen in shown],
            "city": [[seconds(s), 1, *(round(v, 3) for v in whole.edges)] for s, whole in self._city.items],
            "notes": [[seconds(s), note.level, note.text] for s, note in self._notes.items],
            "first": {
                "cameras": {camera: kept.first for camera, kept in self._cameras.items()},
                "layers": self._layers.first,
                "city": self._city.first,
            },
        }

    def picture(self, kind: str, rest: Sequence[str]) -> bytes | None:
        if kind == "cameras":
            with self._changed:
                kept = self._cameras.get(rest[0]) if len(rest) == 2 else None
                image = kept.get(rest[1]) if kept else None
            return None if image is None else small_camera(image)
        if len(rest) != 1:
            return None
        with self._changed:
            if kind == "city":
                whole = self._city.get(rest[0])
                return whole.png if whole else None
            seen = self._layers.get(rest[0])
            if seen is None or kind not in ("layers", "lines"):
                return None
            return seen.lines or seen.png if kind == "lines" else seen.png

    def events(self) -> Iterator[str]:
        """Yield what is new as JSON, again and again; an empty text when nothing is for a while."""
        told = -1
        while True:
            with self._changed:
                if self._version == told:
                    self._changed.wait(ALIVE_S)
                news = json.dumps(self._rows()) if self._version != told else ""
                told = self._version
            yield news
            time.sleep(1.0 / NEWS_HZ)


def _lines_png(local_map: LocalMap, elements: Elements) -> bytes:
    """Draw elements (map frame) over the faint layers, the car to the right."""
    picture = faint_layers(local_map)
    base_from_map = inverse(flatten_to_plane(local_map.map_from_base))
    for line in elements.lines:
        points = line.points @ base_from_map[:2, :2].T + base_from_map[:2, 3]
        draw_line(picture, line.name, points, local_map.grid)
    return png_of(picture)


def _city_png(overview: Overview) -> bytes:
    """Draw a city, north up, no side longer than ``CITY_PX``."""
    picture = coloured(opacity(overview.probabilities), overview.seen)[::-1]
    scale = CITY_PX / max(picture.shape[:2])
    if scale < 1:
        size = tuple(max(round(v * scale), 1) for v in picture.shape[1::-1])
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    return png_of(picture)
