"""``nmp-train coding``: made from what weights write, kept beside them, and used for the cities that they begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nmp.errors import NmpError
from nmp.mapper import OnlineMapper
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.model.weights import read_description
from nmp.prior.coding import coding_of
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp_train import cli
from nmp_train.coding import reads_of
from nmp_train.evaluate import read_scenes, scene_frames

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "frames"
SMALL = NetworkConfig(
    backbone_stages=1, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)

needs_frames = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real frames beside the repository")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = BEVNetwork(SMALL)
    torch.nn.init.normal_(network.fusion.latent.weight, std=2.0)
    save_network(network, tmp_path / "w.safetensors", {"note": "kept"})
    return tmp_path / "w.safetensors"


@needs_frames
def test_cities_are_written_with_the_coding_of_the_weights(weights: Path, tmp_path: Path) -> None:
    fingerprint = load_network(weights)[1]
    assert coding_of(read_description(weights)) is None
    assert cli.main(["coding", str(weights), "--dataroot", str(REAL), "--step", "60"]) == 0
    coding = coding_of(read_description(weights))
    assert coding is not None and coding.channels == 4 and coding.noise > 0
    assert load_network(weights)[1] == fingerprint  # cities of these weights stay theirs
    assert json.loads(weights.with_suffix(".json").read_text())["training"] == {"note": "kept"}
    assert cli.main(["export", str(weights), "--out", str(tmp_path / "exported.safetensors")]) == 0
    assert coding_of(read_description(tmp_path / "exported.safetensors")) == coding
    frames = [frame for scene in read_scenes(REAL, "v1.0-mini") for frame in scene_frames(scene).frames]
    layers = []
    for name, coded in (("coded", True), ("plain", False)):
        with OnlineMapper(weights, tmp_path / name, coded=coded) as mapper:
            mapper.update(frames[0])
        with OnlineMapper(weights, tmp_path / name) as mapper:  # again, with what was stored
            layers.append(mapper.update(frames[0]).probabilities)
    sizes = [Storage(tmp_path / name).size() for name in ("coded", "plain")]
    assert sizes[0] < 0.5 * sizes[1]
    np.testing.assert_allclose(layers[0], layers[1], atol=0.05)
    ledgers = [Ledger.open(Storage(tmp_path / name).below(frames[0].location)) for name in ("coded", "plain")]
    assert [ledger.spec.coding for ledger in ledgers] == [coding, None]


@needs_frames
def test_a_step_out_of_range_leaves_the_weights_alone(weights: Path) -> None:
    before = weights.with_suffix(".json").read_bytes()
    assert cli.main(["coding", str(weights), "--dataroot", str(REAL), "--step", "0"]) == 2
    assert weights.with_suffix(".json").read_bytes() == before


def test_a_network_whose_cells_are_no_means_has_no_coding() -> None:
    with pytest.raises(NmpError, match="channel by channel"):
        reads_of(BEVNetwork(NetworkConfig(fusion="paper", backbone_stages=1)))
