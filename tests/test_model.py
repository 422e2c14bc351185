"""The network: its region, and projection."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_fixtures import ColouredSource, tiny_config

from nmp.errors import NmpError
from nmp.geometry import transform_from
from nmp.model import BEVNetwork, NetworkConfig
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp_train.config import StageConfig
from nmp_train.step import Draws, TrainingStep

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


@pytest.mark.parametrize("fusion", ["evidence", "paper"])
@pytest.mark.parametrize(
    ("length", "width", "cells"), [(60.0, 30.0, (100, 200)), (100.0, 100.0, (333, 333)), (160.0, 100.0, (333, 533))]
)
def test_networks_of_all_ranges_are_trained(length: float, width: float, cells: tuple[int, int], fusion: str) -> None:
    """Encode, fuse, decode and judge: layers have the cells of the truth, whatever the range."""
    net = replace(SMALL, backbone_stages=1, bev_channels=8, prior_channels=2, fusion=fusion)
    net = replace(net, bev_length=length, bev_width=width)
    assert net.feature_grid.shape == cells and net.layer_grid.shape == (2 * cells[0], 2 * cells[1])
    np.testing.assert_allclose(net.layer_grid.centres().mean(axis=(0, 1)), 0, atol=1e-9)  # the car is in the middle
    stage = StageConfig(batch=1, group=2, radius_m=1.0)
    config = tiny_config(network=net, stages=(stage,), prior_dropout=0.5)
    source = ColouredSource(config)
    batch = source.batch(next(iter(source.loader(stage, seed=1, length=1))))
    torch.manual_seed(0)
    step = TrainingStep(BEVNetwork(net), config, stage).train()
    losses = step(batch, Draws.of(batch.seeds.tolist(), stage.group, config, torch.device("cpu")))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])


def test_the_published_range_is_as_it_was() -> None:
    grid = NetworkConfig().layer_grid
    assert (grid.length, grid.width, grid.resolution, grid.shape) == (60.0, 30.0, 0.15, (200, 400))


def test_layers_that_do_not_follow_from_the_features_are_refused() -> None:
    with pytest.raises(NmpError, match="set it to half of feature_resolution, 0.25"):
        BEVNetwork(replace(SMALL, feature_resolution=0.5))
