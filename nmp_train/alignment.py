"""Pose errors in training, and what the search for them should have found."""

from __future__ import annotations

import torch
from torch import Tensor

from nmp.model.fusion import Alignment, Slope
from nmp.model.fusion.align import BLUR, TURN_RAD, Aligner
from nmp.model.fusion.slope import SLOPE_STEP, Leveller
from nmp_train.distributed import sum_over_ranks


def alignment_loss(found: Alignment, aligner: Aligner, target: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy between what the comparison says of all motions and the true one, 0 where they agree.

    How well the pose is known has no part in it. A pose that is known better than a step of the search leaves no room
    for the blur of the true motion: the comparison would be trained to speak against it, and in the end to say nothing.

    :param target: [B, 3] true motion in the ego frame of the given pose: forward, left (m), turn (rad)
    :param weight: [B] how much a frame counts: nothing can be found where little is stored
    """
    c, s = torch.cos(target[:, 2]), torch.sin(target[:, 2])
    forward = (c * target[:, 0] + s * target[:, 1]) / aligner.step_m  # shifts are counted in the turned frame
    left = (c * target[:, 1] - s * target[:, 0]) / aligner.step_m
    turn = target[:, 2] / TURN_RAD
    turns, shifts = found.score.shape[1:3]
    expected = torch.einsum("bt,by,bx->btyx", _near(turn, turns), _near(left, shifts), _near(forward, shifts))
    return _divergence(expected, found.score.flatten(1).log_softmax(dim=1).view_as(expected), weight)


def slope_loss(found: Slope, leveller: Leveller, slope: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy between the probabilities of all slopes and the true one, 0 where they agree.

    :param slope: [B, 2] forward and left, as :attr:`nmp.model.fusion.Slope.slope`; frames where it is NaN do not count
    :param shift: [B, 2] forward, left (m) that the pose is off
    :param weight: [B] as in :func:`alignment_loss`
    """
    known = slope.isfinite().all(dim=1)
    slope, shift = slope.nan_to_num() / SLOPE_STEP, shift / leveller.step_m
    slopes, shifts = found.log_probability.shape[1], found.log_probability.shape[3]
    expected = torch.einsum(
        "bl,bf,by,bx->blfyx",
        _near(slope[:, 1], slopes),
        _near(slope[:, 0], slopes),
        _near(shift[:, 1], shifts),
        _near(shift[:, 0], shifts),
    )
    return _divergence(expected, found.log_probability, weight * known)


def _near(value: Tensor, steps: int) -> Tensor:
    """Return [B, steps] shares around ``value`` (in steps), which is moved into the range of the search."""
    half = steps // 2
    place = torch.arange(-half, half + 1, device=value.device)
    far = (place - value.clamp(-half, half)[:, None]) / BLUR
    return torch.softmax(-(far**2) / 2, dim=1)


def _divergence(expected: Tensor, log_probability: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over frames, by ``weight`` [B] and over all ranks, of how far probabilities are from others."""
    entropy = torch.special.entr(expected).flatten(1).sum(dim=1)
    loss = -(expected * log_probability).flatten(1).sum(dim=1) - entropy
    sums = sum_over_ranks(torch.stack([(loss * weight).sum(), weight.sum()]))
    return sums[0] / sums[1].clamp(min=1e-6)


def motion_between(start: Tensor, end: Tensor) -> Tensor:
    """Return the motion [B, 3] in the frame of ``start`` that leads to ``end``.

    It undoes :func:`~nmp.model.fusion.moved`.
    """
    c, s = torch.cos(start[:, 2]), torch.sin(start[:, 2])
    dx, dy = end[:, 0] - start[:, 0], end[:, 1] - start[:, 1]
    return torch.stack([c * dx + s * dy, c * dy - s * dx, end[:, 2] - start[:, 2]], dim=1)
