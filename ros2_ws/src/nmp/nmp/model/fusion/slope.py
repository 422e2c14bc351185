"""How the road slopes under the car: found by laying what is seen over what is stored, and taken out of what is seen.

A pose tells where the car is and how it leans, not how the road does. Where the ground rises by ``s`` (rise per metre)
along the ego frame, a camera ``h`` above it sees a point at q as if it were at q + q (q . s) / h on level ground: 0.3
degrees are 1.3 m at a distance of 20 m. Two numbers, s / h, describe it for the whole frame.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.geometry import BevGrid
from nmp.model.fusion.correlate import COARSE, FEATURES, centres_of, correlate, features_of
from nmp.model.sampling import sample

SLOPES = 3
"""slopes tried to either side along each axis"""
SLOPE_STEP = 0.0025
"""between them, rise per metre over the height of the cameras, 1/m"""
SHIFTS = 2
"""shifts tried with every slope to either side along each axis, in steps of :data:`COARSE` BEV cells: a slope and an
error of the pose look much alike, and what is an error of the pose must not be taken for a slope"""
USUAL_SLOPE = 0.0033
"""standard deviation before anything is seen, 1/m: 0.005 rad under cameras at 1.5 m"""
USUAL_SHIFT_M = 0.5


class Slope(NamedTuple):
    """What the search found, for B frames."""

    slope: Tensor
    """[B, 2] rise of the ground forward and to the left per metre, over the height of the cameras, 1/m"""
    log_probability: Tensor
    """[B, slopes left, slopes forward, shifts left, shifts forward]"""


class Leveller(nn.Module):
    """Scores every slope of a grid, with small shifts, by how well two learned feature maps then agree.

    Before it is trained it finds level ground.

    :param channels: of the BEV features
    :param prior_channels: of the stored latent
    """

    def __init__(self, grid: BevGrid, channels: int, prior_channels: int) -> None:
        super().__init__()
        self.step_m = COARSE * grid.resolution
        self.seen = features_of(channels)
        self.stored = features_of(prior_channels)
        last = self.stored[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.scale = nn.Parameter(torch.tensor(0.0))
        slope = torch.arange(-SLOPES, SLOPES + 1) * SLOPE_STEP
        shift = torch.arange(-SHIFTS, SHIFTS + 1) * self.step_m
        steep = (slope[:, None] ** 2 + slope[None, :] ** 2) / USUAL_SLOPE**2 / 2
        far = (shift[:, None] ** 2 + shift[None, :] ** 2) / USUAL_SHIFT_M**2 / 2
        self.bias = nn.Parameter(-(steep[:, :, None, None] + far))
        fine, coarse = centres_of(grid)
        half = torch.tensor([grid.length / 2, grid.width / 2])
        every = torch.stack([torch.stack([x, y]) for y, x in itertools.product(slope, slope)])  # [slopes, 2]
        self.register_buffer("slopes", every, persistent=False)
        self.slopes: Tensor
        self.register_buffer("where", _seen_at(coarse, every) / half, persistent=False)
        self.register_buffer("centres", fine, persistent=False)
        self.register_buffer("edge", half, persistent=False)
        self.where: Tensor
        self.centres: Tensor
        self.edge: Tensor

    def forward(self, bev: Tensor, latent: Tensor, evidence: Tensor) -> Slope:
        """Score every slope.

        :param bev: [B, C, rows, cols] features of this frame
        :param latent: [B, D, rows, cols] stored latents as the pose places them in the ego frame
        :param evidence: [B, 1, rows, cols] theirs
        """
        b = len(bev)
        trust = evidence / (evidence + 1)
        seen = self.seen(functional.avg_pool2d(bev, COARSE)).float()
        stored = self.stored(functional.avg_pool2d(latent.to(bev.dtype), COARSE)).float()
        stored = stored * functional.avg_pool2d(trust.float(), COARSE)
        with torch.autocast(bev.device.type, enabled=False):
            # All slopes of a frame are laid below each other: one lookup for all of them.
            where = self.where.flatten(0, 1).expand(b, -1, -1, -1)
            levelled = sample(seen, where)
            levelled = levelled.unflatten(2, (len(self.where), -1)).transpose(1, 2)
            score = correlate(levelled, stored, SHIFTS) * (self.scale.exp() / math.sqrt(FEATURES))
            score = score.view(b, *self.bias.shape) + self.bias.float()
            log_probability = score.flatten(1).log_softmax(dim=1).view_as(score)
            slopes = log_probability.exp().sum(dim=(3, 4)).flatten(1) @ self.slopes
        return Slope(slopes, log_probability)

    def level(self, bev: Tensor, found: Slope) -> Tensor:
        """Return features [B, C, rows, cols] where they would be on level ground.

        No gradient goes into what was found.
        """
        where = _seen_at(self.centres, found.slope.detach())
        with torch.autocast(bev.device.type, enabled=False):
            # not in bfloat16: its places would be off by a cell
            moved = sample(bev.float(), where / self.edge, padding="border")
        # Convolutions follow: as they want it, once.
        return moved.to(bev.dtype, memory_format=torch.channels_last)


def _seen_at(place: Tensor, slope: Tensor) -> Tensor:
    """Return where places [rows, cols, 2] (m) seem to be on each of N slopes [N, 2]: [N, rows, cols, 2]."""
    rise = torch.einsum("yxc,nc->nyx", place, slope)
    return place * (1 + rise[..., None])
