"""What each ray sees: the ground with its kerbs, facades, vehicles, trees, the sky, lamps, and the air between."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nmp_train.sim.boxes import BODY, BUILDING, CABIN, CROWN, PEDESTRIAN
from nmp_train.sim.light import (
    LAMP_CELL_M,
    LAMP_SIDE,
    PATTERN_M,
    SHADOW_CELL_M,
    SHADOW_SIDE,
    headlight,
    pattern_grid,
)
from nmp_train.sim.meet import FAR_M, Met, apply_row

HEIGHT_UNIT_M = 0.005
"""unit of the heights in the top bits of a texel"""

STONE = 0.40

STONE_M, GRAIN = 0.015, 0.28
"""size of the stones in asphalt, and how much their brightness varies"""

SKYLINE_HOUSES, SKYLINE_M = 61, 120.0
"""buildings around the horizon, and how far away they look"""

LAMP_AHEAD_M, LAMP_HEIGHT_M = 2.0, 0.65
"""the car's headlights: ahead of the middle of its cameras, and above the road"""


def shade_rays(
    met: Met,
    texels: Tensor,
    table: Tensor,
    place: Tensor,
    car: Tensor,
    maps: Tensor,
    lamp_map: Tensor,
    pattern: Tensor,
    lamp_at: Tensor,
    lamp_kind: Tensor,
    ray: Tensor,
    eye: Tensor,
    u: Tensor,
    v: Tensor,
    centre: Tensor,
    size: Tensor,
    yaw: Tensor,
    rgb: Tensor,
    kind: Tensor,
    sun: Tensor,
    sunlight: Tensor,
    ambient: Tensor,
    sun_rgb: Tensor,
    sky_rgb: Tensor,
    clouds: Tensor,
    haze: Tensor,
    spray: Tensor,
    wet: Tensor,
    headlights: Tensor,
    lamp_rgb: Tensor,
    phase: Tensor,
    pixel: float,
    sky_rows: int,
    solid_part: tuple[int, int, int, int],
    with_ground: bool,
    with_mirror: bool,
    with_lamps: bool,
    with_facades: bool,
    with_vehicles: bool,
) -> Tensor:
    """Shade what the rays of P strips meet: radiance [P, 3, len(v), len(u)].

    Arguments are those of the scene per strip, [P, ...], but for ``maps`` and ``lamp_map`` [B, C, side, side] and
    the shared ``texels``, ``pattern``, ``u`` and ``v``. Rows from ``sky_rows`` on see no sky, and only pixels inside
    ``solid_part`` (first row, end of rows, first column, end of columns) see solids. The flags leave out what no ray of
    these strips needs: the ground, its mirror images when it is wet, light at night, the details of
    buildings and of vehicles.
    """
    start, matrix, depth_solid, which, mirrored, which_mirror = met
    dx, dy, dz = (apply_row(ray, axis, u, v) for axis in range(3))  # each [P, h, w]
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    ex, ey, ez = (eye[:, i, None, None] for i in range(3))

    def each(value: Tensor) -> Tensor:
        return value[:, None, None]

    def colour_of(value: Tensor) -> Tensor:
        return value[:, :, None, None]

    far = torch.full((), FAR_M, device=u.device)
    # light of the sky: what a horizontal plane receives, and what comes from near the horizon
    sky_light = ambient + 0.15 * sunlight
    horizon = colour_of(sky_rgb * (1.75 * sky_light * (1 - 0.55 * headlights))[:, None])

    half = (size / 2).clamp(min=1e-3)
    any_solid = size.shape[1] > 0

    if with_ground:
        down = dz < -1e-4
        albedo, depth_ground = _ground(texels, table, place, ray, dx, dy, dz, down, ex, ey, ez, pixel)
        depth_ground = torch.where(down, depth_ground, far)
        solid = depth_solid < depth_ground
        depth = torch.minimum(depth_solid, depth_ground)
    else:
        down, solid, depth = None, depth_solid < far, depth_solid
    reached = depth.clamp(max=400.0)
    px, py, pz = ex + reached * dx, ey + reached * dy, ez + reached * dz

    # the sky, deeper blue upwards, with clouds
    up = dz / length
    rise = 0.4 / (up.clamp(0.0, 1.0) + 0.16)
    pattern_x, pattern_y = dx / length * rise, dy / length * rise
    if down is not None:
        pattern_x = torch.where(down, (px + place[:, 0, None, None]) * (1 / PATTERN_M), pattern_x)
        pattern_y = torch.where(down, (py + place[:, 1, None, None]) * (1 / PATTERN_M), pattern_y)
    grid = torch.stack([pattern_grid(pattern_x + each(phase[:, 0])), pattern_grid(pattern_y + each(phase[:, 1]))], -1)
    shape = px.shape
    found = functional.grid_sample(pattern, grid.view(1, -1, shape[2], 2), align_corners=False)
    leaves, puddles, cloud = (found[0, i].view(shape) for i in range(3))
    high = slice(0, sky_rows)
    above, cloud = up[:, high].clamp(0.0, 1.0), cloud[:, high]
    cover = ((cloud - 1 + each(clouds * 1.15)) * 4).clamp(0, 1)[:, None]
    deep = torch.tensor([0.42, 0.60, 0.90], device=u.device)[None, :, None, None]
    blue = 1 - (1 - deep) * (above * 2.2).clamp(max=1)[:, None]
    bright = each(0.75 + 0.5 * clouds) + 0.35 * (cloud - 0.5) * each(clouds)
    sky = horizon * (blue + (bright[:, None] - blue) * cover)
    ways, shapes = torch.stack([dx, dy, dz])[:, :, high], (leaves[:, high], puddles[:, high])
    sky = _before_skyline(sky, horizon, ways, each(phase[:, 0]), *shapes, each(haze), each(headlights))
    sky = functional.pad(sky, (0, 0, 0, shape[1] - sky_rows))

    # light at the place that the ray meets; solids take that of the ground before them
    back = torch.where(solid, (depth - 0.6).clamp(max=400.0), reached)
    lx, ly = ex + back * dx, ey + back * dy
    direct, crown, open_sky = _look_up(maps, lx, ly, SHADOW_SIDE * SHADOW_CELL_M / 2)
    gaps = torch.where(solid, 0.3, ((leaves - 0.62) * 5).clamp(0, 1))
    direct = direct * (1 - crown * (1 - 0.8 * gaps))
    if any_solid:
        top, bottom, left, right = solid_part
        shaded = _shade(
            which[:, top:bottom, left:right],
            depth_solid[:, top:bottom, left:right],
            start,
            matrix,
            u[left:right],
            v[top:bottom],
            half,
            kind,
            rgb,
            yaw,
            sun,
            ray,
            pattern,
            pixel,
            with_lamps,
            with_facades,
            with_vehicles,
        )
        around = (left, len(u) - right, top, len(v) - bottom)
        base, lambert, facing_up, shining = (functional.pad(value, around) for value in shaded)
        direct = torch.where(solid, direct + (1 - direct) * (pz * 0.25).clamp(0, 1), direct)
        falls = torch.where(solid, lambert, each(sun[:, 2])) if with_ground else lambert
        # walls see half the sky, and the ground darkens what is close to it
        wall = 0.52 + 0.35 * facing_up - 0.22 * (1 - pz).clamp(0, 1)
        sky_share = torch.where(solid, wall, 0.25 + 0.75 * open_sky - 0.25 * crown)
        surface = torch.where(solid[:, None], base, albedo) if with_ground else base
    elif with_ground:
        falls, sky_share, surface = each(sun[:, 2]), 0.25 + 0.75 * open_sky - 0.25 * crown, albedo
    else:
        return sky
    sunny = each(sunlight) * falls * direct
    light = (each(ambient) * sky_share)[:, None] * colour_of(sky_rgb) + sunny[:, None] * colour_of(sun_rgb)
    if with_lamps:
        pool, beams = _look_up(lamp_map, lx, ly, LAMP_SIDE * LAMP_CELL_M / 2)
        own = _own_headlights(car, px, py, pz, solid)
        white = each(headlights) * (1.0 * own + 0.5 * beams)
        light = light + pool[:, None] * colour_of(lamp_rgb) * 1.2 + white[:, None]
    if with_mirror and with_ground:
        soaked = (each(wet) * (0.6 + 0.8 * (puddles - 0.5))).clamp(0, 1)
        light = light * (1 - 0.45 * (soaked * ~solid))[:, None]
    colour = surface * light
    if with_lamps and any_solid:
        warm = torch.tensor([1.0, 0.78, 0.50], device=u.device)[None, :, None, None]
        colour = colour + (shining * solid * each(headlights))[:, None] * warm
    if with_mirror and with_ground:
        # a film of water on rough asphalt mirrors at flat angles, a puddle also at steeper ones
        pool_of_water = ((puddles - 0.74) * 5 * each(wet)).clamp(0, 1)
        flat = (1 + dz / length).clamp(0, 1)
        share = (each(wet) * 0.55 + 0.3 * pool_of_water) * flat**4 + 0.08 * pool_of_water
        seen = horizon.expand_as(colour)
        if any_solid:
            other = _pick_colour(rgb, which_mirror) * (0.6 * horizon)
            # asphalt is rough: only the foot of a thing is mirrored clearly, but in a puddle all of it
            height = -(ez + mirrored.clamp(max=400.0) * dz)
            clear = pool_of_water + (1 - pool_of_water) * 0.85 / (1 + height)
            seen = seen + torch.where(mirrored < FAR_M, clear, 0.0)[:, None] * (other - seen)
        share = torch.where(solid, 0.0, share)[:, None]
        colour = colour + share * (seen - colour)
    empty = ~solid if down is None else ~(solid | down)
    colour = torch.where(empty[:, None], sky, colour)
    low = torch.exp(-0.7 * pz.clamp(min=0))
    air = torch.exp(-depth * length * (each(haze) + each(spray) * low))
    air = torch.where(empty, 1.0, air)[:, None]
    colour = horizon * 0.95 + (colour - horizon * 0.95) * air
    if with_lamps:
        on_ground = (down & ~solid) if down is not None else None
        colour = colour + _glare(ray, eye, u, v, lamp_at, lamp_kind, lamp_rgb, headlights, wet, on_ground, with_mirror)
    return colour


def _before_skyline(
    sky: Tensor,
    horizon: Tensor,
    way: Tensor,
    phase: Tensor,
    leaves: Tensor,
    puddles: Tensor,
    haze: Tensor,
    headlights: Tensor,
) -> Tensor:
    """Put trees and buildings, farther away than any solid, before the sky [P, 3, h, w]: no horizon of a city is free.

    :param horizon: [P, 3, 1, 1] radiance of the sky near the horizon
    :param way: [3, P, h, w] of the rays
    :param phase: [P, 1, 1] turns all of it; ``haze`` and ``headlights`` likewise, see ``Weather``
    :param leaves: [P, h, w] of :func:`patterns`, ``puddles`` likewise
    """
    dx, dy, dz = way.unbind(0)
    rise = dz / (dx * dx + dy * dy).sqrt()
    turn = (torch.atan2(dy, dx) * (0.5 / math.pi) + phase + 1.0) % 1.0 * SKYLINE_HOUSES
    house = turn.floor()
    dice = (house * 0.7548777 + (house % 7) * 0.37) % 1.0
    lean = (dice * 13.0) % 1.0
    top = torch.where(dice < 0.62, 0.05 + 0.11 * lean, 0.0)
    wood = 0.015 + 0.075 * puddles + 0.05 * (leaves - 0.5)
    pane_x, pane_y = (turn * 8) % 1.0, (rise * (70.0 + 50.0 * lean)) % 1.0
    pane = (pane_x > 0.35) & (pane_y > 0.4)
    built = (rise < top) & ((turn - house) < 0.55 + 0.4 * lean)
    wall = (0.22 + 0.5 * ((dice * 29.0) % 1.0)) * torch.where(pane, 0.45, 1.0)
    tree = 0.10 + 0.22 * leaves
    far = torch.exp(-SKYLINE_M * haze)
    grey, green = (sky.new_tensor(c)[None, :, None, None] for c in ([1.0, 0.98, 0.96], [0.86, 1.0, 0.72]))
    lit = pane & ((((turn * 8).floor() * 0.618 + (rise * 90.0).floor() * 0.414) % 1.0) < 0.25)
    shown = horizon * wall[:, None] * grey + (0.12 * headlights * lit)[:, None]
    shown = torch.where((rise < wood)[:, None], horizon * tree[:, None] * green, shown)
    shown = horizon + (shown - horizon) * far[:, None]
    return torch.where(((rise < wood) | built)[:, None], shown, sky)


def _ground(
    texels: Tensor,
    table: Tensor,
    place: Tensor,
    ray: Tensor,
    dx: Tensor,
    dy: Tensor,
    dz: Tensor,
    down: Tensor,
    ex: Tensor,
    ey: Tensor,
    ez: Tensor,
    pixel: float,
) -> tuple[Tensor, Tensor]:
    """Return the colour [P, 3, h, w] and depth [P, h, w] of the ground along each ray.

    Raised ground is as high as the city's kerbs. A ray that passes above raised ground at that height ends on it;
    one that does not, and is over raised ground at the road's height, has met the kerb's face in between.
    """
    texel, kerb = place[:, 2, None, None], place[:, 3, None, None]
    raised_units = (kerb * (0.5 / HEIGHT_UNIT_M)).int()
    per_metre = 1 / torch.where(down, -dz, 1.0)  # depth per metre of descent
    zero, top = ez * per_metre, (ez - kerb) * per_metre
    focal_inverse = ray.norm(dim=1).min(dim=-1).values[:, None, None]  # about 1 / f
    footprint = zero * (focal_inverse * (1.2 * pixel) / texel)
    level = torch.log2(footprint.clamp(min=1.0)).round().clamp(max=table.shape[1] - 1)
    entry = table[torch.arange(len(table), device=level.device)[:, None, None], level.long()]
    offset, rows, cols = entry >> 32, ((entry >> 16) & 0xFFFF).int(), (entry & 0xFFFF).int()
    per_texel = torch.exp2(-level) / texel
    ox, oy = ex + place[:, 0, None, None], ey + place[:, 1, None, None]

    def index(x: Tensor, y: Tensor) -> Tensor:
        x = torch.minimum(x.clamp(min=0), cols - 1)
        y = torch.minimum(y.clamp(min=0), rows - 1)
        return offset + (y * cols + x)

    x, y = (ox + top * dx) * per_texel, (oy + top * dy) * per_texel
    on_top = (texels[index(x.int(), y.int())] >> 24) >= raised_units
    depth = torch.where(on_top, top, zero)
    x, y = (ox + depth * dx) * per_texel - 0.5, (oy + depth * dy) * per_texel - 0.5
    x0, y0 = x.floor(), y.floor()
    # Bilinear in integers, two channels in each: weights have 8 bits and sum to 256.
    wx, wy = ((x - x0) * 256).int(), ((y - y0) * 256).int()
    both = (wx * wy) >> 8
    left, upper = x0.int(), y0.int()
    odd = even = torch.zeros_like(both)
    for i, j, weight in ((0, 0, 256 - wx - wy + both), (1, 0, wx - both), (0, 1, wy - both), (1, 1, both)):
        packed = texels[index(left + i, upper + j)]
        even = even + (packed & 0xFF00FF) * weight
        odd = odd + ((packed >> 8) & 0x7F00FF) * weight
    rgb = torch.stack([even & 0xFFFF, odd & 0xFFFF, (even >> 16) & 0xFFFF], dim=1) * (1 / 65280)
    # Asphalt is grains of stone, finer than texels. They average out where a pixel holds many; whole numbers, so that
    # the same stones lie there on every device.
    across = ((ox + depth * dx) * (1 / STONE_M)).floor().int()
    stone = across * 374761393 + ((oy + depth * dy) * (1 / STONE_M)).floor().int() * 668265263
    stone = (stone ^ (stone >> 13)) * 1274126177
    stone = ((stone >> 16) & 255) * (1 / 128) - 1.0
    pixel_m = depth * (focal_inverse * pixel)
    tall = pixel_m * (depth / ez.clamp(min=0.3))
    rgb = rgb * (1 + GRAIN * stone * (STONE_M**2 / (STONE_M**2 + pixel_m * tall)).sqrt())[:, None]
    face = ~on_top & ((odd >> 24) >= raised_units)
    depth = torch.where(face, 0.5 * (top + zero), depth)
    return torch.where(face[:, None], STONE, rgb), depth


def _look_up(maps: Tensor, x: Tensor, y: Tensor, reach: float) -> tuple[Tensor, ...]:
    """Look [B, C, n, n] maps up at x, y [P, h, w] (m from the sample's centre): C times [P, h, w]."""
    b, c = maps.shape[:2]
    p, h, w = x.shape
    grid = torch.stack([x, y], dim=-1) * (1 / reach)
    found = functional.grid_sample(maps, grid.view(b, -1, w, 2), padding_mode="border", align_corners=False)
    return tuple(found[:, i].reshape(p, h, w) for i in range(c))


def _own_headlights(car: Tensor, px: Tensor, py: Tensor, pz: Tensor, solid: Tensor) -> Tensor:
    """Light [P, h, w] of the car's dipped headlights: on the road, and on what stands on it below their cut-off."""
    x, y, way_x, way_y = (car[:, i, None, None] for i in range(4))
    dx, dy = px - x, py - y
    ahead, aside = dx * way_x + dy * way_y - LAMP_AHEAD_M, dy * way_x - dx * way_y
    ground = headlight(ahead, aside)
    # what stands upright faces the beam and is lit farther
    cut = torch.where(pz > LAMP_HEIGHT_M + 0.1, 0.10, 1.0)
    upright = headlight(ahead * 0.5, aside * 0.5) * cut
    return torch.where(solid, upright, ground)


def _pick_colour(rgb: Tensor, which: Tensor) -> Tensor:
    """Take the colours [P, K, 3] of the solids ``which`` [P, h, w]: [P, 3, h, w]."""
    batch = torch.arange(len(rgb), device=rgb.device)[:, None, None]
    return rgb[batch, which].permute(0, 3, 1, 2)


def _shade(
    which: Tensor,
    depth: Tensor,
    start: Tensor,
    matrix: Tensor,
    u: Tensor,
    v: Tensor,
    half: Tensor,
    kind: Tensor,
    rgb: Tensor,
    yaw: Tensor,
    sun: Tensor,
    ray: Tensor,
    pattern: Tensor,
    pixel: float,
    with_lamps: bool,
    with_facades: bool,
    with_vehicles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return colour [P, 3, h, w], share of sunlight, upward part of the normal and light of windows, [P, h, w]."""
    p = len(which)
    batch = torch.arange(p, device=which.device)[:, None, None]
    # one row of numbers for each solid, gathered together
    sun_axes = torch.stack(
        [sun[:, :1] * yaw.cos() + sun[:, 1:2] * yaw.sin(), sun[:, 1:2] * yaw.cos() - sun[:, :1] * yaw.sin()], dim=-1
    )
    numbers = torch.cat([start, matrix.flatten(-2), half, rgb, sun_axes, kind[..., None].float()], dim=-1)
    row = numbers[batch, which]  # [P, h, w, 21]
    near = depth.clamp(max=400.0)
    column = v[:, None]
    way_x, way_y, way_z = (
        row[..., 3 + 3 * i] * u + row[..., 4 + 3 * i] * column + row[..., 5 + 3 * i] for i in range(3)
    )
    x, y, z = (row[..., i] + near * way for i, way in enumerate((way_x, way_y, way_z)))
    hx, hy, hz = (row[..., 12 + i] for i in range(3))
    colour = row[..., 15:18].permute(0, 3, 1, 2)
    what = row[..., 20]
    round_ = (what == float(CROWN)) | (what == float(PEDESTRIAN))
    ax, ay, az = x.abs(), y.abs(), z.abs()
    biggest = torch.maximum(torch.maximum(ax, ay), az) - 1e-5
    on_x, on_y, on_z = ax >= biggest, ay >= biggest, az >= biggest
    nx, ny, nz = (torch.where(round_, c, torch.where(on, c.sign(), 0.0)) for c, on in ((x, on_x), (y, on_y), (z, on_z)))
    lambert = (nx * row[..., 18] + ny * row[..., 19] + nz * sun[:, 2, None, None]).clamp(0, 1)
    side = nz.abs() < 0.5
    # Edges of what is painted on the sides are as soft as a pixel, which is wider on a wall seen at a flat angle.
    edge = near * (ray.norm(dim=1).min(dim=-1).values * pixel)[:, None, None]
    along, over = torch.where(on_x, y * hy, x * hx), (z + 1) * hz
    # leaves of crowns, dirt on walls, both lost in the distance
    skin_x = torch.where(round_, x * hx + 0.7 * y * hy, along)
    skin_y = torch.where(round_, z * hz + 0.5 * y * hy, over)
    grid = torch.stack([pattern_grid(skin_x * 0.16 + hx), pattern_grid(skin_y * 0.16 + hy)], dim=-1)
    found = functional.grid_sample(pattern, grid.view(1, -1, grid.shape[2], 2), align_corners=False)
    leaf, dirt = (found[0, i].view(x.shape) - 0.5 for i in (0, 2))
    rough = torch.where(what > float(CABIN), 0.4 * dirt, 0.0)
    rough = torch.where(what == float(CROWN), 1.9 * leaf + 0.5 * dirt, rough) / (1 + (edge * 4) ** 2)
    colour = colour * (1 + rough)[:, None]
    shining = torch.zeros_like(near)
    flat = torch.where(on_x, way_x * hx, way_y * hy).abs().clamp(min=0.08)
    if with_facades:
        part = ((what == float(BUILDING)) & side & (hz > 1.6)).float()
        colour, lit = _facade(colour, part, along, over, hx * 0.731 + hy * 0.417 + hz * 0.293, dirt, edge / flat, edge)
        if with_lamps:
            shining = lit
    if with_vehicles:
        body, cabin = (((what == float(k)) & side).float() for k in (BODY, CABIN))
        colour = _vehicle(colour, body, cabin, on_x, x, y, z, hx, hy, hz, dirt, edge / flat, edge)
    return colour, lambert, nz.clamp(min=0), shining


def _inside(distance: Tensor, blur: Tensor) -> Tensor:
    """Share of a pixel, ``blur`` m wide, whose middle lies ``distance`` m inside an edge."""
    return (distance / blur + 0.5).clamp(0, 1)


def _put(colour: Tensor, share: Tensor, value: Tensor | float) -> Tensor:
    """Cover a share [P, h, w] of each pixel [P, 3, h, w] with another colour."""
    return colour + share[:, None] * (value - colour)


def _constant(colour: Tensor, *rgb: float) -> Tensor:
    return colour.new_tensor(rgb)[None, :, None, None]


def _facade(
    colour: Tensor, part: Tensor, along: Tensor, over: Tensor, seed: Tensor, dirt: Tensor, edge_u: Tensor, edge: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw windows in frames, shop fronts, ledges and the joints of panels on [P, 3, h, w] walls.

    :param part: [P, h, w] 1 on facades
    :param along: [P, h, w] place on the wall, m; ``over`` likewise, height above its foot
    :param seed: [P, h, w] a number of the building; each has its own grid of windows
    :param edge_u: [P, h, w] width of a pixel along the wall, m; ``edge`` likewise, its height
    :return: colour, and light of lit windows [P, h, w]
    """
    own = seed - seed.floor()
    column_m, storey_m = 2.2 + 2.2 * own, 3.1 + 0.5 * own
    column, storey = along / column_m, over / storey_m
    column_i, storey_i = column.floor(), storey.floor()
    dice = column_i * 0.7548 + storey_i * 0.5698 + own * 3.1
    dice = dice - dice.floor()
    shop = (storey_i < 0.5) & (own > 0.45)
    off_u = (column - column_i - 0.5).abs() * column_m
    off_v = (storey - storey_i - 0.5).abs() * storey_m
    in_u = column_m * torch.where(shop, 0.44, 0.22 + 0.2 * ((own * 7) % 1.0)) - off_u
    in_v = storey_m * torch.where(shop, 0.40, 0.27) - off_v
    rim = torch.minimum(_inside(in_u, edge_u), _inside(in_v, edge))
    pane = torch.minimum(_inside(in_u - 0.09, edge_u), _inside(in_v - 0.09, edge))
    pane = pane * (1 - _inside(torch.where(shop, 0.0, 0.035) - off_u, edge_u))
    frame = part * (rim - pane).clamp(min=0)
    ledge = _inside(off_v - 0.5 * storey_m + 0.14, edge)
    course, panel = over * (1 / 0.42), column * 2
    joints = torch.maximum(
        _inside(((course - course.floor() - 0.5).abs() - 0.44) * 0.42, edge) * (0.12 / (edge + 0.04)).clamp(max=1),
        _inside(((panel - panel.floor() - 0.5).abs() - 0.485) * (0.5 * column_m), edge_u)
        * (0.3 / (edge_u + 0.1)).clamp(max=1),
    )
    tone = 1 + part * (0.22 * ledge - 0.28 * joints * (1 - ledge))
    tone = tone + frame * (torch.where(own > 0.6, 0.45, 1.5) - tone)
    # panes mirror some of the sky, each its own part
    pane = pane * part
    glass = 0.04 + 0.5 * dice * dice * dice + 0.12 * dirt.clamp(min=0)
    colour = _put(colour * tone[:, None], pane, glass[:, None] * _constant(colour, 0.94, 1.0, 1.06))
    return colour, pane * torch.where(dice < 0.3, 0.12 + 0.5 * ((dice * 37) % 1.0), 0.0)


def _vehicle(
    colour: Tensor,
    body: Tensor,
    cabin: Tensor,
    on_x: Tensor,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    hx: Tensor,
    hy: Tensor,
    hz: Tensor,
    dirt: Tensor,
    edge_u: Tensor,
    edge: Tensor,
) -> Tensor:
    """Draw wheels, lamps, plates, grilles, bumpers, doors, panes and pillars on the sides [P, 3, h, w] of vehicles.

    :param body: [P, h, w] 1 on the sides of bodies; ``cabin`` likewise; ``on_x`` says which are front or rear
    :param x: [P, h, w] -1..1 forward in the box, ``y`` to the left, ``z`` up; ``hx``, ``hy`` and ``hz`` half sizes, m
    :param edge_u: [P, h, w] width of a pixel along the side, m; ``edge`` likewise, its height
    """
    ax, ay = x.abs(), y.abs()
    end, flank = body * on_x, body * ~on_x
    upper = _inside((z - 0.86) * hz, edge)
    bumper = end * _inside(0.03 - ((z + 0.55) * hz).abs(), edge) + body * _inside((-0.86 - z) * hz, edge)
    grille = (
        end * (x > 0) * torch.minimum(_inside((0.5 - ay) * hy, edge_u), _inside((0.22 - (z - 0.15).abs()) * hz, edge))
    )
    door = flank * _inside(0.012 - ((x - 0.09).abs() - 0.21).abs() * hx, edge_u)
    tone = 1 - 0.6 * door - 0.65 * bumper.clamp(max=1) - 0.75 * grille + 0.35 * upper * (body + cabin)
    colour = colour * tone[:, None]
    post = torch.where(on_x, (0.90 - ay) * hy, torch.minimum((0.93 - ax) * hx, ax * hx - 0.05))
    pane = cabin * torch.minimum(_inside(post, edge_u), _inside((0.725 - (z - 0.025).abs()) * hz, edge))
    glass = 0.05 + 0.10 * (z + 0.7).clamp(min=0) + 0.2 * dirt.clamp(min=0)
    colour = _put(colour, pane, glass[:, None] * _constant(colour, 0.94, 1.0, 1.06))
    hub = (((ax - 0.62) * hx) ** 2 + ((z + 0.75) * hz) ** 2).sqrt()
    tyre = (0.17 * hx).clamp(max=0.34)
    colour = _put(colour, flank * _inside(tyre - hub, edge), 0.05)
    colour = _put(colour, flank * _inside(0.58 * tyre - hub, edge), 0.42)
    lamp = end * torch.minimum(
        _inside((0.16 - (ay - 0.78).abs()) * hy, edge_u), _inside((0.24 - (z - 0.2).abs()) * hz, edge)
    )
    red = _constant(colour, 0.5, 0.04, 0.03)
    colour = _put(colour, lamp, torch.where((x > 0)[:, None], 0.85, red))
    plate = end * torch.minimum(_inside(0.25 - ay * hy, edge_u), _inside(0.06 - ((z + 0.25) * hz).abs(), edge))
    return _put(colour, plate, 0.72)


def _glare(
    ray: Tensor,
    eye: Tensor,
    u: Tensor,
    v: Tensor,
    at: Tensor,
    kind: Tensor,
    lamp_rgb: Tensor,
    headlights: Tensor,
    wet: Tensor,
    on_ground: Tensor | None,
    with_mirror: bool,
) -> Tensor:
    """Light [P, 3, h, w] that lamps [P, L, 3] spread over the image, and their streaks on wet ground."""
    inverse = _inverse(ray)
    way = at - eye[:, None]

    def project(direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixel = (inverse[:, None] * direction[..., None, :]).sum(dim=-1)
        depth = pixel[..., 2].clamp(min=0.3)
        return pixel[..., 0] / depth, pixel[..., 1] / depth, pixel[..., 2]

    lu, lv, depth = project(way)
    shown = (kind > 0) & (depth > 0.5)
    focal = 1 / ray.norm(dim=1).min(dim=-1).values
    distance = way.norm(dim=-1).clamp(min=1.0)
    bulb = torch.where(kind == 1, 0.16, torch.where(kind == 2, 0.09, 0.06))
    radius = (focal[:, None] * bulb / distance).clamp(min=0.5)
    power = torch.where(kind == 1, 5.0, torch.where(kind == 2, 7.0, 0.8)) * (shown * headlights[:, None])
    # one that is smaller than a pixel is as much dimmer
    power = power * (focal[:, None] * bulb / distance / radius) ** 1.3
    white, red = (torch.tensor(c, device=u.device) for c in ([1.0, 0.96, 0.88], [1.0, 0.10, 0.06]))
    tint = torch.where((kind == 1)[..., None], lamp_rgb[:, None], torch.where((kind == 2)[..., None], white, red))
    strength = power[..., None] * tint  # [P, L, 3]
    one = (..., None, None)
    across = (u - lu[one]) ** 2
    spread = (across + (v[:, None] - lv[one]) ** 2) / (radius * radius)[one]
    blob = (1 + spread) ** -1.5
    total = [(strength[..., i][one] * blob).sum(dim=1) for i in range(3)]
    if with_mirror and on_ground is not None:
        sunk = torch.stack([at[..., 0], at[..., 1], -at[..., 2]], dim=-1) - eye[:, None]
        mu, mv, _ = project(sunk)
        tall = (0.35 * (mv - lv).abs() + radius)[one]
        spread = (u - mu[one]) ** 2 / (radius * radius * 2.0)[one] + (v[:, None] - mv[one]) ** 2 / (tall * tall)
        streak = (1 + spread) ** -1.5 * (0.10 * wet[:, None, None] * on_ground)[:, None]
        total = [t + (strength[..., i][one] * streak).sum(dim=1) for i, t in enumerate(total)]
    return torch.stack(total, dim=1)


def _inverse(matrix: Tensor) -> Tensor:
    """Invert [P, 3, 3]."""
    a, b, c = matrix.unbind(-1)  # columns
    rows = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-2)
    return rows / (a * torch.linalg.cross(b, c)).sum(dim=-1)[..., None, None]
