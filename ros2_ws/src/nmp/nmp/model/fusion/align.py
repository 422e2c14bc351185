"""Where the car really is on the stored map: a small shift and turn, found by laying what is seen over what is stored.

Every shift and turn of a grid is scored by how well two learned feature maps agree. What that says of the pose, without
what was known of it before, is a measurement with an error of its own; the pose is corrected as Kalman's filter would.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.errors import NmpError
from nmp.frame import UNSTATED_STD
from nmp.geometry import BevGrid
from nmp.model.fusion.correlate import COARSE, FEATURES, centres_of, correlate, features_of
from nmp.model.sampling import sample

SHIFTS = 6
"""shifts tried to either side along each axis, in steps of :data:`COARSE` BEV cells"""
TURNS = 5
"""turns tried to either side"""
TURN_RAD = math.radians(1.25)
BLUR = 0.7
"""how far beside the true motion an answer still counts in training, in steps: what is found is as wide"""
MAP_AS_WELL = 1.2
"""how far pose and map are apart, in standard deviations of the pose: a map is the mean of what came at such poses"""
LOOKED_FOR = 2.0
"""standard deviations of the pose within which it is looked for"""
SURE = (0.05, 0.002)
"""pose and map are no closer than this, m and rad"""
ROOM = (0.6, 0.03)
"""it is looked for within this at least, m and rad: in less than a step of the grid nothing could be told"""
ALIKE = 2.0
"""what is measured is taken to be so many times further off than it is in one frame on an exact map: frames that follow
each other misread a street alike, and a map that was made at wrong poses is blurred"""
TOLD_SOMETHING = 0.05
"""a comparison that narrows where the car may be by less than this share says nothing"""


class Exactness(NamedTuple):
    """How exact a search is, forward, left (m) and in turn (rad); ``nmp-train search`` measures it."""

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """what is found is to be multiplied by this: one network finds less than half of a turn, another twice of it"""
    std: tuple[float, float, float] = (0.2, 0.15, 0.01)
    """standard deviation of how far off it then is, where the comparison is as clear as can be"""
    growth: tuple[float, float, float] = (0.3, 0.3, 0.3)
    """and of how much further, for each that the comparison itself is vague by"""

    @classmethod
    def from_dict(cls, values: Any) -> Exactness:
        """Read what :meth:`_asdict` returned, as JSON has it; :class:`NmpError` when it is anything else."""
        try:
            parts = [tuple(float(v) for v in values[name]) for name in cls._fields]
        except (KeyError, TypeError, ValueError):
            parts = []
        if len(parts) != len(cls._fields) or any(
            len(p) != 3 or not all(math.isfinite(v) and v > 0 for v in p) for p in parts
        ):
            raise NmpError(
                "how exact the search for the pose is ('search' in the JSON beside the weights) is no scale, std "
                "and growth of three positive numbers each: measure it again with 'nmp-train search'"
            )
        return cls(*parts)  # type: ignore[arg-type]


class Alignment(NamedTuple):
    """What the search found, for B frames."""

    offset: Tensor
    """[B, 3] forward, left (m) and turn (rad): the corrected pose is the given pose followed by this motion"""
    spread: Tensor
    """[B, 3] standard deviation (m, m, rad) of where the pose may be, by the comparison and by what is told of it"""
    measured: Tensor
    """[B, 3] what the comparison alone says: forward, left (m) and turn (rad); ``offset`` is a part of it"""
    error: Tensor
    """[B, 3] standard deviation of its error (m, m, rad); infinite where it says nothing"""
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
        self.register_buffer("room", torch.tensor([ROOM]) ** 2, persistent=False)
        blur = (BLUR * self.step_m, BLUR * self.step_m, BLUR * TURN_RAD)
        self.register_buffer("blur", torch.tensor([blur]) ** 2, persistent=False)
        self.register_buffer("scaled", torch.empty(1, 3), persistent=False)
        self.register_buffer("own", torch.empty(1, 3), persistent=False)
        self.register_buffer("growth", torch.empty(1, 3), persistent=False)
        self.far: Tensor
        self.usual: Tensor
        self.sure: Tensor
        self.room: Tensor
        self.blur: Tensor
        self.scaled: Tensor
        self.own: Tensor
        self.growth: Tensor
        self.exactness = Exactness()
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
            told = self.usual if spread is None else spread.float()
            within = (LOOKED_FOR * told) ** 2 + self.sure**2
            _, wide = self._gathered(score, within)
            variance = _of_axes((MAP_AS_WELL * told) ** 2 + self.sure**2)
            measured, error = self._measured(score, torch.maximum(within, self.room))
            gain = variance / (variance + error)  # Kalman's, of a measurement
        return Alignment(gain * measured, wide.sqrt(), measured, error.sqrt(), score)

    @property
    def exactness(self) -> Exactness:
        """How exact the search is; not a part of the weights, but beside them."""
        return self._exactness

    @exactness.setter
    def exactness(self, value: Exactness) -> None:
        self._exactness = value
        self.scaled.copy_(torch.tensor([value.scale]))
        self.own.copy_((ALIKE * torch.tensor([value.std])) ** 2)
        self.growth.copy_((ALIKE * torch.tensor([value.growth])) ** 2)

    def _gathered(self, score: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance [B, 3] of the motion, which is looked for within a variance [B, 2] (m2, rad2)."""
        likely = score - torch.einsum("bk,ktyx->btyx", 0.5 / within, self.far)
        mean, square = (likely.flatten(1).softmax(dim=1) @ self.moments).chunk(2, dim=1)
        return mean, (square - mean**2).clamp(min=0)

    def _measured(self, score: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the comparison alone says [B, 3], and the variance of its error.

        As of normal distributions: where the motion may be after the comparison is the product of where it might be
        before, around zero, and of what the comparison says.
        """
        mean, after = self._gathered(score, within)
        _, before = self._gathered(torch.zeros_like(score), within)
        after = after.clamp(min=1e-9)
        said = 1 / after - 1 / before
        something = said * before > TOLD_SOMETHING
        said = torch.where(something, said, 1.0)
        measured = torch.where(something, self.scaled * mean / (after * said), 0.0)
        error = self.growth * (1 / said - self.blur).clamp(min=0) + self.own
        return measured, torch.where(something, error, torch.inf)


def _of_axes(values: Tensor) -> Tensor:
    """Return [B, 3] forward, left and turn of [B, 2] position and heading."""
    return torch.cat([values[:, :1], values], dim=1)


def moved(pose: Tensor, offset: Tensor) -> Tensor:
    """Return poses [B, 3] (x, y m; yaw rad) after a motion [B, 3] in their own frames."""
    c, s = torch.cos(pose[:, 2]), torch.sin(pose[:, 2])
    x = pose[:, 0] + c * offset[:, 0] - s * offset[:, 1]
    y = pose[:, 1] + s * offset[:, 0] + c * offset[:, 1]
    return torch.stack([x, y, pose[:, 2] + offset[:, 2]], dim=1)
