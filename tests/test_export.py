"""Weights on disk: what is written is what is loaded, and what does not fit is refused; ``nmp-train export``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmp.errors import NmpError
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp.model.weights import read_description, weights_file
from nmp_train.checkpoint import save_checkpoint
from nmp_train.config import TrainConfig
from nmp_train.export import add_arguments, export, run

SMALL = NetworkConfig(
    backbone_stages=1,
    input_width=64,
    input_height=32,
    neck_channels=8,
    bev_channels=16,
    prior_channels=4,
    bev_length=12.0,
    bev_width=6.0,
)


@pytest.fixture(scope="module")
def network() -> BEVNetwork:
    torch.manual_seed(0)
    return BEVNetwork(SMALL).eval()


def test_weights_round_trip(network: BEVNetwork, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_network(network, path, {"note": "test"})
    loaded, fingerprint = load_network(path)
    assert loaded.config == SMALL and len(fingerprint) == 16
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    assert load_network(path)[1] == fingerprint
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["input"] == {"width": 64, "height": 32, "mean": list(SMALL.mean), "std": list(SMALL.std)}
    assert described["prior"] == {"channels": 4, "cell_m": 0.3} and described["training"] == {"note": "test"}
    assert path.stat().st_mode & 0o044 == path.with_suffix(".json").stat().st_mode & 0o044  # others may read it


def test_values_beyond_half_precision_are_kept(tmp_path: Path) -> None:
    network = BEVNetwork(SMALL)
    variance = network.backbone.bn1.running_var
    assert isinstance(variance, torch.Tensor)
    variance.fill_(1e6)
    save_network(network, tmp_path / "w.safetensors", {})
    kept = load_network(tmp_path / "w.safetensors")[0].backbone.bn1.running_var
    assert isinstance(kept, torch.Tensor) and kept[0] == 1e6


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
    expect("no network configuration", network=None)
    expect("format 1", format_version=1)
    expect("does not describe", format="other")
    expect("trained for classes", classes=["lane"])
    sidecar.write_text(json.dumps(good))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(NmpError, match="not a readable safetensors"):
        load_network(path)
    path.unlink()
    with pytest.raises(NmpError, match="missing"):
        load_network(path)


def test_a_run_is_exported_with_its_scores(network: BEVNetwork, tmp_path: Path) -> None:
    config = TrainConfig(network=SMALL).to_dict()
    training = {"config": config, "stages": [{"steps": 3, "losses": [1.0]}]}
    metrics = {"no prior": {"miou": 40.5}}
    weights = tmp_path / "run" / "network.safetensors"
    save_network(network, weights, training, dtype=torch.float32, extra={"metrics": metrics})
    (tmp_path / "scores.json").write_text('{"miou": 41.5}')
    out = tmp_path / "deep" / "mine.safetensors"
    done = export(tmp_path / "run", out, metrics=[tmp_path / "scores.json"])
    loaded, fingerprint = load_network(out)
    assert fingerprint == done["fingerprint"] and loaded.config == SMALL
    assert out.stat().st_size == pytest.approx(done["mib"] * 2**20, rel=0.01)
    # half precision changes the outputs a little, and this is what it says
    assert 0 < done["difference"]["logits"] < 0.02
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["metrics"] == metrics | {"scores": {"miou": 41.5}}
    assert described["training"]["stages"] == training["stages"]
    assert described["training_set"]["worlds"]["seeds"] == config["worlds"]["seeds"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine.json", "mine.safetensors"]
    exact = export(tmp_path / "run", tmp_path / "exact.safetensors", dtype="float")
    assert exact["difference"]["logits"] == 0 and exact["mib"] > 1.8 * done["mib"]
    # what was exported can be exported, and keeps its scores
    (tmp_path / "more.json").write_text('{"miou": 42.5}')
    again = export(out, tmp_path / "again.safetensors", metrics=[tmp_path / "more.json"])
    assert again["difference"]["logits"] == 0
    kept = json.loads((tmp_path / "again.json").read_text())
    assert kept["metrics"] == described["metrics"] | {"more": {"miou": 42.5}}
    assert kept["training_set"] == described["training_set"]


def test_a_checkpoint_gives_its_moving_average_and_nothing_else(network: BEVNetwork, tmp_path: Path) -> None:
    average = BEVNetwork(SMALL)
    optimizer = torch.optim.AdamW(network.parameters())
    about = {"started": {"command": "nmp-train fit"}}
    progress = {"config": TrainConfig(network=SMALL).to_dict(), "stage": 1, "step": 7, "about": about}
    save_checkpoint(tmp_path, progress, network, average, optimizer)
    out = tmp_path / "out" / "w.safetensors"
    export(tmp_path, out, dtype="float")
    written = load_file(out)
    assert set(written) == set(network.state_dict())
    assert all(torch.equal(written[name], value) for name, value in average.state_dict().items())
    training = json.loads(out.with_suffix(".json").read_text())["training"]
    assert training["step"] == 7 and training["started"] == about["started"]


def test_exports_that_would_fail_leave_nothing_behind(network: BEVNetwork, tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    save_network(network, source, {}, dtype=torch.float32)
    (tmp_path / "torn.json").write_text("{")
    out = tmp_path / "out" / "x.safetensors"
    for message, source_path, options in (
        ("more than 0.1: allow it with --max-mib 2", source, {"max_mib": 0.1}),
        ("torn.json cannot be read", source, {"metrics": [tmp_path / "torn.json"]}),
        ("leave out --no-vectors", source, {"vectors": False}),
        ("has no network.safetensors", tmp_path, {}),
        ("missing", tmp_path / "other.safetensors", {}),
    ):
        with pytest.raises(NmpError, match=message):
            export(source_path, out, **options)  # type: ignore[arg-type]
        assert not out.parent.exists() or not list(out.parent.iterdir())
    with pytest.raises(NmpError, match="must end in"):
        export(source, tmp_path / "x.pth")
    state = load_file(source)
    state["decoder.out.bias"][0] = float("nan")
    save_file(state, source)
    with pytest.raises(NmpError, match="NaN"):
        export(source, out)


def test_outputs_that_half_precision_ruins_are_not_written(
    network: BEVNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "w.safetensors"
    save_network(network, source, {}, dtype=torch.float32)
    monkeypatch.setitem(__import__("nmp_train.export").export.TOLERANCE, "half", 1e-9)
    with pytest.raises(NmpError, match="use --dtype float"):
        export(source, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_vector_heads_can_be_left_out(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, vector_heads=True)
    full = BEVNetwork(config).eval()
    if set(full.state_dict()) == set(BEVNetwork(SMALL).state_dict()):
        pytest.skip("this network has no heads for vectors")
    save_network(full, tmp_path / "w.safetensors", {})
    export(tmp_path / "w.safetensors", tmp_path / "small.safetensors", vectors=False)
    small = load_network(tmp_path / "small.safetensors")[0]
    assert not small.config.vector_heads
    assert sum(v.numel() for v in small.state_dict().values()) < sum(v.numel() for v in full.state_dict().values())


def test_the_command(network: BEVNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_network(network, tmp_path / "w.safetensors", {})
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "x.safetensors")]))
    assert load_network(tmp_path / "x.safetensors")[1] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu_default", "gpu_default"])
def test_shipped_weights_say_what_they_learned_from_and_how_they_score(name: str) -> None:
    description = read_description(name)
    assert weights_file(name).stat().st_size <= 16 * 2**20
    assert description["training_set"]["worlds"]["seeds"] > 0
    alone, empty, again = (description["metrics"][k]["miou"] for k in ("no prior", "empty", "one trip before"))
    assert alone < empty < again
    assert {"day", "rain", "night", "0-10 m"} <= set(description["metrics"]["empty"]["breakdown"])
