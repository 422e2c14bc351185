"""Training configuration: YAML checked against dataclasses; any key can be overridden as ``key=value``."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig


@dataclass(frozen=True)
class RealWorldsConfig:
    """Cities rendered from recorded maps and along recorded drives, beside the generated ones."""

    maps: str
    """folder with maps/expansion/*.json"""
    trajectories: str
    """drives through these maps, as for ``nmp-train sim --trajectories``"""
    count: int = 8
    """worlds: parts of a city, each around a cluster of scenes"""


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
    changed_share: float = 0.0
    """share of the cities that change between their first and their last drive; each takes twice the memory"""
    changes: int = 6
    """crossings, lane markings and kerbs that change in such a city, where it has room for so many"""
    real: RealWorldsConfig | None = None
    """recorded maps to mix in"""


@dataclass(frozen=True)
class DataConfig:
    """A nuScenes folder, real or simulated, to train from instead of rendering."""

    dataroot: str
    version: str = "v1.0-trainval"
    split: str = "train"
    """scenes to train on: a name in ``<version>/splits.json``, or one of the official devkit"""
    validation_split: str = "val"
    splits: str | None = None
    """file of lists of scenes by split, as ``nmp-train splits`` writes it, instead of ``<version>/splits.json``"""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of what is trained on; 0 leaves each of them out."""

    zoom: float = 0.0
    """images are scaled by up to this share, up or down"""
    shift: float = 0.0
    """images are moved by up to this share of their size"""
    colour: float = 0.0
    """brightness, contrast and saturation change by up to this share"""
    drop_camera: float = 0.0
    """chance that a frame lacks one of its cameras"""
    mirror: float = 0.0
    """chance that a group is mirrored left to right"""
    turn_rad: float = 0.0
    """the vehicle frame is turned by up to this angle"""


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
    """frames of a group lie within this distance of the last"""
    changed_groups: float = 0.0
    """share of the groups that end at a place of a simulated city which has changed, and of whose earlier frames some
    show it as it was"""
    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    """steps in which the learning rate rises from zero; 0 for none"""
    freeze_images: bool = False
    """keep backbone and neck as they are, statistics of their batch norms included"""
    alignment_only: bool = False
    """train the search for the pose alone (``network.align``) and keep everything else: quick, on a CPU too"""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; saved with its weights."""

    seed: int = 0
    workers: int = 14
    """processes that prepare data, for each training process"""
    supersample: int = 2
    """rays per pixel edge"""
    sampler: Literal["geographic", "shuffled"] = "shuffled"
    """order of the groups of recorded data: scenes that share streets on one lane, or any order"""
    loss: Literal["ours", "published"] = "ours"
    """of the layers: cross entropy and Dice, or the weighted cross entropy of the published networks"""
    positive_weight: float = 3.0
    """loss ours: weight of drawn pixels in the cross entropy"""
    backbone_rate: float = 1.0
    """the backbone learns at this multiple of a stage's learning rate"""
    backbone_frozen: int = 0
    """first parts of the backbone that stay as they begin: 1 for the first convolution, 2 with the first stage, and so
    on (for a backbone that was trained before)"""
    backbone_norms: Literal["trained", "fixed"] = "trained"
    """batch norms of the backbone: trained, or kept as they begin, statistics included (for one that was trained)"""
    clip_norm: float = 10.0
    """largest norm of a gradient"""
    ema_decay: float = 0.998
    """the weights that are kept are an exponential moving average over the steps"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """of the network on a GPU; on a CPU it is always fp32"""
    checkpointing: bool = False
    """compute activations a second time in the backward pass instead of keeping them: less memory, a third slower"""
    compile: bool = False
    """compile the blocks of the backbone (torch.compile): a minute at the start, faster steps"""
    checkpoint_every: int = 500
    """steps between two checkpoints to resume from"""
    prior_dropout: float = 0.25
    """share of the frames of a group that are also decoded without a prior"""
    position_noise_m: float = 0.2
    yaw_noise_rad: float = 0.01
    """largest spread (standard deviation) of the pose error of a drive; each group has its own between 0 and this"""
    validation_drives: int = 4
    """drives of each held-out world that are scored after each stage"""
    validation_trips: int = 3
    """times that each of them is driven, 1 to 4"""
    validation_groups: int = 96
    """groups of held-out frames that are scored after each stage, of recorded data"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    worlds: WorldsConfig = field(default_factory=WorldsConfig)
    validation: WorldsConfig = field(default_factory=lambda: WorldsConfig(seeds=2, first_seed=500, drives=12))
    data: DataConfig | None = None
    """recorded images to train from; without it they are rendered from ``worlds``"""
    stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig(group=5, batch=8, freeze_images=True))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the configuration with every key, as :func:`load_config` reads it."""
        # by way of JSON, which knows lists only: YAML would tag tuples
        text: str = yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)
        return text


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a YAML file and apply overrides such as ``stages.0.batch=8``.

    Raises :class:`NmpError` for a file that cannot be read, and for a key or value that makes no sense.
    """
    try:
        values = _parse(Path(path).read_text(), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise NmpError(f"cannot read configuration {path} ({getattr(error, 'strerror', None) or error})") from error
    defaults = _default_values()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise NmpError(f"override {override!r} must look like key=value")
        if not isinstance(values, dict):
            break  # is told below
        # With what the file leaves out: so that stages.0.batch is there to be set.
        values = _completed(values, defaults)
        _assign(values, key.split("."), _parse(text, f"override {override!r}"), override)
    return _build(TrainConfig, values, str(path))


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does; to PyYAML it is text for want of a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise NmpError(f"{where} is not valid YAML ({' '.join(str(error).split())})") from error


def _default_values() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(TrainConfig().to_dict()))
    return values


def _completed(values: Any, defaults: Any) -> Any:
    """Return nested values with those of ``defaults`` where a key is missing."""
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    return defaults | {key: _completed(value, defaults.get(key)) for key, value in values.items()}


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    inside: Any = {"": values}
    at: Any = ""
    for key in keys:
        if inside[at] is None:  # a section that may be left out
            inside[at] = {}
        inside = inside[at]
        if isinstance(inside, list):
            if not key.isdecimal() or int(key) >= len(inside):
                raise NmpError(f"override {override!r}: there is no {key!r} to set, but 0 to {len(inside) - 1}")
            at = int(key)
        elif isinstance(inside, dict):
            at = key
            inside.setdefault(key)
        else:
            raise NmpError(f"override {override!r}: there is no {key!r} to set in {inside!r}")
    inside[at] = value


_RANGES = {
    **dict.fromkeys(
        ("seed", "workers", "positive_weight", "backbone_rate", "backbone_frozen", "position_noise_m", "yaw_noise_rad")
        + ("validation_drives", "validation_groups", "turn_rad", "seeds", "first_seed", "difficulties", "count")
        + ("seconds", "steps", "learning_rate", "weight_decay", "warmup_steps", "changes"),
        (0, math.inf),
    ),
    **dict.fromkeys(("supersample", "checkpoint_every", "batch", "group", "drives"), (1, math.inf)),
    **dict.fromkeys(("ema_decay", "prior_dropout", "changed_share", "changed_groups"), (0, 1)),
    **dict.fromkeys(("zoom", "shift", "colour", "drop_camera", "mirror"), (0, 1)),
    "validation_trips": (1, 4),
}
"""smallest and largest value of a number, by its name"""
_POSITIVE = ("clip_norm", "size_m", "duration_s", "radius_m")
"""numbers that have to be more than 0"""


def _in_range(name: str, value: float, where: str) -> None:
    if not math.isfinite(value):
        raise NmpError(f"{where} must be a finite number, got {value}")
    if name in _POSITIVE and value <= 0:
        raise NmpError(f"{where} is {value:g}: choose more than 0")
    least, most = _RANGES.get(name, (-math.inf, math.inf))
    if not least <= value <= most:
        choice = f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise NmpError(f"{where} is {value:g}: choose {choice}")


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise NmpError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(kind)
    unknown = sorted({str(key) for key in values} - set(hints))
    if unknown:
        raise NmpError(f"{where}: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(hints))}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise NmpError(f"{where}: {', '.join(missing)} is missing")
    out: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        here = f"{where}: {name}"
        if NoneType in get_args(hint):  # a section that may be left out
            if value is None:
                out[name] = None
                continue
            hint = next(option for option in get_args(hint) if option is not NoneType)
        if hint is NetworkConfig:
            out[name] = NetworkConfig.from_dict(value)
        elif dataclasses.is_dataclass(hint):
            out[name] = _build(hint, value, here)
        elif get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise NmpError(f"{here} must be one of {', '.join(get_args(hint))}, got {value!r}")
            out[name] = value
        elif name == "difficulties":
            if not isinstance(value, list) or not value or not all(_is_number(v) for v in value):
                raise NmpError(f"{here} must be a list of numbers such as [0.5, 1.0], got {value!r}")
            for one in value:
                _in_range(name, one, here)
            out[name] = tuple(float(v) for v in value)
        elif name == "stages":
            if not isinstance(value, list) or not value:
                raise NmpError(f"{here} must be a list of at least one stage, got {value!r}")
            out[name] = tuple(_build(StageConfig, v, f"{here}[{i}]") for i, v in enumerate(value))
        else:
            if hint is float and _is_number(value):
                value = float(value)
            if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
                raise NmpError(f"{here} must be {hint.__name__}, got {value!r}")
            if hint in (int, float):
                _in_range(name, value, here)
            out[name] = value
    return kind(**out)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
