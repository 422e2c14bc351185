"""Scores of held-out groups of frames, from any source."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nmp.metrics import Breakdown
from nmp.model import BEVNetwork
from nmp_train.config import TrainConfig
from nmp_train.data import Source
from nmp_train.recordings import weather_rows
from nmp_train.step import Draws, TrainingStep, autocast

Scores = dict[str, dict[str, dict[str, float]]]


@torch.inference_mode()
def score_groups(network: BEVNetwork, source: Source, config: TrainConfig) -> Scores:
    """Score ``config.validation_groups`` groups: every frame on its own, and with the frames of its group before it.

    :return: IoU in percent by system (``no prior``, ``with prior``), by part of the set (``all``, weather, ...), by
        class
    """
    exact = dataclasses.replace(config, prior_dropout=1.0, position_noise_m=0.0, yaw_noise_rad=0.0)
    stage = max(config.stages, key=lambda s: s.group)
    step = TrainingStep(network, exact, stage).eval()
    device = network.mean.device
    grid = config.network.layer_grid
    found: dict[str, Breakdown] = {}
    length = max(config.validation_groups, 1)
    for group in source.loader(stage, seed=77, length=length):
        batch = source.batch(group)
        draws = Draws.of(batch.seeds.tolist(), stage.group, exact, device) if stage.group > 1 else None
        with autocast(config, device):
            answers: dict[str, Any] = step.answers(batch, draws)
        truth = batch.truth.cpu().numpy()
        labels = [
            [*weather_rows(w), *filter(None, [label])] for w, label in zip(batch.weather, batch.labels, strict=True)
        ]
        for name, logits in answers.items():
            breakdown = found.setdefault(name, Breakdown(grid))
            for one, expected, parts in zip((logits > 0).cpu().numpy(), truth, labels, strict=True):
                breakdown.add(one, expected, parts)
    return {name: breakdown.percent() for name, breakdown in found.items()}
