"""Map-aligned fusion: an evidence-weighted mean of latents in the cells of the city.

The prior is never resampled for storage. Each frame's latents are turned onto the map's cells once, added to
what the cells hold in proportion to their evidence, and written back as a block. A weighted sum does not
depend on the order of its terms, so drives can be merged in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmp.geometry import BevGrid

LATENT_SCALE = 127.0
"""int8 steps per unit of latent: latents lie in -1..1"""
EVIDENCE_SCALE = 256.0
"""uint16 steps per unit of evidence"""


def ego_to_map(
    values: Tensor, pose: Tensor, grid: BevGrid, origin: Tensor, cell: float, rows: int, cols: int
) -> Tensor:
    """Resample ego-frame values onto map cells.

    :param values: [B, C, grid rows, grid cols] over ``grid`` in the ego frame
    :param pose: [B, 3] ego x, y (m), yaw (rad) in the map frame
    :param origin: [B, 2] x, y (m) of the corner of the window in the map frame
    :param cell: edge of a map cell, m
    :return: [B, C, rows, cols]; zero outside the ego region
    """
    x = (torch.arange(cols, device=values.device, dtype=torch.float32) + 0.5) * cell
    y = (torch.arange(rows, device=values.device, dtype=torch.float32) + 0.5) * cell
    dx = (x + origin[:, :1] - pose[:, :1])[:, None, :]  # [B, 1, cols]
    dy = (y + origin[:, 1:2] - pose[:, 1:2])[:, :, None]  # [B, rows, 1]
    c, s = torch.cos(pose[:, 2])[:, None, None], torch.sin(pose[:, 2])[:, None, None]
    where = torch.stack([(c * dx + s * dy) / (grid.length / 2), (-s * dx + c * dy) / (grid.width / 2)], dim=-1)
    return functional.grid_sample(values, where.to(values.dtype), align_corners=False)


def map_to_ego(window: Tensor, pose: Tensor, grid: BevGrid, origin: Tensor, cell: float) -> Tensor:
    """Look map cells up at the cells of an ego-frame grid (the inverse of :func:`ego_to_map`).

    :param window: [B, C, rows, cols] map cells
    :return: [B, C, grid rows, grid cols]; zero outside the window
    """
    rows, cols = window.shape[-2:]
    centres = torch.as_tensor(grid.centres(), device=window.device, dtype=torch.float32)
    c, s = torch.cos(pose[:, 2])[:, None, None], torch.sin(pose[:, 2])[:, None, None]
    x = c * centres[..., 0] - s * centres[..., 1] + (pose[:, 0] - origin[:, 0])[:, None, None]
    y = s * centres[..., 0] + c * centres[..., 1] + (pose[:, 1] - origin[:, 1])[:, None, None]
    where = torch.stack([2 * x / (cols * cell) - 1, 2 * y / (rows * cell) - 1], dim=-1)
    return functional.grid_sample(window, where.to(window.dtype), align_corners=False)


def update(latent: Tensor, evidence: Tensor, seen: Tensor, weight: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Add one observation to the cells.

    :param latent: [B, D, rows, cols] mean latent of each cell
    :param evidence: [B, 1, rows, cols] its weight so far
    :param seen: [B, D, rows, cols] weight x latent of the new observation
    :param weight: [B, 1, rows, cols] weight of the new observation
    :param cap: most evidence a cell may hold
    """
    total = evidence + weight
    mean = (latent * evidence + seen) / total.clamp(min=1e-6)
    return torch.where(total > 0, mean, latent), total.clamp(max=cap)
