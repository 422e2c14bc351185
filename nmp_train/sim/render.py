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
from nmp_train.sim.boxes import BODY, BUILDING, CABIN
from nmp_train.sim.lens import drop_atlas, expose
from nmp_train.sim.light import (
    SHADOW_CELL_M,
    SHADOW_SIDE,
    SHADOW_TILES,
    find_lamps,
    ground_light,
    is_round,
    join_tiles,
    patterns,
    pick,
    shadow_scores,
    shadow_tiles,
)
from nmp_train.sim.meet import FAR_M, gaps_between_leaves, nearest_solid, rotated, unhidden
from nmp_train.sim.shade import HEIGHT_UNIT_M, shade_rays
from nmp_train.sim.surface import Surface
from nmp_train.sim.weather import CAMERAS, Weather

__all__ = ["MAX_SOLIDS", "Ground", "Solids", "Weather", "render", "solids_from_boxes"]

MAX_SOLIDS = 96
"""around one sample: data sets and training draw the ones that matter most"""
STRIP = 44
"""widest strip that is traced together, pixels"""
STRIP_ON_CPU = 176
"""wider, because each operation on a CPU costs its call"""
SOLIDS_PER_STRIP, SOLIDS_PER_SHADOW_TILE = 16, 16
"""solids that a strip or a tile of the shadow map is tested against on a GPU: those that look biggest. A compiled
search works in blocks of a power of two: 17 would cost as much as 32."""
KERB_M = 0.15
"""height of kerbs where the ground has none"""


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
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
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
    :param generator: of the sensor's noise; several share the samples in equal parts, in their order
    :param compiled: fuse the work with ``torch.compile``, for shapes that come again and again
    :return: uint8 [B, N, 3, height, width] RGB
    :raises NmpError: for more than six cameras
    """
    b, n = intrinsics.shape[:2]
    if n > CAMERAS:
        raise NmpError(f"cannot render {n} cameras: weather describes {CAMERAS}")
    device, s = map_from_camera.device, supersample
    generators = generator if isinstance(generator, Sequence) else [generator]
    images = b * n // len(generators)
    noise = torch.cat([torch.randn(images, 3, size[1], size[0], device=device, generator=g) for g in generators])
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
            finisher = _fused(expose, compiled)
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
        find = _fused(find_lamps, compiled)
        hide = _fused(unhidden, compiled)
        at, kind, power, beam_at, beam_way, beam_power = find(
            solids.centre, solids.size, solids.yaw, solids.rgb, solids.kind, middle, weather.street
        )
        shown = hide(kind, at, eye, solids.centre, solids.size, solids.yaw)
        dark = batched or bool(weather.headlights.any())
        shine = _fused(ground_light, compiled)
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
    choose = _fused(_most_seen, compiled)
    everything = [getattr(scene.solids, f.name) for f in fields(Solids)]
    solids = Solids(*choose(scene.rays, scene.eyes, _ends(u), _ends(v), scene.sample, wet, *everything))
    # Two kernels: Triton 3.6 fails to compile the search for the nearest solid fused with the ground.
    nearest = _fused(nearest_solid, compiled)
    radiance = _fused(shade_rays, compiled)
    rag = _fused(gaps_between_leaves, compiled)
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
    radiance: Callable[..., Tensor] = shade_rays

    def trace(part: int, p: int) -> Tensor:
        rows, chosen, sample = split[part][p], index[part][p], samples[p]
        if rows.start == rows.stop:
            return u.new_zeros(1, 3, 0, len(u))
        some = scene.solids[slice(sample, sample + 1)]
        solids = Solids(**{f.name: getattr(some, f.name)[:, chosen] for f in fields(Solids)})
        one, mirror = slice(p, p + 1), part == 1 and wet[sample]
        shapes = (solids.centre, solids.size, solids.yaw, solids.kind)
        round_ones = bool(is_round(solids.kind).any())
        gaps = (
            gaps_between_leaves(scene.rays[one], u, v[rows], patterns(u.device)) if round_ones else u.new_zeros(1, 1, 1)
        )
        met = nearest_solid(scene.rays[one], scene.eyes[one], u, v[rows], gaps, *shapes, round_ones, mirror)
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
    """Return what :func:`shade_rays` takes after its first argument and before its flags.

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
        choose = _fused(_most_shading, compiled)
        draw = _fused(shadow_tiles, compiled)
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
    corners = [rotated(rays, torch.stack([u[:, i], v[:, j], one], dim=-1)) for i, j in around]
    middle = rotated(rays, torch.stack([u.mean(dim=1), v.mean(dim=1), one], dim=-1))
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


def _fused(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


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
