"""The training loop: stage by stage, from any source of batches, in one process or many."""

from __future__ import annotations

import copy
import json
import logging
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nmp.errors import NmpError
from nmp.model import BEVNetwork, save_network
from nmp_train.checkpoint import NAME, Checkpoint, check_same_run, save_checkpoint
from nmp_train.config import StageConfig, TrainConfig
from nmp_train.data import Batch, Source, augment
from nmp_train.distributed import Ranks
from nmp_train.export import described, metrics_of
from nmp_train.score import Scores
from nmp_train.step import (
    POSE_DRAWS,
    Draws,
    TrainingStep,
    autocast,
    compile_blocks,
    save_memory,
    used_parameters,
    without_statistics,
)

LOG_EVERY = 50
"""steps between two looks at the losses: each look makes a GPU wait"""

Curve = Callable[[str, float, int], None]
"""takes a name, a value and the step that it is of"""

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; what a checkpoint says beside the weights."""

    stage: int
    """number of the stage, from 0"""
    step: int = 0
    """steps of this stage that are done"""
    seconds: float = 0.0
    """time that they took"""
    waited: float = 0.0
    """seconds of these that were spent waiting for data"""
    frames: int = 0
    """frames trained in these seconds; the first step of a process is not timed, it compiles"""
    losses: list[float] = field(default_factory=list)
    """mean loss between two looks"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """summaries of the stages that are done"""
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """more for the summary: how the run was begun"""


def train(
    network: BEVNetwork,
    source: Source,
    config: TrainConfig,
    out: Path,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    first_stage: int = 1,
    checkpoint: Checkpoint | None = None,
    score: Callable[[BEVNetwork, StageConfig], dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the stages from ``first_stage`` on, writing ``<out>/network.safetensors`` with its JSON after each.

    :param network: on ``device``; trained in place
    :param checkpoint: where to go on; takes the place of ``first_stage`` and of the weights
    :param score: judges the network after each stage, in the first process
    :param about: more for the summary; what the checkpoint has of it takes its place
    :return: the summary that is also written to ``<out>/training.json``

    Raises :class:`NmpError` when a loss or a gradient is not finite, memory runs out or the processes cannot share a
    batch.
    """
    ranks = ranks or Ranks()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress(first_stage - 1, about=about or {})
    if checkpoint is not None:
        check_same_run(checkpoint, config.to_dict(), out)
        progress = Progress(**checkpoint.progress)
        network.load_state_dict(checkpoint.part("network"))
        log.info("going on at stage %d, step %d", progress.stage + 1, progress.step)
    progress.config = config.to_dict()
    ranks.batch_norms(network, device)
    if config.compile:
        compile_blocks(network)
    if config.checkpointing:
        save_memory(network)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config.to_yaml())
    curves_of = _curves(out) if ranks.first else _no_curves
    result = progress.about | {"config": progress.config, "stages": progress.history}
    result |= {"device": _device_text(device), "processes": ranks.ranks}
    while progress.stage < len(config.stages):
        curve = curves_of(progress.stage, progress.step)
        stage = _Stage(network, source, config, out, device, ranks, progress, curve)
        progress.history.append(stage.run(checkpoint))
        checkpoint = None
        if ranks.first:
            scores: Scores = {}
            _save(network, out, result, scores)
            if score is not None:
                scores = progress.history[-1]["scores"] = score(network, stage.stage)
                _save(network, out, result, scores)
            (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        progress = Progress(progress.stage + 1, history=progress.history, config=progress.config, about=progress.about)
        if ranks.first:
            save_checkpoint(out, vars(progress), network)
        ranks.wait()
    return result


def _save(network: BEVNetwork, out: Path, result: dict[str, Any], scores: Scores) -> None:
    # The scores of the last stage are the metrics; those of each are in training.json.
    stages = [{key: value for key, value in stage.items() if key != "scores"} for stage in result["stages"]]
    training = result | {"stages": stages}
    save_network(network, out / "network.safetensors", training, extra=described(training, metrics_of(scores)))


class _Stage:
    """One stage of a run."""

    def __init__(
        self,
        network: BEVNetwork,
        source: Source,
        config: TrainConfig,
        out: Path,
        device: torch.device,
        ranks: Ranks,
        progress: Progress,
        curve: Curve,
    ) -> None:
        self.network, self.source, self.config, self.out, self.device = network, source, config, out, device
        self.ranks, self.progress, self.curve = ranks, progress, curve
        self.number = progress.stage
        self.stage: StageConfig = config.stages[self.number]
        self.name = f"stages.{self.number}"
        self.pending: list[tuple[dict[str, Tensor], list[str]]] = []
        """losses and norm of the gradient of the steps since the last look, and what they were computed from"""
        ranks.share(self.stage.batch, f"{self.name}.batch")

    def run(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Train until the steps or the time are used up; return the summary of the stage."""
        try:
            self._run(checkpoint)
        except torch.OutOfMemoryError as error:
            net = self.config.network
            raise NmpError(
                f"the GPU has too little memory for stage {self.number + 1} ({self.stage.batch} groups of "
                f"{self.stage.group} images of {net.input_width} x {net.input_height} on {self.ranks.ranks} GPUs): "
                f"lower {self.name}.batch or network.input_width and input_height, or set checkpointing=true"
            ) from error
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            why = " ".join(str(error).split())[:200]
            raise NmpError(f"torch.compile failed ({why}): set compile=false, or install a C compiler") from error
        return self._summary()

    def _run(self, checkpoint: Checkpoint | None) -> None:
        stage, config, progress, network = self.stage, self.config, self.progress, self.network
        network.requires_grad_(True)
        training = TrainingStep(network, config, stage)
        for part in training.frozen:
            part.requires_grad_(False)
        average = MovingAverage(network, config.ema_decay)
        if checkpoint is not None and (kept := checkpoint.part("average")):
            average.network.load_state_dict(kept)
        if self._done() >= 1:
            self._finish(average.network)
            return
        groups = stage.steps * stage.batch
        batches = iter(
            self.source.loader(
                stage,
                seed=config.seed * 7919 + self.number,
                length=groups,
                rank=self.ranks.rank,
                ranks=self.ranks.ranks,
                start=min(progress.step * stage.batch, groups),
            )
        )
        batch = augment(self.source.batch(next(batches)), self.config.augment)
        ready = True
        # What this stage leaves out must not wait for gradients, and decays for nothing.
        self._leave_out_unused(batch)
        optimizer = self._optimizer(network)
        if checkpoint is not None:
            checkpoint.load_optimizer(optimizer)
        parallel: nn.Module = training
        if self.ranks.ranks > 1:
            parallel = DistributedDataParallel(training, gradient_as_bucket_view=True)
        parameters = [p for p in network.parameters() if p.requires_grad]
        before = (progress.seconds, progress.waited)
        begin, waited, timed = time.monotonic(), 0.0, False
        bar = tqdm(
            total=stage.steps,
            initial=progress.step,
            desc=f"stage {self.number + 1}",
            unit="step",
            mininterval=5,
            disable=not self.ranks.first,
        )
        while (done := self._done()) < 1:
            if not ready:
                start = time.monotonic()
                group = next(batches)
                waited += time.monotonic() - start
                batch = augment(self.source.batch(group), self.config.augment)
                del group
            rate = min(1.0, (progress.step + 1) / max(stage.warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * done))
            for trained in optimizer.param_groups:
                trained["lr"] = trained["initial_lr"] * rate
            # Whatever the network draws at random depends on the step alone, also after a run is taken up again.
            drawn = np.random.SeedSequence((config.seed, self.number, progress.step, self.ranks.rank))
            torch.manual_seed(int(drawn.generate_state(1)[0]))
            parallel.train()
            with autocast(self.config, self.device):
                losses = parallel(batch, self._draws(batch))
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            # a norm that is not finite makes all weights NaN: it is looked at with the losses, before they are kept
            losses["gradient norm"] = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            progress.step += 1
            average.update(progress.step)
            self.pending.append(({name: value.detach() for name, value in losses.items()}, batch.names))
            if timed:
                progress.frames += len(batch.images) * self.ranks.ranks
                elapsed = before[0] + time.monotonic() - begin
                progress.seconds = self.ranks.agreed(elapsed, self.device) if stage.seconds else elapsed
                progress.waited = before[1] + waited
            else:  # compilation is not training time
                begin, waited, timed = time.monotonic(), 0.0, True
            ready = False
            save = progress.step % config.checkpoint_every == 0 or self._done() >= 1
            if save or progress.step % LOG_EVERY == 0:
                self._look(bar, stage.learning_rate * rate)
            if save and self.ranks.first:
                save_checkpoint(self.out, vars(progress), network, average.network, optimizer)
            bar.update()
        bar.close()
        self._finish(average.network)

    def _done(self) -> float:
        """Return the share of the stage that is done, 1 or more at its end."""
        by_time = self.progress.seconds / self.stage.seconds if self.stage.seconds else 0.0
        return max(self.progress.step / self.stage.steps if self.stage.steps else 1.0, by_time)

    def _finish(self, average: nn.Module) -> None:
        self.network.requires_grad_(True)
        self.network.load_state_dict(average.state_dict())

    def _draws(self, batch: Batch) -> Draws | None:
        if self.stage.group == 1:
            return None
        seeds = batch.seeds.tolist()
        if self.stage.alignment_only:
            seeds = [seed + k for seed in seeds for k in range(POSE_DRAWS)]
        return Draws.of(seeds, self.stage.group, self.config, self.device)

    def _leave_out_unused(self, batch: Batch) -> None:
        """Freeze the parameters that the loss of this stage does not depend on."""
        probe = TrainingStep(self.network, self.config, self.stage).train()
        with autocast(self.config, self.device), without_statistics(self.network):
            used = used_parameters(probe(batch, self._draws(batch))["loss"])
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in used)

    def _optimizer(self, network: BEVNetwork) -> torch.optim.AdamW:
        backbone = {id(p) for p in network.backbone.parameters()}
        trained = [p for p in network.parameters() if p.requires_grad]
        rates = {False: self.stage.learning_rate, True: self.stage.learning_rate * self.config.backbone_rate}
        parts = [
            {"params": [p for p in trained if (id(p) in backbone) is inside], "lr": rate, "initial_lr": rate}
            for inside, rate in rates.items()
        ]
        return torch.optim.AdamW(
            [p for p in parts if p["params"]],
            weight_decay=self.stage.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _look(self, bar: Any, rate: float) -> None:
        """Read the losses since the last look from the device, check and log them."""
        names = list(self.pending[0][0])
        table = torch.stack([torch.stack([losses[n].float() for n in names]) for losses, _ in self.pending])
        values = self.ranks.mean(table).cpu()
        last, sources = self.progress.step, [tokens for _, tokens in self.pending]
        self.pending = []
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            first, what = bad[0].tolist()
            tokens = [t for part in self.ranks.gathered(sources[first]) for t in part]
            raise NmpError(
                f"{names[what]} is {float(values[first, what])} at stage {self.number + 1}, "
                f"step {last - len(values) + first + 1}, with {', '.join(tokens)}: look at these, or lower "
                f"{self.name}.learning_rate (the last good state is {self.out / NAME}, if it had come so far)"
            )
        mean = values.mean(dim=0).tolist()
        progress = self.progress
        progress.losses.append(round(mean[0], 6))
        for name, value in zip(names, mean, strict=True):
            self.curve(name, value, last)
        self.curve("learning rate", rate, last)
        if progress.seconds:
            self.curve("samples per s", progress.frames / progress.seconds, last)
            self.curve("waiting for data", progress.waited / progress.seconds, last)
            bar.set_postfix(loss=f"{mean[0]:.3f}", samples_s=f"{progress.frames / progress.seconds:.0f}")
        if self.device.type == "cuda":
            self.curve("GPU memory GiB", torch.cuda.max_memory_allocated(self.device) / 2**30, last)

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        seconds = max(progress.seconds, 1e-9)
        out = {
            "stage": self.number + 1,
            "steps": progress.step,
            "frames": progress.frames,
            "seconds": round(progress.seconds, 1),
            "samples_per_s": round(progress.frames / seconds, 1),
            "waiting_for_data": round(progress.waited / seconds, 4),
            "losses": progress.losses,
            # ru_maxrss is in KiB; of the workers, the biggest that has ended
            "host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "worker_memory_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        }
        if self.device.type == "cuda":
            out["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) // 2**20
            out["gpu_memory_reserved_mib"] = torch.cuda.max_memory_reserved(self.device) // 2**20
        return out


class MovingAverage:
    """Exponential moving average of a network's weights and statistics, in a copy of the network."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        # counts of batches stay out: nothing depends on them
        kept, current = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        self._kept, self._current = list(kept), list(current)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move on after step 1, 2, ...; the decay grows to its value, so that the untrained start is forgotten."""
        decay = min(self.decay, step / (9.0 + step)) if step > 1 else 0.0
        torch._foreach_lerp_(self._kept, self._current, 1 - decay)


def _curves(out: Path) -> Callable[[int, int], Curve]:
    """Return what opens the curves of a stage for TensorBoard, by its number and the steps of it that are done."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no curves: TensorBoard is not installed (pip install tensorboard)")
        return _no_curves

    def opened(stage: int, done: int) -> Curve:
        # A run of its own for every stage: what a killed process wrote beyond the checkpoint is hidden from a step on,
        # in all curves of the run.
        writer = SummaryWriter(str(out / "curves" / f"stage-{stage + 1}"), purge_step=done + 1)

        def curve(name: str, value: float, step: int) -> None:
            writer.add_scalar(name, value, step)
            writer.flush()

        return curve

    return opened


def _no_curves(stage: int, done: int) -> Curve:
    return lambda name, value, step: None


def _device_text(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
