"""Where the car really is on the stored map: a small shift and turn, found by laying what is seen over what is stored.

Every shift and turn of a grid is scored by how well two learned feature maps agree, which gives a probability for
each; their mean, weighed against the pose as a measurement, corrects it, and their spread tells how far to trust it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.frame import UNSTATED_STD
from nmp.geometry import BevGrid
from nmp.model.fusion.correlate import COARSE, FEATURES, centres_of, correlate, features_of
from nmp.model.sampling import sample

SHIFTS = 6
"""shifts tried to either side along each axis, in steps of :data:`COARSE` BEV cells"""
TURNS = 5
"""turns tried to either side"""
TURN_RAD = math.radians(1.25)
MAP_AS_WELL = 2.0
"""how far pose and map may be apart, in standard deviations of the pose: what is stored came at poses like it"""
SURE = (0.05, 0.002)
"""they are no closer than this, m and rad"""
SEARCH_STD = (0.2, 0.02)
"""how far off the search is itself, m and rad: what it finds is weighed against the given pose as a measurement"""


class Alignment(NamedTuple):
    """What the search found, for B frames."""

    offset: Tensor
    """[B, 3] forward, left (m) and turn (rad): the corrected pose is the given pose followed by this motion"""
    spread: Tensor
    """[B, 3] standard deviation of the same (m, m, rad)"""
    score: Tensor
    """[B, turns, shifts left, shifts forward] logarithm of how likely each is by the comparison alone, whatever is
    known of the pose; but for a constant"""


class Aligner(nn.Module):
    """Finds the motion in the ego frame that brings the stored cells under the seen ones.

    :param channels: of the BEV features
    :param prior_channels: of the stored latent
    """

    def __init__(self, grid: BevGrid, channels: int, prior_channels: int) -> None:
        super().__init__()
        self.step_m = COARSE * grid.resolution
        self.seen = features_of(channels)
        self.stored = features_of(prior_channels)
        self.scale = nn.Parameter(torch.tensor(-2.0))
        shift = torch.arange(-SHIFTS, SHIFTS + 1) * self.step_m
        turn = torch.arange(-TURNS, TURNS + 1) * TURN_RAD
        far = torch.stack(torch.broadcast_tensors(shift[:, None] ** 2 + shift**2, turn[:, None, None] ** 2))
        self.register_buffer("far", far, persistent=False)  # [2, turns, shifts, shifts], m2 and rad2
        self.register_buffer("usual", torch.tensor([UNSTATED_STD]), persistent=False)
        self.register_buffer("sure", torch.tensor([SURE]), persistent=False)
        self.register_buffer("own", torch.tensor([SEARCH_STD]) ** 2, persistent=False)
        self.far: Tensor
        self.usual: Tensor
        self.sure: Tensor
        self.own: Tensor
        _, coarse = centres_of(grid)
        c, s = torch.cos(turn)[:, None, None], torch.sin(turn)[:, None, None]
        x, y = coarse[..., 0], coarse[..., 1]
        turned = torch.stack([(c * x - s * y) / (grid.length / 2), (s * x + c * y) / (grid.width / 2)], dim=-1)
        self.register_buffer("where", turned, persistent=False)  # [turns, rows / 2, cols / 2, 2]
        self.where: Tensor
        # Shifts are those of the turned car, (x + d) under a turn: turn them back into the given ego frame.
        left, forward = shift[:, None], shift[None, :]
        parts = (c * forward - s * left, s * forward + c * left, turn[:, None, None])
        motions = torch.stack(torch.broadcast_tensors(*parts)).flatten(1)
        self.register_buffer("moments", torch.cat([motions, motions**2]).T.contiguous(), persistent=False)
        self.moments: Tensor

    def forward(self, bev: Tensor, latent: Tensor, evidence: Tensor, spread: Tensor | None = None) -> Alignment:
        """Score every motion.

        :param bev: [B, C, rows, cols] features of this frame
        :param latent: [B, D, rows / 2, cols / 2] stored latents as the given pose places them in the ego frame
        :param evidence: [B, 1, rows / 2, cols / 2] theirs
        :param spread: [B, 2] standard deviations of position (m) and heading (rad) of the given pose, None for unknown:
            how likely every motion is before anything is compared
        """
        b, turns = bev.shape[0], len(self.where)
        seen = self.seen(functional.avg_pool2d(bev, COARSE)).float()
        stored = self.stored(latent.to(bev.dtype)).float() * (evidence / (evidence + 1)).float()
        # Not in bfloat16: its places would be off by a cell, and its spreads by more than they are.
        with torch.autocast(bev.device.type, enabled=False):
            # Stored cells under each turn: what a cell at x would be if the car were turned.
            grid = self.where.expand(b, -1, -1, -1, -1).flatten(0, 1)
            turned = sample(stored.repeat_interleave(turns, dim=0), grid)
            # What is stored at x + d is seen at x: compared from the stored side, that is the opposite shift.
            score = correlate(turned.unflatten(0, (b, turns)), seen, SHIFTS).flip(2, 3)
            score = score * (self.scale.exp() / math.sqrt(FEATURES))
            variance = (MAP_AS_WELL * (self.usual if spread is None else spread.float())) ** 2 + self.sure**2
            likely = score - torch.einsum("bk,ktyx->btyx", 0.5 / variance, self.far)
            mean, square = (likely.flatten(1).softmax(dim=1) @ self.moments).chunk(2, dim=1)
            deviation = (square - mean**2).clamp(min=0).sqrt()
            gain = variance / (variance + self.own)  # Kalman's, of a measurement
            mean = mean * torch.cat([gain[:, :1], gain], dim=1)
        return Alignment(mean, deviation, score)


def moved(pose: Tensor, offset: Tensor) -> Tensor:
    """Return poses [B, 3] (x, y m; yaw rad) after a motion [B, 3] in their own frames."""
    c, s = torch.cos(pose[:, 2]), torch.sin(pose[:, 2])
    x = pose[:, 0] + c * offset[:, 0] - s * offset[:, 1]
    y = pose[:, 1] + s * offset[:, 0] + c * offset[:, 1]
    return torch.stack([x, y, pose[:, 2] + offset[:, 2]], dim=1)
