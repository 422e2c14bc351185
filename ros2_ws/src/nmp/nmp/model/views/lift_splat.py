"""Lift-Splat (Philion and Fidler, ECCV 2020): every pixel is spread over depths, and what lands in a cell is added."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.views.base import View, inverse_3x3

NEAREST_M = 1.0
HEIGHT_M = 10.0
"""points that lie further above or below the ego are left out, as in the paper"""
SPARE_BAG = 64
"""points outside of the region that are summed (for nothing) at a time"""


def unproject(pixels: Tensor, depths: Tensor, pixel_from_base: Tensor) -> Tensor:
    """Points of the base frame that are seen at these pixels and depths.

    :param pixels: [P, 2] image coordinates, 0..1 spans the image
    :param depths: [D] m
    :param pixel_from_base: [B, 3, 4]
    :return: [B, D, P, 3] m
    """
    inverse = inverse_3x3(pixel_from_base[..., :3])  # base = inverse (depth [u, v, 1] - last column)
    rays = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=-1)
    directions = torch.einsum("bij,pj->bpi", inverse, rays)
    centres = -torch.einsum("bij,bj->bi", inverse, pixel_from_base[..., 3])
    return centres[:, None, None] + depths[:, None, None] * directions[:, None]


def splat(context: Tensor, weights: Tensor, cells: Tensor, count: int) -> Tensor:
    """Add every pixel's features, times the weight of each of its points, to the cell that the point lies in.

    The points are sorted by cell and each cell is one weighted sum of rows of ``context``, so that no feature is
    ever written out per point, and the order of the terms is always the same.

    :param context: [P, C] features of the pixels
    :param weights: [D, P] of the points
    :param cells: [D, P] integer cell of each point in 0..count - 1; ``count`` for points outside
    :return: [count, C]
    """
    ordered, order = torch.sort(cells.flatten(), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=cells.device, dtype=cells.dtype))
    # The points outside come last. They go into many small bags that are cut off: one thread sums a bag.
    spare = torch.arange(0, cells.numel() + SPARE_BAG, SPARE_BAG, device=cells.device)
    starts = torch.cat([starts[:-1], (starts[-1] + spare).clamp(max=cells.numel())])
    pixels = torch.arange(cells.shape[1], device=cells.device).expand_as(cells).flatten()
    bags = functional.embedding_bag(
        pixels[order], context, starts, mode="sum", per_sample_weights=weights.flatten()[order]
    )
    return bags[:count]


class LiftSplat(View):
    """A depth distribution per feature pixel (stride 8), splatted along its ray into the cells of the BEV.

    Depths are ``config.depth_bins`` bins of equal size, from one metre to the farthest corner of the region.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, level=1)
        if config.depth_bins < 1:
            raise NmpError(f"depth_bins is {config.depth_bins}: a pixel needs at least one depth")
        width = (config.feature_grid.reach - NEAREST_M) / config.depth_bins
        depths = NEAREST_M + (torch.arange(config.depth_bins) + 0.5) * width
        self.register_buffer("depths", depths, persistent=False)
        self.depths: Tensor
        self.predict = nn.Conv2d(config.neck_channels, config.depth_bins + self.channels, 1)

    def cells(self, pixel_from_base: Tensor, present: Tensor, height: int, width: int) -> Tensor:
        """Cell of every point of the frustums: [D, B, N, height * width], row-major over [B, rows, cols].

        Points outside of the region, and all points of an absent camera, are in cell B * rows * cols.
        """
        b, n = present.shape
        v = (torch.arange(height, device=present.device, dtype=torch.float32) + 0.5) / height
        u = (torch.arange(width, device=present.device, dtype=torch.float32) + 0.5) / width
        pixels = torch.stack([u.expand(height, -1), v[:, None].expand(-1, width)], dim=-1).flatten(0, 1)
        points = unproject(pixels, self.depths, pixel_from_base.float().flatten(0, 1))
        points = points.unflatten(0, (b, n)).permute(2, 0, 1, 3, 4)  # [D, B, N, P, 3]
        cols, rows = [torch.floor((points[..., axis] - low) / self.resolution) for axis, low in enumerate(self.corner)]
        inside = (rows >= 0) & (rows < self.rows) & (cols >= 0) & (cols < self.cols)
        inside &= (points[..., 2].abs() < HEIGHT_M) & (present > 0)[..., None]
        sample = torch.arange(b, device=present.device)[:, None, None]
        # Compared as floats, and only then made integers: a point that is not finite has no integer.
        inner = (torch.where(inside, rows, 0) * self.cols + torch.where(inside, cols, 0)).long()
        return torch.where(inside, inner + sample * (self.rows * self.cols), b * self.rows * self.cols)

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Splat features into the BEV, as :class:`View` says: [B, C, rows, cols], zero where no point lands."""
        b, n, _, height, width = features.shape
        depth, context = self.predict(features.flatten(0, 1)).float().split([len(self.depths), self.channels], dim=1)
        with torch.autocast(features.device.type, enabled=False):
            cells = self.cells(pixel_from_base, present, height, width)
            weights = depth.softmax(dim=1).flatten(2).transpose(0, 1)  # [D, B N, P]
            context = context.flatten(2).transpose(1, 2).flatten(0, 1)  # [B N P, C]
            out = splat(context, weights.flatten(1), cells.flatten(1), b * self.rows * self.cols)
        return out.unflatten(0, (b, self.rows, self.cols)).permute(0, 3, 1, 2)
