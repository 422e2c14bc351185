"""What a browser asks for: one page a drive, and the pictures on it, made when they are wanted."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from nmp.draw import CLASS_COLOURS
from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.frame import CAMERAS, CAR_LENGTH, CAR_WIDTH, CLASSES, REAR_OVERHANG
from nmp.geometry import Array, yaw_of
from nmp.page import hex_colour, page_with
from nmp.view.drive import RecordedDrive
from nmp.view.find import Recording
from nmp.view.pictures import CityPieces, Piece, layers_png, lines_png, small_camera

INDEX = "index.html"
POSES_HZ = 20.0
"""more poses a second than this are left out of a page"""
TYPES = {".html": "text/html; charset=utf-8", ".jpg": "image/jpeg", ".png": "image/png"}


@dataclass(frozen=True)
class Link:
    """Another drive that can be looked at."""

    name: str
    slug: str


class Screen(ABC):
    """A page and its pictures, by their paths relative to it."""

    name: str
    slug: str

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return what the page is told, as JSON values."""

    @abstractmethod
    def picture(self, kind: str, rest: Sequence[str]) -> bytes | None:
        """Return a picture, for instance kind ``cameras`` and rest ``cam_front``, ``3``; None where there is none."""

    def html(self, links: Sequence[Link]) -> str:
        """Return the page."""
        drives = [{"name": link.name, "slug": link.slug} for link in links]
        return page_with("nmp.view", {**self.content(), "drives": drives, "slug": self.slug})


def common() -> dict[str, Any]:
    """Return what every page is told."""
    return {
        "classes": [[name, hex_colour(CLASS_COLOURS[name])] for name in CLASSES],
        "car": [CAR_LENGTH, CAR_WIDTH, REAR_OVERHANG],
        "names": list(CAMERAS),
    }


def planar(pose: Array) -> list[float]:
    """Return x, y (m) and yaw (rad) of a pose [4, 4]."""
    return [round(float(pose[0, 3]), 3), round(float(pose[1, 3]), 3), round(yaw_of(pose), 5)]


def clock(stamp_ns: int) -> str:
    """Return a stamp as date and time (UTC)."""
    return datetime.fromtimestamp(stamp_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class RecordedScreen(Screen):
    """A recorded drive; opened when it is first looked at."""

    def __init__(self, recording: Recording, maps: CityMaps | None = None) -> None:
        self.name, self.slug = recording.name, recording.slug
        self._recording, self._maps = recording, maps
        self._lock = threading.Lock()
        self._drive: RecordedDrive | None = None
        self._pieces: list[Piece] = []
        self._content: dict[str, Any] = {}

    @property
    def drive(self) -> RecordedDrive:
        """The drive; raises what :class:`RecordedDrive` raises."""
        with self._lock:
            if self._drive is None:
                drive = RecordedDrive(self._recording, self._maps)
                try:
                    city = CityPieces(drive)
                    self._pieces = list(city.pieces())
                    self._content = _content(drive, self.name, city.edges, self._pieces)
                except BaseException:
                    drive.close()
                    raise
                self._drive = drive
            return self._drive

    def content(self) -> dict[str, Any]:
        _ = self.drive
        return self._content

    def picture(self, kind: str, rest: Sequence[str]) -> bytes | None:
        drive = self.drive
        if kind == "cameras":
            if len(rest) != 2 or rest[0] not in drive.shots or not _within(rest[1], drive.shots[rest[0]]):
                return None
            return small_camera(drive.image(rest[0], int(rest[1])))
        if len(rest) != 1 or not _within(rest[0], drive.keyframes):
            return None
        index = int(rest[0])
        match kind:
            case "layers":
                shown = drive.layers(index)
                return layers_png(shown.probabilities, shown.evidence)
            case "lines":
                return lines_png(drive.layers(index))
            case "truth":
                truth = drive.truth(index)
                return None if truth is None else layers_png(truth)
            case "city":
                return self._pieces[index].png
        return None

    def paths(self) -> Iterator[tuple[str, list[str], str]]:
        """Yield kind, rest and file name of every picture."""
        drive = self.drive
        for camera, shots in drive.shots.items():
            yield from (("cameras", [camera, str(i)], f"cameras/{camera}/{i}.jpg") for i in range(len(shots)))
        for kind in ("layers", "lines", "city", *(("truth",) if self._maps else ())):
            yield from ((kind, [str(i)], f"{kind}/{i}.png") for i in range(len(drive.keyframes)))

    def close(self) -> None:
        """Close the bag."""
        with self._lock:
            if self._drive is not None:
                self._drive.close()


def _within(text: str, items: Sequence[object]) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9 and int(text) < len(items)


def _content(
    drive: RecordedDrive, name: str, edges: tuple[float, float, float, float], pieces: Sequence[Piece]
) -> dict[str, Any]:
    start = drive.start_ns

    def seconds(stamp_ns: int) -> float:
        return round((stamp_ns - start) / 1e9, 3)

    poses: list[list[float]] = []
    for pose in drive.poses:
        at = seconds(pose.stamp_ns)
        if not poses or at - poses[-1][0] >= 1.0 / POSES_HZ:
            poses.append([at, *planar(pose.map_from_base)])
    return {
        **common(),
        "live": False,
        "name": name,
        "location": drive.location,
        "began": clock(start),
        "from": 0.0,
        "seconds": seconds(drive.end_ns),
        "grid": [drive.grid.length, drive.grid.width],
        "cameras": {camera: [seconds(s.stamp_ns) for s in shots] for camera, shots in drive.shots.items()},
        "poses": poses,
        "layers": [[seconds(k.stamp_ns), *planar(k.map_from_base)] for k in drive.keyframes],
        "city": [
            [seconds(k.stamp_ns), int(p.whole), *(round(v, 3) for v in p.edges)]
            for k, p in zip(drive.keyframes, pieces, strict=True)
        ],
        "first": {"cameras": {}, "layers": 0, "city": 0},
        "bounds": [round(v, 3) for v in edges],
        "scores": drive.scores,
        "notes": [[seconds(n.stamp_ns), n.level, n.text] for n in drive.notes],
    }


class Site:
    """Several screens; addresses are ``/<slug>/`` and what lies below."""

    def __init__(self, screens: Sequence[Screen]) -> None:
        self.screens = {screen.slug: screen for screen in screens}

    def moved(self, path: str) -> str | None:
        """Return the path to go to instead: pictures are named relative to a page, which is a folder."""
        if path == "/":
            return f"/{self.links[0].slug}/"
        return f"{path}/" if path.removeprefix("/") in self.screens else None

    @property
    def links(self) -> list[Link]:
        """All screens, the one to show first in front."""
        return [Link(screen.name, slug) for slug, screen in self.screens.items()]

    def answer(self, path: str) -> tuple[bytes, str] | None:
        """Return content and type for the path of an address; None where there is nothing.

        Raises :class:`NmpError` for what cannot be read.
        """
        slug, *rest = path.strip("/").split("/")
        screen = self.screens.get(slug)
        if screen is None:
            return None
        if rest in ([], [INDEX]):
            return screen.html(self.links).encode(), TYPES[".html"]
        kind, *inside = rest
        stem, dot, ending = inside[-1].partition(".") if inside else ("", "", "")
        wanted = "jpg" if kind == "cameras" else "png"
        if not dot or ending != wanted:
            return None
        found = screen.picture(kind, [*inside[:-1], stem])
        return None if found is None else (found, TYPES[f".{wanted}"])


def problem(error: NmpError) -> str:
    """Return a page that says what is wrong."""
    return f"<!doctype html><meta charset=utf-8><title>nmp view</title><p>{escape(str(error))}</p>"
