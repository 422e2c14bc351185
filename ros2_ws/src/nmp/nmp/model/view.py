"""From image features to BEV features: each BEV cell looks up its ground point in the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.geometry import BevGrid

NEAR_PLANE_M = 0.5
COORDINATE_CHANNELS = 4


class GroundLift(nn.Module):
    """Inverse-perspective lifting: bilinear look-up of the z = 0 point of every cell, averaged over the cameras.

    The published networks learn depth or attention here; on roads the ground plane is close enough to the
    truth that this costs least on a CPU.
    """

    def __init__(self, grid: BevGrid) -> None:
        super().__init__()
        centres = torch.as_tensor(grid.centres(), dtype=torch.float32)  # [rows, cols, 2]
        points = torch.cat([centres, torch.zeros_like(centres[..., :1]), torch.ones_like(centres[..., :1])], dim=-1)
        self.register_buffer("points", points, persistent=False)
        scaled = centres / torch.tensor([grid.length / 2, grid.width / 2])
        where = torch.stack([scaled[..., 0], scaled[..., 1], centres.norm(dim=-1) / grid.length])
        self.register_buffer("where", where, persistent=False)
        self.points: Tensor
        self.where: Tensor

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Lift features to the BEV.

        :param features: [B, N, C, h, w] of N cameras
        :param pixel_from_base: [B, N, 3, 4] projection of base points (m) to homogeneous feature coordinates, scaled so
            that 0..1 spans the feature map
        :param present: [B, N] 1 where the camera delivered an image, else 0
        :return: [B, C + 4, rows, cols]: features, ego coordinates of the cell (3) and the share of cameras that see it
        """
        # Half-precision coordinates would be off by a pixel.
        features = features.float()
        b, n, c, _, _ = features.shape
        rows, cols, _ = self.points.shape
        total = features.new_zeros(b, c, rows, cols)
        seen = features.new_zeros(b, 1, rows, cols)
        for camera in range(n):
            # [B, 3, 4] x [rows, cols, 4] -> [B, rows, cols, 3]
            uvw = torch.einsum("bij,rcj->brci", pixel_from_base[:, camera].float(), self.points)
            depth = uvw[..., 2]
            uv = uvw[..., :2] / depth.clamp(min=NEAR_PLANE_M)[..., None]
            inside = (depth > NEAR_PLANE_M) & ((uv > 0) & (uv < 1)).all(dim=-1)
            mask = inside[:, None].float() * present[:, camera, None, None, None].float()
            grid = (2 * uv - 1).clamp(-2, 2)
            total = total + mask * functional.grid_sample(features[:, camera], grid, align_corners=False)
            seen = seen + mask
        where = self.where.expand(b, -1, -1, -1)
        return torch.cat([total / seen.clamp(min=1), where, seen.clamp(max=1)], dim=1)
