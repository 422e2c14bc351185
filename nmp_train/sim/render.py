"""Camera images of a simulated city: one ray caster in PyTorch for CPU and GPU.

Every pixel's ray meets the ground (looked up in a :class:`~nmp_train.sim.surface.Surface`, with kerbs) or one of
the solids around the car (boxes and ellipsoids), whichever is nearer. The same call renders data sets on a
CPU and training batches on a GPU; on a GPU ``compiled=True`` fuses it into a few kernels.

An image is traced in strips, each against the few solids that it can see. A strip is a camera of its own, whose
pixels begin at 0, so that all strips of a batch are one tensor on a GPU. On a CPU each is a job for a thread.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nmp.errors import NmpError
from nmp_train.sim.boxes import BODY, BUILDING, CABIN, CROWN, PEDESTRIAN
from nmp_train.sim.lens import drop_atlas, expose
from nmp_train.sim.light import (
    LAMP_CELL_M,
    LAMP_SIDE,
    PATTERN_M,
    SHADOW_CELL_M,
    SHADOW_SIDE,
    SHADOW_TILES,
    find_lamps,
    ground_light,
    headlight,
    is_round,
    join_tiles,
    pattern_grid,
    patterns,
    pick,
    shadow_scores,
    shadow_tiles,
)
from nmp_train.sim.surface import Surface
from nmp_train.sim.weather import CAMERAS, Weather

__all__ = ["Ground", "Solids", "Weather", "render", "solids_from_boxes"]

FAR_M = 1.0e4
STRIP = 88
"""widest strip that is traced together, pixels"""
STRIP_ON_CPU = 176
"""wider, because each operation on a CPU costs its call"""
SOLIDS_PER_STRIP, SOLIDS_PER_SHADOW_TILE = 24, 24
"""solids that a strip or a tile of the shadow map is tested against on a GPU: those that look biggest"""
HEIGHT_UNIT_M = 0.005
"""unit of the heights in the top bits of a texel"""
KERB_M = 0.15
"""height of kerbs where the ground has none"""
STONE = 0.40
STONE_M, GRAIN = 0.015, 0.28
"""size of the stones in asphalt, and how much their brightness varies"""
SKYLINE_HOUSES, SKYLINE_M = 61, 120.0
"""buildings around the horizon, and how far away they look"""
LEAF_TURNS = 14
"""the pattern of leaves repeats so often around the eye"""
LAMP_AHEAD_M, LAMP_HEIGHT_M = 2.0, 0.65
"""the car's headlights: ahead of the middle of its cameras, and above the road"""


@dataclass
class Ground:
    """Surfaces of one or more cities on one device."""

    texels: Tensor
    """[total] packed colour and height of all cities, all levels"""
    table: Tensor
    """[cities, levels, 3] int64: offset, rows, cols"""
    origin: Tensor
    """[cities, 3]: x0, y0 (m), texel (m)"""
    kerb: Tensor
    """[cities] float32 height of what is raised above the road, m"""

    @classmethod
    def of(cls, surfaces: Sequence[Surface], device: torch.device | str = "cpu") -> Ground:
        table, start = [], 0
        for surface in surfaces:
            table.append([(start + offset, rows, cols) for offset, rows, cols in surface.levels])
            start += surface.texels.numel()
        return cls(
            torch.cat([s.texels.to(device) for s in surfaces]),
            torch.tensor(table, dtype=torch.int64, device=device),
            torch.tensor([[s.x0, s.y0, s.resolution] for s in surfaces], dtype=torch.float64, device=device),
            torch.tensor([_kerb_height(s) for s in surfaces], dtype=torch.float32, device=device),
        )


def _kerb_height(surface: Surface) -> float:
    """Return the most common height (m) above the road."""
    offset, rows, cols = surface.levels[0]
    counts = torch.bincount((surface.texels[offset : offset + rows * cols : 7] >> 24).clamp(min=0), minlength=128)
    counts[:4] = 0  # lower than 2 cm is no kerb
    return float(counts.argmax()) * HEIGHT_UNIT_M if counts.any() else KERB_M


@dataclass
class Solids:
    """Boxes and ellipsoids around each sample, all [B, K, ...]; absent ones have zero size."""

    centre: Tensor
    """[B, K, 3] map frame relative to ``Scene.centre``, m"""
    size: Tensor
    """[B, K, 3] length, width, height, m"""
    yaw: Tensor
    """[B, K] rad"""
    rgb: Tensor
    """[B, K, 3] 0..1"""
    kind: Tensor
    """[B, K] int64, as in :mod:`nmp_train.sim.boxes`"""

    def to(self, device: torch.device | str) -> Solids:
        return Solids(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __getitem__(self, index: Tensor | slice) -> Solids:
        return Solids(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def pick(self, index: Tensor) -> Solids:
        """Return the solids ``index`` [B, k] of each sample."""
        return Solids(**{f.name: pick(getattr(self, f.name), index) for f in fields(self)})


def render(
    ground: Ground,
    city: Tensor,
    centre: Tensor,
    intrinsics: Tensor,
    map_from_camera: Tensor,
    solids: Solids,
    weather: Weather,
    size: tuple[int, int],
    *,
    supersample: int = 1,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Tensor:
    """Render the cameras of B samples.

    :param city: [B] int64 index into ``ground``
    :param centre: [B, 2] float64, the map position (m) that all relative coordinates refer to
    :param intrinsics: [B, N, 3, 3] for images of ``size``
    :param map_from_camera: [B, N, 4, 4] float32, translation relative to ``centre``; the first camera looks ahead,
        where the car's headlights point
    :param size: (width, height), pixels
    :param supersample: rays per pixel edge
    :param generator: of the sensor's noise
    :param compiled: fuse the work with ``torch.compile``, for shapes that come again and again
    :return: uint8 [B, N, 3, height, width] RGB
    :raises NmpError: for more than six cameras
    """
    b, n = intrinsics.shape[:2]
    if n > CAMERAS:
        raise NmpError(f"cannot render {n} cameras: weather describes {CAMERAS}")
    device, s = map_from_camera.device, supersample
    noise = torch.randn(b * n, 3, size[1], size[0], device=device, generator=generator)
    atlas = drop_atlas(device)
    batched = compiled or device.type != "cpu"
    with contextlib.ExitStack() as stack:
        if not batched:
            # A thread per strip and per image: they are too small to be worth sharing among threads.
            stack.enter_context(_one_thread_each())
            pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        scene = _Scene.of(ground, city, centre, intrinsics, map_from_camera, solids, weather, size, s, compiled)
        image = (_all_strips(scene, compiled) if batched else _strip_by_strip(scene, pool)).flatten(0, 1)
        if s > 1:
            image = functional.avg_pool2d(image, s)

        def finish(part: slice, with_drops: bool = True, with_blur: bool = True) -> Tensor:
            finisher: Callable[..., Tensor] = _compiled(expose) if compiled else expose
            names = ("exposure", "metering", "tint", "noise", "blur", "vignette", "saturation", "drops", "drops_at")
            each = [_per_camera(getattr(weather, name), n)[part] for name in names]
            return finisher(image[part], noise[part], atlas, *each, with_drops, with_blur)

        if batched:
            done = finish(slice(None))
        else:
            drops, blur = (value.flatten(1).any(dim=1).tolist() for value in (weather.drops, weather.blur))
            jobs = [lambda i=i: finish(slice(i, i + 1), drops[i // n], blur[i // n]) for i in range(b * n)]
            done = torch.cat(_run(pool, jobs))
    return done.unflatten(0, (b, n))


def _per_camera(value: Tensor, n: int) -> Tensor:
    """Return values per sample or per sample and camera as [B * N, ...]."""
    per_sample = value.dim() == 1
    return (value[:, None].expand(-1, n) if per_sample else value[:, :n]).flatten(0, 1)


def _run(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Run jobs in threads, in the inference mode of the caller, which is otherwise a thread's own."""
    inference = torch.is_inference_mode_enabled()

    def one(job: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(inference):
            return job()

    return list(pool.map(one, jobs))


@dataclass
class _Scene:
    """Everything that strips are traced from. P = B * N * T strips, in the order of samples, cameras and columns."""

    texels: Tensor
    solids: Solids
    weather: Weather
    maps: Tensor
    """[B, 3, side, side] of :func:`join_tiles`"""
    lamp_map: Tensor
    """[B, 2, side, side] of :func:`ground_light`"""
    lamp_at: Tensor
    """[B, L, 3]"""
    lamp_kind: Tensor
    """[P, L] of :func:`find_lamps`, 0 for lamps that are hidden from the camera"""
    rays: Tensor
    """[P, 3, 3]: (column in the strip, row, 1) to a direction whose camera depth is 1"""
    eyes: Tensor
    """[P, 3]"""
    sample: Tensor
    """[P]"""
    table: Tensor
    """[B, levels] offset, rows and columns of each level in one number, see :func:`_pack_table`"""
    place: Tensor
    """[B, 4]: centre relative to the texture's corner (x, y), edge of a texel, height of kerbs, m"""
    car: Tensor
    """[B, 4]: middle of the cameras (x, y), direction of travel (x, y)"""
    batch: tuple[int, int, int]
    """samples, cameras, strips per camera"""
    strip: tuple[int, int]
    """width and height of a strip, pixels"""
    width: int
    """of an image; the last strip may reach beyond it"""
    supersample: int

    @classmethod
    def of(
        cls,
        ground: Ground,
        city: Tensor,
        centre: Tensor,
        intrinsics: Tensor,
        map_from_camera: Tensor,
        solids: Solids,
        weather: Weather,
        size: tuple[int, int],
        supersample: int,
        compiled: bool,
    ) -> _Scene:
        b, n = intrinsics.shape[:2]
        device = intrinsics.device
        batched = compiled or device.type != "cpu"
        rays, wide = _strips(intrinsics, map_from_camera, size[0], STRIP if batched else STRIP_ON_CPU)
        t = rays.shape[2]
        eye = map_from_camera[..., :3, 3]
        middle = eye.mean(dim=1)
        ahead = functional.normalize(map_from_camera[:, 0, :2, 2], dim=-1)
        origin = ground.origin[city]
        place = torch.cat([(centre - origin[:, :2]).float(), origin[:, 2:].float(), ground.kerb[city][:, None]], dim=-1)
        find: Callable[..., tuple[Tensor, ...]] = _compiled(find_lamps) if compiled else find_lamps
        hide: Callable[..., Tensor] = _compiled(_unhidden) if compiled else _unhidden
        at, kind, power, beam_at, beam_way, beam_power = find(
            solids.centre, solids.size, solids.yaw, solids.rgb, solids.kind, middle, weather.street
        )
        shown = hide(kind, at, eye, solids.centre, solids.size, solids.yaw)
        dark = batched or bool(weather.headlights.any())
        shine: Callable[..., Tensor] = _compiled(ground_light) if compiled else ground_light
        lamp_map = shine(at, power, beam_at, beam_way, beam_power) if dark else at.new_zeros(b, 2, 1, 1)
        return cls(
            texels=ground.texels,
            solids=solids,
            weather=weather,
            maps=_shadows(solids, weather.sun, batched, compiled),
            lamp_map=lamp_map,
            lamp_at=at,
            lamp_kind=shown[:, :, None].expand(-1, -1, t, -1).flatten(0, 2),
            rays=rays.flatten(0, 2),
            eyes=eye[:, :, None].expand(-1, -1, t, -1).flatten(0, 2),
            sample=torch.arange(b, device=device).repeat_interleave(n * t),
            table=_pack_table(ground.table[city]),
            place=place,
            car=torch.cat([middle[:, :2], ahead], dim=-1),
            batch=(b, n, t),
            strip=(wide, size[1]),
            width=size[0],
            supersample=supersample,
        )

    def columns(self) -> Tensor:
        return _pixels(0, self.strip[0], self.supersample, self.rays.device)

    def rows(self) -> Tensor:
        return _pixels(0, self.strip[1], self.supersample, self.rays.device)

    def joined(self, strips: Tensor) -> Tensor:
        """Put [P, 3, h, w] strips together: [B, N, 3, H, W]."""
        b, n, t = self.batch
        whole = strips.view(b, n, t, *strips.shape[1:]).permute(0, 1, 3, 4, 2, 5).flatten(-2)
        return whole[..., : self.width * self.supersample]


def _strips(intrinsics: Tensor, map_from_camera: Tensor, width: int, widest: int) -> tuple[Tensor, int]:
    """Cut images into T strips of equal width: their rays [B, N, T, 3, 3], as in :class:`_Scene`, and the width."""
    t = -(-width // widest)
    wide = -(-width // t)
    rays = map_from_camera[..., :3, :3] @ torch.linalg.inv_ex(intrinsics.double()).inverse.float()
    start = torch.arange(t, device=rays.device, dtype=torch.float32) * wide
    rays = rays[:, :, None].repeat(1, 1, t, 1, 1)
    rays[..., 2] += rays[..., 0] * start[:, None]
    return rays, wide


def strip_scores(
    intrinsics: Tensor, map_from_camera: Tensor, solids: Solids, size: tuple[int, int], wet: bool
) -> Tensor:
    """Return [B, N, T, S]: how big each solid looks to each strip of each camera on a GPU, 0 when it is out of view.

    A strip is traced against the ``SOLIDS_PER_STRIP`` solids that look biggest. Arguments are those of
    :func:`render`; ``wet`` says whether mirror images are seen as well.
    """
    rays, wide = _strips(intrinsics, map_from_camera, size[0], STRIP)
    b, n, t = rays.shape[:3]
    eyes = map_from_camera[:, :, None, :3, 3].expand(-1, -1, t, -1).flatten(0, 2)
    sample = torch.arange(b).repeat_interleave(n * t)
    mirrored = torch.full((b * n * t,), wet)
    u, v = (torch.tensor([0.0, float(side - 1)]) for side in (wide, size[1]))
    return _scores(rays.flatten(0, 2), eyes, u, v, solids[sample], mirrored).view(b, n, t, -1)


def _pixels(start: int, stop: int, supersample: int, device: torch.device) -> Tensor:
    # Moved by a trifle: a ray exactly along a face of a solid would divide 0 by 0.
    s = supersample
    return (torch.arange(start * s, stop * s, device=device, dtype=torch.float32) + 0.5) / s - 0.49993


def _ends(values: Tensor) -> Tensor:
    return torch.stack([values[0], values[-1]])


def _pack_table(table: Tensor) -> Tensor:
    """Pack offset, rows and columns [..., 3] into one number each, so that a ray looks up one."""
    return (table[..., 0] << 32) | (table[..., 1] << 16) | table[..., 2]


def _all_strips(scene: _Scene, compiled: bool) -> Tensor:
    """Trace all strips of all samples at once: [B, N, 3, H, W]."""
    u, v = scene.columns(), scene.rows()
    wet = scene.weather.wet[scene.sample] > 0
    choose: Callable[..., tuple[Tensor, ...]] = _compiled(_most_seen) if compiled else _most_seen
    everything = [getattr(scene.solids, f.name) for f in fields(Solids)]
    solids = Solids(*choose(scene.rays, scene.eyes, _ends(u), _ends(v), scene.sample, wet, *everything))
    # Two kernels: Triton 3.6 fails to compile the search for the nearest solid fused with the ground.
    nearest: Callable[..., _Met] = _compiled(_nearest) if compiled else _nearest
    radiance: Callable[..., Tensor] = _compiled(_radiance) if compiled else _radiance
    rag: Callable[..., Tensor] = _compiled(_gaps) if compiled else _gaps
    gaps = rag(scene.rays, u, v, patterns(u.device))
    met = nearest(scene.rays, scene.eyes, u, v, gaps, solids.centre, solids.size, solids.yaw, solids.kind, True, True)
    return scene.joined(
        radiance(met, *_arguments(scene, slice(None), solids, u, v), len(v), (0, len(v), 0, len(u)), *[True] * 5)
    )


def _strip_by_strip(scene: _Scene, pool: ThreadPoolExecutor) -> Tensor:
    """Trace strips in threads, the part below the horizon apart from the part above: [B, N, 3, H, W]."""
    u, v = scene.columns(), scene.rows()
    slope = scene.rays[:, 2]  # downwards is affine in (u, v, 1)
    ends, middle = slope[:, :1] * _ends(u), slope[:, 1:2] * v + slope[:, 2:]
    horizon, sky_rows = (
        (edge[:, None] + middle >= -1e-4).sum(dim=1).tolist() for edge in (ends.amin(dim=1), ends.amax(dim=1))
    )
    split = [slice(0, h) for h in horizon], [slice(h, len(v)) for h in horizon]
    mirrors = scene.weather.wet[scene.sample] > 0
    index = []
    for part, mirrored in zip(split, (torch.zeros_like(mirrors), mirrors), strict=True):
        rows = torch.stack([v[[min(p.start, len(v) - 1), max(p.stop - 1, 0)]] for p in part])
        score = _scores(scene.rays, scene.eyes, _ends(u), rows, scene.solids[scene.sample], mirrored)
        index.append([row.nonzero()[:, 0] for row in score])
    wet, night = ((getattr(scene.weather, name) > 0).tolist() for name in ("wet", "headlights"))
    samples = scene.sample.tolist()
    radiance: Callable[..., Tensor] = _radiance

    def trace(part: int, p: int) -> Tensor:
        rows, chosen, sample = split[part][p], index[part][p], samples[p]
        if rows.start == rows.stop:
            return u.new_zeros(1, 3, 0, len(u))
        some = scene.solids[slice(sample, sample + 1)]
        solids = Solids(**{f.name: getattr(some, f.name)[:, chosen] for f in fields(Solids)})
        one, mirror = slice(p, p + 1), part == 1 and wet[sample]
        shapes = (solids.centre, solids.size, solids.yaw, solids.kind)
        round_ones = bool(is_round(solids.kind).any())
        gaps = _gaps(scene.rays[one], u, v[rows], patterns(u.device)) if round_ones else u.new_zeros(1, 1, 1)
        met = _nearest(scene.rays[one], scene.eyes[one], u, v[rows], gaps, *shapes, round_ones, mirror)
        solid = met[2] < FAR_M
        hit = solids.kind[0][met[3][solid]].bincount(minlength=BUILDING + 1).tolist()
        solid_part = (*_extent(solid.any(dim=2)), *_extent(solid.any(dim=1)))
        if not (any(hit) or mirror or night[sample]):
            solids = Solids(**{f.name: getattr(solids, f.name)[:, :0] for f in fields(Solids)})
        arguments = _arguments(scene, one, solids, u, v[rows])
        shown = (hit[BUILDING] > 0, hit[BODY] + hit[CABIN] > 0)
        return radiance(
            met,
            *arguments,
            min(sky_rows[p], rows.stop) - rows.start,
            solid_part,
            part == 1,
            mirror,
            night[sample],
            *shown,
        )

    jobs = [lambda p=p: torch.cat([trace(part, p) for part in (0, 1)], dim=2) for p in range(len(samples))]
    return scene.joined(torch.cat(_run(pool, jobs)))


def _extent(hit: Tensor) -> tuple[int, int]:
    """Return the first index and the end of what is true in [1, n]."""
    where = hit[0].nonzero()[:, 0]
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)


def _arguments(scene: _Scene, which: slice, solids: Solids, u: Tensor, v: Tensor) -> list[Any]:
    """Return what :func:`_radiance` takes after its first argument and before its flags.

    :param which: strips
    :param solids: theirs, [P, K, ...]
    """
    sample = scene.sample[which]
    whole = which == slice(None)
    first = int(sample[0]) if not whole else 0
    some = slice(None) if whole else slice(first, first + 1)  # the samples of these strips
    w = scene.weather
    air = (
        *(getattr(w, name)[sample] for name in ("sun", "sunlight", "ambient", "sun_rgb", "sky_rgb", "clouds")),
        *(getattr(w, name)[sample] for name in ("haze", "spray", "wet", "headlights", "lamp_rgb", "phase")),
    )
    return [
        scene.texels,
        scene.table[sample],
        scene.place[sample],
        scene.car[sample],
        scene.maps[some],
        scene.lamp_map[some],
        patterns(u.device),
        scene.lamp_at[sample],
        scene.lamp_kind[which],
        scene.rays[which],
        scene.eyes[which],
        u,
        v,
        *(getattr(solids, f.name) for f in fields(solids)),
        *air,
        1.0 / scene.supersample,
    ]


def _shadows(solids: Solids, sun: Tensor, batched: bool, compiled: bool) -> Tensor:
    """Return the maps of light around each sample, [B, 3, side, side]: see :func:`shadow_tiles`."""
    edge = SHADOW_SIDE * SHADOW_CELL_M / SHADOW_TILES
    corner = (torch.arange(SHADOW_TILES, device=sun.device) - SHADOW_TILES / 2) * edge
    x0, y0 = corner.repeat(SHADOW_TILES), corner.repeat_interleave(SHADOW_TILES)
    b, tiles = len(sun), SHADOW_TILES**2
    if batched:
        choose: Callable[..., tuple[Tensor, ...]] = _compiled(_most_shading) if compiled else _most_shading
        draw: Callable[..., Tensor] = _compiled(shadow_tiles) if compiled else shadow_tiles
        drawn = draw(x0.repeat(b), y0.repeat(b), *choose(solids.centre, solids.size, solids.yaw, solids.kind, sun))
        return join_tiles(drawn.unflatten(0, (b, tiles)))
    score = shadow_scores(solids.centre, solids.size, sun)
    side = SHADOW_SIDE // SHADOW_TILES
    out = torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(b, tiles, 3, side, side).clone()
    for i in range(b):
        one = solids[slice(i, i + 1)]
        for tile, row in enumerate(score[i]):
            chosen = row.nonzero()[:, 0]
            if len(chosen):
                out[i, tile] = shadow_tiles(
                    x0[tile : tile + 1],
                    y0[tile : tile + 1],
                    one.centre[:, chosen],
                    one.size[:, chosen],
                    one.yaw[:, chosen],
                    one.kind[:, chosen],
                    sun[i : i + 1],
                )[0]
    return join_tiles(out)


def _most_shading(centre: Tensor, size: Tensor, yaw: Tensor, kind: Tensor, sun: Tensor) -> tuple[Tensor, ...]:
    """Return the solids of each tile of the shadow map, as arguments of :func:`shadow_tiles` from the third on."""
    score = shadow_scores(centre, size, sun)
    index = score.flatten(0, 1).topk(min(SOLIDS_PER_SHADOW_TILE, score.shape[2]), dim=1).indices
    sample = torch.arange(len(sun), device=sun.device).repeat_interleave(score.shape[1])
    return *(value[sample[:, None], index] for value in (centre, size, yaw, kind)), sun[sample]


def _most_seen(
    rays: Tensor,
    eyes: Tensor,
    u: Tensor,
    v: Tensor,
    sample: Tensor,
    mirrored: Tensor,
    centre: Tensor,
    size: Tensor,
    yaw: Tensor,
    rgb: Tensor,
    kind: Tensor,
) -> tuple[Tensor, ...]:
    """Return the fields of the solids [P, K, ...] that look biggest to each strip, see :func:`_scores`."""
    solids = Solids(centre, size, yaw, rgb, kind)
    score = _scores(rays, eyes, u, v, solids[sample], mirrored)
    index = score.topk(min(SOLIDS_PER_STRIP, score.shape[1]), dim=1).indices
    return tuple(value[sample[:, None], index] for value in (centre, size, yaw, rgb, kind))


def _scores(rays: Tensor, eyes: Tensor, u: Tensor, v: Tensor, solids: Solids, mirrored: Tensor) -> Tensor:
    """Return [P, S]: how big each solid looks to each strip, 0 when the strip cannot see it.

    :param u: [2] or [P, 2] first and last column; ``v`` likewise the rows
    :param mirrored: [P] whether to see mirror images below the ground as well
    """
    u, v = u.expand(len(rays), 2), v.expand(len(rays), 2)
    one = torch.ones_like(u[:, 0])
    around = ((0, 0), (1, 0), (1, 1), (0, 1))
    corners = [_rotated(rays, torch.stack([u[:, i], v[:, j], one], dim=-1)) for i, j in around]
    middle = _rotated(rays, torch.stack([u.mean(dim=1), v.mean(dim=1), one], dim=-1))
    offset = solids.centre - eyes[:, None]
    half = solids.size / 2
    cos, sin = solids.yaw.cos(), solids.yaw.sin()
    seen, seen_mirrored = solids.size[..., 0] > 0, (solids.size[..., 0] > 0) & mirrored[..., None]
    sunk = -solids.centre[..., 2] - eyes[:, None, 2]
    # planes through the eye and the edges of the strip; their normals point into the strip
    normals = [torch.linalg.cross(corners[i], corners[i - 1]) for i in range(4)]
    for normal in (*normals, middle):
        normal = normal * torch.sign((normal * middle).sum(dim=-1, keepdim=True))
        x, y, z = (normal[:, None, i] for i in range(3))
        reach = (
            (x * cos + y * sin).abs() * half[..., 0] + (y * cos - x * sin).abs() * half[..., 1] + z.abs() * half[..., 2]
        )
        level = offset[..., 0] * x + offset[..., 1] * y + reach
        seen = seen & (level + offset[..., 2] * z > 0)
        seen_mirrored = seen_mirrored & (level + sunk * z > 0)
    looks = half.norm(dim=-1) / (offset.norm(dim=-1) + 0.1)
    return torch.where(seen | seen_mirrored, looks, 0.0)


def _rotated(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _apply(matrix: Tensor, axis: int, u: Tensor, v: Tensor) -> Tensor:
    """Row ``axis`` of matrix @ (u, v, 1). Written out, because a matrix product would not fuse with what follows."""
    part = matrix[..., axis, :, None, None]
    return part[..., 0, :, :] * u + (part[..., 1, :, :] * v[:, None] + part[..., 2, :, :])


_Met = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Result of :func:`_nearest`"""


def _gaps(ray: Tensor, u: Tensor, v: Tensor, pattern: Tensor) -> Tensor:
    """Return [P, h, w]: how far leaves leave each ray free at the rim of a crown, see :func:`_ball`.

    It depends on the direction alone, so that one look-up serves all crowns of a strip.
    """
    dx, dy, dz = (_apply(ray, axis, u, v) for axis in range(3))
    turn = torch.atan2(dy, dx) * (LEAF_TURNS / (2 * math.pi))
    rise = dz / (dx * dx + dy * dy).sqrt() * (LEAF_TURNS / (2 * math.pi))
    grid = torch.stack([pattern_grid(turn), pattern_grid(rise)], dim=-1)
    leaf = functional.grid_sample(pattern[:, :1], grid.view(1, -1, len(u), 2), align_corners=False)[0, 0].view(dx.shape)
    # 0.5 at most for most rays, but through a few one sees between the leaves in the middle too
    return 0.55 * leaf + ((leaf - 0.86) * 10).clamp(0, 0.5)


def _nearest(
    ray: Tensor,
    eye: Tensor,
    u: Tensor,
    v: Tensor,
    gaps: Tensor,
    centre: Tensor,
    size: Tensor,
    yaw: Tensor,
    kind: Tensor,
    with_round: bool,
    with_mirror: bool,
) -> _Met:
    """Find the solid, and the solid's mirror image, that each ray of P strips meets first.

    :param gaps: [P, h, w] of :func:`_gaps`
    :return: where the eye is in each solid's axes [P, K, 3], the way there from pixels [P, K, 3, 3], depth of the
        nearest solid [P, h, w] (``FAR_M`` for none), its number, and both for the mirror images
    """
    half = (size / 2).clamp(min=1e-3)
    start, matrix = _axes_of(centre, half, yaw, ray, eye)
    if size.shape[1] == 0:
        nothing = torch.full((len(ray), len(v), len(u)), FAR_M, device=u.device)
        number = torch.zeros_like(nothing, dtype=torch.int64)
        return start, matrix, nothing, number, nothing, number
    depths, mirrored = _meet(start, matrix, u, v, gaps, size, kind, centre, half, with_round, with_mirror)
    depth, which = depths.min(dim=1)
    if mirrored is None:
        return start, matrix, depth, which, torch.full_like(depth, FAR_M), which
    return start, matrix, depth, which, *mirrored.min(dim=1)


def _radiance(
    met: _Met,
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
    dx, dy, dz = (_apply(ray, axis, u, v) for axis in range(3))  # each [P, h, w]
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


def _unhidden(kind: Tensor, at: Tensor, eye: Tensor, centre: Tensor, size: Tensor, yaw: Tensor) -> Tensor:
    """Return the kinds [B, N, L] of lamps ``at`` [B, L, 3], 0 where a solid lies between lamp and eye [B, N, 3]."""
    turn = _turn(yaw, (size / 2).clamp(min=1e-3))[:, None, :, None]  # [B, 1, K, 1, 3, 3]
    way = at[:, None] - eye[:, :, None]
    start = (turn * (eye[:, :, None] - centre[:, None])[:, :, :, None, None]).sum(dim=-1)
    inside = (turn * way[:, :, None, :, None]).sum(dim=-1)  # [B, N, K, L, 3]
    inside = torch.where(inside.abs() < 1e-6, 1e-6, inside)
    middle, reach = -start / inside, 1 / inside.abs()
    near, far = (middle - reach).amax(dim=-1), (middle + reach).amin(dim=-1)
    between = (near < far) & (near > 0) & (near < 0.98) & (size[:, None, :, None, 0] > 0)
    return kind[:, None] * ~between.any(dim=2)


def _turn(yaw: Tensor, half: Tensor) -> Tensor:
    """Return [..., 3, 3] from directions in the map to a solid's axes, in units of its half sizes [..., 3]."""
    cos, sin = yaw.cos(), yaw.sin()
    zero, unit = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, unit], dim=-1).unflatten(-1, (3, 3))
    return turn / half[..., None]


def _axes_of(centre: Tensor, half: Tensor, yaw: Tensor, ray: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """Return rays in each solid's axes, in which it is the cube [-1, 1]^3 or the unit ball.

    :return: [P, K, 3] where the eye is, [P, K, 3, 3] from (u, v, 1) to directions
    """
    turn = _turn(yaw, half)
    start = (turn * (eye[:, None] - centre)[..., None, :]).sum(dim=-1)
    matrix = (turn[..., None] * ray[:, None, None]).sum(dim=-2)
    return start, matrix


def _meet(
    start: Tensor,
    matrix: Tensor,
    u: Tensor,
    v: Tensor,
    gaps: Tensor,
    size: Tensor,
    kind: Tensor,
    centre: Tensor,
    half: Tensor,
    with_round: bool,
    with_mirror: bool,
) -> tuple[Tensor, Tensor | None]:
    """Depth at which each ray meets each solid, [P, K, h, w], and each solid's mirror image below the ground.

    It is ``FAR_M`` where it does not.
    """
    one = (..., None, None)
    there = (size[..., 0] > 0)[one]
    nears, fars = [], []
    inverse = start
    for axis in range(3):
        inverse = 1 / _apply(matrix, axis, u, v)
        middle, reach = -start[..., axis][one] * inverse, inverse.abs()
        nears.append(middle - reach)
        fars.append(middle + reach)
    near_xy, far_xy = torch.maximum(nears[0], nears[1]), torch.minimum(fars[0], fars[1])
    near, far = torch.maximum(near_xy, nears[2]), torch.minimum(far_xy, fars[2])
    depth = torch.where((near < far) & (near > 0.2) & there, near, FAR_M)
    if with_round:
        rim = gaps[:, None] * (kind == CROWN)[one]
        gram = matrix.transpose(-1, -2) @ matrix
        in_u = gram[..., 0, 0][one] * (u * u) + 2 * gram[..., 0, 2][one] * u
        in_v = (gram[..., 1, 1][one] * (v * v) + 2 * gram[..., 1, 2][one] * v).transpose(-1, -2) + gram[..., 2, 2][one]
        square = in_u + in_v + gram[..., 0, 1][one] * (2 * u * v[:, None])
        depth = torch.where(is_round(kind)[one], _ball(start, matrix, square, u, v, rim, there), depth)
    if not with_mirror:
        return depth, None
    below = start[..., 2] + 2 * centre[..., 2] / half[..., 2]  # the eye above the mirror image
    middle, reach = -below[one] * inverse, inverse.abs()
    near, far = torch.maximum(near_xy, middle - reach), torch.minimum(far_xy, middle + reach)
    mirrored = torch.where((near < far) & (near > 0.2) & there, near, FAR_M)
    if with_round:
        start = torch.cat([start[..., :2], below[..., None]], dim=-1)
        mirrored = torch.where(is_round(kind)[one], _ball(start, matrix, square, u, v, rim, there), mirrored)
    return depth, mirrored


def _ball(start: Tensor, matrix: Tensor, square: Tensor, u: Tensor, v: Tensor, rim: Tensor, there: Tensor) -> Tensor:
    """Depth [P, K, h, w] at which |start + depth * way| = 1; ``square`` is |way|^2, a polynomial of u and v too.

    A ray whose squared distance from the middle exceeds 1 - ``rim`` passes between the leaves.
    """
    one = (..., None, None)
    begin = (start[..., None, :] @ matrix)[..., 0, :]  # [P, K, 3]
    along = begin[..., 0][one] * u + (begin[..., 1][one] * v[:, None] + begin[..., 2][one])
    root = along * along - square * (start.square().sum(dim=-1) - 1)[one]
    depth = -(along + root.clamp(min=0).sqrt()) / square
    return torch.where((root > rim * square) & (depth > 0.2) & there, depth, FAR_M)


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


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let each operation run on the thread that calls it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def solids_from_boxes(
    centre: np.ndarray,
    size: np.ndarray,
    yaw: np.ndarray,
    rgb: np.ndarray,
    kind: np.ndarray,
    about: np.ndarray,
    limit: int,
) -> Solids:
    """Pack the ``limit`` solids that matter most at ``about`` [2] (m) into a [1, limit] batch, relative to it."""
    radius = np.linalg.norm(size, axis=1) / 2
    distance = np.linalg.norm(centre[:, :2] - about, axis=1) - np.linalg.norm(size[:, :2], axis=1) / 2
    # A building far away shows more than a cone that is nearer, but what is near matters most.
    order = np.argsort((np.maximum(distance, 0) + 3.0) / np.sqrt(np.maximum(radius, 1e-3)), kind="stable")[:limit]

    def pack(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(1, limit, *values.shape[1:], dtype=dtype)
        out[0, : len(order)] = torch.as_tensor(values[order]).to(dtype)
        return out

    shifted = centre - np.array([about[0], about[1], 0.0])
    return Solids(
        pack(shifted, torch.float32),
        pack(size, torch.float32),
        pack(yaw, torch.float32),
        pack(rgb, torch.float32),
        pack(kind, torch.int64),
    )
