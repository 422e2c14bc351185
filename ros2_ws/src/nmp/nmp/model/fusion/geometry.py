"""Between the ego frame and the cells of a window of the map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmp.geometry import BevGrid


def ego_to_map(
    values: Tensor,
    pose: Tensor,
    grid: BevGrid,
    origin: Tensor,
    cell: float,
    rows: int,
    cols: int,
    mode: str = "bilinear",
) -> Tensor:
    """Resample ego-frame values onto map cells.

    :param values: [B, C, grid rows, grid cols] over ``grid`` in the ego frame
    :param pose: [B, 3] ego x, y (m), yaw (rad) in the map frame
    :param origin: [B, 2] x, y (m) of the corner of the window in the map frame
    :param cell: edge of a map cell, m
    :param mode: bilinear, or nearest for the cell that holds the point
    :return: [B, C, rows, cols]; zero outside the ego region
    """
    x = (torch.arange(cols, device=values.device, dtype=torch.float32) + 0.5) * cell
    y = (torch.arange(rows, device=values.device, dtype=torch.float32) + 0.5) * cell
    dx = (x + origin[:, :1] - pose[:, :1])[:, None, :]  # [B, 1, cols]
    dy = (y + origin[:, 1:2] - pose[:, 1:2])[:, :, None]  # [B, rows, 1]
    c, s = torch.cos(pose[:, 2])[:, None, None], torch.sin(pose[:, 2])[:, None, None]
    where = torch.stack([(c * dx + s * dy) / (grid.length / 2), (-s * dx + c * dy) / (grid.width / 2)], dim=-1)
    return functional.grid_sample(values, where.to(values.dtype), mode=mode, align_corners=False)


def map_to_ego(
    window: Tensor, pose: Tensor, grid: BevGrid, origin: Tensor, cell: float, mode: str = "bilinear"
) -> Tensor:
    """Look map cells up at the cells of an ego-frame grid (the inverse of :func:`ego_to_map`).

    :param window: [B, C, rows, cols] map cells
    :return: [B, C, grid rows, grid cols]; zero outside the window
    """
    rows, cols = window.shape[-2:]
    # The cells are counted on the device: a copy from the host would make a GPU wait.
    across, along = (
        (torch.arange(count, device=window.device, dtype=torch.float32) + 0.5) * grid.resolution - edge / 2
        for count, edge in zip(grid.shape, (grid.width, grid.length), strict=True)
    )
    c, s = torch.cos(pose[:, 2])[:, None, None], torch.sin(pose[:, 2])[:, None, None]
    x = c * along - s * across[:, None] + (pose[:, 0] - origin[:, 0])[:, None, None]
    y = s * along + c * across[:, None] + (pose[:, 1] - origin[:, 1])[:, None, None]
    where = torch.stack([2 * x / (cols * cell) - 1, 2 * y / (rows * cell) - 1], dim=-1)
    return functional.grid_sample(window, where.to(window.dtype), mode=mode, align_corners=False)
