"""The pictures of a page: cameras made small, layers and lines from above, a city that grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from nmp.draw import CLASS_COLOURS, CityCanvas, Layers, Picture, coloured, corners_of, opacity
from nmp.errors import NmpError
from nmp.frame import LocalMap
from nmp.geometry import BevGrid
from nmp.vectorize import outline, vectorize
from nmp.view.drive import JPEG_QUALITY, RecordedDrive

CAMERA_WIDTH = 800
"""pixels; wider images are made smaller"""
CITY_M = 0.2
"""finest edge of a pixel of the city"""
CITY_PX = 2048
"""longest side of the city"""
WHOLE_EVERY = 32
"""pieces of the city, of which one shows all of it: so many pictures at most are drawn to jump anywhere"""
_LINES_SCALE = 3
"""pixels to a cell"""


@dataclass(frozen=True)
class Piece:
    """A picture of the part of a city that changed with a keyframe, or of all of it."""

    whole: bool
    """what was drawn before is covered"""
    edges: tuple[float, float, float, float]
    """west, south, east, north, map frame, m"""
    png: bytes


def small_camera(image: bytes) -> bytes:
    """Return an encoded image as a JPEG no wider than ``CAMERA_WIDTH``; one that is that already as it is."""
    pixels = np.frombuffer(image, np.uint8)
    picture = cv2.imdecode(pixels, cv2.IMREAD_COLOR)
    if picture is None:
        raise NmpError(f"{len(image)} bytes of an image are damaged: check the camera driver")
    height, width = picture.shape[:2]
    if width <= CAMERA_WIDTH and image.startswith(b"\xff\xd8"):
        return image
    if width > CAMERA_WIDTH:
        size = (CAMERA_WIDTH, round(height * CAMERA_WIDTH / width))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def png_of(picture: Picture) -> bytes:
    """Return a picture as a PNG file."""
    return bytes(cv2.imencode(".png", picture[:, :, ::-1])[1])


def layers_png(layers: Layers, seen: NDArray[np.float32] | None = None) -> bytes:
    """Draw layers [3, rows, cols], one pixel a cell, the car to the right; what was never ``seen`` is dark."""
    shown = np.ones(layers.shape[1:], np.float32) if seen is None else (seen > 0).astype(np.float32)
    return png_of(coloured(opacity(layers.astype(np.float32)), shown)[::-1])


def lines_png(local_map: LocalMap) -> bytes:
    """Draw the elements of the layers as lines over the faint layers, the car to the right."""
    out = faint_layers(local_map)
    seen = (local_map.evidence > 0).astype(np.float32)
    for element in vectorize(local_map.probabilities * seen, local_map.grid):
        draw_line(out, element.name, np.array(outline(element.geometry).coords), local_map.grid)
    return png_of(out)


def faint_layers(local_map: LocalMap) -> Picture:
    """Draw layers for lines to be drawn over them, three pixels a cell, the car to the right."""
    seen = (local_map.evidence > 0).astype(np.float32)
    faint = coloured(opacity(local_map.probabilities) * np.float32(0.25), seen)[::-1]
    size = (local_map.grid.cols * _LINES_SCALE, local_map.grid.rows * _LINES_SCALE)
    return np.ascontiguousarray(cv2.resize(faint, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def draw_line(picture: Picture, name: str, points: NDArray[np.float64], grid: BevGrid) -> None:
    """Draw a line with a dot at every vertex, in place.

    :param points: [N, 2] ego frame, m
    """
    pixels_per_m = picture.shape[1] / grid.length
    x = (points[:, 0] + grid.length / 2) * pixels_per_m
    y = (grid.width / 2 - points[:, 1]) * pixels_per_m
    pixels = np.rint(np.stack([x, y], axis=1)).astype(np.int32)
    cv2.polylines(picture, [pixels], False, CLASS_COLOURS[name], 3, cv2.LINE_AA)
    for pixel in pixels:
        cv2.circle(picture, tuple(int(v) for v in pixel), 4, CLASS_COLOURS[name], -1, cv2.LINE_AA)


class CityPieces:
    """The pieces of a drive's city, one a keyframe."""

    def __init__(self, drive: RecordedDrive) -> None:
        corners = [corners_of(frame.map_from_base, frame.grid) for frame in drive.keyframes]
        self._drive = drive
        self._canvas = CityCanvas(np.concatenate(corners), CITY_M, CITY_PX)

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """West, south, east and north of all of it, map frame, m."""
        return self._canvas.edges(self._canvas.whole)

    def pieces(self) -> Iterator[Piece]:
        """Yield the piece of every keyframe, in order."""
        for index in range(len(self._drive.keyframes)):
            box = self._canvas.add(self._drive.layers(index))
            whole = index % WHOLE_EVERY == 0
            box = self._canvas.whole if whole else box
            yield Piece(whole, self._canvas.edges(box), png_of(self._canvas.picture(box)))
