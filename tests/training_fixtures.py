"""A source of training batches that needs no worlds: coloured frames, and layers that follow from their colour."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from nmp.frame import CAMERAS
from nmp.model import BEVNetwork, NetworkConfig
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp_train.config import StageConfig, TrainConfig
from nmp_train.data import Batch, Group, StepSampler, collate
from nmp_train.data.sampler import Places, Targets
from nmp_train.distributed import Ranks
from nmp_train.loop import train
from nmp_train.score import score_groups
from nmp_train.sim.rig import log_rig
from nmp_train.step import Draws, TrainingStep

TINY_NETWORK = NetworkConfig(
    backbone_stages=1,
    input_width=32,
    input_height=16,
    neck_channels=8,
    bev_channels=8,
    bev_length=12.0,
    bev_width=6.0,
    prior_channels=4,
)


def tiny_config(**changes: Any) -> TrainConfig:
    """Return a configuration of one stage of groups of three frames, small enough for a test."""
    stage = StageConfig(seconds=0, steps=6, batch=2, group=3, radius_m=4.0, learning_rate=0.01, warmup_steps=2)
    return TrainConfig(
        **({"network": TINY_NETWORK, "workers": 0, "stages": (stage,), "validation_groups": 4} | changes)
    )


@functools.cache
def _projection(config: NetworkConfig) -> Tensor:
    matrices = [
        unit_projection(
            network_intrinsics(c.intrinsics, c.width, c.height, config),
            c.base_from_camera,
            config.input_width,
            config.input_height,
        )
        for c in log_rig("n008", 1)
    ]
    return torch.from_numpy(np.stack(matrices)).float()


def streets() -> Places:
    """Return four streets far from each other, each with two drives of eight frames."""
    street, drive, frame = (axis.ravel() for axis in np.indices((4, 2, 8)))
    return Places(
        place=np.zeros(street.size, np.int64),
        xy=np.column_stack([500.0 * street + 0.5 * frame, 0.3 * drive]),
        scene=2 * street + drive,
        time_s=100.0 * drive + frame,
    )


class ColouredGroups(Dataset[Group]):
    """Frames of one colour: where they are bright, the left half of the road is class 0, and the right half class 1."""

    def __init__(self, config: NetworkConfig, frames: int, seed: int, targets: Targets | None = None) -> None:
        """:param targets: the frames of :func:`streets` that groups are made of; None: any that come to mind"""
        self.config, self.frames, self.seed, self.targets = config, frames, seed, targets

    def __getitem__(self, index: int) -> Group:
        rng = np.random.default_rng((self.seed, index))
        t, net = self.frames, self.config
        bright = rng.random(t) < 0.5
        images = rng.integers(0, 60, (t, len(CAMERAS), 3, net.input_height, net.input_width))
        truth = np.zeros((t, 3, *net.layer_grid.shape), np.uint8)
        half = net.layer_grid.shape[0] // 2
        truth[:, 0, half:] = bright[:, None, None]
        truth[:, 1, :half] = bright[:, None, None]
        pose = np.column_stack([rng.uniform(-2, 2, (t, 2)), rng.uniform(-math.pi, math.pi, t)])
        if self.targets is not None:
            pose[:, :2] = self.targets.places.xy[self.targets.group(rng, index)]
        pose[:, :2] -= pose[-1, :2].copy()
        return Group(
            pose=torch.from_numpy(pose).float(),
            drive=torch.from_numpy(np.sort(rng.integers(0, t, t))),
            slope=torch.full((t, 2), torch.nan),
            seed=torch.tensor(int(rng.integers(2**62))),
            pixel_from_base=_projection(net).expand(t, -1, -1, -1).clone(),
            present=torch.ones(t, len(CAMERAS)),
            truth=torch.from_numpy(truth),
            names=[f"group {index}, frame {i}" for i in range(t)],
            weather=["day"] * t,
            labels=[""] * t,
            images=torch.from_numpy(images + 180 * bright[:, None, None, None, None]).to(torch.uint8),
        )


class ColouredSource:
    """Coloured frames as a source of batches."""

    def __init__(self, config: TrainConfig, broken: int = -1) -> None:
        """:param broken: number of a group whose calibration is not a number"""
        self.config, self.broken = config, broken

    def loader(
        self, stage: StageConfig, *, seed: int, length: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> DataLoader[Group]:
        geographic = self.config.sampler == "geographic"
        targets = Targets(streets(), stage, seed, geographic=True) if geographic else None
        groups = ColouredGroups(self.config.network, stage.group, seed, targets)
        order = StepSampler(length, stage.batch, rank=rank, ranks=ranks, start=start)
        return DataLoader(groups, batch_sampler=order, collate_fn=collate)

    def batch(self, group: Group) -> Batch:
        assert group.images is not None
        images = group.images.flatten(0, 1)
        if f"group {self.broken}, frame 0" in group.names:
            images = images * torch.nan
        return Batch.of(group, images, torch.device("cpu"))


def tiny_network(seed: int = 3) -> BEVNetwork:
    torch.manual_seed(seed)
    return BEVNetwork(TINY_NETWORK)


class DoubleSource(ColouredSource):
    """Coloured frames in double precision."""

    def batch(self, group: Group) -> Batch:
        batch = super().batch(group)
        floats = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
        return replace(batch, **{name: v.double() for name, v in floats.items() if v.is_floating_point()})


def train_in_process(rank: int, ranks: int, port: int, out: Path) -> None:
    """Train a few steps as one process of several, as torchrun would start it, all of it in double precision.

    The gradient of the first step is left in ``gradient.safetensors``.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what the network computes in single precision for the sake of bfloat16
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    stage = replace(tiny_config().stages[0], steps=16, batch=4, learning_rate=0.005)
    config = tiny_config(stages=(stage,), ema_decay=0.5, sampler="geographic")
    source = DoubleSource(config)
    team = Ranks.join("cpu")
    try:
        _save_gradient(source, config, stage, team, out)
        # Another start in each process: what counts is that of the first.
        network = tiny_network(3 + rank).double()
        train(
            network,
            source,
            config,
            out,
            device=torch.device("cpu"),
            ranks=team,
            score=lambda trained, _: score_groups(trained, source, config),
        )
    finally:
        team.leave()


def _save_gradient(source: ColouredSource, config: TrainConfig, stage: StageConfig, team: Ranks, out: Path) -> None:
    network = tiny_network().double()
    team.batch_norms(network, torch.device("cpu"))
    step: nn.Module = TrainingStep(network, config, stage).train()
    if team.ranks > 1:
        step = DistributedDataParallel(step)
    batch = source.batch(next(iter(source.loader(stage, seed=1, length=4, rank=team.rank, ranks=team.ranks))))
    step(batch, Draws.of(batch.seeds.tolist(), stage.group, config, torch.device("cpu")))["loss"].backward()
    if team.first:
        out.mkdir()
        save_file({n: p.grad for n, p in network.named_parameters()}, str(out / "gradient.safetensors"))
