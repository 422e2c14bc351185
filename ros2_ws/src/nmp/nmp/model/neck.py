"""Feature pyramid (Lin et al., CVPR 2017), one level of it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nmp.model.blocks import ConvBnRelu


class FeaturePyramid(nn.Module):
    """Merges trunk outputs (strides 4, 8, ...) top-down into one map: that of stride 4 * 2 ** ``level``.

    ``forward`` takes the outputs of all stages, [B, in_channels[k], H / 2 ** (k + 2), W / 2 ** (k + 2)], and returns
    [B, channels, H / 2 ** (level + 2), W / 2 ** (level + 2)].
    """

    def __init__(self, in_channels: list[int], channels: int, level: int = 0) -> None:
        super().__init__()
        self.level = level
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[level:])
        self.smooth = ConvBnRelu(channels, channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        levels = levels[self.level :]
        merged: Tensor = self.lateral[-1](levels[-1])
        for lateral, level in zip(reversed(self.lateral[:-1]), reversed(levels[:-1]), strict=True):
            up = functional.interpolate(merged, size=level.shape[-2:], mode="bilinear", align_corners=False)
            merged = lateral(level) + up
        out: Tensor = self.smooth(merged)
        return out
