"""``nmp-train fit``: train a network from a configuration, on rendered or on recorded images."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmp import __version__
from nmp.errors import NmpError
from nmp.metrics import format_table
from nmp.model import BEVNetwork, load_network
from nmp.model.resnet import load_torchvision
from nmp_train.checkpoint import NAME, Checkpoint, check_same_run, differences, load_checkpoint
from nmp_train.config import DataConfig, StageConfig, TrainConfig, load_config
from nmp_train.data import SimulatedSource, Source, make_worlds
from nmp_train.distributed import Ranks
from nmp_train.loop import train

HELP = """\
Train a network from a YAML configuration; any of its keys can be set on the command line. Weights, the configuration,
curves for TensorBoard and a checkpoint are written to --out. On several GPUs start it with torchrun.

  nmp-train fit nmp_train/configs/cpu_default.yaml --out out/cpu_default
  nmp-train fit nmp_train/configs/cpu_default.yaml --out out/cpu_default --resume
  nmp-train fit nmp_train/configs/gpu_default.yaml stages.0.batch=96 --out out/gpu
  torchrun --nproc-per-node 8 -m nmp_train.cli fit nmp_train/configs/paper.yaml data.dataroot=/data --out out/paper"""

log = logging.getLogger(__name__)

Score = Callable[[BEVNetwork, StageConfig], dict[str, Any]]


def fit(
    config: TrainConfig,
    out: Path,
    *,
    weights: Path | None = None,
    backbone: Path | None = None,
    first_stage: int = 1,
    device_name: str | None = None,
    resume: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train the stages from ``first_stage`` on, writing ``<out>/network.safetensors`` with its JSON after each.

    :param weights: what to begin with, as a run of earlier stages left them
    :param backbone: weights of another network, or of a torchvision ResNet, to begin with their backbone
    :param device_name: cuda or cpu; None for a GPU where there is one
    :param resume: go on from the checkpoint in ``out``, if there is one
    :param command: the command line, to be kept with the weights
    :return: the summary that is also written to ``<out>/training.json``

    Raises :class:`NmpError` for weights that do not fit, data that is missing, and what :func:`~nmp_train.loop.train`
    raises.
    """
    if not 1 <= first_stage <= len(config.stages):
        raise NmpError(f"stage {first_stage} does not exist: the configuration has {len(config.stages)}")
    kind = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise NmpError("there is no GPU that torch can use: leave out --device, or give --device cpu")
    checkpoint = _checkpoint(out, resume, len(config.stages))
    if checkpoint is not None and checkpoint.progress["stage"] >= len(config.stages):
        check_same_run(checkpoint, config.to_dict(), out)
        log.info("the run in %s is complete", out)
        done: dict[str, Any] = json.loads((out / "training.json").read_text())
        return done
    if (config.backbone_frozen or config.backbone_norms == "fixed") and not (weights or backbone or checkpoint):
        raise NmpError(
            "backbone_frozen and backbone_norms: fixed keep the backbone as it begins, and that is at random: give "
            "weights with --backbone or --weights, or set backbone_frozen=0 backbone_norms=trained"
        )
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    network = BEVNetwork(config.network)
    if weights:
        network = _start(weights, config)
    if backbone:
        _copy_backbone(network, backbone)
    ranks = Ranks.join(kind)
    try:
        device = torch.device(kind, ranks.local) if kind == "cuda" else torch.device(kind)
        for number, stage in enumerate(config.stages):
            ranks.share(stage.batch, f"stages.{number}.batch")  # known before the data is made
        source, score = _sources(config, device, ranks)
        return train(
            network.to(device),
            source,
            config,
            out,
            device=device,
            ranks=ranks,
            first_stage=first_stage,
            checkpoint=checkpoint,
            score=score,
            about={
                "started": {
                    "command": command,
                    "nmp": __version__,
                    "weights": str(weights) if weights else None,
                    "backbone": str(backbone) if backbone else None,
                    "first_stage": first_stage,
                }
            },
        )
    finally:
        ranks.leave()


def _checkpoint(out: Path, resume: bool, stages: int) -> Checkpoint | None:
    found = load_checkpoint(out)
    if resume or found is None:
        return found
    if found.progress["stage"] < stages:
        raise NmpError(
            f"{out} holds a run that is not finished: add --resume to go on, or remove {out / NAME} to begin again"
        )
    return None


_PRIOR = ("fusion", "align", "slopes", "evidence_cap")
"""keys of the network that only the fusion depends on, beside those that begin with prior"""


def _start(path: Path, config: TrainConfig) -> BEVNetwork:
    """Take weights to begin with; what another fusion does not have, or has narrower, begins anew.

    Where only the inside of the fusion is wider, the weights are widened, and the network begins with the same answers.
    """
    network = load_network(path)[0]
    ours, theirs = config.network.to_dict(), network.config.to_dict()
    found = differences(theirs, ours)
    other = [key for key in found if not key.startswith("prior") and key not in _PRIOR]
    if other:
        text = ", ".join(f"{key} {theirs[key.split('.')[0]]} there, {ours[key.split('.')[0]]} here" for key in other)
        raise NmpError(
            f"{path} is of another network than the configuration ({text}): set network.{other[0]} alike, or take its "
            "backbone alone with --backbone"
        )
    if not found:
        return network
    started = BEVNetwork(config.network)
    # Other channels of the prior are another order of what the fusion reads, not a width.
    same = all(ours[key] == theirs[key] for key in ("fusion", "prior_channels"))
    state = started.state_dict()
    for name, value in network.state_dict().items():
        wanted = state.get(name)
        if wanted is None:
            continue
        if wanted.shape == value.shape:
            wanted.copy_(value)
        elif same and all(a >= b for a, b in zip(wanted.shape, value.shape, strict=True)):
            _widen(wanted, value)
    return started


def _widen(wide: Tensor, narrow: Tensor) -> None:
    """Put weights into the first rows and columns of wider ones, in place.

    The channels that are new are drawn at random and have no say in the others at first (in the manner of Net2Net,
    Chen et al., ICLR 2016): what is computed stays the same, until training finds a use for them.
    """
    if wide.dim() > 1:
        wide[: len(narrow)] = 0
    wide[tuple(slice(0, n) for n in narrow.shape)] = narrow


def _copy_backbone(network: BEVNetwork, source: Path) -> None:
    """Take the backbone of other weights, of the same backbone but any other layers."""
    if not source.with_suffix(".json").is_file():
        load_torchvision(network.backbone, source)
        return
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


@contextlib.contextmanager
def _memory_for(what: str, remedy: str) -> Iterator[None]:
    """Say what the memory of the GPU was too small for; the steps of training say it themselves."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NmpError(f"the GPU has too little memory for {what}: {remedy}") from error


_LESS_GROUND = "lower worlds.seeds, validation.seeds or size_m of either"
_LESS_VALIDATION = (
    "lower validation_drives or validation_trips and go on with --resume; the weights of the stage are kept"
)


def _sources(config: TrainConfig, device: torch.device, ranks: Ranks) -> tuple[Source, Score | None]:
    """Return what to train on, and for the first process how to judge a network on what was held out."""
    if config.data is not None:
        return _recorded(config, config.data, device, ranks)
    from nmp_train.validate import validate

    reach = config.network.layer_grid.reach
    worlds = make_worlds(config.worlds, config.workers, reach_m=reach)
    if not ranks.first:
        with _memory_for("the ground of the worlds", _LESS_GROUND):
            return SimulatedSource(worlds, config, device), None
    held_out = make_worlds(
        config.validation, config.workers, held_out=True, trips=config.validation_trips, reach_m=reach
    )
    # One ground for both: a second one of another size would be compiled for anew.
    with _memory_for("the ground of the worlds", _LESS_GROUND):
        both = SimulatedSource(worlds + held_out, config, device)
    judged = both.part(len(worlds), augmented=False)

    def score(network: BEVNetwork, stage: StageConfig) -> dict[str, Any]:
        with_prior = stage.group > 1  # otherwise it is not trained yet
        trips = config.validation_trips if with_prior else 1
        drives = config.validation_drives
        with _memory_for("the validation, which keeps the features of all of its drives", _LESS_VALIDATION):
            scores = validate(network, judged, config, drives=drives, trips=trips, with_prior=with_prior)
        print(_table(scores), flush=True)
        return scores

    return both.part(0, len(worlds)), score


def _recorded(config: TrainConfig, data: DataConfig, device: torch.device, ranks: Ranks) -> tuple[Source, Score | None]:
    from nmp_train.data.recorded import RecordedSource
    from nmp_train.evaluate import split_scenes
    from nmp_train.score import score_groups

    root = Path(data.dataroot).expanduser()
    splits = None if data.splits is None else Path(data.splits).expanduser()

    def of(split: str, augmented: bool) -> Source:
        try:
            scenes = split_scenes(split, root, data.version, splits)
        except ImportError as error:
            raise NmpError(
                f"split {split!r} needs the nuScenes devkit ({error}): install it, or write "
                f"{root / data.version / 'splits.json'} with 'nmp-train splits'"
            ) from error
        return RecordedSource(root, data.version, scenes, config, device, augmented=augmented)

    judged = of(data.validation_split, False) if ranks.first else None

    def score(network: BEVNetwork, stage: StageConfig) -> dict[str, Any]:
        assert judged is not None
        with _memory_for(
            "the validation, which has the batches of the stage with the longest groups",
            "lower its batch; the weights of this stage are kept",
        ):
            scores = score_groups(network, judged, config)
        print(_table(scores), flush=True)
        return scores

    return of(data.split, True), score if ranks.first else None


def _table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the rows to look at; ``training.json`` has all of them."""
    shown = {
        f"{system}, {part}": row
        for system, parts in scores.items()
        for part, row in parts.items()
        if part in ("all", "changed", "unchanged") or system == "no prior"
    }
    return format_table(shown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nmp-train fit``."""
    parser.description = HELP
    parser.add_argument("config", type=Path)
    parser.add_argument("override", nargs="*", help="key=value, for example stages.0.batch=8")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    # Not --start, which torchrun takes for an abbreviation of an option of its own, wherever it stands.
    parser.add_argument("--weights", type=Path, help="weights to begin with")
    parser.add_argument(
        "--backbone",
        type=Path,
        help="weights of another network, or of a torchvision ResNet, to start from its backbone",
    )
    parser.add_argument("--first-stage", type=int, default=1, help="skip the stages before this one (default 1)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda when there is one")


def run(args: argparse.Namespace) -> None:
    """Carry out ``nmp-train fit``."""
    fit(
        load_config(args.config, args.override),
        args.out,
        weights=args.weights,
        backbone=args.backbone,
        first_stage=args.first_stage,
        device_name=args.device,
        resume=args.resume,
        command=args.command_line,
    )
