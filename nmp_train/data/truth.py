"""The labels of a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from nmp.citymap import CityMap
from nmp.model.config import NetworkConfig
from nmp.truth import rasterize, rasterize_vectors


def draw_truth(
    city: CityMap, x: float, y: float, yaw: float, network: NetworkConfig
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Draw the layers [3, rows, cols] at a pose (map frame; m, rad), as the evaluation does.

    With vector heads also the instances [3, rows, cols] and directions [2, rows, cols]; all uint8.
    """
    if not network.vector_heads:
        return torch.from_numpy(rasterize(city, x, y, yaw, network.layer_grid)), None, None
    instance, direction = map(torch.from_numpy, rasterize_vectors(city, x, y, yaw, network.layer_grid))
    return (instance > 0).to(torch.uint8), instance, direction
