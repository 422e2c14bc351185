"""The trainer: configurations that are checked, runs that resume and share work exactly, and end in weights."""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, multiprocessing, nn
from training_fixtures import TINY_NETWORK, ColouredSource, tiny_config, tiny_network, train_in_process

from nmp import __version__
from nmp.errors import NmpError
from nmp.evaluation import nan_as_null
from nmp.model import BEVNetwork, NetworkConfig, load_network, save_network
from nmp_train import loop
from nmp_train.checkpoint import NAME, load_checkpoint
from nmp_train.cli import main
from nmp_train.config import DataConfig, StageConfig, TrainConfig, load_config
from nmp_train.distributed import CpuSyncBatchNorm, Ranks, convert
from nmp_train.fit import _start, fit
from nmp_train.loop import train
from nmp_train.step import Draws, TrainingStep, compile_blocks, recomputed, save_memory, used_parameters
from nmp_train.world import make_world

CONFIGS = Path(__file__).parents[1] / "nmp_train" / "configs"
CPU = torch.device("cpu")
SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)
TINY = """
workers: 0
supersample: 1
validation_drives: 1
validation_trips: 1
network: {backbone_stages: 2, input_width: 64, input_height: 32, neck_channels: 8, bev_channels: 16, prior_channels: 4}
worlds: {seeds: 1, first_seed: 1001, size_m: 200.0, drives: 1, duration_s: 2.0}
validation: {seeds: 1, first_seed: 1001, size_m: 200.0, drives: 1, duration_s: 2.0}
stages:
  - {seconds: 0, steps: 1, batch: 1, group: 1}
  - {seconds: 0, steps: 2, batch: 1, group: 2, freeze_images: true, learning_rate: 0.05, warmup_steps: 1}
"""


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "network.safetensors"))


def described_in(folder: Path) -> dict[str, Any]:
    """Return the JSON beside the weights of a run, which has the scores once: as metrics."""
    described: dict[str, Any] = json.loads((folder / "network.json").read_text())
    assert described["metrics"] and not any("scores" in stage for stage in described["training"]["stages"])
    return described


def test_the_shipped_configurations_are_valid() -> None:
    config = load_config(CONFIGS / "cpu_default.yaml", ["stages.1.batch=4"])
    assert config.stages[1].batch == 4 and config.stages[1].freeze_images
    assert config.network == load_network()[0].config  # the shipped weights are of this network
    for path in CONFIGS.glob("*.yaml"):
        # without the prior all is trained, then with it all but backbone and neck
        assert [(s.group > 1, s.freeze_images) for s in load_config(path, []).stages] == [(False, False), (True, True)]
    # the network of the figures at 256 x 704 is that of the GPU, but for its backbone
    gpu, r50 = (load_config(CONFIGS / f"{name}.yaml", []) for name in ("gpu_default", "r50"))
    assert r50 == replace(gpu, network=replace(gpu.network, backbone="resnet50", backbone_stages=4))
    paper = load_config(CONFIGS / "paper.yaml", [])
    assert paper.network.fusion == "paper" and paper.data is not None and paper.backbone_rate == 0.1


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "paper.yaml", ["worlds.difficulties=[0.5, 1]"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml", []) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sed: 1", [], "unknown key.s. sed"),
        ("seed: one", [], "seed must be int, got 'one'"),
        ("workers: true", [], "workers must be int"),
        ("worlds: {seeds: 1.5}", [], "seeds must be int"),
        ("stages: [{batch: x}]", [], r"stages\[0\]: batch must be int"),
        ("stages: []", [], "at least one stage"),
        ("worlds: {difficulties: 1}", [], "difficulties must be a list of numbers"),
        ("network: {backbone: 18}", [], "backbone must be str"),
        ("precision: fp16", [], "precision must be one of bf16, fp32, got 'fp16'"),
        ("data: {split: train}", [], "data: dataroot is missing"),
        ("data: 1", [], "data: expected keys and values"),
        ("stages: [{batch: 1}]", ["stages.7.batch=2"], "there is no '7'"),
        ("stages: [{batch: 1}]", ["stages.last.batch=2"], "there is no 'last'"),
        ("seed: 1", ["seed"], "key=value"),
        ("seed: [", [], "not valid YAML"),
        ("1: 2", [], "unknown key.s. 1"),
        ("seed: 1", ["seed=["], "override 'seed=.' is not valid YAML"),
        ("seed: 1", ["seed=2024-13-01"], "override 'seed=2024-13-01' is not valid YAML .month must be"),
        ("seed: 1", ["seed.x=1"], "override 'seed.x=1': there is no 'x' to set in 1"),
        ("seed: 1", ["sed.x=1"], "unknown key.s. sed"),
        ("[1, 2]", ["seed=1"], "expected keys and values"),
        ("data:", ["data.split=val"], "data: dataroot is missing"),
        ("worlds: {real: null}", ["worlds.real.count=2"], "real: maps, trajectories is missing"),
        ("seed: 1", ["network.mean=3"], "mean must be 3 numbers, got 3"),
        ("seed: 1", ["network.mean=[1, 2]"], "mean must be 3 numbers"),
        ("seed: 1", ["network.std=[1, 0, 1]"], "std is 0: choose more than 0"),
        ("seed: 1", ["network.std=[1, a, 1]"], "std must be float, got 'a'"),
        ("seed: 1", ["network=5"], "network configuration: expected keys and values"),
        ("seed: 1", ["network.bev_length=.nan"], "bev_length must be float, got nan"),
        ("seed: 1", ["network.neck_channels=0"], "neck_channels is 0: choose more than 0"),
        ("seed: 1", ["network.bev_half_channels=-1"], "bev_half_channels is -1: choose more than 0"),
        ("seed: 1", ["network.align=1"], "align must be bool"),
        ("seed: 1", ["stages.0.batch=0"], "batch is 0: choose 1 or more"),
        ("seed: 1", ["stages.0.group=0"], "group is 0: choose 1 or more"),
        ("seed: 1", ["stages.0.warmup_steps=-1"], "warmup_steps is -1: choose 0 or more"),
        ("seed: 1", ["stages.1.radius_m=0"], "radius_m is 0: choose more than 0"),
        ("seed: 1", ["prior_dropout=1.5"], "prior_dropout is 1.5: choose 0 to 1"),
        ("seed: 1", ["clip_norm=.inf"], "clip_norm must be a finite number"),
        ("seed: 1", ["validation_trips=5"], "validation_trips is 5: choose 1 to 4"),
        ("seed: 1", ["worlds.difficulties.0=-1"], "difficulties is -1: choose 0 or more"),
        ("seed: 1", ["worlds.difficulties.1=1"], "there is no '1' to set, but 0 to 0"),
        ("seed: 1", ["worlds.difficulties=[true]"], "difficulties must be a list of numbers"),
    ],
)
def test_wrong_configurations_are_named(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(NmpError, match=message):
        load_config(path, overrides)


def test_any_key_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data:\nworlds: {real: null}\nseed: 3\n")
    keys = ["data.dataroot=/d", "stages.0.learning_rate=1e-4", "stages.1.batch=2", "worlds.difficulties.0=2e-1"]
    keys += ["worlds.real.maps=m", "worlds.real.trajectories=t", "stages.0.warmup_steps=0", "network.std.1=5e1"]
    config = load_config(path, keys)
    assert config.data is not None and config.data.dataroot == "/d" and config.seed == 3
    assert config.stages[0].learning_rate == 1e-4 and config.stages[0].warmup_steps == 0
    assert config.stages[1] == replace(TrainConfig().stages[1], batch=2)  # of the stages that there are without any
    assert config.worlds.difficulties == (0.2,) and config.worlds.real is not None and config.worlds.real.count == 8
    assert config.network.std == (58.395, 50.0, 57.375)
    path.write_text("stages: [{learning_rate: 2e-4}]")
    assert load_config(path, []).stages == (StageConfig(learning_rate=2e-4),)


def test_overrides_may_come_behind_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("nmp_train.fit.fit", lambda config, out, **_: seen.append(config))
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3")
    assert main(["fit", str(path), "workers=1", "--out", str(tmp_path), "seed=4", "--resume", "clip_norm=2"]) == 0
    assert (seen[0].seed, seen[0].workers, seen[0].clip_norm) == (4, 1, 2.0)
    for wrong in (["fit", str(path), "--out", "x", "--oops", "seed=4"], ["export", "x", "--out", "y", "--oops"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "--oops" in capsys.readouterr().err


def test_without_warmup_the_first_step_is_whole(tmp_path: Path) -> None:
    config = tiny_config(stages=(replace(tiny_config().stages[0], steps=1, warmup_steps=0),), ema_decay=0.0)
    network = tiny_network()
    before = network.decoder.out.weight.clone()
    train(network, ColouredSource(config), config, tmp_path, device=CPU)
    assert not torch.equal(before, network.decoder.out.weight)


def test_pose_errors_belong_to_drives_and_do_not_depend_on_the_batch() -> None:
    config = tiny_config(position_noise_m=0.5, yaw_noise_rad=0.1)
    seeds = list(range(40))
    together = Draws.of(seeds, 4, config, CPU)
    alone = Draws.of(seeds[7:8], 4, config, CPU)
    for field in dataclasses.fields(Draws):
        torch.testing.assert_close(getattr(together, field.name)[7:8], getattr(alone, field.name), rtol=0, atol=0)
    error = together.offset + together.jitter
    spread = error.std(dim=(0, 1))
    assert 0.12 < float(spread[0]) < 0.4 and 0.024 < float(spread[2]) < 0.08  # between none and all of it
    groups = error.std(dim=1)[:, 0]
    assert float(groups.min()) < 0.05 < 0.25 < float(groups.max())
    assert together.alone.shape == (40, 1)  # a quarter of the frames
    perfect = Draws.of(seeds, 4, tiny_config(position_noise_m=0.0, yaw_noise_rad=0.0, prior_dropout=0.0), CPU)
    assert not perfect.offset.any() and not perfect.jitter.any() and perfect.alone.shape == (40, 0)


def test_a_frame_learns_from_earlier_frames_only() -> None:
    """The layers of a frame depend on the images before it, also by gradient, and never on those behind it."""
    config = tiny_config(prior_dropout=0.0)
    network = tiny_network().eval()
    nn.init.normal_(network.fusion.prior_out.weight)  # an untrained network does not look at its prior
    step = TrainingStep(network, config, config.stages[0]).eval()
    source = ColouredSource(config)
    batch = source.batch(next(iter(source.loader(config.stages[0], seed=1, length=2))))
    draws = Draws.of(batch.seeds.tolist(), 3, config, CPU)
    frames = torch.randn(2, 3, TINY_NETWORK.bev_channels, *TINY_NETWORK.feature_grid.shape, requires_grad=True)
    outputs, _ = step._drive(frames, batch, draws)
    outputs[1].logits.sum().backward()
    assert frames.grad is not None
    reach = frames.grad.abs().amax(dim=(0, 2, 3, 4))
    assert reach[0] > 0 and reach[1] > 0 and reach[2] == 0


@pytest.mark.parametrize("vectors", [False, True])
def test_the_prior_is_trained_without_dropout_of_it(vectors: bool, tmp_path: Path) -> None:
    network = BEVNetwork(replace(TINY_NETWORK, vector_heads=vectors))
    stage = replace(tiny_config().stages[0], steps=2)
    config = tiny_config(network=network.config, stages=(stage,), prior_dropout=0.0)
    before = network.fusion.latent.weight.clone()
    summary = train(network, ColouredSource(config), config, tmp_path, device=CPU)
    assert np.isfinite(summary["stages"][0]["losses"]).all()
    assert not torch.equal(before, network.fusion.latent.weight)


def test_a_stage_of_no_steps_asks_for_no_data(tmp_path: Path) -> None:
    """Many processes could not share it."""
    config = tiny_config(stages=(StageConfig(steps=0, batch=2),))
    source = ColouredSource(config)
    source.loader = None  # type: ignore[assignment]
    assert train(tiny_network(), source, config, tmp_path, device=CPU)["stages"][0]["steps"] == 0


def test_only_what_a_stage_uses_is_trained(tmp_path: Path) -> None:
    network = tiny_network()
    config = tiny_config(stages=(StageConfig(seconds=0, steps=2, batch=2, warmup_steps=1, learning_rate=0.1),))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(network, ColouredSource(config), config, tmp_path, device=CPU)
    after = network.state_dict()
    fusion = [name for name, _ in network.fusion.named_parameters(prefix="fusion")]
    assert fusion and all(torch.equal(before[name], after[name]) for name in fusion)
    others = [name for name, _ in network.named_parameters() if name not in fusion]
    assert all(not torch.equal(before[name], after[name]) for name in others)


def test_frozen_parts_keep_parameters_and_statistics(tmp_path: Path) -> None:
    network = tiny_network()
    config = tiny_config(stages=(replace(tiny_config().stages[0], steps=2, freeze_images=True),))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(network, ColouredSource(config), config, tmp_path, device=CPU)
    after = network.state_dict()
    frozen = [name for name in before if name.startswith(("backbone.", "neck."))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["decoder.out.weight"], after["decoder.out.weight"])
    assert not torch.equal(before["fusion.latent.weight"], after["fusion.latent.weight"])
    assert all(p.requires_grad for p in network.parameters())


def test_the_first_parts_of_a_backbone_and_its_norms_can_stay_as_they_are(tmp_path: Path) -> None:
    network = BEVNetwork(replace(TINY_NETWORK, backbone_stages=2))
    stage = replace(tiny_config().stages[0], steps=2)
    config = tiny_config(
        network=network.config, stages=(stage,), backbone_frozen=2, backbone_norms="fixed", ema_decay=0.0
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(network, ColouredSource(config), config, tmp_path, device=CPU)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    kept = {name for name in before if name.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1."))}
    kept |= {name for name in before if name.startswith("backbone.") and name.rsplit(".", 1)[0] in norms}
    assert "backbone.layer2.0.bn1.running_mean" in kept and not changed & kept
    assert {"backbone.layer2.0.conv1.weight", "neck.smooth.1.running_mean"} <= changed
    with pytest.raises(NmpError, match="backbone_frozen is 9"):
        TrainingStep(network, replace(config, backbone_frozen=9), stage)


@pytest.mark.parametrize("kept", [{"backbone_frozen": 1}, {"backbone_norms": "fixed"}])
def test_a_backbone_that_begins_at_random_is_not_kept_as_it_begins(kept: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="--backbone"):
        fit(tiny_config(**kept), tmp_path, device_name="cpu")


def test_the_search_for_the_pose_is_trained_alone(tmp_path: Path) -> None:
    network = BEVNetwork(replace(TINY_NETWORK, align=True))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stage = replace(tiny_config().stages[0], steps=3, alignment_only=True)
    config = tiny_config(network=network.config, stages=(stage,), ema_decay=0.0)
    train(network, ColouredSource(config), config, tmp_path, device=torch.device("cpu"))
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("fusion.aligner.") for name in changed)


def test_the_search_for_the_pose_needs_something_to_search() -> None:
    stage = replace(tiny_config().stages[0], alignment_only=True)
    with pytest.raises(NmpError, match="needs network.align=true"):
        TrainingStep(tiny_network(), tiny_config(stages=(stage,)), stage)
    aligned = BEVNetwork(replace(TINY_NETWORK, align=True))
    with pytest.raises(NmpError, match="groups of more than one frame"):
        TrainingStep(aligned, tiny_config(), replace(stage, group=1))


def test_weights_without_the_search_begin_a_run_with_it(tmp_path: Path) -> None:
    network = tiny_network()
    torch.nn.init.normal_(network.fusion.prior_out.weight)
    save_network(network, tmp_path / "w.safetensors", {})
    started = _start(tmp_path / "w.safetensors", tiny_config(network=replace(TINY_NETWORK, align=True)))
    assert started.fusion.aligner is not None
    torch.testing.assert_close(started.fusion.prior_out.weight, network.fusion.prior_out.weight, atol=1e-2, rtol=1e-2)
    with pytest.raises(NmpError, match="is of another network"):
        _start(tmp_path / "w.safetensors", tiny_config(network=replace(TINY_NETWORK, neck_channels=4)))


def test_a_wider_fusion_begins_with_the_same_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = BEVNetwork(TINY_NETWORK)
    torch.nn.init.normal_(network.fusion.prior_out.weight)
    torch.nn.init.normal_(network.fusion.beyond.weight)
    save_network(network, tmp_path / "w.safetensors", {})
    narrow = load_network(tmp_path / "w.safetensors")[0].eval()
    wide = replace(TINY_NETWORK, prior_mix_channels=24, prior_coarse_channels=72)
    wider = _start(tmp_path / "w.safetensors", tiny_config(network=wide)).eval()
    assert wider.fusion.prior_out.weight.shape[1] == 24 and wider.fusion.prior_mix.mix_half.conv1[0].in_channels == 72
    rows, cols = TINY_NETWORK.feature_grid.shape
    bev, latent = torch.randn(1, TINY_NETWORK.bev_channels, rows, cols), torch.randn(1, 4, rows, cols).tanh()
    evidence = 4 * torch.rand(1, 1, rows, cols)
    expected = narrow.fusion.fuse(bev, latent, evidence)
    assert (expected - bev).abs().mean() > 0.1
    found = wider.fusion.fuse(bev, latent, evidence)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()  # and learns to use the width that is new
    assert wider.fusion.prior_out.weight.grad[:, TINY_NETWORK.bev_channels :].abs().sum() > 0
    # with more channels in the map, what tells known cells from others is read from another column
    more = _start(tmp_path / "w.safetensors", tiny_config(network=replace(TINY_NETWORK, prior_channels=6)))
    assert not torch.equal(more.fusion.prior_in.weight[:, :4], narrow.fusion.prior_in.weight[:, :4])
    # a narrower one has no place for them
    again = _start(tmp_path / "w.safetensors", tiny_config(network=replace(TINY_NETWORK, prior_mix_channels=4)))
    assert again.fusion.prior_in.weight.shape[0] == 4 and not again.fusion.prior_out.weight.any()


def test_recomputing_and_compiling_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # by a compiler that needs no other one installed, and derives the backward pass as the usual one does
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = tiny_config()
    source = ColouredSource(config)
    batch = source.batch(next(iter(source.loader(config.stages[0], seed=1, length=2))))
    draws = Draws.of(batch.seeds.tolist(), 3, config, CPU)
    found: list[dict[str, Tensor]] = []
    for compiled, checkpointing in itertools.product((False, True), repeat=2):
        network = tiny_network()
        if compiled:
            compile_blocks(network)
        if checkpointing:
            save_memory(network)
        step = TrainingStep(network, replace(config, checkpointing=checkpointing), config.stages[0]).train()
        step(batch, draws)["loss"].backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append(grads | {n: b for n, b in network.named_buffers() if "running" in n})
    for other in found[1:]:
        assert found[0].keys() == other.keys() and len(found[0]) > 50
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, msg=name, atol=1e-5, rtol=1e-4)


def test_recomputed_values_are_not_kept() -> None:
    layer = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = recomputed(layer, layer, torch.ones(1, 1, 9, 9)).sum()
    assert not any(t.numel() == 81 and not torch.equal(t, torch.ones_like(t)) for t in kept)
    assert used_parameters(loss) == {id(p) for p in layer.parameters()}


class Killed(BaseException):
    """As a signal would end the run."""


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    count = 0
    original = TrainingStep.forward

    def forward(self: TrainingStep, *args: Any) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count > steps + 1:  # the first call finds out which parameters are used
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(TrainingStep, "forward", forward)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    config = tiny_config(checkpoint_every=3, backbone_rate=0.5)
    source = ColouredSource(config)
    whole = train(tiny_network(), source, config, tmp_path / "whole", device=CPU)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)  # one step more than the checkpoint holds
        with pytest.raises(Killed):
            train(tiny_network(), source, config, tmp_path / "halves", device=CPU)
    checkpoint = load_checkpoint(tmp_path / "halves")
    assert checkpoint is not None and checkpoint.progress["step"] == 3
    assert not (tmp_path / "halves" / "network.safetensors").exists()
    halves = train(BEVNetwork(TINY_NETWORK), source, config, tmp_path / "halves", device=CPU, checkpoint=checkpoint)
    expected, got = (r["stages"][0]["losses"] for r in (whole, halves))
    assert len(expected) == 6 and len(set(expected)) == 6
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    one, two = state_of(tmp_path / "whole"), state_of(tmp_path / "halves")
    assert all(torch.equal(one[name], two[name]) for name in one)
    done = load_checkpoint(tmp_path / "halves")
    assert done is not None and done.progress["stage"] == 1
    # Nothing is left to do, and no data is made for it.
    assert fit(config, tmp_path / "halves", device_name="cpu", resume=True)["stages"][0]["losses"] == expected


def test_the_scores_of_all_stages_stay_with_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = replace(tiny_config().stages[0], steps=2)
    config = tiny_config(stages=(stage, stage))
    source, marks = ColouredSource(config), iter((10.0, 20.0))

    def score(network: BEVNetwork, stage: StageConfig) -> dict[str, Any]:
        return {"no prior": {"all": {"miou": next(marks)}}}

    with monkeypatch.context() as patch:
        kill_after(patch, 4)  # in the second stage
        with pytest.raises(Killed):
            train(tiny_network(), source, config, tmp_path, device=CPU, score=score)
    assert described_in(tmp_path)["metrics"]["no prior"]["miou"] == 10.0
    found = load_checkpoint(tmp_path)
    assert found is not None and found.progress["stage"] == 1
    train(tiny_network(), source, config, tmp_path, device=CPU, checkpoint=found, score=score)
    done = load_checkpoint(tmp_path)
    assert done is not None
    for stages in (json.loads((tmp_path / "training.json").read_text())["stages"], done.progress["history"]):
        assert [known["scores"]["no prior"]["all"]["miou"] for known in stages] == [10.0, 20.0]
    assert described_in(tmp_path)["metrics"] == {"no prior": {"miou": 20.0, "breakdown": {}}}


def test_curves_go_on_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    stage = tiny_config().stages[0]
    config = tiny_config(checkpoint_every=3, stages=(replace(stage, steps=5), stage))
    source = ColouredSource(config)
    with monkeypatch.context() as patch:
        kill_after(patch, 11)  # in the second stage, two steps beyond the checkpoint
        with pytest.raises(Killed):
            train(tiny_network(), source, config, tmp_path, device=CPU)
    train(tiny_network(), source, config, tmp_path, device=CPU, checkpoint=load_checkpoint(tmp_path))
    for name, steps in (("stage-1", 5), ("stage-2", 6)):
        curves = EventAccumulator(str(tmp_path / "curves" / name)).Reload()
        for curve in ("loss", "gradient norm", "learning rate"):
            assert [event.step for event in curves.Scalars(curve)] == list(range(1, steps + 1))


def test_a_run_without_tensorboard_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stage = StageConfig(seconds=0, steps=1, batch=2)
    config = tiny_config(stages=(stage, stage))
    train(tiny_network(), ColouredSource(config), config, tmp_path, device=CPU)
    assert caplog.text.count("no curves: TensorBoard is not installed") == 1
    assert not (tmp_path / "curves").exists()


def test_a_checkpoint_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    config = tiny_config(stages=(replace(tiny_config().stages[0], steps=1),))
    train(tiny_network(), ColouredSource(config), config, tmp_path, device=CPU)
    checkpoint = load_checkpoint(tmp_path)
    other = replace(config, workers=3, ema_decay=0.5, stages=(replace(config.stages[0], batch=4),))
    with pytest.raises(NmpError, match=r"other settings \(ema_decay, stages.0.batch\)"):
        train(tiny_network(), ColouredSource(other), other, tmp_path, device=CPU, checkpoint=checkpoint)
    unfinished = replace(config, stages=(*config.stages, config.stages[0]))
    with pytest.raises(NmpError, match="not finished: add --resume"):
        fit(unfinished, tmp_path, device_name="cpu")
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(NmpError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_frames(tmp_path: Path) -> None:
    config = tiny_config(checkpoint_every=2)
    with pytest.raises(NmpError, match=r"loss is nan at stage 1, step 4, with group 6, frame 0.*group 7, frame 2"):
        train(tiny_network(), ColouredSource(config, broken=6), config, tmp_path, device=CPU)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.progress["step"] == 2
    assert all(bool(torch.isfinite(v).all()) for v in checkpoint.tensors.values())


def test_a_gradient_that_is_infinite_does_not_reach_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite and the gradient is not: in the very step before a checkpoint, nothing else tells of it."""
    count = 0
    original = TrainingStep.forward

    def forward(self: TrainingStep, *args: Any) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        losses = original(self, *args)
        if count == 1 + 4:  # the first call finds out which parameters are used
            losses["loss"].register_hook(lambda gradient: gradient * torch.inf)
        return losses

    monkeypatch.setattr(TrainingStep, "forward", forward)
    config = tiny_config(checkpoint_every=2)
    with pytest.raises(NmpError, match=r"gradient norm is (inf|nan) at stage 1, step 4, with group 6, frame 0"):
        train(tiny_network(), ColouredSource(config), config, tmp_path, device=CPU)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.progress["step"] == 2
    assert all(bool(torch.isfinite(v).all()) for v in checkpoint.tensors.values())


def test_too_little_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "forward", forward)
    config = tiny_config()
    with pytest.raises(NmpError, match=r"lower stages.0.batch or network.input_width.*checkpointing=true"):
        train(tiny_network(), ColouredSource(config), config, tmp_path, device=CPU)


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config = tiny_config(compile=True)
    with pytest.raises(NmpError, match=r"torch.compile failed \(.*no C compiler.*compile=false"):
        train(tiny_network(), ColouredSource(config), config, tmp_path, device=CPU)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_over_processes_is_torchs_own(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process there is nothing to add up, and the result is that of torch.nn.BatchNorm2d."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3)).train(training)
    nn.init.normal_(plain[0].weight)
    ours = convert(nn.Sequential(nn.BatchNorm2d(3))).train(training)
    assert isinstance(ours[0], CpuSyncBatchNorm)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 5) * 2 + 1
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, value in zip((plain, ours), inputs, strict=True):
        module(value).square().mean().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """In double precision, where rounding is too small to grow into something: with groups dealt out by streets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, ranks in (("one", 1), ("two", 2)):
        multiprocessing.spawn(train_in_process, (ranks, port, tmp_path / name), nprocs=ranks)
    gradients = [load_file(str(tmp_path / name / "gradient.safetensors")) for name in ("one", "two")]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name, rtol=1e-9, atol=1e-12)
    summaries = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert [s["processes"] for s in summaries] == [1, 2]
    losses = [s["stages"][0]["losses"] for s in summaries]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    scores = [s["stages"][0]["scores"]["with prior"]["all"]["miou"] for s in summaries]
    assert scores[0] > 40 and abs(scores[0] - scores[1]) <= 0.05  # percent
    # as far as half precision tells: a random start of each process would differ in every weight
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name, rtol=2e-3, atol=1e-4)


def test_processes_that_cannot_share_a_batch_are_refused() -> None:
    assert Ranks(1, 4).share(8, "stages.0.batch") == 2
    with pytest.raises(NmpError, match="stages.0.batch is 6, which 4 processes cannot share"):
        Ranks(1, 4).share(6, "stages.0.batch")


@pytest.fixture
def coarse_worlds() -> Iterator[None]:
    """Paint the cities of a run coarsely, and each of them once: here training and validation have the same."""
    with pytest.MonkeyPatch.context() as patch:
        made = functools.cache(functools.partial(make_world, texel_m=0.5))
        patch.setattr("nmp_train.data.simulated.make_world", made)
        yield


def test_a_run_ends_in_weights_that_load(tmp_path: Path, coarse_worlds: None) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    assert main(["fit", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    network, _ = load_network(tmp_path / "run" / "network.safetensors")
    assert network.config == SMALL
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert [stage["steps"] for stage in summary["stages"]] == [1, 2]
    assert summary["stages"][0]["host_memory_mib"] > 100
    scores = summary["stages"][1]["scores"]
    assert {"no prior", "empty"} <= set(scores)
    assert {"all", "0-10 m", "20-40 m"} <= set(scores["no prior"])
    assert list((tmp_path / "run" / "curves").iterdir())
    assert load_config(tmp_path / "run" / "config.yaml", []) == load_config(config, [])
    described = described_in(tmp_path / "run")
    assert [stage["steps"] for stage in described["training"]["stages"]] == [1, 2]
    assert described["metrics"]["empty"]["breakdown"]["0-10 m"] == nan_as_null(scores["empty"]["0-10 m"])
    assert described["metrics"]["no prior"]["miou"] == scores["no prior"]["all"]["miou"]
    assert described["training_set"]["worlds"]["first_seed"] == 1001
    for known in (summary, described["training"]):
        assert known["started"]["command"] == f"nmp-train fit {config} --out {tmp_path / 'run'} --device cpu"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nmp_train.fit.SimulatedSource", "for the ground of the worlds: lower worlds.seeds, validation.seeds or"),
        ("nmp_train.validate.validate", "for the validation.*: lower validation_drives or validation_trips"),
    ],
)
def test_too_little_memory_for_worlds_names_the_settings(
    place: str, message: str, tmp_path: Path, coarse_worlds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, full)
    (tmp_path / "tiny.yaml").write_text(TINY)
    with pytest.raises(NmpError, match=message):
        fit(load_config(tmp_path / "tiny.yaml", ["stages.0.steps=0"]), tmp_path / "run", device_name="cpu")
    assert (tmp_path / "run" / "network.safetensors").is_file() == ("validate" in place)


def test_too_little_memory_for_recorded_groups_names_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_config(data=DataConfig("nowhere"), stages=(StageConfig(steps=0, batch=1),))
    monkeypatch.setattr("nmp_train.data.recorded.RecordedSource", lambda *_, **__: ColouredSource(config))
    monkeypatch.setattr("nmp_train.evaluate.split_scenes", lambda *_: [])
    monkeypatch.setattr("nmp_train.score.score_groups", full)
    with pytest.raises(NmpError, match="for the validation, .* the longest groups: lower its batch"):
        fit(config, tmp_path / "run", device_name="cpu")


def test_splits_of_another_file_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "v1.0-trainval").mkdir(parents=True)
    (tmp_path / "mine.json").write_text('{"train": ["scene-0001"], "held out": ["scene-0002"]}')
    (tmp_path / "c.yaml").write_text(f"data: {{dataroot: {tmp_path / 'data'}, validation_split: held out}}")
    config = load_config(tmp_path / "c.yaml", [f"data.splits={tmp_path / 'mine.json'}", "stages=[{steps: 0}]"])
    drawn: list[list[str]] = []

    def source(root: Path, version: str, scenes: list[str], *_: Any, **__: Any) -> ColouredSource:
        drawn.append(scenes)
        return ColouredSource(tiny_config())

    monkeypatch.setattr("nmp_train.data.recorded.RecordedSource", source)
    monkeypatch.setattr("nmp_train.score.score_groups", lambda *_: {})
    fit(config, tmp_path / "run", device_name="cpu")
    assert sorted(drawn) == [["scene-0001"], ["scene-0002"]]


def test_how_a_run_was_started_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_network(BEVNetwork(SMALL), tmp_path / "other.safetensors", {})
    monkeypatch.setattr("nmp_train.fit._sources", lambda config, device, ranks: (ColouredSource(config), None))
    stages = tuple(StageConfig(seconds=0, steps=1, batch=1) for _ in range(3))
    config = TrainConfig(network=SMALL, workers=0, stages=stages)
    given = {"weights": tmp_path / "other.safetensors", "backbone": tmp_path / "other.safetensors", "first_stage": 2}
    with monkeypatch.context() as patch:
        kill_after(patch, 2)  # in the third stage
        with pytest.raises(Killed):
            fit(config, tmp_path / "out", **given, device_name="cpu", command="nmp-train fit c.yaml")
    summary = fit(config, tmp_path / "out", device_name="cpu", resume=True, command="nmp-train fit c.yaml --resume")
    expected = {
        "command": "nmp-train fit c.yaml",
        "nmp": __version__,
        "weights": str(tmp_path / "other.safetensors"),
        "backbone": str(tmp_path / "other.safetensors"),
        "first_stage": 2,
    }
    assert summary["started"] == expected
    assert json.loads((tmp_path / "out" / "network.json").read_text())["training"]["started"] == expected


def test_a_backbone_is_taken_from_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    save_network(BEVNetwork(replace(SMALL, bev_channels=8)), tmp_path / "other.safetensors", {})
    monkeypatch.setattr("nmp_train.fit._sources", lambda config, device, ranks: (ColouredSource(config), None))
    stages = tuple(StageConfig(steps=0, batch=1) for _ in range(2))
    config = TrainConfig(network=SMALL, workers=0, stages=stages)
    fit(config, tmp_path / "out", backbone=tmp_path / "other.safetensors", device_name="cpu")
    given, taken = (load_network(tmp_path / p)[0] for p in ("other.safetensors", "out/network.safetensors"))
    for name, value in given.backbone.state_dict().items():
        torch.testing.assert_close(taken.backbone.state_dict()[name], value, msg=name)
    other = replace(config, network=replace(SMALL, backbone_stages=1))
    with pytest.raises(NmpError, match="a resnet18 of 2 stages, the configuration a resnet18 of 1"):
        fit(other, tmp_path / "third", backbone=tmp_path / "other.safetensors", device_name="cpu")
    with pytest.raises(NmpError, match="another network.*bev_channels 8 there, 16 here"):
        fit(config, tmp_path / "fourth", weights=tmp_path / "other.safetensors", device_name="cpu")


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_torchrun_takes_no_option_for_its_own(command: str) -> None:
    from torch.distributed.run import get_args_parser

    own = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"nmp_train.{command}").add_arguments(own)
    options = {option for action in own._actions for option in action.option_strings}
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    # It reads abbreviations of its options behind the name of the program too.
    assert options and not [(ours, other) for ours in options for other in theirs if other.startswith(ours)]
