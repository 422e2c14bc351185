"""The network: encode images, observe what to remember, decode layers with or without the prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.frame import CLASSES
from nmp.model.blocks import Residual, conv_bn_relu
from nmp.model.config import NetworkConfig
from nmp.model.neck import FeaturePyramid
from nmp.model.resnet import ResNet
from nmp.model.view import COORDINATE_CHANNELS, GroundLift


class BevEncoder(nn.Module):
    """Gives every BEV cell its surroundings: a three-level U-shaped stack of convolutions."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        wide = channels * 3 // 2
        self.stem = nn.Sequential(conv_bn_relu(inputs, channels), Residual(channels))
        self.down_half = nn.Sequential(conv_bn_relu(channels, wide, 2), Residual(wide))
        self.down_quarter = nn.Sequential(
            conv_bn_relu(wide, 2 * channels, 2), Residual(2 * channels), Residual(2 * channels)
        )
        self.up_half = nn.Conv2d(2 * channels, wide, 1)
        self.mix_half = Residual(wide)
        self.up_full = nn.Conv2d(wide, channels, 1)
        self.mix_full = Residual(channels)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x)
        half = self.down_half(full)
        low = self.up_half(self.down_quarter(half))
        half = self.mix_half(torch.relu(half + functional.interpolate(low, half.shape[-2:], mode="bilinear")))
        up = functional.interpolate(self.up_full(half), full.shape[-2:], mode="bilinear")
        out: Tensor = self.mix_full(torch.relu(full + up))
        return out


class Decoder(nn.Module):
    """BEV features and prior latents to class logits at twice the resolution.

    The prior enters through a path that starts at zero and is closed where there is no evidence, so that an
    empty prior gives exactly the layers of the network without one.
    """

    def __init__(self, channels: int, prior_channels: int, classes: int) -> None:
        super().__init__()
        self.prior_in = nn.Conv2d(prior_channels + 1, channels, 1)
        self.prior_mix = Residual(channels)
        self.prior_out = nn.Conv2d(channels, channels, 3, 1, 1)
        nn.init.zeros_(self.prior_out.weight)
        assert self.prior_out.bias is not None
        nn.init.zeros_(self.prior_out.bias)
        self.mix = nn.Sequential(Residual(channels), Residual(channels))
        self.up = nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(16, classes, 3, 1, 1)

    def forward(self, bev: Tensor, latent: Tensor | None, evidence: Tensor | None) -> Tensor:
        x = bev
        if latent is not None and evidence is not None:
            trust = evidence / (evidence + 1)
            prior = torch.relu(self.prior_in(torch.cat([latent * trust, trust], dim=1)))
            x = x + trust * self.prior_out(self.prior_mix(prior))
        out: Tensor = self.out(self.up(self.mix(x)))
        return out


class BEVNetwork(nn.Module):
    """Six images to map layers, with a door for the prior.

    The three steps are separate so that the mapper, the trainer and the benchmarks can put the prior between them.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone, config.backbone_stages)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels)
        self.lift = GroundLift(config.feature_grid)
        self.bev = BevEncoder(config.neck_channels + COORDINATE_CHANNELS, config.bev_channels)
        self.latent = nn.Conv2d(config.bev_channels, config.prior_channels, 1)
        self.weight = nn.Conv2d(config.bev_channels, 1, 1)
        self.decoder = Decoder(config.bev_channels, config.prior_channels, len(CLASSES))
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def encode(self, images: Tensor, pixel_from_base: Tensor, present: Tensor) -> Tensor:
        """Images to BEV features.

        :param images: [B, N, 3, H, W] RGB in 0..255
        :param pixel_from_base: [B, N, 3, 4] base points (m) to homogeneous image coordinates in 0..1
        :param present: [B, N] 1 where the camera delivered an image
        :return: [B, bev_channels, rows, cols] over the feature grid
        """
        b, n = images.shape[:2]
        flat = (images.flatten(0, 1).to(self.mean.dtype) - self.mean) / self.std
        if flat.device.type == "cpu":
            flat = flat.contiguous(memory_format=torch.channels_last)
        features = self.neck(self.backbone(flat))
        out: Tensor = self.bev(self.lift(features.unflatten(0, (b, n)), pixel_from_base, present))
        return out

    def observe(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """What this frame adds to the prior: (weight x latent [B, D, rows, cols], weight [B, 1, rows, cols]).

        Latents lie in -1..1, weights in 0..1: the network itself says how much a cell was really seen.
        """
        weight = torch.sigmoid(self.weight(bev).float())
        return torch.tanh(self.latent(bev).float()) * weight, weight

    def decode(self, bev: Tensor, latent: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        """Class logits [B, 3, 2 rows, 2 cols].

        :param latent: [B, D, rows, cols] prior latents in the ego frame, or None for no prior
        :param evidence: [B, 1, rows, cols] their evidence
        """
        out: Tensor = self.decoder(bev, latent, evidence)
        return out
