"""Camera images of a simulated city: one ray caster in PyTorch for CPU and GPU.

Every pixel's ray meets the ground plane (looked up in a :class:`~nmp_train.sim.surface.Surface`) or one of
the solids around the car (boxes and ellipsoids), whichever is nearer. The same call renders data sets on a
CPU and training batches on a GPU; on a GPU ``compiled=True`` fuses it into a few kernels.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nmp_train.sim.surface import Surface

ROUND_KINDS = (3, 5)  # tree crowns and pedestrians are ellipsoids
GLASS_KIND, BUILDING_KIND = 1, 2
FAR_M = 1.0e4
SHADOW_SIDE, SHADOW_CELL_M = 320, 0.3
STRIP = 100
"""columns of an image that are traced together on a CPU, against the solids that they can see"""


@dataclass
class Weather:
    """Light and air, one value per sample: tensors [B] unless said otherwise."""

    sun: Tensor
    """[B, 3] unit vector towards the sun, map frame"""
    sunlight: Tensor
    """strength of the direct light"""
    ambient: Tensor
    """strength of the light of the sky"""
    haze: Tensor
    """1 / visibility, 1 / m"""
    headlights: Tensor
    """0 by day, 1 at night"""
    wet: Tensor
    """0 dry .. 1 wet: the ground reflects the sky"""
    noise: Tensor
    """standard deviation of the sensor's noise, in 0..1 units"""
    exposure: Tensor
    """gain"""

    @classmethod
    def sample(cls, count: int, generator: torch.Generator, kind: str | None = None) -> Weather:
        """Draw conditions.

        ``kind`` holds the words rain, night, both or neither (day); None mixes them about 70 : 20 : 10, like nuScenes.
        """

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        draw = torch.rand(count, generator=generator)
        rain, night = (draw >= 0.7) & (draw < 0.9), draw >= 0.9
        if kind is not None:
            rain, night = (torch.full((count,), word in kind) for word in ("rain", "night"))
        azimuth, height = uniform(0, 6.2832), uniform(0.3, 1.2)
        sun = torch.stack([azimuth.cos() * height.cos(), azimuth.sin() * height.cos(), height.sin()], dim=-1)
        overcast = (torch.rand(count, generator=generator) < 0.35) | rain
        sunlight = torch.where(overcast, uniform(0.0, 0.25), uniform(0.7, 1.3))
        ambient = torch.where(overcast, uniform(0.6, 1.0), uniform(0.35, 0.6))
        return cls(
            sun=sun,
            sunlight=torch.where(night, torch.zeros(count), sunlight),
            ambient=torch.where(night, uniform(0.05, 0.16), ambient),
            haze=torch.where(rain, uniform(0.008, 0.025), uniform(0.001, 0.006)),
            headlights=night.float(),
            wet=torch.where(rain, uniform(0.4, 1.0), torch.zeros(count)),
            noise=torch.where(night, uniform(0.03, 0.06), uniform(0.005, 0.02)),
            exposure=uniform(0.75, 1.35) * torch.where(night, uniform(1.6, 2.4), torch.ones(count)),
        )

    def to(self, device: torch.device | str) -> Weather:
        return Weather(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass
class Ground:
    """Surfaces of one or more cities on one device."""

    texels: Tensor
    """[total] packed RGB of all cities, all levels"""
    table: Tensor
    """[cities, levels, 3] int64: offset, rows, cols"""
    origin: Tensor
    """[cities, 3]: x0, y0 (m), texel (m)"""

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
        )


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
    """[B, K] int64, as in :mod:`nmp_train.sim.traffic`"""

    def to(self, device: torch.device | str) -> Solids:
        return Solids(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


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
    :param map_from_camera: [B, N, 4, 4] float32, translation relative to ``centre``
    :param size: (width, height), pixels
    :param supersample: rays per pixel edge
    :return: uint8 [B, N, 3, height, width] RGB
    """
    width, height = size
    device = map_from_camera.device
    b, n = intrinsics.shape[:2]
    s = supersample
    k_inverse = torch.linalg.inv(intrinsics.double()).float()
    ray = map_from_camera[..., :3, :3] @ k_inverse  # [B, N, 3, 3]: (u, v, 1) to a direction whose camera depth is 1
    cast = _compiled(_shadow_map) if compiled else _shadow_map
    shadow = cast(solids.centre, solids.size, solids.yaw, weather.sun)
    u = (torch.arange(width * s, device=device, dtype=torch.float32) + 0.5) / s - 0.5
    v = (torch.arange(height * s, device=device, dtype=torch.float32) + 0.5) / s - 0.5
    trace: Callable[..., Tensor] = _compiled(_trace) if compiled else _trace
    eye = map_from_camera[..., :3, 3]
    origin = (centre - ground.origin[city, :2]).float()  # centre relative to the texture's corner
    texel = ground.origin[city, 2].float()
    table = ground.table[city]
    common = (ground.texels, table, origin, texel, shadow)
    if device.type == "cpu":

        def one_camera(sample: int, camera: int) -> Tensor:
            one = slice(sample, sample + 1)
            columns = []
            for part in u.split(STRIP * s):
                chosen = _visible(solids, sample, ray[sample, camera], eye[sample, camera], part, v)
                columns.append(
                    trace(
                        ground.texels,
                        *(t[one] for t in common[1:]),
                        ray[one, camera : camera + 1],
                        eye[one, camera : camera + 1],
                        part,
                        v,
                        *(getattr(solids, f.name)[one, chosen] for f in fields(solids)),
                        *(getattr(weather, f.name)[one] for f in fields(weather)),
                        1.0 / s,
                        bool(_is_round(solids.kind[sample, chosen]).any()),
                    )
                )
            return torch.cat(columns, dim=-1)

        # A thread per camera: strips are too small to be worth sharing among threads.
        jobs = [(sample, camera) for sample in range(b) for camera in range(n)]
        with _one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
            image = torch.cat(list(pool.map(lambda job: one_camera(*job), jobs))).reshape(
                b, n, 3, height * s, width * s
            )
    else:
        image = trace(
            *common,
            ray,
            eye,
            u,
            v,
            *(getattr(solids, f.name) for f in fields(solids)),
            *(getattr(weather, f.name) for f in fields(weather)),
            1.0 / s,
            True,
        )
    if s > 1:
        image = functional.avg_pool2d(image.flatten(0, 1), s).unflatten(0, (b, n))
    noise = torch.randn(image.shape, device=device, generator=generator)
    image = image + weather.noise.view(-1, 1, 1, 1, 1) * noise
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def _visible(solids: Solids, sample: int, ray: Tensor, eye: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the indices of the solids whose bounding sphere can meet a strip of the image (CPU only)."""
    offset = solids.centre[sample] - eye
    radius = solids.size[sample].norm(dim=-1) / 2
    left, right = (
        torch.stack([ray @ torch.stack([e, y, torch.ones(())]) for y in (v[0], v[-1])]) for e in (u[0], u[-1])
    )
    # planes through the eye and the strip's vertical edges; their normals point into the strip
    inward_left = torch.linalg.cross(left[1], left[0])
    inward_right = torch.linalg.cross(right[0], right[1])
    middle = ray @ torch.stack([u.mean(), v.mean(), torch.ones(())])
    keep = radius > 0.01
    for normal in (inward_left, inward_right):
        normal = normal / normal.norm() * torch.sign((normal * middle).sum())
        keep &= offset @ normal > -radius
    keep &= offset @ (middle / middle.norm()) > -radius
    return keep.nonzero()[:, 0]


def _shadow_map(centre: Tensor, size: Tensor, yaw: Tensor, sun: Tensor) -> Tensor:
    """Return [B, side, side]: how much of the sun each patch of ground around the centre receives.

    A patch lies in shadow when the line from it towards the sun meets a solid; under a solid it is dark in any light.
    """
    axis = (
        torch.arange(SHADOW_SIDE, device=centre.device, dtype=torch.float32) + 0.5 - SHADOW_SIDE / 2
    ) * SHADOW_CELL_M
    per_solid = (slice(None), slice(None), None, None)  # [B, K] to [B, K, 1, 1]
    half = size / 2
    top = (centre[..., 2] + half[..., 2]).clamp(min=0)
    # the shadow of the upper edge, drawn as a footprint that is stretched along the light
    slope = sun[:, None, :2] / sun[:, None, 2:].clamp(min=0.15)
    tip_x, tip_y = (slope[..., i] * top * 0.8 for i in range(2))
    length2 = (tip_x**2 + tip_y**2).clamp(min=1e-3)[per_solid]
    tip_x, tip_y = tip_x[per_solid], tip_y[per_solid]
    dx, dy = axis[None, :] - centre[..., 0][per_solid], axis[:, None] - centre[..., 1][per_solid]
    along = ((-dx * tip_x - dy * tip_y) / length2).clamp(0, 1)
    px, py = dx + along * tip_x, dy + along * tip_y
    cos, sin = yaw.cos()[per_solid], yaw.sin()[per_solid]
    inside = ((cos * px + sin * py).abs() < half[..., 0][per_solid]) & (
        (-sin * px + cos * py).abs() < half[..., 1][per_solid]
    )
    lit = torch.where(inside, torch.where(along < 0.02, 0.15, 0.35), 1.0).amin(dim=1)
    return functional.avg_pool2d(lit[:, None], 3, 1, 1)[:, 0]


def _texture(texels: Tensor, table: Tensor, x: Tensor, y: Tensor, footprint: Tensor, texel: Tensor) -> Tensor:
    """Look the ground up at x, y (m from the texture's corner), [B, ...] -> [B, 3, ...] in 0..1."""
    lead = (-1,) + (1,) * (x.dim() - 1)
    step = texel.view(lead)
    levels = table.shape[1]
    level = torch.log2((footprint / step).clamp(min=1.0)).round().long().clamp(0, levels - 1)
    batch = torch.arange(x.shape[0], device=x.device).view(lead)
    entry = table[batch, level]  # [B, ..., 3]
    offset, rows, cols = entry[..., 0], entry[..., 1], entry[..., 2]
    scale = step * torch.exp2(level.float())
    fx, fy = x / scale - 0.5, y / scale - 0.5
    x0, y0 = fx.floor(), fy.floor()
    wx, wy = fx - x0, fy - y0
    total = torch.zeros(x.shape[0], 3, *x.shape[1:], device=x.device)
    for dy in (0, 1):
        for dx in (0, 1):
            xi = torch.minimum((x0.long() + dx).clamp(min=0), cols - 1)
            yi = torch.minimum((y0.long() + dy).clamp(min=0), rows - 1)
            packed = texels[offset + yi * cols + xi]
            weight = ((wx if dx else 1 - wx) * (wy if dy else 1 - wy))[:, None]
            rgb = torch.stack([packed & 255, (packed >> 8) & 255, (packed >> 16) & 255], dim=1)
            total = total + weight * rgb.float()
    return total / 255


def _trace(
    texels: Tensor,
    table: Tensor,
    origin: Tensor,
    texel: Tensor,
    shadow: Tensor,
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
    haze: Tensor,
    headlights: Tensor,
    wet: Tensor,
    _noise: Tensor,
    exposure: Tensor,
    pixel: float,
    with_round: bool,
) -> Tensor:
    """Shade every ray: [B, N, 3, len(v), len(u)], linear 0..1 before noise."""
    b = ray.shape[0]
    one = torch.ones((), device=u.device)
    spread = ray[:, :, None, None]  # [B, N, 1, 1, 3, 3]
    dx, dy, dz = (_apply(spread, axis, u[None, :], v[:, None]) for axis in range(3))  # each [B, N, h, w]
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    per_sample = (-1, 1, 1, 1)

    # the ground plane z = 0
    eye_z = eye[..., 2, None, None]
    down = dz < -1e-4
    depth_ground = torch.where(down, -eye_z / torch.where(down, dz, -one), FAR_M * one)
    gx = eye[..., 0, None, None] + depth_ground * dx
    gy = eye[..., 1, None, None] + depth_ground * dy
    focal_inverse = ray.norm(dim=2).min(dim=-1).values[..., None, None]  # about 1 / f
    footprint = depth_ground * focal_inverse * pixel * 1.6
    albedo = _texture(
        texels, table, gx + origin[:, 0].view(per_sample), gy + origin[:, 1].view(per_sample), footprint, texel
    ).permute(0, 2, 1, 3, 4)
    sx = (gx / SHADOW_CELL_M + SHADOW_SIDE / 2).clamp(0, SHADOW_SIDE - 1).long()
    sy = (gy / SHADOW_CELL_M + SHADOW_SIDE / 2).clamp(0, SHADOW_SIDE - 1).long()
    batch = torch.arange(b, device=u.device).view(per_sample)
    lit = shadow[batch, sy, sx]
    sun_z = sun[:, 2].view(per_sample)
    distance = depth_ground * length
    lamp = headlights.view(per_sample)
    beam = lamp * 1.1 * torch.exp(-((depth_ground / 16) ** 2))
    light = ambient.view(per_sample) * (0.6 + 0.4 * lit) + sunlight.view(per_sample) * sun_z * lit + beam
    colour_ground = albedo * light[:, :, None]

    # the sky, brighter towards the horizon
    up = (dz / length).clamp(0, 1)
    sky_light = (ambient + 0.4 * sunlight).view(per_sample)
    sky_tint = torch.tensor([0.85, 0.93, 1.0], device=u.device).view(1, 1, 3, 1, 1)
    deep = torch.tensor([0.45, 0.62, 0.95], device=u.device).view(1, 1, 3, 1, 1)
    blue = (up * 2).clamp(max=1)[:, :, None] * (sunlight > 0.3).float().view(-1, 1, 1, 1, 1)
    sky = sky_light[:, :, None] * (sky_tint * (1 - blue) + deep * blue) * (1 - 0.8 * lamp[:, :, None])
    mirror = wet.view(per_sample) * (1 + dz / length).clamp(0, 1) ** 4 * 0.8
    colour_ground = (
        colour_ground * (1 - mirror[:, :, None]) * (1 - 0.35 * wet.view(-1, 1, 1, 1, 1)) + sky * mirror[:, :, None]
    )

    # solids: in its own axes each is the cube [-1, 1]^3 or the unit ball
    half = (size / 2).clamp(min=1e-3)
    cos, sin = yaw.cos(), yaw.sin()
    zero, unit = torch.zeros_like(cos), torch.ones_like(cos)
    turn = (
        torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, unit], dim=-1).unflatten(-1, (3, 3)) / half[..., None]
    )
    start = (turn[:, None] * (eye[:, :, None] - centre[:, None])[..., None, :]).sum(dim=-1)  # [B, N, K, 3]
    # [B, N, K, 3, 3]: (u, v, 1) to the ray's direction in the solid's axes
    matrix = (turn[:, None, ..., None] * ray[:, :, None, None]).sum(dim=-2)
    if size.shape[1]:
        depth_solid, which = _nearest_solid(start, matrix, u, v, size, kind, with_round).min(dim=2)
        base, lambert = _shade_solid(which, depth_solid, start, matrix, u, v, half, kind, rgb, yaw, sun)
    else:
        depth_solid, base, lambert = torch.full_like(depth_ground, FAR_M), sky, up
    beam_solid = lamp * 0.9 * torch.exp(-((depth_solid / 22) ** 2))
    light_solid = ambient.view(per_sample) * 0.85 + sunlight.view(per_sample) * lambert + beam_solid
    colour_solid = base * light_solid[:, :, None]

    solid = depth_solid < depth_ground
    colour = torch.where(solid[:, :, None], colour_solid, torch.where(down[:, :, None], colour_ground, sky))
    distance = torch.where(solid, depth_solid * length, distance)
    air = torch.exp(-distance * haze.view(per_sample))
    nothing = ~solid & ~down
    air = torch.where(nothing, one, air)
    veil = sky_light[:, :, None] * sky_tint * (1 - 0.8 * lamp[:, :, None])
    colour = colour * air[:, :, None] + veil * (1 - air[:, :, None])
    exposed = colour * exposure.view(-1, 1, 1, 1, 1)
    return (exposed / (1 + 0.25 * exposed)).clamp(0, 1) ** 0.6  # soft shoulder and display gamma


def _apply(matrix: Tensor, axis: int, u: Tensor, v: Tensor) -> Tensor:
    """Row ``axis`` of matrix @ (u, v, 1). Written out, because a matrix product would not fuse with what follows."""
    return matrix[..., axis, 0] * u + matrix[..., axis, 1] * v + matrix[..., axis, 2]


def _nearest_solid(
    start: Tensor, matrix: Tensor, u: Tensor, v: Tensor, size: Tensor, kind: Tensor, with_round: bool
) -> Tensor:
    """Depth at which each ray meets each solid: [B, N, K, h, w], ``FAR_M`` where it does not."""
    start = start[..., None, None]  # [B, N, K, 3, 1, 1]
    matrix = matrix[:, :, :, None, None]  # [B, N, K, 1, 1, 3, 3]
    near, far = torch.full((), -FAR_M, device=u.device), torch.full((), FAR_M, device=u.device)
    half_b, square, inner = 0.0 * near, 0.0 * near, -torch.ones_like(near)
    for axis in range(3):
        d = _apply(matrix, axis, u[None, :], v[:, None])
        d = torch.where(d.abs() < 1e-9, 1e-9, d)
        inverse = 1 / d
        middle, reach = -start[:, :, :, axis] * inverse, inverse.abs()
        near, far = torch.maximum(near, middle - reach), torch.minimum(far, middle + reach)
        if with_round:
            half_b = half_b + start[:, :, :, axis] * d
            square = square + d * d
            inner = inner + start[:, :, :, axis] ** 2
    depth = torch.where((near < far) & (near > 0.2), near, FAR_M)
    if with_round:
        root = half_b * half_b - square * inner
        ball = (-half_b - root.clamp(min=0).sqrt()) / square
        depth = torch.where(
            _is_round(kind)[:, None, :, None, None], torch.where((root > 0) & (ball > 0.2), ball, FAR_M), depth
        )
    return torch.where(size[:, None, :, 0, None, None] > 0, depth, FAR_M)


def _is_round(kind: Tensor) -> Tensor:
    return (kind == ROUND_KINDS[0]) | (kind == ROUND_KINDS[1])


def _shade_solid(
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
) -> tuple[Tensor, Tensor]:
    """Colour [B, N, 3, h, w] and lambert factor [B, N, h, w] of the solid that each ray meets."""
    b, n = which.shape[:2]
    batch = torch.arange(b, device=which.device).view(-1, 1, 1, 1)
    camera = torch.arange(n, device=which.device).view(1, -1, 1, 1)
    chosen = matrix[batch, camera, which]  # [B, N, h, w, 3, 3]
    begin = start[batch, camera, which]
    far = depth.clamp(max=FAR_M / 2)
    # on the unit cube or ball
    point = torch.stack([begin[..., i] + far * _apply(chosen, i, u[None, :], v[:, None]) for i in range(3)], dim=2)
    k, colour, size = kind[batch, which], rgb[batch, which], half[batch, which]
    angle = yaw[batch, which]
    x, y, z = point.unbind(2)
    biggest = point.abs().amax(dim=2, keepdim=True)
    cube_normal = torch.where(point.abs() >= biggest - 1e-5, torch.sign(point), torch.zeros_like(point))
    normal = torch.where(_is_round(k)[:, :, None], point, cube_normal)
    normal = normal / normal.norm(dim=2, keepdim=True).clamp(min=1e-6)
    cos, sin = angle.cos(), angle.sin()
    nx, ny = cos * normal[:, :, 0] - sin * normal[:, :, 1], sin * normal[:, :, 0] + cos * normal[:, :, 1]
    s = sun.view(b, 1, 3, 1, 1)
    lambert = (nx * s[:, :, 0] + ny * s[:, :, 1] + normal[:, :, 2] * s[:, :, 2]).clamp(min=0)
    on_side = normal[:, :, 2].abs() < 0.5
    # glass in the sides of cabins; wheels and a dark sill in bodies; windows in facades
    glass = (k == GLASS_KIND) & on_side & (z > -0.7) & (z < 0.75)
    wheel = (k == 0) & on_side & (z < -0.45) & ((x.abs() - 0.62).abs() < 0.16)
    metric_x = torch.where(normal[:, :, 0].abs() > 0.5, y * size[..., 1], x * size[..., 0])
    metric_z = (z + 1) * size[..., 2]
    window = (
        (k == BUILDING_KIND) & on_side & ((metric_x % 3.2) < 1.7) & ((metric_z % 3.3) > 1.1) & ((metric_z % 3.3) < 2.7)
    )
    dark = glass | wheel | window
    leaf = ((x * 7.3).sin() * (y * 8.1).sin() + (z * 9.7).sin() * (x * 5.1 + y * 4.3).sin()) * 0.22
    tone = torch.where(dark, 0.22, 1.0) + torch.where(k == 3, leaf, torch.zeros_like(leaf))
    return colour.permute(0, 1, 4, 2, 3) * tone[:, :, None], lambert


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
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
    """Pack the ``limit`` solids nearest to ``about`` [2] (m) into a [1, limit] batch, relative to ``about``."""
    distance = np.linalg.norm(centre[:, :2] - about, axis=1) - np.linalg.norm(size[:, :2], axis=1) / 2
    order = np.argsort(distance, kind="stable")[:limit]

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
