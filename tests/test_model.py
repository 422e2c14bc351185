"""The network: projection, and weights on disk."""

import numpy as np
import pytest
import torch

from nmp.geometry import transform_from
from nmp.model import BEVNetwork, NetworkConfig
from nmp.model.preprocess import network_intrinsics, unit_projection

SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)


@pytest.fixture(scope="module")
def network() -> BEVNetwork:
    torch.manual_seed(0)
    return BEVNetwork(SMALL).eval()


def test_projection_follows_scaling_and_cropping() -> None:
    """A ground point seen at a pixel of the full image is seen at the corresponding pixel of the network's."""
    intrinsics = np.array([[1266.0, 0, 816.0], [0, 1266.0, 491.0], [0, 0, 1]])
    forward = transform_from(np.array([1.7, 0.0, 1.5]), np.array([-0.5, 0.5, -0.5, 0.5]))
    point = np.array([12.0, 1.0, 0.0, 1.0])
    full = intrinsics @ (np.linalg.inv(forward) @ point)[:3]
    u, v = full[:2] / full[2]
    config = NetworkConfig()
    small = network_intrinsics(intrinsics, 1600, 900, config)
    unit = unit_projection(small, forward, config.input_width, config.input_height) @ point
    scale = 352 / 1600
    assert unit[0] / unit[2] * 352 == pytest.approx((u + 0.5) * scale)
    assert unit[1] / unit[2] * 128 == pytest.approx((v + 0.5) * scale - (198 - 128))
