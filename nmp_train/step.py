"""One training step: a batch of groups in, losses out. The same for one process and for many."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmp.errors import NmpError
from nmp.model.fusion import Alignment, Memory, Slope, moved
from nmp.model.network import BEVNetwork, Output
from nmp_train.alignment import alignment_loss, motion_between, slope_loss
from nmp_train.config import StageConfig, TrainConfig
from nmp_train.data import Batch
from nmp_train.losses import direction_loss, embedding_loss, layer_loss, published_loss

ALIGNMENT_WEIGHT = 0.1
POSE_DRAWS = 4
"""times that a group is gone through with other errors of the pose, where the alignment alone is trained"""
REPEATS = (1.0, 1.0, 2.0, 4.0)
"""how often a frame counts as seen, drawn at random: as if its place had been passed so often"""
_SHAPES_OF_BLOCKS = 64
MARGIN_M = 2.0
"""room around the window for errors of the pose"""


@dataclass
class Draws:
    """What is drawn at random for a batch of B groups of T frames."""

    offset: Tensor
    """[B, T, 3] error (m, m, rad) of each drive of a group; there are at most as many drives as frames"""
    jitter: Tensor
    """[B, T, 3] error (m, m, rad) of each frame beside that of its drive"""
    repeat: Tensor
    """[B, T] how often a frame counts as seen"""
    spread: Tensor
    """[B, 2] how exactly the poses are known: standard deviations of position (m) and heading (rad)"""
    corner: Tensor
    """[B, 2] where in a cell of the map (m) the last frame of a group stands"""
    alone: Tensor
    """[B, K] int64 frames that are also decoded without a prior"""

    @classmethod
    def of(cls, seeds: list[int], frames: int, config: TrainConfig, device: torch.device) -> Draws:
        """Draw for groups of ``frames`` frames, each from its own seed, whichever process it is in."""
        count = math.ceil(config.prior_dropout * frames)
        rows: list[tuple[Any, ...]] = []
        for seed in seeds:
            rng = np.random.default_rng((seed, len(REPEATS)))
            spread = np.array([config.position_noise_m, config.position_noise_m, config.yaw_noise_rad])
            spread = spread * rng.uniform() ** 2  # good poses are trained more often than bad ones
            # Errors last for a drive, or change from frame to frame, or do both: their squares share the spread.
            share = rng.uniform()
            rows.append(
                (
                    rng.normal(size=(frames, 3)) * spread * math.sqrt(1 - share),
                    rng.normal(size=(frames, 3)) * spread * math.sqrt(share),
                    rng.choice(REPEATS, frames),
                    spread[1:],
                    rng.uniform(0, config.network.prior_cell, 2),
                    rng.permutation(frames)[:count],
                )
            )
        *floats, alone = (np.stack(column) for column in zip(*rows, strict=True))
        parts = [torch.from_numpy(values).float() for values in floats] + [torch.from_numpy(alone)]
        if device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return cls(*(part.to(device, non_blocking=True) for part in parts))


class TrainingStep(nn.Module):
    """Encode, remember and decode a batch, and judge the result.

    With one frame a group the network is trained without a prior. With more, the frames of a group are gone through
    in the order of time, with a window of the map that starts empty, as the mapper does.
    """

    def __init__(self, network: BEVNetwork, config: TrainConfig, stage: StageConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.stage = stage
        self.frozen = frozen_parts(network, config, stage)
        reach = stage.radius_m + network.config.feature_grid.reach + MARGIN_M
        self.window = 2 * math.ceil(reach / network.config.prior_cell)
        """edge of the window, in cells"""
        self._step: Callable[..., tuple[Output, Memory]] = network.step
        if config.checkpointing:
            self._step = functools.partial(recomputed, network, network.step)

    def train(self, mode: bool = True) -> TrainingStep:
        """Switch to training; frozen parts stay as they are, the statistics of their batch norms included."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, batch: Batch, draws: Draws | None) -> dict[str, Tensor]:
        """Return the loss of a batch, and the parts that it is the sum of, each a scalar.

        :param draws: None for groups of one frame
        """
        if self.stage.alignment_only and draws is not None:
            return self._search(batch, draws)
        bev = self.network.encode(batch.images, batch.pixel_from_base, batch.present)
        if draws is None:
            return self._judge(self.network.alone(bev), batch.truth, batch.instance, batch.direction)
        b, t = batch.pose.shape[:2]
        frames = bev.unflatten(0, (b, t))
        # without dropout of the prior there is nothing to decode alone, and layers do not take batches of nothing
        alone = self.network.alone(_chosen(frames, draws.alone)) if draws.alone.numel() else None
        outputs, searched = self._drive(frames, batch, draws)
        truths = (batch.truth, batch.instance, batch.direction)
        losses = self._judge(
            _joined(outputs, alone),
            *(None if v is None else torch.cat([v, _chosen(v.unflatten(0, (b, t)), draws.alone)]) for v in truths),
        )
        for name, value in searched.items():
            losses[name] = ALIGNMENT_WEIGHT * value
            losses["loss"] = losses["loss"] + losses[name]
        return losses

    def _search(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return the loss of the alignment alone, over :data:`POSE_DRAWS` draws of pose errors for every group."""
        fusion = self.network.fusion
        with torch.no_grad():
            bev = self.network.encode(batch.images, batch.pixel_from_base, batch.present)
        frames, true, drive = (
            v.repeat_interleave(POSE_DRAWS, dim=0)
            for v in (bev.unflatten(0, batch.pose.shape[:2]), batch.pose, batch.drive)
        )
        pose, origin, memory = self._begin(frames, true, drive, draws)
        used: list[Tensor] = []
        errors: list[Tensor] = []
        for now in range(frames.shape[1]):
            frame = frames[:, now]
            with torch.no_grad():
                cells = fusion.opened(memory)
            with torch.set_grad_enabled(torch.is_grad_enabled() and now > 0):
                found = fusion.locate(frame, cells, pose[:, now], origin, draws.spread)
            assert found is not None
            if now:
                errors.append(self._alignment(found, true, pose[:, now], used, draws.repeat, now))
            with torch.no_grad():
                used.append(moved(pose[:, now], found.offset))
                memory = fusion.write(cells, frame, frame, used[-1], origin, found, draws.repeat[:, now])
        loss = torch.stack(errors).mean()
        return {"loss": loss, "alignment": loss}

    def answers(self, batch: Batch, draws: Draws | None) -> dict[str, Tensor]:
        """Return the logits [F, 3, rows, cols] of every frame on its own, and with the earlier frames of its group."""
        bev = self.network.encode(batch.images, batch.pixel_from_base, batch.present)
        out = {"no prior": self.network.alone(bev).logits}
        if draws is not None:
            outputs, _ = self._drive(bev.unflatten(0, batch.pose.shape[:2]), batch, draws)
            out["with prior"] = torch.stack([o.logits for o in outputs], dim=1).flatten(0, 1)
        return out

    def _drive(self, frames: Tensor, batch: Batch, draws: Draws) -> tuple[list[Output], dict[str, Tensor]]:
        """Go through the frames [B, T, C, rows, cols] in the order of time; also return the losses of the searches."""
        t = frames.shape[1]
        pose, origin, memory = self._begin(frames, batch.pose, batch.drive, draws)
        outputs: list[Output] = []
        used: list[Tensor] = []
        errors: dict[str, list[Tensor]] = {}
        for now in range(t):
            output, memory = self._step(
                frames[:, now], memory, pose[:, now], origin, draws.repeat[:, now], draws.spread
            )
            outputs.append(output)
            at = pose[:, now]
            if output.alignment is not None:
                if now:
                    loss = self._alignment(output.alignment, batch.pose, at, used, draws.repeat, now)
                    errors.setdefault("alignment", []).append(loss)
                at = moved(at, output.alignment.offset.detach())
            if output.slope is not None:
                if now:
                    loss = self._slope(output.slope, batch, at, used, draws.repeat, now)
                    errors.setdefault("slope", []).append(loss)
            used.append(at)
        return outputs, {name: torch.stack(values).mean() for name, values in errors.items()}

    def _begin(self, frames: Tensor, true: Tensor, drive: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Memory]:
        """Return poses with their errors [B, T, 3], and the origin and the cells of windows that are empty."""
        pose = true + draws.offset.gather(1, drive[..., None].expand(-1, -1, 3)) + draws.jitter
        # Poses count from the last frame, so that it stands in the middle of the window.
        origin = draws.corner - self.window / 2 * self.network.config.prior_cell
        memory = Memory.empty(len(frames), self.network.state_channels, self.window, self.window, frames.device)
        return pose, origin, memory

    def _alignment(
        self, found: Alignment, true: Tensor, given: Tensor, used: list[Tensor], repeat: Tensor, now: int
    ) -> Tensor:
        """Compare what the search found with where the map really is."""
        aligner = self.network.fusion.aligner
        assert aligner is not None
        motion, weight = self._correction(true, given, used, repeat, now)
        return alignment_loss(found, aligner, motion, weight)

    def _slope(self, found: Slope, batch: Batch, given: Tensor, used: list[Tensor], repeat: Tensor, now: int) -> Tensor:
        """Compare the slope and the shift that were found with those that really are."""
        leveller = self.network.fusion.leveller
        assert leveller is not None
        motion, weight = self._correction(batch.pose, given, used, repeat, now)
        return slope_loss(found, leveller, batch.slope[:, now], motion[:, :2], weight)

    def _correction(
        self, true: Tensor, given: Tensor, used: list[Tensor], repeat: Tensor, now: int
    ) -> tuple[Tensor, Tensor]:
        """Return the motion [B, 3] that leads a pose to where the map is, and how much of it is there to see [B].

        What earlier frames stored is displaced by the errors of the poses that they were stored at. At the place of
        this frame the map is displaced by the mean of these, weighted by how much of the place they saw.

        :param true: [B, T, 3] poses
        :param given: [B, 3] pose of this frame, with its error
        :param used: poses [B, 3] that earlier frames were stored at
        """
        before, stored = true[:, :now], torch.stack(used, dim=1)  # [B, now, 3]
        turn = stored[..., 2] - before[..., 2]
        here = true[:, now, None, :2] - before[..., :2]
        c, s = torch.cos(turn), torch.sin(turn)
        there = torch.stack([c * here[..., 0] - s * here[..., 1], s * here[..., 0] + c * here[..., 1]], dim=-1)
        shift = stored[..., :2] + there - true[:, now, None, :2]
        near = (1 - here.norm(dim=-1) / self.network.config.bev_length).clamp(min=0)
        share = near * repeat[:, :now]
        total = share.sum(dim=1)
        share = share / total.clamp(min=1e-6)[:, None]
        mean = torch.einsum("bt,btc->bc", share, torch.cat([shift, turn[..., None]], dim=-1))
        return motion_between(given, true[:, now] + mean), total.clamp(max=1)

    def _judge(
        self, output: Output, truth: Tensor | None, instance: Tensor | None, direction: Tensor | None
    ) -> dict[str, Tensor]:
        assert truth is not None
        if self.config.loss == "published":
            losses = {"layers": published_loss(output.logits, truth)}
        else:
            losses = {"layers": layer_loss(output.logits, truth, self.config.positive_weight)}
        if output.embedding is not None and instance is not None:
            losses["embedding"] = embedding_loss(output.embedding, instance)
        if output.direction is not None and direction is not None:
            losses["direction"] = direction_loss(output.direction, direction)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context in which a network is trained and scored: bfloat16 on a GPU, if the configuration says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and config.precision == "bf16")


def frozen_parts(network: BEVNetwork, config: TrainConfig, stage: StageConfig) -> tuple[nn.Module, ...]:
    """Return the parts of a network that a stage keeps as they are.

    Raises :class:`NmpError` where the stage or the configuration asks for parts that are not there.
    """
    if stage.alignment_only:
        aligner = network.fusion.aligner
        if aligner is None or stage.group == 1:
            raise NmpError("a stage with alignment_only needs network.align=true and groups of more than one frame")
        parts = [*network.children(), *network.fusion.children()]
        return tuple(part for part in parts if part is not aligner and part is not network.fusion)
    if stage.freeze_images:
        return network.backbone, network.neck
    backbone, count = network.backbone, config.backbone_frozen
    if not 0 <= count <= backbone.stages + 1:
        raise NmpError(f"backbone_frozen is {count}: this backbone has 0 to {backbone.stages + 1} parts to freeze")
    parts = [backbone.conv1, backbone.bn1] if count else []
    parts += [backbone.get_submodule(f"layer{index}") for index in range(1, count)]
    if config.backbone_norms == "fixed":
        parts += [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return tuple(parts)


def _chosen(values: Tensor, which: Tensor) -> Tensor:
    """Return of values [B, T, ...] the frames ``which`` [B, K], as [B * K, ...]."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, which].flatten(0, 1)


def _joined(steps: Sequence[Output], alone: Output | None) -> Output:
    """Put the maps of T steps, each [B, ...], into the order of the batch [B * T, ...], and others behind them."""

    def maps(name: str) -> Any:
        found = [getattr(step, name) for step in steps]
        if found[0] is None:
            return None
        driven = torch.stack(found, dim=1).flatten(0, 1)
        return driven if alone is None else torch.cat([driven, getattr(alone, name)])

    return Output(maps("logits"), maps("embedding"), maps("direction"))


def used_parameters(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that a loss depends on, from the graph of its gradient."""
    found: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    return found


def recomputed(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function of a module and compute it again in the backward pass, instead of keeping what it computed.

    Batch norms take note of the statistics of a batch the first time only.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    contexts = lambda: (contextlib.nullcontext(), without_statistics(module))  # noqa: E731
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def without_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of a batch without taking note of them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


def save_memory(network: BEVNetwork) -> None:
    """Have the blocks of the backbone, and what else can, computed twice instead of kept."""
    for module in network.modules():
        if hasattr(module, "checkpoint"):
            setattr(module, "checkpoint", True)  # noqa: B010 (for mypy any attribute is a tensor or module)
    for block in _blocks(network):
        block.forward = functools.partial(recomputed, block, block.forward)


def compile_blocks(network: BEVNetwork) -> None:
    """Compile the blocks of the backbone; to be called before :func:`save_memory`.

    Not the whole network: what torch 2.13 makes of the BEV encoder has wrong gradients (its bilinear interpolation on a
    CPU; off by more than their size, without a warning), and a part with batch norms that runs several times before
    the backward pass cannot be compiled at all.
    """
    from torch import _dynamo as dynamo  # takes a second, and few compile

    # All blocks have the same code: every shape of them counts as compiled anew, and twice where statistics are taken
    # once. What is beyond the limit would not be compiled.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _SHAPES_OF_BLOCKS)
    for block in _blocks(network):
        block.forward = torch.compile(block.forward)


def _blocks(network: BEVNetwork) -> Iterator[nn.Module]:
    for index in range(network.backbone.stages):
        yield from network.backbone.get_submodule(f"layer{index + 1}").children()
