"""Heads that turn BEV features into what vectorisation needs, after HDMapNet (Li et al., ICRA 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from nmp.model.blocks import ConvBnRelu

EMBEDDING_CHANNELS = 16
DIRECTION_CHANNELS = 37
"""no line, and 36 directions of 10 degrees"""
_WIDTH = 32
"""channels of a head at twice the resolution"""


class VectorHeads(nn.Module):
    """Instance embeddings and directions at twice the resolution of the BEV features, each by a branch of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embedding = _branch(channels, EMBEDDING_CHANNELS)
        self.direction = _branch(channels, DIRECTION_CHANNELS)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, 16, 2 rows, 2 cols] and direction logits [B, 37, 2 rows, 2 cols].

        :param features: [B, channels, rows, cols] of the decoder, before it makes layers of them
        """
        return self.embedding(features), self.direction(features)


def _branch(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvBnRelu(channels, 4 * _WIDTH), nn.PixelShuffle(2), nn.Conv2d(_WIDTH, outputs, 1))
