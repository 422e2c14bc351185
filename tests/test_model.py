"""The network: projection, lifting, the closed door of an empty prior, map-aligned fusion, weights on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nmp.errors import NmpError
from nmp.geometry import BevGrid, transform_from
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp.model.resnet import ResNet
from nmp.model.view import GroundLift

SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)


@pytest.fixture(scope="module")
def network() -> BEVNetwork:
    torch.manual_seed(0)
    return BEVNetwork(SMALL).eval()


def test_backbone_has_torchvisions_parameter_names() -> None:
    names = set(ResNet("resnet50", 4).state_dict())
    for expected in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.1.bias",
        "layer3.5.conv3.weight",
        "layer4.2.bn2.weight",
    ):
        assert expected in names
    with pytest.raises(NmpError, match="resnet19"):
        ResNet("resnet19")


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


def test_lift_looks_up_the_ground_point() -> None:
    """A feature map that holds its own image coordinates must come back as the projection of each cell."""
    grid = BevGrid(resolution=0.3)
    lift = GroundLift(grid)
    h, w = 32, 88
    v, u = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    features = torch.stack([u, v])[None, None]
    config = NetworkConfig()
    intrinsics = network_intrinsics(np.array([[1266.0, 0, 816.0], [0, 1266.0, 491.0], [0, 0, 1]]), 1600, 900, config)
    forward = transform_from(np.array([1.7, 0.0, 1.5]), np.array([-0.5, 0.5, -0.5, 0.5]))
    projection = unit_projection(intrinsics, forward, config.input_width, config.input_height)
    out = lift(features, torch.from_numpy(projection).float()[None, None], torch.ones(1, 1))[0]
    row, col = 48, 150  # about 15 m ahead
    point = np.append(grid.centres()[row, col], [0, 1])
    expected = projection @ point
    np.testing.assert_allclose(out[:2, row, col].numpy(), expected[:2] / expected[2], atol=1e-4)
    assert out[-1, row, col] == 1 and out[-1, row, 20] == 0  # nothing is seen behind the car
    absent = lift(features, torch.from_numpy(projection).float()[None, None], torch.zeros(1, 1))[0]
    assert absent[:2].abs().max() == 0


def test_weights_round_trip(network: BEVNetwork, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_network(network, path, {"note": "test"})
    loaded, fingerprint = load_network(path)
    assert loaded.config == SMALL and len(fingerprint) == 16
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    assert load_network(path)[1] == fingerprint


def test_weights_that_do_not_fit_are_refused(network: BEVNetwork, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_network(network, path, {})
    sidecar = path.with_suffix(".json")
    good = json.loads(sidecar.read_text())

    def expect(message: str, **changes: object) -> None:
        sidecar.write_text(json.dumps({**good, **changes}))
        with pytest.raises(NmpError, match=message):
            load_network(path)

    expect("does not fit", network={**good["network"], "bev_channels": 24})
    expect("unknown key", network={**good["network"], "attention": True})
    expect("must be int", network={**good["network"], "bev_channels": "24"})
    expect("format 2", format_version=2)
    expect("does not describe", format="other")
    expect("trained for classes", classes=["lane"])
    sidecar.write_text(json.dumps(good))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(NmpError, match="not a readable safetensors"):
        load_network(path)
    path.unlink()
    with pytest.raises(NmpError, match="missing"):
        load_network(path)
