"""What the view transforms have in common: the interface, and points seen by cameras."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.model.config import NetworkConfig

NEAR_PLANE_M = 0.5


class View(nn.Module):
    """Image features of N cameras to one BEV over ``config.feature_grid``.

    ``forward(features [B, N, neck_channels, h, w], pixel_from_base [B, N, 3, 4], present [B, N])`` returns
    [B, ``channels``, rows, cols]. ``pixel_from_base`` projects base points (m) to homogeneous image coordinates
    in which 0..1 spans width and height and whose third coordinate is the depth (m); ``present`` is 1 where the
    camera delivered an image and 0 elsewhere: such a camera adds nothing.
    """

    channels: int
    """of the BEV features"""
    level: int
    """pyramid level that the view reads: its features are at stride 4 * 2 ** level of the network's input"""

    def __init__(self, config: NetworkConfig, level: int = 0) -> None:
        super().__init__()
        self.channels = config.neck_channels
        self.level = min(level, config.backbone_stages - 1)
        grid = config.feature_grid
        self.resolution = grid.resolution
        self.corner = (-grid.length / 2, -grid.width / 2)
        self.rows, self.cols = grid.shape

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        raise NotImplementedError


def ground_points(config: NetworkConfig) -> Tensor:
    """Ground point (z = 0) of every cell of the feature grid: [rows, cols, 4] homogeneous in the base frame, m."""
    centres = torch.as_tensor(config.feature_grid.centres(), dtype=torch.float32)
    return functional.pad(functional.pad(centres, (0, 1)), (0, 1), value=1.0)


def inverse_3x3(matrix: Tensor) -> Tensor:
    """Invert [..., 3, 3] by cross products of the rows: no solver, and no wait for the GPU.

    A singular matrix, as of a camera that is not there, gives its adjugate: finite, and of no meaning.
    """
    a, b, c = matrix.unbind(-2)
    columns = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    determinant = (a * columns[0]).sum(-1)[..., None, None]
    return torch.stack(columns, dim=-1) / determinant.where(determinant != 0, 1)


def project(points: Tensor, pixel_from_base: Tensor) -> tuple[Tensor, Tensor]:
    """Project points of the base frame into images.

    :param points: [..., 4] homogeneous, m
    :param pixel_from_base: [B, 3, 4]
    :return: (image coordinates [B, ..., 2] in 0..1 where the image is, depth [B, ...] in m); where the depth is
        not beyond the near plane the coordinates mean nothing, but are finite
    """
    # Not a matrix product: autocast and TF32 would round coordinates to half a pixel.
    matrix = pixel_from_base.to(points.dtype).view(-1, *[1] * (points.dim() - 1), 3, 4)
    uvw = matrix[..., 3] * points[..., 3:]
    for axis in range(3):
        uvw = torch.addcmul(uvw, matrix[..., axis], points[..., axis : axis + 1])
    depth = uvw[..., 2]
    return uvw[..., :2] / depth.clamp(min=NEAR_PLANE_M)[..., None], depth
