"""Which solid each ray meets first: boxes and ellipsoids, and their mirror images in a wet road."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nmp_train.sim.boxes import CROWN
from nmp_train.sim.light import is_round, pattern_grid

FAR_M = 1.0e4

LEAF_TURNS = 14
"""the pattern of leaves repeats so often around the eye"""


def apply_row(matrix: Tensor, axis: int, u: Tensor, v: Tensor) -> Tensor:
    """Row ``axis`` of matrix @ (u, v, 1). Written out, because a matrix product would not fuse with what follows."""
    part = matrix[..., axis, :, None, None]
    return part[..., 0, :, :] * u + (part[..., 1, :, :] * v[:, None] + part[..., 2, :, :])


Met = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Result of :func:`nearest_solid`"""


def gaps_between_leaves(ray: Tensor, u: Tensor, v: Tensor, pattern: Tensor) -> Tensor:
    """Return [P, h, w]: how far leaves leave each ray free at the rim of a crown, see :func:`_ball`.

    It depends on the direction alone, so that one look-up serves all crowns of a strip.
    """
    dx, dy, dz = (apply_row(ray, axis, u, v) for axis in range(3))
    turn = torch.atan2(dy, dx) * (LEAF_TURNS / (2 * math.pi))
    rise = dz / (dx * dx + dy * dy).sqrt() * (LEAF_TURNS / (2 * math.pi))
    grid = torch.stack([pattern_grid(turn), pattern_grid(rise)], dim=-1)
    leaf = functional.grid_sample(pattern[:, :1], grid.view(1, -1, len(u), 2), align_corners=False)[0, 0].view(dx.shape)
    # 0.5 at most for most rays, but through a few one sees between the leaves in the middle too
    return 0.55 * leaf + ((leaf - 0.86) * 10).clamp(0, 0.5)


def nearest_solid(
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
) -> Met:
    """Find the solid, and the solid's mirror image, that each ray of P strips meets first.

    :param gaps: [P, h, w] of :func:`gaps_between_leaves`
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


def unhidden(kind: Tensor, at: Tensor, eye: Tensor, centre: Tensor, size: Tensor, yaw: Tensor) -> Tensor:
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
        inverse = 1 / apply_row(matrix, axis, u, v)
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


def rotated(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
