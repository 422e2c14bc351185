"""Map-aligned fusion: an evidence-weighted mean of latents in the cells of the city.

The prior is never resampled for storage. Each frame's latents are turned onto the map's cells once, added to
what the cells hold in proportion to their evidence, and written back as a block. A weighted sum does not
depend on the order of its terms, so drives can be merged in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.model.blocks import ConvBnRelu, Residual
from nmp.model.config import NetworkConfig
from nmp.model.fusion.align import Aligner, Alignment
from nmp.model.fusion.correlate import COARSE
from nmp.model.fusion.geometry import ego_to_map, map_to_ego
from nmp.model.fusion.memory import Memory
from nmp.model.fusion.slope import Leveller, Slope

LATENT_SCALE = 127.0
"""int8 steps per unit of latent: latents lie in -1..1"""
EVIDENCE_SCALE = 256.0
"""uint16 steps per unit of evidence: a cell with one unit is trusted by half"""
MAX_WEIGHT = 4.0
"""evidence of a cell that one frame saw as well as can be: from far away it may be a hundredth of that, as what is 20 m
away is seen a metre off its place"""
WIDE_CHANNELS, FAR_CHANNELS = 48, 64
"""at a half and a quarter of the resolution at least, and at an eighth, where they cost little: where the configuration
has no ``prior_coarse_channels``"""


class Surroundings(nn.Module):
    """Looks at prior and frame together, down to an eighth of the resolution: lines go on beyond what was seen.

    At an eighth a cell is 2.4 m long, and what is decided there follows from 18 m around.
    """

    def __init__(self, channels: int, coarse: int = 0) -> None:
        """:param coarse: channels at half of the resolution and less; 0: as many as :data:`WIDE_CHANNELS` says"""
        super().__init__()
        wide, widest = (coarse, coarse) if coarse else (max(channels, WIDE_CHANNELS), FAR_CHANNELS)
        self.mix_full = Residual(channels)
        self.down_half = nn.Sequential(ConvBnRelu(channels, wide, 2), Residual(wide))
        self.down_quarter = nn.Sequential(ConvBnRelu(wide, wide, 2), Residual(wide))
        far = [Residual(widest) for _ in range(3)]
        self.down_eighth = nn.Sequential(ConvBnRelu(wide, widest, 2), *far)
        self.up_quarter = nn.Conv2d(widest, wide, 1)
        self.mix_quarter = Residual(wide)
        self.up_half = nn.Conv2d(wide, wide, 1)
        self.mix_half = Residual(wide)
        self.up_full = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many channels [B, channels, rows, cols] of the same cells."""
        full = self.mix_full(x)
        half = self.down_half(full)
        quarter = self.down_quarter(half)
        quarter = self.mix_quarter(_joined(quarter, self.up_quarter(self.down_eighth(quarter))))
        half = self.mix_half(_joined(half, self.up_half(quarter)))
        return _joined(full, self.up_full(half))


def _joined(fine: Tensor, coarse: Tensor) -> Tensor:
    return (fine + functional.interpolate(coarse, fine.shape[-2:], mode="bilinear")).relu_()


class EvidenceFusion(nn.Module):
    """Our fusion: every cell holds a weighted mean of what was observed there, and the weight.

    The prior enters the features through a path that starts at zero and is closed while nothing around the car is
    known, so that an empty prior gives exactly the layers of the network without one.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.state_channels = config.prior_channels
        self.cap = config.evidence_cap
        """most evidence of a cell after :meth:`write`; infinite where whoever stores the cells caps them"""
        channels, stored = config.bev_channels, config.prior_channels
        mixed = config.prior_mix_channels or channels
        self.latent = nn.Conv2d(channels, stored, 1)
        self.weight = nn.Conv2d(channels, 1, 1)
        self.prior_in = nn.Conv2d(stored + 1, mixed, 1)
        self.frame_in = nn.Conv2d(channels, mixed, 1, bias=False)
        self.prior_mix = Surroundings(mixed, config.prior_coarse_channels)
        self.prior_out = nn.Conv2d(mixed, channels, 3, 1, 1)
        assert self.weight.bias is not None
        nn.init.constant_(self.weight.bias, -2.5)  # few cells are seen well
        nn.init.zeros_(self.prior_out.weight)
        assert self.prior_out.bias is not None
        nn.init.zeros_(self.prior_out.bias)
        # What the map says of the cells beside those that it knows: where lines go on.
        self.beyond = nn.Conv2d(mixed, channels, 1, bias=False)
        nn.init.zeros_(self.beyond.weight)
        self.aligner = Aligner(config.feature_grid, channels, stored) if config.align else None
        self.leveller = Leveller(config.feature_grid, channels, stored) if config.slopes else None
        # How well the pose is known, for what is read and for what is written. Until training finds otherwise it
        # makes no difference.
        self.spread_in = nn.Conv2d(3, mixed, 1, bias=False) if config.align else None
        self.doubt = nn.Linear(3, 1) if config.align else None
        if self.spread_in is not None and self.doubt is not None:
            nn.init.zeros_(self.spread_in.weight)
            nn.init.zeros_(self.doubt.weight)
            nn.init.constant_(self.doubt.bias, 4.0)

    def opened(self, memory: Memory) -> Tensor:
        """Return the sums [B, D + 1, rows, cols] that are looked up and added to, see :func:`sums`."""
        return sums(memory)

    def locate(
        self, bev: Tensor, cells: Tensor, pose: Tensor, origin: Tensor, spread: Tensor | None = None
    ) -> Alignment | None:
        """Find how far the pose is off, by what is stored; None without ``config.align``.

        :param cells: as :meth:`opened` returned them
        :param spread: [B, 2] how exactly the pose is known, see :meth:`nmp.model.fusion.align.Aligner.forward`
        """
        if self.aligner is None:
            return None
        found: Alignment = self.aligner(bev, *self.read(cells, pose, origin, COARSE), spread)
        return found

    def read(self, cells: Tensor, pose: Tensor, origin: Tensor, square: int = 1) -> tuple[Tensor, Tensor]:
        """Look cells up in the ego frame: latent [B, D, rows, cols], evidence [B, 1, rows, cols].

        :param cells: as :meth:`opened` returned them
        :param square: look up only the middle of every square of so many by so many cells of the ego frame
        """
        net = self.config
        latent, evidence = means(map_to_ego(cells, pose, net.feature_grid, origin, net.prior_cell, square=square))
        return latent, evidence

    def level(self, bev: Tensor, latent: Tensor, evidence: Tensor) -> tuple[Tensor, Slope | None]:
        """Return the features as they would be on level ground, and the slope, by what :meth:`read` returned.

        Without ``config.slopes``, and for frames of places never seen, they are the features given.
        """
        if self.leveller is None:
            return bev, None
        found: Slope = self.leveller(bev, latent, evidence)
        known = evidence.amax(dim=(1, 2, 3), keepdim=True) > 0
        # The search learns from its own loss, as that for the pose does.
        return torch.where(known, self.leveller.level(bev, found), bev), found

    def fuse(self, bev: Tensor, latent: Tensor, evidence: Tensor, alignment: Alignment | None = None) -> Tensor:
        """Return the features [B, C, rows, cols] with the prior added."""
        trust = evidence / (evidence + 1)
        prior = self.prior_in(torch.cat([latent * trust, trust], dim=1))
        if self.spread_in is not None and alignment is not None:
            prior = prior + self.spread_in(alignment.spread[:, :, None, None]) * trust
        prior = (prior + self.frame_in(bev)).relu_().to(bev.dtype)
        mixed = self.prior_mix(prior)
        known = (trust.amax(dim=(2, 3), keepdim=True) > 0).to(trust.dtype)
        # In the precision of the features: what follows must not round otherwise where nothing was added.
        return bev + (trust * self.prior_out(mixed) + known * self.beyond(mixed)).to(bev.dtype)

    def observe(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """What this frame adds to the prior: (weight x latent [B, D, rows, cols], weight [B, 1, rows, cols]).

        Latents lie in -1..1, weights in 0..4: the network itself says how well a cell was seen.
        """
        weight = MAX_WEIGHT * torch.sigmoid(self.weight(bev).float())
        return torch.tanh(self.latent(bev).float()) * weight, weight

    def write(
        self,
        cells: Tensor,
        bev: Tensor,
        features: Tensor,
        pose: Tensor,
        origin: Tensor,
        alignment: Alignment | None = None,
        repeat: Tensor | None = None,
    ) -> Memory:
        """Add one frame to the cells.

        :param cells: as :meth:`opened` returned them
        :param features: as :meth:`fuse` returned them; what is stored is what this frame saw by itself
        :param repeat: [B] how many times the observation counts, None for once
        """
        net = self.config
        seen = torch.cat(self.observe(bev), dim=1)
        if repeat is not None:
            seen = seen * repeat[:, None, None, None]
        if self.doubt is not None and alignment is not None:
            seen = seen * torch.sigmoid(self.doubt(alignment.spread))[:, :, None, None]
        rows, cols = cells.shape[-2:]
        total = cells + ego_to_map(seen, pose, net.feature_grid, origin, net.prior_cell, rows, cols)
        return means(total, self.cap)


def sums(memory: Memory) -> Tensor:
    """Return evidence x latent, and evidence, of cells: [B, D + 1, rows, cols]. What was seen is added to it."""
    return torch.cat([memory.latent * memory.evidence, memory.evidence], dim=1)


def means(total: Tensor, cap: float = math.inf) -> Memory:
    """Undo :func:`sums`; cells without evidence get a latent of zero.

    :param cap: most evidence a cell may hold
    """
    evidence = total[:, -1:]
    return Memory(total[:, :-1] / evidence.clamp(min=1e-6), evidence.clamp(max=cap))
