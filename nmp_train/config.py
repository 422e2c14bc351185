"""Training configuration: YAML checked against dataclasses; any key can be overridden as ``key=value``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig


@dataclass(frozen=True)
class WorldsConfig:
    """The simulated cities that training draws from."""

    seeds: int = 16
    """number of cities, of seeds first_seed, first_seed + 1, ..."""
    first_seed: int = 1000
    size_m: float = 400.0
    drives: int = 60
    duration_s: float = 30.0
    difficulties: tuple[float, ...] = (1.0,)
    """how ambiguous the ground is (see :class:`nmp_train.sim.clutter.Clutter`): for training, cities take these in
    turn; for validation, every city is scored at each"""


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    seconds: float = 240.0
    """wall-clock limit; 0 for none"""
    steps: int = 20000
    batch: int = 16
    """groups a step"""
    group: int = 1
    """frames a group; with more than one the prior is trained"""
    radius_m: float = 30.0
    """frames of a group lie within this distance of the first"""
    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    freeze_images: bool = False
    """keep backbone and neck as they are"""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; saved with its weights."""

    seed: int = 0
    workers: int = 14
    supersample: int = 2
    """rays per pixel edge"""
    positive_weight: float = 3.0
    clip_norm: float = 10.0
    ema_decay: float = 0.998
    prior_dropout: float = 0.25
    """share of frames that are decoded without a prior"""
    position_noise_m: float = 0.05
    yaw_noise_rad: float = 0.003
    """pose error of the frames that make the prior"""
    validation_groups: int = 96
    """groups of five held-out frames that are scored after each stage"""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    worlds: WorldsConfig = field(default_factory=WorldsConfig)
    validation: WorldsConfig = field(default_factory=lambda: WorldsConfig(seeds=2, first_seed=500, drives=12))
    stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig(group=5, batch=8, freeze_images=True))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a YAML file and apply overrides such as ``stages.0.batch=8``."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise NmpError(f"cannot read configuration {path} ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise NmpError(f"{path} is not valid YAML ({error})") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise NmpError(f"override {override!r} must look like key=value")
        _assign(values, key.split("."), yaml.safe_load(text), override)
    return _build(TrainConfig, values, str(path))


def _assign(values: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        try:
            values = values[int(key)] if isinstance(values, list) else values.setdefault(key, {})
        except (ValueError, IndexError, AttributeError) as error:
            raise NmpError(f"override {override!r}: there is no {key!r} to set") from error
    if isinstance(values, list):
        raise NmpError(f"override {override!r}: name a key of the list entry")
    values[keys[-1]] = value


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise NmpError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise NmpError(f"{where}: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(hints))}")
    out: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        here = f"{where}: {name}"
        if hint is NetworkConfig:
            out[name] = NetworkConfig.from_dict(value)
        elif dataclasses.is_dataclass(hint):
            out[name] = _build(hint, value, here)
        elif name == "difficulties":
            if not isinstance(value, list) or not value or not all(isinstance(v, int | float) for v in value):
                raise NmpError(f"{here} must be a list of numbers such as [0.5, 1.0], got {value!r}")
            out[name] = tuple(float(v) for v in value)
        elif name == "stages":
            out[name] = tuple(_build(StageConfig, v, f"{here}[{i}]") for i, v in enumerate(value))
        else:
            if hint is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
                raise NmpError(f"{here} must be {hint.__name__}, got {value!r}")
            out[name] = value
    return kind(**out)
