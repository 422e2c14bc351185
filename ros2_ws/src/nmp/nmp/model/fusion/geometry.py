"""Between the ego frame and the cells of a window of the map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmp.geometry import BevGrid
from nmp.model.sampling import sample


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
    place = (_centres(rows, cols, cell, values.device) + _offset(origin, pose)) * _turn(-pose[:, 2])
    where = torch.view_as_real(place) * _pair(2 / grid.length, 2 / grid.width, values.device)
    return sample(values, where.to(values.dtype), mode)


def map_to_ego(
    window: Tensor,
    pose: Tensor,
    grid: BevGrid,
    origin: Tensor,
    cell: float,
    mode: str = "bilinear",
    square: int = 1,
) -> Tensor:
    """Look map cells up at the cells of an ego-frame grid (the inverse of :func:`ego_to_map`).

    :param window: [B, C, rows, cols] map cells
    :param square: look up the middles of squares of so many by so many cells of the grid instead
    :return: [B, C, grid rows / square, grid cols / square], rounded down; zero outside the window
    """
    rows, cols = window.shape[-2:]
    corner = (-grid.length / 2, -grid.width / 2)
    across, along = (n // square for n in grid.shape)
    middles = _centres(across, along, square * grid.resolution, window.device, corner)
    place = middles * _turn(pose[:, 2]) + _offset(pose, origin)
    where = torch.view_as_real(place) * _pair(2 / (cols * cell), 2 / (rows * cell), window.device) - 1
    return sample(window, where.to(window.dtype), mode)


# Places are complex numbers x + iy: a turn is one product, where sines and cosines are a dozen small steps, which a
# GPU takes no less time for than for large ones.


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function made; a compiler makes constants of it, and warns of caches that it cannot see through."""
    kept = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def get(*arguments: Any) -> Tensor:
        return make(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return get


@_kept
def _centres(
    rows: int, cols: int, cell: float, device: torch.device, corner: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Return the middles [rows, cols] of cells that begin at a corner."""
    with torch.inference_mode(False), torch.no_grad():  # training may use them next
        x, y = (
            torch.linspace(start + cell / 2, start + (count - 0.5) * cell, count, device=device)
            for start, count in zip(corner, (cols, rows), strict=True)
        )
        return torch.complex(x.expand(rows, cols), y[:, None].expand(rows, cols))


def _offset(there: Tensor, here: Tensor) -> Tensor:
    """Return the way [B, 1, 1] between places whose first columns are x and y."""
    return torch.view_as_complex((there[:, :2] - here[:, :2]).float().contiguous())[:, None, None]


def _turn(angle: Tensor) -> Tensor:
    """Return the factors [B, 1, 1] that turn places by angles [B]."""
    angle = angle.float()
    return torch.polar(torch.ones_like(angle), angle)[:, None, None]


@_kept
def _pair(first: float, second: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.linspace(first, second, 2, device=device)
