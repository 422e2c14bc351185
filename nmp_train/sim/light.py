"""What lights the scene: shadows on the ground, lamps, and patterns that repeat over the map."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nmp_train.sim.boxes import BODY, CROWN, LAMP_POLE, PEDESTRIAN

SHADOW_SIDE, SHADOW_CELL_M = 240, 0.4
SHADOW_TILES = 8
"""the map of shadows is drawn in tiles, each against the solids that can darken it"""
SHADOW_REACH = 6.5
"""shadows are drawn up to this many times as long as things are tall"""
LAMP_SIDE, LAMP_CELL_M = 96, 1.0
LAMPS, BEAMS = 16, 6
"""lamps that are seen, and vehicles whose beams light the ground, around one sample"""
PATTERN_SIDE, PATTERN_M = 256, 24.0
GUARD_M = 0.6
"""a thing whose lower edge is lower than this hides the sky from the ground under it"""


def is_round(kind: Tensor) -> Tensor:
    """Return whether solids of this kind are ellipsoids: tree crowns and people."""
    return (kind == CROWN) | (kind == PEDESTRIAN)


@functools.cache
def patterns(device: torch.device) -> Tensor:
    """Return [1, 3, side + 2, side + 2] patterns in 0..1 that repeat every ``PATTERN_M`` (with a frame of one pixel).

    Channels: leaves (a few decimetres), puddles (a few metres), clouds (all sizes).
    """
    rng = np.random.default_rng((21, PATTERN_SIDE))
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(PATTERN_SIDE, 1 / PATTERN_SIDE)] * 2))
    frequency[0, 0] = 1.0

    def noise(power: float, low: float, high: float) -> np.ndarray:
        band = frequency**-power * (frequency >= low) * np.exp(-((frequency / high) ** 2))
        band[0, 0] = 0.0
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal(frequency.shape)) * band).real
        return field.argsort(axis=None).argsort().reshape(field.shape) / field.size  # uniform in 0..1

    stack = np.stack([noise(0.3, 12, 50), noise(1.0, 2, 14), noise(1.6, 1, 60)]).astype(np.float32)
    with torch.inference_mode(False):  # it is kept for other callers
        return torch.from_numpy(np.pad(stack, ((0, 0), (1, 1), (1, 1)), mode="wrap"))[None].to(device)


def pattern_grid(value: Tensor) -> Tensor:
    """Return the coordinate for ``grid_sample`` of :func:`patterns`; ``value`` counts repetitions."""
    return ((value - value.floor()) * PATTERN_SIDE + 1.0) * (2 / (PATTERN_SIDE + 2)) - 1.0


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Take the solids ``index`` [P, K] of each row: [P, S, ...] to [P, K, ...]."""
    return values[torch.arange(index.shape[0], device=index.device)[:, None], index]


def shadow_scores(centre: Tensor, size: Tensor, sun: Tensor) -> Tensor:
    """Return [B, tiles, S]: how much each solid matters to each tile of the shadow map, 0 for not at all."""
    edge = SHADOW_SIDE * SHADOW_CELL_M / SHADOW_TILES
    middle = (torch.arange(SHADOW_TILES, device=centre.device) + 0.5 - SHADOW_TILES / 2) * edge
    x, y = middle.repeat(SHADOW_TILES)[:, None], middle.repeat_interleave(SHADOW_TILES)[:, None]
    radius = size[..., :2].norm(dim=-1) / 2
    top = (centre[..., 2] + size[..., 2] / 2).clamp(min=0)
    tip = -(_towards(sun)[:, None] * top[..., None])  # from the thing to the end of its shadow, [B, S, 2]
    dx, dy = x - centre[:, None, :, 0], y - centre[:, None, :, 1]
    tip_x, tip_y = tip[:, None, :, 0], tip[:, None, :, 1]
    along = ((dx * tip_x + dy * tip_y) / (tip_x**2 + tip_y**2).clamp(min=1e-3)).clamp(0, 1)
    distance = torch.hypot(dx - along * tip_x, dy - along * tip_y)
    reach = radius[:, None] + 0.72 * edge
    return torch.where((distance < reach) & (radius[:, None] > 0.05), radius[:, None] / (1 + distance), 0.0)


def _towards(sun: Tensor) -> Tensor:
    """Return the horizontal way [B, 2] that light comes from, per metre of height."""
    return sun[:, :2] / torch.maximum(sun[:, 2:], sun[:, :2].norm(dim=1, keepdim=True) / SHADOW_REACH).clamp(min=1e-3)


def shadow_tiles(
    x0: Tensor, y0: Tensor, centre: Tensor, size: Tensor, yaw: Tensor, kind: Tensor, sun: Tensor
) -> Tensor:
    """Draw tiles of the shadow map.

    :param x0: [P] corner of each tile, ``y0`` likewise, m
    :param centre: [P, K, 3] solids of each tile; ``size`` [P, K, 3], ``yaw`` [P, K], ``kind`` [P, K]
    :param sun: [P, 3]
    :return: [P, 3, side, side]: direct light past opaque things, light lost in tree crowns, light of the sky
    """
    side = SHADOW_SIDE // SHADOW_TILES
    step = (torch.arange(side, device=centre.device, dtype=torch.float32) + 0.5) * SHADOW_CELL_M
    x, y = (x0[:, None] + step)[:, None, None, :], (y0[:, None] + step)[:, None, :, None]  # [P, 1, 1, n], [P, 1, n, 1]
    half = (size / 2).clamp(min=1e-3)
    cos, sin = yaw.cos(), yaw.sin()
    slope = _towards(sun)
    slope_x, slope_y = slope[:, :1], slope[:, 1:]
    per_solid = (..., None, None)
    # Seen from the solid, the line from a place towards the sun starts at (affine in x and y) and rises 1 m per step.
    a = torch.stack([cos, -sin], dim=-1) / half[..., :2]
    b = torch.stack([sin, cos], dim=-1) / half[..., :2]
    c = -(a * centre[..., 0:1] + b * centre[..., 1:2])
    d = a * slope_x[..., None] + b * slope_y[..., None]
    d = torch.where(d.abs() < 1e-5, 1e-5, d)
    inverse = 1 / d
    near_z, far_z = centre[..., 2] - half[..., 2], centre[..., 2] + half[..., 2]
    nears, fars = [], []
    for i in (0, 1):
        mid_x, mid_y = -a[..., i] * inverse[..., i], -b[..., i] * inverse[..., i]
        mid_c, reach = -c[..., i] * inverse[..., i], inverse[..., i].abs()
        plane = mid_x[per_solid] * x + mid_y[per_solid] * y
        nears.append(plane + (mid_c - reach)[per_solid])
        fars.append(plane + (mid_c + reach)[per_solid])
    enters, leaves = torch.maximum(nears[0], nears[1]), torch.minimum(fars[0], fars[1])
    inside = (enters < 0) & (leaves > 0)
    blocked = torch.maximum(enters, near_z.clamp(min=0)[per_solid]) < torch.minimum(leaves, far_z[per_solid])
    opaque, crown = (kind != CROWN) & (size[..., 0] > 0), kind == CROWN
    low = opaque & (near_z < GUARD_M)
    hard = (blocked & opaque[per_solid]).any(dim=1)
    covered = (inside & low[per_solid]).any(dim=1)
    # A crown dims light by the way that it travels inside. Its start is the place itself, in units of the crown.
    start_x = a[..., 0][per_solid] * x + (b[..., 0][per_solid] * y + c[..., 0][per_solid])
    start_y = a[..., 1][per_solid] * x + (b[..., 1][per_solid] * y + c[..., 1][per_solid])
    start_z, rise = -centre[..., 2] / half[..., 2], 1 / half[..., 2]
    square = d[..., 0] ** 2 + d[..., 1] ** 2 + rise**2
    along = start_x * d[..., 0][per_solid] + start_y * d[..., 1][per_solid] + (start_z * rise)[per_solid]
    outside = start_x * start_x + start_y * start_y + (start_z**2 - 1)[per_solid]
    chord = (along * along - outside * square[per_solid]).clamp(min=0).sqrt() * (
        torch.where(crown, 2 / square * (1 + slope_x**2 + slope_y**2).sqrt(), torch.zeros_like(square))[per_solid]
    )
    shade = 1 - torch.exp(-1.1 * chord.sum(dim=1))
    return torch.stack([1 - hard.float(), shade, 1 - 0.85 * covered.float()], dim=1)


def join_tiles(tiles: Tensor) -> Tensor:
    """Put [B, T * T, C, side, side] tiles together, with soft edges: [B, C, T * side, T * side]."""
    b, _, c, side, _ = tiles.shape
    grid = tiles.view(b, SHADOW_TILES, SHADOW_TILES, c, side, side).permute(0, 3, 1, 4, 2, 5)
    whole = grid.reshape(b, c, SHADOW_SIDE, SHADOW_SIDE)
    return functional.avg_pool2d(whole, 3, 1, 1, count_include_pad=False)


def ground_light(lamp_at: Tensor, lamp_power: Tensor, beam_at: Tensor, beam_way: Tensor, beam_power: Tensor) -> Tensor:
    """Light on the ground: [B, 2, side, side], of street lamps and of the beams of vehicles.

    :param lamp_at: [B, L, 3] m; ``lamp_power`` [B, L]
    :param beam_at: [B, V, 2] m, ``beam_way`` [B, V, 2] unit vectors, ``beam_power`` [B, V]
    """
    axis = (torch.arange(LAMP_SIDE, device=lamp_at.device, dtype=torch.float32) + 0.5 - LAMP_SIDE / 2) * LAMP_CELL_M
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    one = (..., None, None)
    square = (x - lamp_at[..., 0][one]) ** 2 + (y - lamp_at[..., 1][one]) ** 2
    height2 = (lamp_at[..., 2] ** 2).clamp(min=4.0)[one]
    pools = (lamp_power[one] * (1 + square / height2) ** -1.5).sum(dim=1)
    dx, dy = x - beam_at[..., 0][one], y - beam_at[..., 1][one]
    way_x, way_y = beam_way[..., 0][one], beam_way[..., 1][one]
    lit = headlight(dx * way_x + dy * way_y, dy * way_x - dx * way_y)
    return torch.stack([pools, (beam_power[one] * lit).sum(dim=1)], dim=1)


def headlight(ahead: Tensor, aside: Tensor) -> Tensor:
    """Light of dipped headlights on the ground, 1 at its brightest, by the distance ahead and to the side (m)."""
    wide = 0.30 * ahead.clamp(min=0) + 1.1
    fall = (1 + (ahead / 8.5) ** 2) ** -1.5
    return torch.where(ahead > 0, torch.exp(-((aside / wide) ** 2)) * fall * (ahead / 2).clamp(0, 1), 0.0)


def _chance(size: Tensor, rgb: Tensor) -> Tensor:
    """Return a number in 0..1 that stays with a solid: [B, S]."""
    mixed = size @ size.new_tensor([3.7, 7.1, 5.3]) + rgb @ rgb.new_tensor([11.3, 13.7, 17.9])
    return mixed - mixed.floor()


def find_lamps(
    centre: Tensor, size: Tensor, yaw: Tensor, rgb: Tensor, kind: Tensor, eye: Tensor, street: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose the lamps around each sample: street lamps, and the headlamps or tail lamps of vehicles that face the eye.

    Some vehicles stand parked with their lamps off.

    :param eye: [B, 3] between the cameras
    :param street: [B] strength of street lamps
    :return: position [B, L, 3], kind [B, L] (0 none, 1 street lamp, 2 headlamp, 3 tail lamp), and the arguments
        ``lamp_power``, ``beam_at``, ``beam_way`` and ``beam_power`` of :func:`ground_light`
    """
    way = torch.stack([yaw.cos(), yaw.sin()], dim=-1)
    left = torch.stack([-yaw.sin(), yaw.cos()], dim=-1)
    vehicle = (kind == BODY) & (size[..., 0] > 1.4) & (_chance(size, rgb) < 0.65)
    facing = ((eye[:, None, :2] - centre[..., :2]) * way).sum(dim=-1) > 0
    end = centre[..., :2] + way * (torch.where(facing, 0.5, -0.5) * size[..., 0] * 1.03)[..., None]
    level = (centre[..., 2] + 0.1 * size[..., 2])[..., None]
    found = []
    for side in (-0.38, 0.38):
        found.append(torch.cat([end + left * (side * size[..., 1])[..., None], level], dim=-1))
    top = centre.clone()
    top[..., 2] += size[..., 2] / 2 + 0.1
    found.append(top)
    place = torch.cat(found, dim=1)
    off = torch.zeros_like(kind)
    car = torch.where(vehicle, torch.where(facing, 2, 3), off)
    pole = torch.where((kind == LAMP_POLE) & (size[..., 2] > 0), 1, off)
    lamp = torch.cat([car, car, pole], dim=1)
    distance = (place - eye[:, None]).norm(dim=-1) + 1e4 * (lamp == 0)
    best = distance.topk(min(LAMPS, distance.shape[1]), largest=False).indices
    at, what = pick(place, best), pick(lamp, best)
    power = street[:, None] * (what == 1)
    front = centre[..., :2] + way * (0.5 * size[..., :1])
    far = (front - eye[:, None, :2]).norm(dim=-1) + 1e4 * ~vehicle
    beams = far.topk(min(BEAMS, far.shape[1]), largest=False).indices
    return at, what, power, pick(front, beams), pick(way, beams), pick(vehicle.float(), beams)
