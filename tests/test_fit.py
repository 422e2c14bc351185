"""The trainer: configurations that are checked, labels that are the evaluation's, and a run that ends in weights."""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nmp.errors import NmpError
from nmp.geometry import BevGrid
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.truth import rasterize
from nmp_train.cli import main
from nmp_train.config import TrainConfig, load_config
from nmp_train.data import SimulatedGroups, collate
from nmp_train.fit import group_prior
from nmp_train.losses import layer_loss
from nmp_train.world import World, make_world

SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)
TINY = """
workers: 0
supersample: 1
validation_groups: 1
network: {backbone_stages: 2, input_width: 64, input_height: 32, neck_channels: 8, bev_channels: 16, prior_channels: 4}
worlds: {seeds: 1, first_seed: 1001, size_m: 250.0, drives: 1, duration_s: 5.0}
validation: {seeds: 1, first_seed: 501, size_m: 250.0, drives: 1, duration_s: 5.0, difficulties: [0.5, 1]}
stages:
  - {seconds: 0, steps: 2, batch: 1, group: 1}
  - {seconds: 0, steps: 2, batch: 1, group: 3, freeze_images: true, learning_rate: 0.05, warmup_steps: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def coarse_worlds() -> Iterator[None]:
    """Paint the cities of a run coarsely, and each of them once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmp_train.fit.make_world", functools.cache(functools.partial(make_world, texel_m=0.4)))
        yield


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(1001, size_m=250.0, drives=2, duration_s=6.0, texel_m=0.3)


def test_the_shipped_configuration_is_valid() -> None:
    config = load_config(Path(__file__).parents[1] / "nmp_train" / "configs" / "cpu_default.yaml", ["stages.1.batch=4"])
    assert config.stages[1].batch == 4 and config.stages[1].freeze_images
    assert config.network == load_network()[0].config  # the shipped weights are of this network
    assert load_config(Path(__file__).parents[1] / "nmp_train" / "configs" / "gpu_default.yaml", []).stages


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sed: 1", [], "unknown key.s. sed"),
        ("seed: one", [], "seed must be int, got 'one'"),
        ("workers: true", [], "workers must be int"),
        ("worlds: {seeds: 1.5}", [], "seeds must be int"),
        ("stages: [{batch: x}]", [], r"stages\[0\]: batch must be int"),
        ("worlds: {difficulties: 1}", [], "difficulties must be a list of numbers"),
        ("network: {backbone: 18}", [], "backbone must be str"),
        ("stages: [{batch: 1}]", ["stages.7.batch=2"], "there is no '7'"),
        ("seed: 1", ["seed"], "key=value"),
        ("seed: [", [], "not valid YAML"),
    ],
)
def test_wrong_configurations_are_named(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(NmpError, match=message):
        load_config(path, overrides)


def test_labels_and_projection_are_those_of_the_evaluation(world: World) -> None:
    data = SimulatedGroups([world], SMALL, group=3, radius_m=30.0, seed=4, length=2)
    group = data[0]
    centre = group.centre.numpy()
    yaw = group.pose[:, 2].numpy()
    for (x, y), angle, label in zip(centre, yaw, group.truth.numpy(), strict=True):
        frame = world.frames[np.argmin(np.hypot(*(world.frames[:, :2] - [x, y]).T))]
        np.testing.assert_array_equal(label, rasterize(world.city, x, y, float(frame[2]), BevGrid()))
        assert frame[2] == pytest.approx(angle, abs=1e-5)
    assert np.hypot(*(centre - centre[0]).T).max() <= 30.0
    again = SimulatedGroups([world], SMALL, group=3, radius_m=30.0, seed=4, length=2)[0]
    torch.testing.assert_close(group.pixel_from_base, again.pixel_from_base)
    batch = collate([group, data[1]])
    assert batch.truth.shape == (2, 3, 3, 200, 400) and batch.solids[0].shape[:2] == (2, 3)


def test_the_prior_of_a_frame_is_made_of_the_others(world: World) -> None:
    """With poses that never overlap there is no prior; with one place seen twice there is, and gradients reach it."""
    torch.manual_seed(0)
    network = BEVNetwork(SMALL)
    config = TrainConfig(network=SMALL, prior_dropout=0.0, position_noise_m=0.0, yaw_noise_rad=0.0)
    bev = torch.randn(2, 16, *SMALL.feature_grid.shape, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    apart = torch.tensor([[[0.0, 0.0, 0.0], [500.0, 0.0, 0.0]]])
    assert all(float(group_prior(network, bev, apart, config, generator)[1].detach().max()) == 0 for _ in range(4))
    together = torch.tensor([[[0.0, 0.0, 0.0], [5.0, 0.0, 0.3]]])
    found = [group_prior(network, bev, together, config, generator) for _ in range(8)]
    latent, evidence = next(x for x in found if float(x[1][0].detach().max()) > 0)
    latent[0].sum().backward()
    assert bev.grad is not None and float(bev.grad[1].abs().max()) > 0 and float(bev.grad[0].abs().max()) == 0
    dropped = TrainConfig(network=SMALL, prior_dropout=1.0)
    assert float(group_prior(network, bev, together, dropped, generator)[1].max()) == 0


def test_the_loss_is_small_for_the_truth_only() -> None:
    truth = (torch.rand(2, 3, 20, 20) < 0.1).to(torch.uint8)
    right = (truth.float() * 2 - 1) * 12
    assert float(layer_loss(right, truth, 3.0)) < 0.01 < 1.0 < float(layer_loss(-right, truth, 3.0))


def test_a_run_ends_in_weights_that_load(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    assert main(["fit", str(config), "stages.1.steps=0", "--out", str(tmp_path / "one"), "--device", "cpu"]) == 0
    first, _ = load_network(tmp_path / "one" / "network.safetensors")
    start = str(tmp_path / "one" / "network.safetensors")
    arguments = ["--start", start, "--first-stage", "2", "--out", str(tmp_path / "two"), "--device", "cpu"]
    assert main(["fit", str(config), *arguments]) == 0
    second, _ = load_network(tmp_path / "two" / "network.safetensors")
    before, after = first.state_dict(), second.state_dict()
    frozen = [n for n in before if n.startswith(("backbone.", "neck."))]
    assert frozen and all(torch.equal(before[n], after[n]) for n in frozen)
    assert not torch.equal(before["decoder.out.weight"], after["decoder.out.weight"])
    summary = json.loads((tmp_path / "two" / "training.json").read_text())
    assert summary["stages"][0]["steps"] == 2
    scores = summary["stages"][0]["scores"]
    assert set(scores) == {"no prior", "with prior"} and {"all", "0-10 m", "20-40 m"} <= set(scores["no prior"])
    assert any(name.startswith("difficulty ") for name in scores["no prior"])
    assert list((tmp_path / "two" / "curves").iterdir())


def test_a_backbone_is_taken_from_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_network(BEVNetwork(replace(SMALL, bev_channels=8)), tmp_path / "other.safetensors", {})
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    nothing = ["stages.0.steps=0", "stages.1.steps=0"]
    arguments = ["--backbone", str(tmp_path / "other.safetensors"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["fit", str(config), *nothing, *arguments]) == 0
    given, taken = (load_network(tmp_path / p)[0] for p in ("other.safetensors", "out/network.safetensors"))
    for name, value in given.backbone.state_dict().items():
        torch.testing.assert_close(taken.backbone.state_dict()[name], value, msg=name)
    assert main(["fit", str(config), "network.backbone_stages=1", *nothing, *arguments]) == 2  # another backbone
