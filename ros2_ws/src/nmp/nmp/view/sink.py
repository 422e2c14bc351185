"""What is shown, piece by piece as time goes on: the same of recorded drives and of running nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nmp.frame import LocalMap
from nmp.geometry import Array
from nmp.vectorize import outline
from nmp.vectors.raster import Overview
from nmp.vectors.tracker import Tracked


@dataclass(frozen=True)
class Note:
    """Something that was said: a diagnosis, or how far a drive is."""

    stamp_ns: int
    level: int
    """as of diagnostic_msgs/DiagnosticStatus: 0 fine, 1 a warning, 2 an error, 3 stale"""
    text: str


@dataclass(frozen=True)
class Pose:
    """Where the car believed to be."""

    stamp_ns: int
    map_from_base: Array
    """[4, 4]"""


@dataclass(frozen=True)
class Mounting:
    """A transform of ``/tf_static``."""

    parent: str
    child: str
    parent_from_child: Array
    """[4, 4]"""


@dataclass(frozen=True)
class Line:
    """An element of the map as a line, closed for a crossing."""

    name: str
    """one of ``nmp.frame.CLASSES``"""
    id: int
    points: Array
    """[N, 2] map frame, m"""
    confidence: float
    """0..1"""


@dataclass(frozen=True)
class Elements:
    """The elements around the car at one moment, and what is not there any more."""

    stamp_ns: int
    lines: Sequence[Line]
    gone: Sequence[tuple[str, int]] = ()
    """class and id"""
    afresh: bool = False
    """all that was shown before is gone"""

    @classmethod
    def of(cls, tracked: Tracked) -> Elements:
        """Return tracked elements as lines."""
        lines = [
            Line(e.name, e.id, np.array(outline(e.geometry).coords)[:, :2], e.confidence) for e in tracked.elements
        ]
        return cls(tracked.stamp_ns, lines, tracked.gone)


class Sink(ABC):
    """Somebody who shows it. Methods may be called in any thread, one at a time."""

    def wants_image(self, camera: str) -> bool:
        """Whether images of a camera are looked at by now."""
        return True

    def wants_city(self) -> bool:
        """Whether the city is looked at by now."""
        return True

    @abstractmethod
    def image(self, camera: str, stamp_ns: int, data: bytes) -> None:
        """Show an image, a JPEG or PNG file."""

    @abstractmethod
    def pose(self, pose: Pose) -> None:
        """Show where the car is."""

    @abstractmethod
    def mountings(self, stamp_ns: int, mountings: Sequence[Mounting]) -> None:
        """Take in where the cameras are."""

    @abstractmethod
    def layers(self, local_map: LocalMap) -> None:
        """Show the layers around the car."""

    @abstractmethod
    def city(self, stamp_ns: int, overview: Overview) -> None:
        """Show the city so far."""

    @abstractmethod
    def elements(self, elements: Elements) -> None:
        """Show the elements around the car."""

    @abstractmethod
    def note(self, note: Note) -> None:
        """Show something that was said."""
