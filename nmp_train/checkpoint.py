"""Checkpoints of a run: everything that is needed to go on after a kill as if nothing had happened.

One safetensors file holds the weights, their moving average and the state of the optimiser; its header holds the
stage, the step and the configuration as JSON. It is written beside the former one and then takes its place, so that
there is always a whole one. Nothing is ever unpickled. Random numbers need no state: data, noise and the network
draw from generators that are seeded by the run's seed, the stage and the step.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nmp.errors import NmpError

FORMAT = "nmp-checkpoint-1"
NAME = "checkpoint.safetensors"
MAY_CHANGE = {
    "workers",
    "checkpoint_every",
    "checkpointing",
    "compile",
    "validation_groups",
    "validation_drives",
    "validation_trips",
}
"""settings that change how fast a run is or how it is judged, and not what it learns"""


@dataclass
class Checkpoint:
    """A checkpoint as it was read."""

    progress: dict[str, Any]
    """stage, step and what else the run wants to know again"""
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of ``network``, ``average`` or ``optimizer``."""
        return {key.removeprefix(f"{name}."): v for key, v in self.tensors.items() if key.startswith(f"{name}.")}

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimiser back into its state, for parameters in the same order."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.part("optimizer").items():
            index, _, name = key.partition(".")
            parameter = parameters[int(index)]
            if name != "step":
                # in the memory order of the parameter, which the fast kernels want
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path,
    progress: dict[str, Any],
    network: nn.Module,
    average: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write the checkpoint of a run into its folder, in place of the one before."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    cleaned = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    part = folder / f"{NAME}.part"
    save_file(cleaned, str(part), {"format": FORMAT, "progress": json.dumps(progress)})
    os.replace(part, folder / NAME)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the checkpoint of a folder, None where there is none.

    Raises :class:`NmpError` for a file that is damaged or not a checkpoint.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise NmpError(f"{path} is not a readable checkpoint ({error}): remove it and train again") from error
    if described.get("format") != FORMAT:
        raise NmpError(f"{path} has format {described.get('format')}, this nmp reads {FORMAT}: train again")
    return Checkpoint(json.loads(described["progress"]), tensors)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the keys in which two configurations differ, as ``stages.0.batch``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True)) for d in differences(*pair, f"{path}.{i}")]
    return [] if old == new else [path]


def check_same_run(checkpoint: Checkpoint, config: dict[str, Any], folder: Path) -> None:
    """Raise :class:`NmpError` when a checkpoint is of another configuration than this one."""
    found = differences(checkpoint.progress["config"], json.loads(json.dumps(config)))
    if other := [key for key in found if key not in MAY_CHANGE]:
        raise NmpError(
            f"{folder / NAME} is of a run with other settings ({', '.join(other)}): resume with the same "
            f"configuration ({folder / 'config.yaml'}), or choose another --out"
        )
