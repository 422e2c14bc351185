"""Inverse perspective: each BEV cell looks up its ground point in the images."""

from __future__ import annotations

import torch
from torch import Tensor

from nmp.model.config import NetworkConfig
from nmp.model.sampling import sample
from nmp.model.views.base import NEAR_PLANE_M, View, ground_points, project

COORDINATE_CHANNELS = 4


class GroundLift(View):
    """Inverse-perspective lifting: bilinear look-up of the z = 0 point of every cell, averaged over the cameras.

    The published networks learn depth or attention here; on roads the ground plane is close enough to the
    truth that this costs least on a CPU.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.channels = config.neck_channels + COORDINATE_CHANNELS
        grid = config.feature_grid
        self.register_buffer("points", ground_points(config), persistent=False)
        centres = ground_points(config)[..., :2]
        scaled = centres / torch.tensor([grid.length / 2, grid.width / 2])
        where = torch.stack([scaled[..., 0], scaled[..., 1], centres.norm(dim=-1) / grid.length])
        self.register_buffer("where", where, persistent=False)
        self.points: Tensor
        self.where: Tensor

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Lift features to the BEV, as :class:`View` says.

        :return: [B, C + 4, rows, cols]: features, ego coordinates of the cell (3) and whether a camera sees it
        """
        # grid_sample takes one type for features and coordinates, and these need the precision.
        features = features.float()
        b, n, c, _, _ = features.shape
        uv, depth = project(self.points, pixel_from_base.flatten(0, 1))
        grid = (2 * uv - 1).clamp(-2, 2).unflatten(0, (b, n))
        inside = (depth > NEAR_PLANE_M) & ((uv > 0) & (uv < 1)).all(dim=-1)
        masks = inside.unflatten(0, (b, n)).float() * present[..., None, None].float()
        total = features.new_zeros(b, c, self.rows, self.cols)
        for camera in range(n):
            seen_here = sample(features[:, camera], grid[:, camera])
            total = torch.addcmul(total, masks[:, camera, None], seen_here)
        seen = masks.sum(dim=1, keepdim=True)
        where = self.where.expand(b, -1, -1, -1)
        return torch.cat([total / seen.clamp(min=1), where, seen.clamp(max=1)], dim=1)
