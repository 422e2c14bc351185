"""Losses of the layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def layer_loss(logits: Tensor, truth: Tensor, positive_weight: float) -> Tensor:
    """Binary cross entropy plus soft Dice (Milletari et al., 3DV 2016), averaged over classes.

    :param logits: [B, 3, rows, cols]
    :param truth: [B, 3, rows, cols] of 0 and 1
    :param positive_weight: weight of drawn pixels in the cross entropy: lines cover only a few per cent
    """
    target = truth.float()
    logits = logits.float()
    weight = 1 + (positive_weight - 1) * target
    entropy = (functional.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).mean()
    probability = torch.sigmoid(logits)
    overlap = (probability * target).sum(dim=(0, 2, 3))
    total = (probability + target).sum(dim=(0, 2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return entropy + dice.mean()
