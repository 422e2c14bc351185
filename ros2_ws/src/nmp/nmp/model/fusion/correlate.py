"""How well two feature maps agree, for every small shift of one of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp.geometry import BevGrid

FEATURES = 8
"""channels that are compared"""
COARSE = 2
"""rows and columns of BEV cells that are compared as one"""


def features_of(channels: int) -> nn.Sequential:
    """Return the layers that make what is compared of features or latents with so many channels."""
    return nn.Sequential(nn.Conv2d(channels, 32, 1), nn.ReLU(), nn.Conv2d(32, FEATURES, 3, 1, 1))


def centres_of(grid: BevGrid) -> tuple[Tensor, Tensor]:
    """Return the middles (m) of the cells of a grid [rows, cols, 2], and of squares of them [rows / 2, cols / 2, 2].

    The squares (:data:`COARSE`) are what is compared.
    """
    fine = torch.as_tensor(grid.centres(), dtype=torch.float32).reshape(*grid.shape, 2)
    return fine, functional.avg_pool2d(fine.permute(2, 0, 1), COARSE).permute(1, 2, 0)


def correlate(first: Tensor, second: Tensor, shifts: int) -> Tensor:
    """Sum first(x) * second(x + d) over cells and channels for every shift d, in float32.

    Matrix products on a GPU; on a CPU one convolution with the first maps as kernels, which takes a third of their time
    there. Fourier transforms take longer for shifts as small.

    :param first: [B, N, K, rows, cols], N maps that are compared with the same second one
    :param second: [B, K, rows, cols], zero outside
    :param shifts: cells tried to either side along each axis
    :return: [B, N, 2 shifts + 1, 2 shifts + 1], the mean over all cells times the root of their number
    """
    rows, cols = second.shape[-2:]
    with torch.autocast(second.device.type, enabled=False):
        padded = functional.pad(second.float(), [shifts] * 4)
        if not second.is_cuda:
            kernels = first.float().flatten(0, 1)
            sums = functional.conv2d(padded.flatten(0, 1)[None], kernels, groups=len(second))
            return sums.view(*first.shape[:2], *sums.shape[-2:]) / math.sqrt(rows * cols)
        # A product for each row of each channel, [N, cols] x [cols, shifts]: in one alone, or in one for each channel,
        # most of the GPU would have no part.
        moved = padded.unfold(2, rows, 1).unfold(3, cols, 1).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
        each = first.float().permute(0, 2, 3, 1, 4) @ moved.transpose(3, 4)
        sums = each.flatten(1, 2).sum(dim=1)
    return sums.view(*first.shape[:2], 2 * shifts + 1, 2 * shifts + 1) / math.sqrt(rows * cols)
