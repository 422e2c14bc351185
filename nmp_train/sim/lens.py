"""From light to bytes: drops on the lens, blur, vignetting, noise, exposure and the camera's tone curve."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ATLAS_SIDE = 512
DROPS = 46
KEY, GAMMA, SHOULDER = 0.37, 0.68, 0.14
"""mean radiance of a well exposed picture, and the display's curve: its power, and how gently it ends in white"""
GRAIN_WIDTH = 1600
"""the strength of the noise is that of images so wide; smaller ones are averages of more light"""
COARSE = 4
"""what is seen through a drop is as blurred as an image reduced by this"""


@functools.cache
def drop_atlas(device: torch.device) -> Tensor:
    """Return drops on a sheet of glass, [1, 4, side, side], that repeats at its edges.

    Channels: shift of the view along x and y (fractions of the sheet), cover 0..1, and how much must be covered
    for this drop to be there (0..1).
    """
    rng = np.random.default_rng((20, ATLAS_SIDE))
    axis = (np.arange(ATLAS_SIDE) + 0.5) / ATLAS_SIDE
    sheet = np.zeros((4, ATLAS_SIDE, ATLAS_SIDE), np.float32)
    for rank in rng.permutation(DROPS) / DROPS:
        x, y = rng.uniform(size=2)
        radius = 0.012 + 0.07 * rng.uniform() ** 3
        dx = (axis[None, :] - x + 0.5) % 1.0 - 0.5
        dy = (axis[:, None] - y + 0.5) % 1.0 - 0.5
        angle = np.arctan2(dy, dx)
        wobble = 1 + 0.18 * np.sin(2 * angle + rng.uniform(0, 6)) + 0.1 * np.sin(3 * angle + rng.uniform(0, 6))
        r = np.hypot(dx, dy * rng.uniform(0.7, 1.0)) / (radius * wobble)
        cover = np.clip((1.0 - r) * 3.0, 0, 1)
        inside = cover > sheet[2]
        strength = rng.uniform(1.0, 2.2)  # a drop is a lens that shows the scene upside down
        for channel, value in enumerate((-dx * strength, -dy * strength, cover, rank)):
            sheet[channel][inside] = np.broadcast_to(value, inside.shape)[inside]
    with torch.inference_mode(False):  # it is kept for other callers
        return torch.from_numpy(sheet)[None].to(device)


def expose(
    image: Tensor,
    noise: Tensor,
    atlas: Tensor,
    exposure: Tensor,
    metering: Tensor,
    tint: Tensor,
    grain: Tensor,
    blur: Tensor,
    vignette: Tensor,
    saturation: Tensor,
    drops: Tensor,
    drops_at: Tensor,
    with_drops: bool,
    with_blur: bool,
) -> Tensor:
    """Turn radiance [M, 3, H, W] of M cameras into uint8 [M, 3, H, W].

    :param noise: [M, 3, H, W] standard normal
    :param atlas: of :func:`drop_atlas`
    :param exposure: [M], like all that follow but ``tint`` [M, 3], ``blur`` and ``drops_at`` [M, 2]: see
        :class:`~nmp_train.sim.weather.Weather`, whose ``noise`` is ``grain`` here
    :param with_drops: False when no camera has drops; ``with_blur`` likewise
    """
    height, width = image.shape[-2:]
    each = (-1, 1, 1, 1)
    x = (torch.arange(width, device=image.device, dtype=torch.float32) + 0.5) / width * 2 - 1
    y = ((torch.arange(height, device=image.device, dtype=torch.float32) + 0.5) / height * 2 - 1)[:, None]
    if with_drops:
        image = _through_drops(image, atlas, x, y, drops, drops_at)
    if with_blur:
        image = _blurred(image, blur * width)
    # the mean brightness decides the gain, but glaring spots count no more than white paper
    mean = image.clamp(max=1.5).mean(dim=(1, 2, 3)).clamp(min=1e-3)
    exposure = exposure * (KEY / mean) ** metering
    corner = 1 - vignette.view(-1, 1, 1) * (0.7 * x * x + 0.3 * y * y)
    gain = (exposure[:, None] * tint)[:, :, None, None] * corner[:, None]
    # photons arrive at random, and reading the sensor adds noise that shows in the dark
    light = (image * gain).clamp(min=0)
    light = (light + (grain * (width / GRAIN_WIDTH) ** 0.5).view(each) * (light + 0.06).sqrt() * noise).clamp(min=0)
    red, green, blue = light.unbind(1)
    grey = (0.3 * red + 0.59 * green + 0.11 * blue)[:, None]
    light = grey + saturation.view(each) * (light - grey)
    # soft shoulder and display gamma
    return ((light / (1 + SHOULDER * light)).clamp(0, 1) ** GAMMA).mul(255).round().to(torch.uint8)


def _through_drops(image: Tensor, atlas: Tensor, x: Tensor, y: Tensor, drops: Tensor, at: Tensor) -> Tensor:
    """Replace what lies behind drops by a shifted and blurred view."""
    m, _, height, width = image.shape
    # the sheet keeps its proportions: it repeats along the longer side of the image
    sheet_x = (x * 0.5 * max(1.0, width / height) + at[:, None, None, 0]) % 1.0
    sheet_y = (y * 0.5 + at[:, None, None, 1]) % 1.0
    grid = torch.stack(torch.broadcast_tensors(sheet_x * 2 - 1, sheet_y * 2 - 1), dim=-1)
    found = functional.grid_sample(atlas, grid.reshape(1, m * height, -1, 2), align_corners=False)
    shift_x, shift_y, cover, rank = (c.reshape(m, height, -1) for c in found[0].unbind(0))
    cover = cover * (rank < drops.view(-1, 1, 1)) * 0.92
    coarse = functional.avg_pool2d(image, COARSE, ceil_mode=True, count_include_pad=False)
    behind = torch.stack([x + shift_x * 4.0, y + shift_y * 6.0], dim=-1)
    seen = functional.grid_sample(coarse, behind, padding_mode="reflection", align_corners=False)
    return image + cover[:, None] * (seen * 1.03 - image)


def _blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each camera's image by its own standard deviations [M, 2] (pixels) with five taps along each axis."""
    for axis, dim in ((0, 3), (1, 2)):
        s = sigma[:, axis].clamp(min=0.05, max=1.6)
        near, far = torch.exp(-0.5 / s**2), torch.exp(-2.0 / s**2)
        total = 1 + 2 * near + 2 * far
        size = image.shape[dim]
        pad = (2, 2, 0, 0) if dim == 3 else (0, 0, 2, 2)
        wide = functional.pad(image, pad, mode="replicate")
        part = [wide.narrow(dim, i, size) for i in range(5)]
        each = (-1, 1, 1, 1)
        image = (
            image * (1 / total).view(each)
            + (part[1] + part[3]) * (near / total).view(each)
            + (part[0] + part[4]) * (far / total).view(each)
        )
    return image
