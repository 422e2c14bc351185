"""The network: images to BEV features, the prior read and written, features to layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.model import fusion
from nmp.model.blocks import ConvBnRelu, Residual
from nmp.model.config import NetworkConfig
from nmp.model.heads import VectorHeads
from nmp.model.neck import FeaturePyramid
from nmp.model.resnet import ResNet
from nmp.model.views import make_view


class BevEncoder(nn.Module):
    """Gives every BEV cell its surroundings: a three-level U-shaped stack of convolutions."""

    def __init__(self, inputs: int, channels: int, half: int, quarter: int) -> None:
        """:param half: channels at half the resolution, ``quarter`` at a quarter of it"""
        super().__init__()
        self.stem = nn.Sequential(ConvBnRelu(inputs, channels), Residual(channels))
        self.down_half = nn.Sequential(ConvBnRelu(channels, half, 2), Residual(half))
        self.down_quarter = nn.Sequential(ConvBnRelu(half, quarter, 2), Residual(quarter), Residual(quarter))
        self.up_half = nn.Conv2d(quarter, half, 1)
        self.mix_half = Residual(half)
        self.up_full = nn.Conv2d(half, channels, 1)
        self.mix_full = Residual(channels)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x)
        half = self.down_half(full)
        low = self.up_half(self.down_quarter(half))
        half = self.mix_half((half + functional.interpolate(low, half.shape[-2:], mode="bilinear")).relu_())
        up = functional.interpolate(self.up_full(half), full.shape[-2:], mode="bilinear")
        out: Tensor = self.mix_full((full + up).relu_())
        return out


class Decoder(nn.Module):
    """BEV features to class logits at twice the resolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(Residual(channels), Residual(channels))
        self.up = nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(16, classes, 3, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, classes, 2 rows, 2 cols] and the features [B, channels, rows, cols] they are made of."""
        mixed = self.mix(features)
        return self.out(self.up(mixed)), mixed


class Output(NamedTuple):
    """What a network says about B frames, at twice the resolution of the BEV features; row 0 is the right edge."""

    logits: Tensor
    """[B, 3, 2 rows, 2 cols] of the classes"""
    embedding: Tensor | None = None
    """[B, 16, 2 rows, 2 cols] near each other for pixels of one element, with ``vector_heads``"""
    direction: Tensor | None = None
    """[B, 37, 2 rows, 2 cols] logits of no direction and of 36 directions, with ``vector_heads``"""
    alignment: fusion.Alignment | None = None
    """how the pose was corrected, with ``align``"""
    slope: fusion.Slope | None = None
    """how the road slopes, with ``slopes``"""


class BEVNetwork(nn.Module):
    """Six images to map layers, with a door for the prior.

    The three steps are separate so that the mapper, the trainer and the benchmarks can put the prior between them.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        rows, cols = config.feature_grid.shape
        if config.layer_grid.shape != (2 * rows, 2 * cols):
            raise NmpError(
                f"network configuration: layer_resolution is {config.layer_resolution:g}, but layers have two cells "
                f"where features have one: set it to half of feature_resolution, {config.feature_resolution / 2:g}"
            )
        self.config = config
        self.backbone = ResNet(config.backbone, config.backbone_stages)
        self.view = make_view(config)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels, self.view.level)
        channels = config.bev_channels
        half = config.bev_half_channels or channels * 3 // 2
        quarter = config.bev_quarter_channels or 2 * channels
        self.bev = BevEncoder(self.view.channels, channels, half, quarter)
        self.fusion = fusion.make_fusion(config)
        self.decoder = Decoder(channels, len(CLASSES))
        self.heads = VectorHeads(channels) if config.vector_heads else None
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
        features = self.neck(self.backbone(flat.contiguous(memory_format=torch.channels_last)))
        out: Tensor = self.bev(self.view(features.unflatten(0, (b, n)), pixel_from_base, present))
        return out

    def decode(self, features: Tensor) -> Output:
        """Layers of features that the fusion made, with or without a prior in them."""
        logits, mixed = self.decoder(features)
        return Output(logits) if self.heads is None else Output(logits, *self.heads(mixed))

    def alone(self, bev: Tensor) -> Output:
        """Layers of BEV features [B, C, rows, cols] of one frame by itself, as with an empty prior."""
        if self.config.fusion == "evidence":
            return self.decode(bev)  # nothing is added where there is no evidence
        rows, cols = bev.shape[-2:]
        nothing = fusion.Memory.empty(len(bev), self.state_channels, rows, cols, bev.device)
        return self.decode(self.fusion.fuse(bev, *nothing))

    def step(
        self,
        bev: Tensor,
        memory: fusion.Memory,
        pose: Tensor,
        origin: Tensor,
        repeat: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> tuple[Output, fusion.Memory]:
        """Map one frame with what is remembered of its place, and remember it as well.

        :param bev: [B, C, rows, cols] of :meth:`encode`
        :param memory: windows of the map, of any size, one for each frame
        :param pose: [B, 3] ego x, y (m), yaw (rad) in the map frame
        :param origin: [B, 2] x, y (m) of the corner of each window in the map frame
        :param repeat: [B] how many times the frame counts as seen, None for once
        :param spread: [B, 2] standard deviations of position (m) and heading (rad), None for unknown
        :return: layers, and the windows as they are afterwards
        """
        cells = self.fusion.opened(memory)
        alignment = self.fusion.locate(bev, cells, pose, origin, spread)
        if alignment is not None:
            # The search learns from its own loss: gradients through the places of cells only add noise.
            pose = fusion.moved(pose, alignment.offset.detach())
        latent, evidence = self.fusion.read(cells, pose, origin)
        level, slope = self.fusion.level(bev, latent, evidence)
        features = self.fusion.fuse(level, latent, evidence, alignment)
        # What was seen is stored as it was seen: slopes differ from look to look and their mean is none, but what is
        # levelled by the map would repeat the map's own errors.
        memory = self.fusion.write(cells, bev, features, pose, origin, alignment, repeat)
        return self.decode(features)._replace(alignment=alignment, slope=slope), memory

    @property
    def state_channels(self) -> int:
        """Channels that a cell of the map holds."""
        return self.fusion.state_channels
