"""Pictures of layers: bird's-eye view, in the cameras, as a film strip, and of a whole drive.

Every bird's-eye view has the car looking to the right (ego x right, ego y up); a city map has north up (map x
right, map y up). Pictures are RGB uint8 [height, width, 3].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nmp.errors import NmpError
from nmp.frame import CLASSES, CameraShot, Frame, LocalMap, car_outline
from nmp.geometry import Array, BevGrid, flatten_to_plane, inverse

Picture = NDArray[np.uint8]
Layers = NDArray[np.float32] | NDArray[np.uint8]
"""[3, rows, cols] probabilities or 0/1 masks, classes in the order of ``CLASSES``"""
Colour = tuple[int, int, int]

CLASS_COLOURS: dict[str, Colour] = {"divider": (255, 183, 51), "crossing": (64, 186, 255), "boundary": (255, 82, 122)}
"""RGB of every class, everywhere; told apart by people who see red and green alike, too."""

INK: Colour = (13, 17, 24)
"""background of sheets and maps"""
GROUND: Colour = (27, 33, 43)
"""cells that have been seen"""
GRID: Colour = (48, 56, 69)
TEXT: Colour = (226, 231, 238)
FAINT: Colour = (139, 149, 163)
CAR: Colour = (236, 240, 245)
TRACK: Colour = (250, 250, 210)

MOSAIC = (("cam_front_left", "cam_front", "cam_front_right"), ("cam_back_left", "cam_back", "cam_back_right"))
LEAST_MAP_WIDTH = 760  # pixels: title and legend have to fit
NEAREST_DRAWN_M = 2.0  # the car's own body would hide anything nearer


# ------------------------------------------------------------------------------------------------------- pieces


@lru_cache(maxsize=16)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    # matplotlib brings its own font, so that pictures look the same on every machine
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _write(
    picture: Picture, text: str, x: int, y: int, size: int = 14, colour: Colour = TEXT, *, bold: bool = False
) -> int:
    """Write text with its top left corner at x, y (pixels), in place; return the x where it ends."""
    canvas = Image.fromarray(picture)
    font = _font(size, bold)
    ImageDraw.Draw(canvas).text((x, y), text, fill=colour, font=font)
    picture[:] = np.asarray(canvas)
    return round(x + font.getlength(text))


def _label(picture: Picture, text: str, size: int = 13) -> None:
    """Put a name on a dark plate into the upper left corner, in place."""
    width, height = math.ceil(_font(size, False).getlength(text)) + 14, size + 10
    plate = picture[:height, :width]
    plate[:] = (plate * 0.25).astype(np.uint8)
    _write(picture, text, 7, 4, size)


def legend(width: int, title: str = "", zoom: float = 1.0) -> Picture:
    """Return a strip with a title on the left and the class colours on the right; ``zoom`` scales all of it."""
    big, small = round(15 * zoom), round(13 * zoom)
    out = np.full((round(44 * zoom), width, 3), INK, np.uint8)
    middle, margin = out.shape[0] // 2, round(12 * zoom)
    left = _write(out, title, margin, middle - round(0.6 * big), big, bold=True) if title else margin
    line, gap = round(18 * zoom), round(8 * zoom)
    names = [(name, round(_font(small, False).getlength(name))) for name in CLASSES]
    x = max(width - sum(w + line + 2 * gap + margin for _, w in names), left + 2 * margin)
    for name, text_width in names:
        cv2.line(out, (x, middle), (x + line, middle), CLASS_COLOURS[name], round(4 * zoom), cv2.LINE_AA)
        _write(out, name, x + line + gap, middle - round(0.6 * small), small)
        x += text_width + line + 2 * gap + margin
    return out


@lru_cache(maxsize=8)
def colour_table(name: str) -> Picture:
    """Return one of matplotlib's colour maps as [256, 3], without its darkest fifth: that is the background's."""
    return np.rint(matplotlib.colormaps[name](np.linspace(0.2, 1.0, 256))[:, :3] * 255).astype(np.uint8)


def colour_legend(
    width: int, title: str, caption: str, ticks: Sequence[tuple[float, str]], table: Picture, zoom: float = 1.0
) -> Picture:
    """Return a strip with a title on the left and a scale of colours on the right.

    :param caption: what is measured, in which unit
    :param ticks: where along the scale (0..1) which number stands
    :param table: [256, 3] colours from 0 to 1, as of :func:`colour_table`
    :param zoom: scales all of it
    """
    big, small, bar = round(15 * zoom), round(12 * zoom), round(220 * zoom)
    out = np.full((round(44 * zoom), width, 3), INK, np.uint8)
    middle, margin = out.shape[0] // 2, round(12 * zoom)
    end = _write(out, title, margin, middle - round(0.6 * big), big, bold=True) if title else margin
    text = round(_font(small, False).getlength(caption))
    left = max(width - bar - 2 * margin, end + text + 3 * margin)
    _write(out, caption, left - margin - text, middle - round(0.6 * small), small)
    upper, lower = round(9 * zoom), round(21 * zoom)
    columns = np.linspace(0, len(table) - 1, max(min(left + bar, width) - left, 0))
    out[upper:lower, left : left + len(columns)] = table[np.rint(columns).astype(int)]
    for where, number in ticks:
        x = left + round(where * (bar - 1))
        cv2.line(out, (x, lower), (x, lower + round(3 * zoom)), TEXT, 1)
        half = _font(small, False).getlength(number) / 2
        _write(out, number, round(min(x - half, width - 2 * half - 2)), lower + round(4 * zoom), small, FAINT)
    return out


def _shrink(picture: Picture, width: int, height: int) -> Picture:
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _ground(seen: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the empty ground [H, W, 3]: lighter where ``seen`` [H, W] is 1 than where it is 0."""
    ink, ground = np.array(INK, np.float32), np.array(GROUND, np.float32)
    return ink + (ground - ink) * seen[..., None]


_INVISIBLE = np.float32(0.25)
"""what is no more likely is not drawn"""


def opacity(layers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how opaque (0..1) the colours of classes are that are so likely (0..1), arrays of any shape."""
    # A soft threshold: noise below a quarter disappears, what counts as present (over a half) is nearly solid.
    return np.clip((layers - _INVISIBLE) / np.float32(0.35), 0.0, 1.0)


def _paint(base: NDArray[np.float32] | Picture, layers: NDArray[np.float32], strength: float = 1.0) -> Picture:
    """Lay the class colours over a picture [H, W, 3]; a colour is as opaque as its class is likely."""
    # Most of a map is empty: only what shows is worked out.
    where = np.flatnonzero(layers.max(axis=0) > _INVISIBLE)
    return _blended(base, where, opacity(layers.reshape(len(layers), -1)[:, where]) * np.float32(strength))


def _blend(base: NDArray[np.float32], opacities: NDArray[np.float32]) -> Picture:
    """Lay the class colours over a picture [H, W, 3], each as opaque (0..1) as its plane of [3, H, W] says."""
    where = np.flatnonzero(opacities.any(axis=0))
    return _blended(base, where, opacities.reshape(len(opacities), -1)[:, where])


_INK_OR_GROUND = np.array([INK, GROUND, *[GROUND] * 254], np.uint8)[:, None]
"""what OpenCV takes as a table of colours: of 0, and of 1"""


def _blended(base: NDArray[np.float32] | Picture, where: NDArray[np.intp], opacities: NDArray[np.float32]) -> Picture:
    """Lay the class colours over the pixels ``where`` [N] of a picture [H, W, 3], as opaque as ``opacities`` [3, N]."""
    out = base.copy() if base.dtype == np.uint8 else np.rint(base).astype(np.uint8)
    mixed = base.reshape(-1, 3)[where].T.astype(np.float32, order="C")
    for name, alpha in zip(CLASSES, opacities, strict=True):
        mixed = mixed * (1 - alpha) + alpha * np.array(CLASS_COLOURS[name], np.float32)[:, None]
    out.reshape(-1, 3)[where] = np.rint(mixed).astype(np.uint8).T
    return np.asarray(out, np.uint8)


def save_png(path: Path, picture: Picture) -> None:
    """Write a picture as PNG (or as what the suffix says); makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    except OSError as error:
        raise NmpError(f"cannot write the picture {path} ({error.strerror or error}): choose another folder") from error


def decode_image(shot: CameraShot) -> Picture:
    """Return a shot's image as RGB."""
    if isinstance(shot.image, np.ndarray):
        return shot.image
    bgr = cv2.imdecode(np.frombuffer(shot.image, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise NmpError(f"{shot.camera.name}: image data cannot be decoded: check the camera driver")
    return np.ascontiguousarray(bgr[:, :, ::-1])


# ---------------------------------------------------------------------------------------------- bird's-eye view


def layers_picture(
    layers: Layers, grid: BevGrid, evidence: NDArray[np.float32] | None = None, scale: int = 2
) -> Picture:
    """Draw layers over a dark ground with a 10 m grid and the car, which looks to the right.

    :param evidence: [rows, cols]; cells with 0 are left black. None: everything was seen
    :param scale: pixels per cell
    """
    seen = np.ones(grid.shape, np.uint8) if evidence is None else (evidence > 0).astype(np.uint8)
    size = (grid.cols * scale, grid.rows * scale)
    # Row 0 is the right edge of the region, so flipped it is the bottom of the picture.
    shown = cv2.resize(seen[::-1], size, interpolation=cv2.INTER_NEAREST)
    base = np.asarray(cv2.applyColorMap(shown, _INK_OR_GROUND), np.uint8)
    pixels_per_m = scale / grid.resolution

    def pixel(x: float, y: float) -> tuple[int, int]:
        return round((x + grid.length / 2) * pixels_per_m), round((grid.width / 2 - y) * pixels_per_m)

    for x in np.arange(-math.floor(grid.length / 20) * 10, grid.length / 2, 10.0):
        cv2.line(base, pixel(x, -grid.width / 2), pixel(x, grid.width / 2), GRID, 1)
    for y in np.arange(-math.floor(grid.width / 20) * 10, grid.width / 2, 10.0):
        cv2.line(base, pixel(-grid.length / 2, y), pixel(grid.length / 2, y), GRID, 1)
    enlarged = [cv2.resize(layer[::-1].astype(np.float32), size, interpolation=cv2.INTER_LINEAR) for layer in layers]
    out = _paint(base, np.stack(enlarged))

    body = np.array([pixel(x, y) for x, y in car_outline()])
    cv2.fillPoly(out, [body], CAR, cv2.LINE_AA)
    cv2.polylines(out, [body], True, INK, 1, cv2.LINE_AA)
    return out


def bev_picture(local_map: LocalMap, scale: int = 2) -> Picture:
    """Draw the layers around the car; unknown cells are black, and the car looks to the right."""
    return layers_picture(local_map.probabilities, local_map.grid, local_map.evidence, scale)


# ---------------------------------------------------------------------------------------------- in the cameras


def project_layers(
    shot: CameraShot,
    layers: Layers,
    grid: BevGrid,
    map_from_base: Array,
    *,
    width: int | None = None,
    strength: float = 0.6,
) -> Picture:
    """Lay BEV layers over a camera image, as if painted on the ground.

    The ground is the plane z = 0 of the car at ``map_from_base``, the pose of the layers; the camera stands where
    it was at its own stamp. ``width`` (pixels) scales the picture.
    """
    image = decode_image(shot)
    out_w = width or shot.camera.width
    out_h = round(out_w * shot.camera.height / shot.camera.width)
    image = _shrink(image, out_w, out_h)
    k = shot.camera.intrinsics.copy()
    k[:2] *= out_w / shot.camera.width

    base_from_camera = inverse(map_from_base) @ shot.map_from_base @ shot.camera.base_from_camera
    u, v = np.meshgrid(np.arange(out_w) + 0.5, np.arange(out_h) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(k).T @ base_from_camera[:3, :3].T
    origin = base_from_camera[:3, 3]
    # Rays that do not point down never meet the ground: they get a point outside of every grid.
    down = rays[..., 2] < -1e-3
    reach = np.where(down, -origin[2] / np.where(down, rays[..., 2], -1.0), np.nan)
    x, y = origin[0] + reach * rays[..., 0], origin[1] + reach * rays[..., 1]
    near = np.hypot(x, y) < NEAREST_DRAWN_M
    far = ~down | near
    cols = np.where(far, -10.0, (x + grid.length / 2) / grid.resolution - 0.5).astype(np.float32)
    rows = np.where(far, -10.0, (y + grid.width / 2) / grid.resolution - 0.5).astype(np.float32)
    seen = [cv2.remap(layer.astype(np.float32), cols, rows, cv2.INTER_LINEAR) for layer in layers]  # 0 outside
    return _paint(image.astype(np.float32), np.stack(seen), strength)


def camera_mosaic(
    frame: Frame, layers: Layers | None = None, grid: BevGrid | None = None, *, width: int = 480, gap: int = 4
) -> Picture:
    """Show the six cameras in two rows, front above back, each ``width`` pixels wide; layers painted on if given."""
    shots = {shot.camera.name: shot for shot in frame.shots}
    rows = []
    for names in MOSAIC:
        tiles = []
        for name in names:
            shot = shots[name]
            if layers is None:
                height = round(width * shot.camera.height / shot.camera.width)
                tile = _shrink(decode_image(shot), width, height)
            else:
                tile = project_layers(shot, layers, grid or BevGrid(), frame.map_from_base, width=width)
            _label(tile, name.removeprefix("cam_").replace("_", " "))
            tiles.append(tile)
        rows.append(_beside(tiles, gap))
    return _below(rows, gap)


def _beside(pictures: Sequence[Picture], gap: int) -> Picture:
    height = max(p.shape[0] for p in pictures)
    out = np.full((height, sum(p.shape[1] for p in pictures) + gap * (len(pictures) - 1), 3), INK, np.uint8)
    x = 0
    for p in pictures:
        out[: p.shape[0], x : x + p.shape[1]] = p
        x += p.shape[1] + gap
    return out


def _below(pictures: Sequence[Picture], gap: int) -> Picture:
    width = max(p.shape[1] for p in pictures)
    out = np.full((sum(p.shape[0] for p in pictures) + gap * (len(pictures) - 1), width, 3), INK, np.uint8)
    y = 0
    for p in pictures:
        out[y : y + p.shape[0], : p.shape[1]] = p
        y += p.shape[0] + gap
    return out


# ------------------------------------------------------------------------------------------------- film strip


@dataclass(frozen=True)
class Panel:
    """One bird's-eye view of a film strip."""

    title: str
    layers: Layers
    evidence: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, title: str, local_map: LocalMap) -> Panel:
        return cls(title, local_map.probabilities, local_map.evidence)


def film_strip(
    frame: Frame, panels: Sequence[Panel], grid: BevGrid, *, painted: Layers | None = None, camera_width: int = 480
) -> Picture:
    """Show one moment: the six cameras in two rows, below them the bird's-eye views (prediction, truth, ...) in one.

    :param painted: layers to lay over the cameras as well
    """
    gap = 4
    mosaic = camera_mosaic(frame, painted, grid, width=camera_width, gap=gap)
    width = (mosaic.shape[1] - gap * (len(panels) - 1)) // len(panels)
    views = []
    for panel in panels:
        view = layers_picture(panel.layers, grid, panel.evidence, scale=3)
        view = _shrink(view, width, round(width * grid.width / grid.length))
        _label(view, panel.title)
        views.append(view)
    return _below([mosaic, _beside(views, gap)], gap)


def comparison(frame: Frame, sides: Mapping[str, Layers], grid: BevGrid, *, camera_width: int = 320) -> Picture:
    """Show one moment in columns, one per named set of layers: the cameras above, the bird's-eye view below."""
    gap = 4
    columns = []
    for title, layers in sides.items():
        mosaic = camera_mosaic(frame, layers, grid, width=camera_width, gap=gap)
        width = mosaic.shape[1]
        view = _shrink(layers_picture(layers, grid, scale=3), width, round(width * grid.width / grid.length))
        _label(view, title, 16)
        columns.append(_below([mosaic, view], gap))
    return _beside(columns, 4 * gap)


def film_sheet(strips: Sequence[Picture], title: str, captions: Sequence[str] = ()) -> Picture:
    """Stack film strips under a title and the legend, each under its caption."""
    width = max(s.shape[1] for s in strips)
    zoom = map_zoom(width)
    parts = [legend(width, title, zoom)]
    for index, strip in enumerate(strips):
        if captions:
            caption = np.full((round(22 * zoom), width, 3), INK, np.uint8)
            _write(caption, captions[index], round(12 * zoom), round(3 * zoom), round(13 * zoom), FAINT)
            parts.append(caption)
        parts.append(strip)
    return _below(parts, 6)


# --------------------------------------------------------------------------------------------------- city map


Box = tuple[slice, slice]
"""rows and columns of a picture"""


class CityCanvas:
    """A map that a drive builds up frame by frame: the mean of its local maps, north up."""

    def __init__(self, corners: Array, resolution: float, longest_side: int, margin: float = 5.0) -> None:
        """Take in nothing yet.

        :param corners: [N, 2] of all local maps that will be added (map frame, m), as of :func:`corners_of`
        :param resolution: finest edge of a pixel, m; coarser where a side would exceed ``longest_side`` pixels
        :param margin: empty rim, m
        """
        self.low, self.high = corners.min(axis=0) - margin, corners.max(axis=0) + margin
        self.resolution = max(resolution, float((self.high - self.low).max()) / longest_side)
        width, height = (int(v) for v in np.ceil((self.high - self.low) / self.resolution))
        # probabilities, then the number of votes
        self._sums = np.zeros((height, width, len(CLASSES) + 1), np.float32)

    @property
    def whole(self) -> Box:
        """All of it."""
        return slice(0, self._sums.shape[0]), slice(0, self._sums.shape[1])

    def add(self, local_map: LocalMap) -> Box:
        """Add a local map, and return where the picture changed."""
        return _vote(self._sums, local_map, float(self.low[0]), float(self.high[1]), self.resolution)

    def picture(self, box: Box | None = None) -> Picture:
        """Draw the map, or a part of it, as it is by now."""
        sums = np.ascontiguousarray(np.moveaxis(self._sums[box or self.whole], -1, 0))
        count, total = sums[-1], sums[:-1]
        mean = np.where(count > 0.05, total / np.maximum(count, 1e-6), np.float32(0.0))
        return _paint(_ground(np.clip(count, 0.0, 1.0)), mean)

    def edges(self, box: Box) -> tuple[float, float, float, float]:
        """Return west, south, east and north of a part (map frame, m)."""
        rows, cols = box
        west, north = float(self.low[0]), float(self.high[1])
        return (
            west + cols.start * self.resolution,
            north - rows.stop * self.resolution,
            west + cols.stop * self.resolution,
            north - rows.start * self.resolution,
        )


def city_picture(
    layer_maps: Iterable[LocalMap],
    title: str = "",
    *,
    resolution: float = 0.1,
    longest_side: int = 1600,
    margin: float = 5.0,
) -> Picture:
    """Draw the map that a drive has built up: the mean of all its local maps, north up, with the way driven.

    :param resolution: finest edge of a pixel, m; coarser where the drive would exceed ``longest_side`` pixels
    :param margin: empty rim, m
    """
    maps = list(layer_maps)
    if not maps:
        raise NmpError("no layers to draw a city map of: map a drive first")
    way = np.array([m.map_from_base[:2, 3] for m in maps])
    canvas = CityCanvas(
        np.concatenate([corners_of(m.map_from_base, m.grid) for m in maps]), resolution, longest_side, margin
    )
    for m in maps:
        canvas.add(m)
    out = canvas.picture()
    points = np.stack([(way[:, 0] - canvas.low[0]), (canvas.high[1] - way[:, 1])], axis=1) / canvas.resolution
    _draw_way(out, points, max(1, round(max(out.shape[:2]) / 900)))
    return _framed_map(out, title, canvas.resolution, f"{len(maps)} keyframes")


def vector_picture(
    layers: Layers,
    seen: NDArray[np.float32],
    corner: tuple[float, float],
    resolution: float,
    lines: Iterable[tuple[str, Array]],
    title: str = "",
) -> Picture:
    """Draw lines over the faint raster that they were made from, north up, with a dot at every vertex.

    :param layers: row 0 is in the south
    :param seen: [rows, cols] 0 where nothing was seen, else 1
    :param corner: x, y of the south-western corner, map frame, m
    :param resolution: edge of a cell, m
    :param lines: class and points [N, 2] (map frame, m)
    """
    rows, cols = np.nonzero(seen)
    if not len(rows):
        raise NmpError("nothing was ever seen: there is no map to draw")
    rim = math.ceil(5.0 / resolution)
    bottom, top = max(rows.min() - rim, 0), min(rows.max() + rim, seen.shape[0] - 1)
    left, right = max(cols.min() - rim, 0), min(cols.max() + rim, seen.shape[1] - 1)
    part = np.s_[bottom : top + 1, left : right + 1]
    faint = _paint(_ground(seen[part]), np.stack([layer[part] for layer in layers]).astype(np.float32), 0.35)
    out = np.ascontiguousarray(faint[::-1])
    dot = max(1, round(max(out.shape) / 900))
    for name, points in lines:
        pixels = (points - corner) / resolution - [left, bottom]
        pixels[:, 1] = out.shape[0] - pixels[:, 1]
        whole = np.rint(pixels).astype(np.int32)
        cv2.polylines(out, [whole], False, CLASS_COLOURS[name], dot, cv2.LINE_AA)
        for point in whole:
            cv2.circle(out, tuple(int(v) for v in point), dot + 1, CLASS_COLOURS[name], -1, cv2.LINE_AA)
    return _framed_map(out, title, resolution, "")


def corners_of(map_from_base: Array, grid: BevGrid) -> Array:
    """Return the corners of a local map at a pose [4, 4] in the map frame, [4, 2] m."""
    pose = flatten_to_plane(map_from_base)
    half = np.array([grid.length, grid.width]) / 2
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    out: Array = (signs * half) @ pose[:2, :2].T + pose[:2, 3]
    return out


def _vote(sums: NDArray[np.float32], m: LocalMap, west: float, north: float, resolution: float) -> Box:
    """Add a local map to ``sums`` [height, width, classes + 1], whose upper left corner is at west, north (m).

    Returns where it lies.
    """
    known = (m.evidence > 0).astype(np.float32)
    votes = np.dstack([*(m.probabilities * known), known]).astype(np.float32)
    shrink = resolution / m.grid.resolution
    if shrink > 1:  # thin lines would flicker away between the pixels
        votes = np.asarray(cv2.GaussianBlur(votes, (0, 0), 0.4 * shrink), np.float32)
    # only the part of the picture in which the local map lies
    corners = corners_of(m.map_from_base, m.grid)
    left, top = (
        int(v) - 1 for v in ((corners[:, 0].min() - west) / resolution, (north - corners[:, 1].max()) / resolution)
    )
    right, bottom = (
        int(v) + 2 for v in ((corners[:, 0].max() - west) / resolution, (north - corners[:, 1].min()) / resolution)
    )
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, sums.shape[1]), min(bottom, sums.shape[0])
    # cell (col, row) -> ego (m) -> map (m) -> pixel; pixel centres are at whole numbers, as OpenCV has it
    cell = m.grid.resolution
    ego = np.array([[cell, 0, (cell - m.grid.length) / 2], [0, cell, (cell - m.grid.width) / 2], [0, 0, 1]])
    to_map = flatten_to_plane(m.map_from_base)[np.ix_([0, 1, 3], [0, 1, 3])]
    to_pixel = np.array([[1, 0, -west - (left + 0.5) * resolution], [0, -1, north - (top + 0.5) * resolution]])
    warp = to_pixel / resolution @ to_map @ ego
    sums[top:bottom, left:right] += cv2.warpAffine(votes, warp, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    return slice(top, bottom), slice(left, right)


def _draw_way(picture: Picture, points: Array, thickness: int) -> None:
    pixels = np.rint(points).astype(np.int32)
    cv2.polylines(picture, [pixels], False, TRACK, thickness, cv2.LINE_AA)
    for point in pixels[1:-1]:
        cv2.circle(picture, tuple(int(v) for v in point), thickness + 1, TRACK, -1, cv2.LINE_AA)
    for name, point in (("start", pixels[0]), ("end", pixels[-1])):
        x, y = (int(v) for v in point)
        cv2.circle(picture, (x, y), 3 * thickness + 3, INK, -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), 3 * thickness + 1, TRACK, -1 if name == "start" else 2, cv2.LINE_AA)


def coloured(opacities: NDArray[np.float32], seen: NDArray[np.float32]) -> Picture:
    """Draw classes on the ground, each as opaque (0..1) as its plane of [3, H, W] says.

    :param seen: [H, W] share (0..1) of each pixel that was ever seen
    """
    return _blend(_ground(seen), opacities)


def shaded(values: NDArray[np.float32], seen: NDArray[np.float32], table: Picture) -> Picture:
    """Draw values (0..1, [H, W]) in the colours of a table [256, 3], over the background where nothing was seen.

    :param seen: [H, W] share (0..1) of each pixel that was ever seen
    """
    found = table[np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)]
    ink = np.array(INK, np.float32)
    return np.rint(ink + (found - ink) * seen[..., None]).astype(np.uint8)


def map_zoom(width: int) -> float:
    """How much larger than usual the writing on a wide picture has to be, which is shown reduced."""
    return min(max(width / 1000, 1.0), 2.0)


def map_foot(width: int, resolution: float, note: str = "") -> Picture:
    """Return the strip below a map: a scale bar for pixels of ``resolution`` m, and which way is north.

    :param note: tells of the way driven, if it is drawn
    """
    zoom = map_zoom(width)
    foot = np.full((round(44 * zoom), width, 3), INK, np.uint8)
    middle, margin, size = foot.shape[0] // 2, round(14 * zoom), round(13 * zoom)
    top = middle - round(0.6 * size)
    # the longest round length that takes up to a quarter of the width
    lengths = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
    metres = max((m for m in lengths if m / resolution <= width / 4), default=1)
    end = margin + round(metres / resolution)
    cv2.line(foot, (margin, middle), (end, middle), TEXT, 2)
    for x in (margin, end):
        cv2.line(foot, (x, middle - margin // 2), (x, middle + margin // 2), TEXT, 2)
    x = _write(foot, f"{metres} m" if metres < 1000 else f"{metres // 1000} km", end + margin, top, size)
    x = _write(foot, "north is up", x + 2 * margin, top, size, FAINT) + 2 * margin
    if note:
        cv2.circle(foot, (x + margin // 2, middle), round(5 * zoom), TRACK, -1, cv2.LINE_AA)
        _write(foot, f"start of the way driven ({note})", x + round(1.3 * margin), top, size, FAINT)
    return foot


def _framed_map(picture: Picture, title: str, resolution: float, note: str) -> Picture:
    """Add the title with the legend above and the scale bar below; ``note`` tells of the way driven, if it is drawn."""
    width = max(picture.shape[1], LEAST_MAP_WIDTH)
    padded = np.full((picture.shape[0], width, 3), INK, np.uint8)
    left = (width - picture.shape[1]) // 2
    padded[:, left : left + picture.shape[1]] = picture
    return _below([legend(width, title, map_zoom(width)), padded, map_foot(width, resolution, note)], 0)
