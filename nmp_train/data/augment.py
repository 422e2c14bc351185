"""Random changes of a batch on the training device that keep images, projections, poses and truth in agreement."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nmp.frame import CAMERAS
from nmp.truth import DIRECTIONS
from nmp_train.data.batch import Batch

if TYPE_CHECKING:
    from nmp_train.config import AugmentConfig

_OTHER_SIDE = [
    CAMERAS.index(name.replace("left", "right") if "left" in name else name.replace("right", "left"))
    for name in CAMERAS
]
"""the camera that sees in a mirrored world what each of them sees"""


def augment(batch: Batch, config: AugmentConfig) -> Batch:
    """Mirror groups, zoom and shift images, change their colours and leave out cameras, as the configuration says.

    What is drawn for a group follows from its seed, so it is the same on any number of ranks. Turned ego frames
    (``turn_rad``) are drawn in the workers, with the truth. The batch given stays as it is.
    """
    rngs = [np.random.default_rng((int(seed), 53)) for seed in batch.seeds]
    frames, device = batch.pose.shape[1], batch.images.device

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        """Draw [F, ...] numbers, each group from a generator of its own."""
        values = np.stack([rng.uniform(low, high, (frames, *shape)) for rng in rngs])
        return torch.from_numpy(values).float().flatten(0, 1).to(device)

    if config.mirror:
        batch = mirrored(batch, torch.tensor([rng.uniform() < config.mirror for rng in rngs], device=device))
    if config.zoom or config.shift:
        n = len(CAMERAS)
        scale = 1 + drawn(-config.zoom, config.zoom, n)
        batch = moved(batch, scale, drawn(-config.shift, config.shift, n, 2))
    if config.colour:
        batch = replace(batch, images=coloured(batch.images, 1 + drawn(-config.colour, config.colour, 3)))
    if config.drop_camera:
        chance = drawn(0, 1) < config.drop_camera
        which = drawn(0, len(CAMERAS)).long().clamp(max=len(CAMERAS) - 1)
        batch = without(batch, functional.one_hot(which, len(CAMERAS)).bool() & chance[:, None])
    return batch


def mirrored(batch: Batch, which: Tensor) -> Batch:
    """Mirror the world of some groups (``which`` [B] bool) left to right.

    Every image is mirrored and becomes that of the camera on the other side, so that front left looks to the front
    left again. Traffic keeps to the other side of the road.
    """
    each = which.repeat_interleave(batch.pose.shape[1])

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(each.view(-1, *[1] * (new.dim() - 1)), new, old)

    # u becomes 1 - u, and y becomes -y
    projection = batch.pixel_from_base[:, _OTHER_SIDE].clone()
    projection[..., 0, :] = projection[..., 2, :] - projection[..., 0, :]
    projection[..., 1] = -projection[..., 1]
    direction = batch.direction
    if direction is not None:
        # class k is the angle of (k - 1) steps, which becomes its negative
        turned = torch.where(direction > 0, (DIRECTIONS + 1 - direction.int()) % DIRECTIONS + 1, 0)
        direction = chosen(turned.to(direction.dtype).flip(-2), direction)
    sign = torch.tensor([1.0, -1.0, -1.0], device=batch.pose.device)
    return replace(
        batch,
        images=chosen(batch.images[:, _OTHER_SIDE].flip(-1), batch.images),
        pixel_from_base=chosen(projection, batch.pixel_from_base),
        present=chosen(batch.present[:, _OTHER_SIDE], batch.present),
        pose=torch.where(which[:, None, None], batch.pose * sign, batch.pose),
        slope=torch.where(which[:, None, None], batch.slope * sign[:2], batch.slope),
        truth=chosen(batch.truth.flip(-2), batch.truth),
        instance=None if batch.instance is None else chosen(batch.instance.flip(-2), batch.instance),
        direction=direction,
    )


def moved(batch: Batch, scale: Tensor, shift: Tensor) -> Batch:
    """Zoom into every image by ``scale`` [F, N] about its middle, and move it by ``shift`` [F, N, 2] of its size.

    A shift of (0.1, 0) moves what is seen to the right by a tenth of the width. What comes into view is black.
    """
    f, n, _, h, w = batch.images.shape
    # new = scale * (old - 1/2) + 1/2 + shift
    offset = 0.5 - 0.5 * scale[..., None] + shift
    change = torch.zeros(f, n, 3, 3, device=scale.device)
    change[..., 0, 0] = change[..., 1, 1] = scale
    change[..., :2, 2] = offset
    change[..., 2, 2] = 1
    # grid_sample wants where each new pixel comes from, in -1..1: 2 * old - 1 = (2 * new - 1 - 2 * shift) / scale
    back = torch.zeros(f * n, 2, 3, device=scale.device)
    back[:, 0, 0] = back[:, 1, 1] = 1 / scale.flatten()
    back[:, :, 2] = (-2 * shift / scale[..., None]).flatten(0, 1)
    grid = functional.affine_grid(back, [f * n, 3, h, w], align_corners=False)
    images = functional.grid_sample(batch.images.flatten(0, 1).float(), grid, align_corners=False)
    return replace(
        batch,
        images=images.round_().to(torch.uint8).unflatten(0, (f, n)),
        pixel_from_base=change @ batch.pixel_from_base,
    )


def coloured(images: Tensor, gain: Tensor) -> Tensor:
    """Change brightness, contrast and saturation (``gain`` [F, 3], 1 keeps each) of uint8 images [F, N, 3, H, W]."""
    brightness, contrast, saturation = (g[:, None, None, None, None] for g in gain.unbind(dim=1))
    values = images.float() * brightness
    middle = values.mean(dim=(2, 3, 4), keepdim=True)
    values = middle + (values - middle) * contrast
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    grey = (values * weights).sum(dim=2, keepdim=True)
    values = grey + (values - grey) * saturation
    return values.round_().clamp_(0, 255).to(torch.uint8)


def without(batch: Batch, lost: Tensor) -> Batch:
    """Leave out cameras (``lost`` [F, N] bool): their images are black, and ``present`` says so."""
    return replace(
        batch,
        images=batch.images.masked_fill(lost[..., None, None, None], 0),
        present=batch.present.masked_fill(lost, 0.0),
    )
