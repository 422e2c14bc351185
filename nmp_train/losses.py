"""Losses of the layers, and of the instance embeddings and directions.

In a run of several processes every loss is that of the whole batch, the same number on every rank: the sums that it
is made of are added up over the ranks before they are divided. Every rank must therefore call the same losses, in the
same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmp_train.distributed import sum_over_ranks

PUBLISHED_POSITIVE_WEIGHT = 15.0
PUBLISHED_LAYER_WEIGHT = 2.0
PUBLISHED_DIRECTION_WEIGHT = 0.2
PULL_MARGIN = 0.5
PUSH_MARGIN = 3.0


def layer_loss(logits: Tensor, truth: Tensor, positive_weight: float) -> Tensor:
    """Binary cross entropy plus soft Dice (Milletari et al., 3DV 2016), averaged over classes.

    :param logits: [B, 3, rows, cols]
    :param truth: [B, 3, rows, cols] of 0 and 1
    :param positive_weight: weight of drawn pixels in the cross entropy: lines cover only a few per cent
    """
    target = truth.float()
    logits = logits.float()
    weight = 1 + (positive_weight - 1) * target
    entropy = functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
    probability = torch.sigmoid(logits)
    overlap = (probability * target).sum(dim=(0, 2, 3))
    total = (probability + target).sum(dim=(0, 2, 3))
    classes = target.shape[1]
    sums = sum_over_ranks(torch.cat([torch.stack([entropy, _count(target)]), overlap, total]))
    overlap, total = sums[2:].split(classes)
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return sums[0] / sums[1] + dice.mean()


def published_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Weighted cross entropy of Neural Map Prior (Xiong et al., CVPR 2023), in binary form.

    The published head has four channels, background and one of three exclusive classes, with class weights 1, 15, 15
    and 15 and a factor of 2. Our classes may overlap and have a logit each, so theirs becomes a sum over the classes of
    binary cross entropies with weight 15 on drawn pixels; where nothing is drawn and little is predicted, the two are
    equal to first order.

    :param logits: [B, 3, rows, cols]
    :param truth: [B, 3, rows, cols] of 0 and 1
    """
    target = truth.float()
    weight = 1 + (PUBLISHED_POSITIVE_WEIGHT - 1) * target
    entropy = functional.binary_cross_entropy_with_logits(logits.float(), target, weight, reduction="sum")
    sums = sum_over_ranks(torch.stack([entropy, _count(target[:, 0])]))
    return PUBLISHED_LAYER_WEIGHT * sums[0] / sums[1]


def embedding_loss(embedding: Tensor, instances: Tensor) -> Tensor:
    """Discriminative loss (De Brabandere et al., 2017): pixels of a line near their mean, means of lines apart.

    Pixels further than 0.5 from the mean of their line are pulled to it, means nearer than 3 to each other are pushed
    apart, within each class of each frame; mean over frames and classes, where those without lines count as zero. As
    in HDMapNet's published code, 3 is the whole distance between two means (2 delta_d in the paper's notation).

    :param embedding: [B, E, rows, cols]
    :param instances: [B, 3, rows, cols] integers: number of the line among those of its class, from 1; 0 for none
    """
    groups = instances.shape[0] * instances.shape[1]
    with torch.autocast(embedding.device.type, enabled=False):
        frame, layer, row, col = torch.nonzero(instances, as_tuple=True)
        numbers = instances[frame, layer, row, col].long()
        pixels = embedding[frame, :, row, col].float()
        most = int(numbers.max()) if len(numbers) else 1
        line = (frame * instances.shape[1] + layer) * most + numbers - 1
        count = pixels.new_zeros(groups * most).index_add(0, line, torch.ones_like(pixels[:, 0]))
        mean = pixels.new_zeros(groups * most, pixels.shape[1]).index_add(0, line, pixels)
        mean = mean / count.clamp(min=1)[:, None]

        away = torch.linalg.vector_norm(pixels - mean.index_select(0, line), dim=1)
        # Each pixel counts as its share of its line, each line as its share of its class.
        exists = (count > 0).view(groups, most)
        lines = exists.sum(dim=1)
        share = 1 / (count.clamp(min=1).view(groups, most) * lines.clamp(min=1)[:, None]).flatten()
        pull = (functional.relu(away - PULL_MARGIN).square() * share.index_select(0, line)).sum()

        mean = mean.view(groups, most, -1)
        apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
        pair = exists[:, :, None] & exists[:, None, :] & ~torch.eye(most, dtype=torch.bool, device=mean.device)
        near = torch.where(pair, functional.relu(PUSH_MARGIN - apart), 0).square().sum(dim=(1, 2))
        push = (near / (lines * (lines - 1)).clamp(min=1)).sum()
        sums = sum_over_ranks(torch.stack([pull + push, pull.new_tensor(float(groups))]))
    return sums[0] / sums[1]


def direction_loss(direction: Tensor, truth: Tensor) -> Tensor:
    """Direction loss of HDMapNet (Li et al., ICRA 2022) with its weight of 0.2.

    Binary cross entropy between the softmax over the 37 classes and both directions of the line, the way it was drawn
    and the opposite, mean over classes and over the pixels of lines.

    :param direction: [B, 37, rows, cols] logits
    :param truth: [B, 2, rows, cols] integers: classes 1..36 of both directions; 0 where there is no line
    """
    with torch.autocast(direction.device.type, enabled=False):
        frame, row, col = torch.nonzero(truth[:, 0], as_tuple=True)
        probability = torch.softmax(direction[frame, :, row, col].float(), dim=1)
        target = torch.zeros_like(probability).scatter(1, truth[frame, :, row, col].long(), 1)
        entropy = functional.binary_cross_entropy(probability, target, reduction="sum")
        sums = sum_over_ranks(torch.stack([entropy, _count(probability)]))
    return PUBLISHED_DIRECTION_WEIGHT * sums[0] / sums[1].clamp(min=1)


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)
