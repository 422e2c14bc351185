"""Training: stage by stage, on images rendered as they are needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.metrics import Breakdown, format_table
from nmp.model import BEVNetwork, fusion, load_network, save_network
from nmp_train.config import StageConfig, TrainConfig, WorldsConfig
from nmp_train.data import Group, SimulatedGroups, collate
from nmp_train.losses import layer_loss
from nmp_train.sim.render import Ground, Solids, Weather, render
from nmp_train.sim.weather import MIX, WORDS
from nmp_train.world import World, make_world


@dataclass
class Batch:
    """B x T frames on the training device, flattened to F = B * T."""

    images: Tensor
    """[F, 6, 3, H, W] uint8"""
    pixel_from_base: Tensor
    """[F, 6, 3, 4]"""
    pose: Tensor
    """[B, T, 3] relative to the group, m and rad"""
    truth: Tensor
    """[F, 3, rows, cols]"""
    weather: list[str]
    """[F] day, rain or night"""


def make_worlds(config: WorldsConfig, workers: int, *, at_every_difficulty: bool = False) -> list[World]:
    """Generate the cities of a configuration, in parallel.

    :param at_every_difficulty: each city at each of ``config.difficulties``, instead of one of them in turn
    """
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    levels = config.difficulties
    if at_every_difficulty:
        jobs = [(seed, level) for level in levels for seed in seeds]
    else:
        jobs = [(seed, levels[i % len(levels)]) for i, seed in enumerate(seeds)]
    make = functools.partial(make_world, size_m=config.size_m, drives=config.drives, duration_s=config.duration_s)
    if not workers:
        return [make(*job) for job in tqdm(jobs, desc="cities", unit="city")]
    # Spawned, not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn) as pool:
        return list(tqdm(pool.map(make, *zip(*jobs, strict=True)), desc="cities", unit="city", total=len(jobs)))


class Simulator:
    """Renders groups on the training device."""

    def __init__(self, worlds: list[World], config: TrainConfig, device: torch.device) -> None:
        self.ground = Ground.of([w.surface for w in worlds], device)
        self.cities = len(worlds)
        self.config = config
        self.device = device
        self.cpu_generator = torch.Generator().manual_seed(config.seed)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def render(self, group: Group, first_city: int = 0) -> Batch:
        """Render every frame of a batch in a weather of its own.

        :param first_city: number among the simulator's worlds that the group counts its cities from
        """
        b, t = group.centre.shape[:2]
        f = b * t

        def flat(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True).flatten(0, 1)

        network = self.config.network
        weather = self._draw_weather(f)
        images = render(
            self.ground,
            group.city.to(self.device, non_blocking=True).repeat_interleave(t) + first_city,
            flat(group.centre),
            flat(group.intrinsics),
            flat(group.map_from_camera),
            Solids(*(flat(s) for s in group.solids)),
            Weather.sample(f, self.cpu_generator, weather).to(self.device),
            (network.input_width, network.input_height),
            supersample=self.config.supersample,
            generator=self.generator,
            compiled=self.device.type == "cuda",
        )
        return Batch(images, flat(group.pixel_from_base), group.pose.to(self.device, non_blocking=True), flat(group.truth), weather)

    def _draw_weather(self, count: int) -> list[str]:
        shares = torch.tensor(list(MIX.values()))
        drawn = torch.multinomial(shares, count, replacement=True, generator=self.cpu_generator)
        return [WORDS[i] for i in drawn.tolist()]


def group_prior(
    network: BEVNetwork, bev: Tensor, pose: Tensor, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Build each frame's prior from the other frames of its group, differentiably.

    The same two resamplings as in the mapper (ego to map cells, map cells to ego) and the same weighted mean; as a
    sum over frames it needs no recurrence. Some frames count several times, as if a place had been passed often.

    :param bev: [B * T, C, rows, cols]
    :param pose: [B, T, 3]
    :return: latent [B * T, D, rows, cols] and evidence [B * T, 1, rows, cols]
    """
    b, t = pose.shape[:2]
    device = bev.device
    net = network.config
    seen, weight = network.observe(bev)
    counts = torch.tensor([1.0, 1.0, 2.0, 4.0], device=device)
    count = counts[torch.randint(4, (b * t, 1, 1, 1), device=device, generator=generator)]
    stack = (torch.cat([seen, weight], dim=1) * count).unflatten(0, (b, t))
    noise = torch.randn(b, t, 3, device=device, generator=generator)
    scale = torch.tensor([config.position_noise_m, config.position_noise_m, config.yaw_noise_rad], device=device)
    noisy = pose + noise * scale
    cell = net.prior_cell
    side = 2 * math.ceil(math.hypot(net.bev_length, net.bev_width) / cell / 2) + 2
    # which frames the prior of each target is made of: never itself, a random share of the others
    share = torch.rand(b, t, 1, device=device, generator=generator)
    pick = (torch.rand(b, t, t, device=device, generator=generator) < 0.25 + share) & ~torch.eye(
        t, dtype=torch.bool, device=device
    )
    dropped = torch.rand(b, t, 1, device=device, generator=generator) < config.prior_dropout
    pick = (pick & ~dropped).float()
    out = []
    grid = net.feature_grid
    for target in range(t):
        origin = torch.floor(pose[:, target, :2] / cell) * cell - side / 2 * cell
        others = [s for s in range(t) if s != target]
        source = stack[:, others].flatten(0, 1)
        turned = fusion.ego_to_map(
            source,
            noisy[:, others].flatten(0, 1),
            grid,
            origin.repeat_interleave(len(others), dim=0),
            cell,
            side,
            side,
        ).unflatten(0, (b, len(others)))
        cells = (turned * pick[:, target, others, None, None, None]).sum(dim=1)
        out.append(fusion.map_to_ego(cells, noisy[:, target], grid, origin, cell))
    summed = torch.stack(out, dim=1).flatten(0, 1)
    evidence = summed[:, -1:]
    return summed[:, :-1] / evidence.clamp(min=1e-6), evidence.clamp(max=net.evidence_cap)


def loader(worlds: list[World], config: TrainConfig, stage: StageConfig, seed: int, length: int) -> DataLoader[Group]:
    data = SimulatedGroups(worlds, config.network, group=stage.group, radius_m=stage.radius_m, seed=seed, length=length)
    return DataLoader(
        data,
        batch_size=stage.batch,
        drop_last=length >= stage.batch,
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=6 if config.workers else None,
        # Forked workers share the cities; a spawned one would have to be sent all of them.
        multiprocessing_context="fork" if config.workers else None,
        worker_init_fn=_single_thread,
    )


def _single_thread(_worker: int) -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def validate(
    network: BEVNetwork, simulator: Simulator, worlds: list[World], config: TrainConfig, groups: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Score held-out cities without prior, and with a prior of the other frames of each group.

    :param worlds: the last ones of the simulator's
    :return: for ``no prior`` and ``with prior`` the scores in all, by weather and by distance (percent)
    """
    network.eval()
    stage = StageConfig(group=6, batch=8)  # the shape of a training step, so that nothing is compiled again
    grid = config.network.layer_grid
    scores = {"no prior": Breakdown(grid), "with prior": Breakdown(grid)}
    generator = torch.Generator(simulator.device).manual_seed(seed)
    always = dataclasses.replace(config, prior_dropout=0.0)
    for group in loader(worlds, config, stage, seed, groups):
        batch = simulator.render(group, simulator.cities - len(worlds))
        with torch.autocast(simulator.device.type, torch.bfloat16, enabled=simulator.device.type == "cuda"):
            present = torch.ones(batch.images.shape[:2], device=simulator.device)
            bev = network.encode(batch.images, batch.pixel_from_base, present)
            latent, evidence = group_prior(network, bev, batch.pose, always, generator)
            single, fused = network.decode(bev), network.decode(bev, latent, evidence)
        truth = batch.truth.cpu().numpy()
        levels = [worlds[i].difficulty for i in group.city.tolist() for _ in range(stage.group)]
        for name, logits in (("no prior", single), ("with prior", fused)):
            predicted = (logits > 0).cpu().numpy()
            for one, expected, weather, level in zip(predicted, truth, batch.weather, levels, strict=True):
                scores[name].add(one, expected, [weather, f"difficulty {level:g}"])
    return {name: breakdown.percent() for name, breakdown in scores.items()}


def _table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    return format_table({f"{system}, {part}": row for system, parts in scores.items() for part, row in parts.items()})


def fit(
    config: TrainConfig,
    out: Path,
    *,
    start: Path | None = None,
    backbone: Path | None = None,
    first_stage: int = 1,
    device_name: str | None = None,
) -> dict[str, Any]:
    """Train the stages from ``first_stage`` on, writing ``<out>/network.safetensors`` with its JSON after each.

    :param start: weights to begin with, as a run of earlier stages left them
    :param backbone: weights of another network, to begin with its backbone
    :return: the summary that is also written to ``<out>/training.json``
    """
    if not 1 <= first_stage <= len(config.stages):
        raise NmpError(f"stage {first_stage} does not exist: the configuration has {len(config.stages)}")
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    worlds = make_worlds(config.worlds, config.workers)
    held_out = make_worlds(config.validation, config.workers, at_every_difficulty=True)
    # One simulator for both: a second ground of another size would be compiled for anew.
    simulator = Simulator(worlds + held_out, config, device)
    network = load_network(start)[0] if start else BEVNetwork(config.network)
    if backbone:
        _copy_backbone(network, backbone)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    history: list[dict[str, Any]] = []
    result: dict[str, Any] = {"stages": history, "config": config.to_dict(), "device": _device_text(device)}
    curves = _curves(out)
    for number, stage in list(enumerate(config.stages))[first_stage - 1 :]:
        history.append({"stage": number + 1, **_run_stage(network, simulator, worlds, config, stage, number, curves)})
        save_network(network, out / "network.safetensors", result)
        history[-1]["scores"] = validate(network, simulator, held_out, config, config.validation_groups, 77)
        print(_table(history[-1]["scores"]), flush=True)
        (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        save_network(network, out / "network.safetensors", result)
    return result


def _copy_backbone(network: BEVNetwork, source: Path) -> None:
    """Take the backbone of other weights, of the same backbone but any other layers."""
    other = load_network(source)[0]
    if (other.config.backbone, other.config.backbone_stages) != (
        network.config.backbone,
        network.config.backbone_stages,
    ):
        raise NmpError(
            f"{source} has a {other.config.backbone} of {other.config.backbone_stages} stages, the configuration a "
            f"{network.config.backbone} of {network.config.backbone_stages}: choose weights of the same backbone"
        )
    network.backbone.load_state_dict(other.backbone.state_dict())


def _moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Exponential moving average that forgets the untrained start: the decay grows to its value."""

    def average(kept: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        grown = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        return kept + (1 - grown) * (current - kept)

    return average


def _curves(out: Path) -> Callable[[str, float, int], None]:
    """Return a call that logs (name, value, step) for TensorBoard, where it is installed (extra ``train``)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda name, value, step: None
    writer = SummaryWriter(str(out / "curves"))

    def log(name: str, value: float, step: int) -> None:
        writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _device_text(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _run_stage(
    network: BEVNetwork,
    simulator: Simulator,
    worlds: list[World],
    config: TrainConfig,
    stage: StageConfig,
    number: int,
    curves: Callable[[str, float, int], None],
) -> dict[str, Any]:
    device = simulator.device
    frozen: list[torch.nn.Module] = [network.backbone, network.neck] if stage.freeze_images else []
    network.backbone.requires_grad_(not stage.freeze_images)
    network.neck.requires_grad_(not stage.freeze_images)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    averaged = AveragedModel(network, avg_fn=_moving_average(config.ema_decay), use_buffers=True)
    generator = torch.Generator(device).manual_seed(config.seed + number)
    begin = time.monotonic()
    waited, losses, step, frames = 0.0, [], 0, 0
    batches = iter(loader(worlds, config, stage, config.seed * 7919 + number, stage.steps * stage.batch))
    bar = tqdm(total=stage.steps, desc=f"stage {number + 1}", unit="step", mininterval=5)
    while step < stage.steps:
        progress = step / stage.steps
        elapsed = time.monotonic() - begin
        if stage.seconds:
            progress = max(progress, elapsed / stage.seconds)
        if progress >= 1:
            break
        rate = min(1.0, (step + 1) / stage.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group_ in optimizer.param_groups:
            group_["lr"] = stage.learning_rate * rate
        before = time.monotonic()
        group = next(batches)
        waited += time.monotonic() - before
        batch = simulator.render(group)
        network.train()
        for part in frozen:
            part.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            present = torch.ones(batch.images.shape[:2], device=device)
            bev = network.encode(batch.images, batch.pixel_from_base, present)
            if stage.group > 1:
                latent, evidence = group_prior(network, bev, batch.pose, config, generator)
                logits = network.decode(bev, latent, evidence)
            else:
                logits = network.decode(bev)
        loss = layer_loss(logits, batch.truth, config.positive_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        averaged.update_parameters(network)
        step += 1
        if step == 1:  # compilation is not training time
            begin, waited = time.monotonic(), 0.0
        else:
            frames += batch.images.shape[0]
        if step % 50 == 0 or step == 1:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NmpError(f"loss is {value} at stage {number + 1}, step {step}: lower learning_rate")
            losses.append(round(value, 4))
            curves(f"stage {number + 1}/loss", value, step)
            curves(f"stage {number + 1}/learning rate", stage.learning_rate * rate, step)
            bar.set_postfix(loss=f"{value:.3f}", samples_s=f"{frames / (time.monotonic() - begin):.0f}")
        bar.update()
    bar.close()
    network.load_state_dict(averaged.module.state_dict())
    elapsed = time.monotonic() - begin
    return {
        "steps": step,
        "frames": frames,
        "seconds": round(elapsed, 1),
        "samples_per_s": round(frames / elapsed, 1),
        "waiting_for_data": round(waited / elapsed, 4),
        "losses": losses,
    }
