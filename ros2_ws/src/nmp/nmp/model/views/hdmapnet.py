"""The view transform of HDMapNet (Li et al., ICRA 2022): a learned plan view per camera, then a homography."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.model.config import NetworkConfig
from nmp.model.views.base import View, ground_points, inverse_3x3, project

PLAN_SHAPE = (32, 64)
"""cells of a camera's plan view: ahead, and to the right"""


class PlanView(View):
    """Every camera's feature image (stride 16) becomes a plan view of what lies ahead of it.

    A perceptron over the flattened image positions, one per camera and the same for all channels, gives a plan
    view from the camera forward to as far as the region reaches, and as far to the left and to the right. The ground
    plane's homography (here a planar rigid motion: both sides are plan views) takes it to the ego frame, where
    the cameras are averaged. The perceptron has one weight per pair of positions: it fits one input size only.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, level=2)
        self.reach = config.feature_grid.reach
        stride = 4 * 2**self.level
        self.image_shape = (-(-config.input_height // stride), -(-config.input_width // stride))
        positions, plan = math.prod(self.image_shape), math.prod(PLAN_SHAPE)
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(positions, plan), nn.ReLU(inplace=True), nn.Linear(plan, plan), nn.ReLU())
            for _ in CAMERAS
        )
        self.register_buffer("points", ground_points(config), persistent=False)
        self.points: Tensor

    def _sources(self, pixel_from_base: Tensor) -> tuple[Tensor, Tensor]:
        """Where the cells lie in the plan view of one camera: [B, rows, cols, 2] in -1..1, and whether it sees them."""
        uv, _ = project(self.points, pixel_from_base)
        rotation, offset = pixel_from_base[..., :3], pixel_from_base[..., 3]
        # The third row is the optical axis; turned to the horizon it is the plan view's forward direction.
        forward = functional.normalize(rotation[:, 2, :2], dim=-1)
        right = torch.stack([forward[:, 1], -forward[:, 0]], dim=-1)
        centre = -torch.einsum("bij,bj->bi", inverse_3x3(rotation), offset)[:, :2]
        away = self.points[..., :2] - centre[:, None, None]
        ahead = torch.einsum("brci,bi->brc", away, forward) / self.reach
        aside = torch.einsum("brci,bi->brc", away, right) / self.reach
        seen = (ahead > 0) & (ahead < 1) & (aside.abs() < 1) & (uv[..., 0] > 0) & (uv[..., 0] < 1)
        return torch.stack([aside, 2 * ahead - 1], dim=-1).clamp(-2, 2), seen

    def forward(self, features: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Turn features into the BEV, as :class:`View` says: [B, C, rows, cols], zero where no camera looks.

        Raises :class:`NmpError` for features of another size than the configuration's, or more cameras.
        """
        b, n, c, height, width = features.shape
        if (height, width) != self.image_shape or n > len(CAMERAS):
            raise NmpError(
                f"the hdmapnet view was made for {len(CAMERAS)} feature images of {self.image_shape[0]} x "
                f"{self.image_shape[1]}, got {n} of {height} x {width}: use the configuration's input size and level"
            )
        total = features.new_zeros(b, c, self.rows, self.cols, dtype=torch.float32)
        count = total.new_zeros(b, 1, self.rows, self.cols)
        for camera in range(n):
            plan = self.mlp[camera](features[:, camera].flatten(2)).unflatten(-1, PLAN_SHAPE).float()
            with torch.autocast(features.device.type, enabled=False):
                grid, seen = self._sources(pixel_from_base[:, camera].float())
            mask = (seen & (present[:, camera] > 0)[:, None, None])[:, None]
            sampled = functional.grid_sample(plan, grid, align_corners=False, padding_mode="border")
            total = total + sampled * mask
            count = count + mask
        return total / count.clamp(min=1)
