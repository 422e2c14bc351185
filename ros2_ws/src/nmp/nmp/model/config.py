"""What defines a network: stored as JSON beside its weights, checked when they are loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nmp.errors import NmpError
from nmp.geometry import BevGrid


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture and input of a :class:`~nmp.model.network.BEVNetwork`."""

    backbone: str = "resnet18"
    backbone_stages: int = 3
    """residual stages in use (stage k ends at stride 2 ** (k + 1))"""
    input_width: int = 352
    input_height: int = 128
    """network input, pixels: images are scaled to the width, then the rows at the top are cut off"""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """normalisation of RGB in 0..255, as torchvision's checkpoints expect"""
    view: str = "ground"
    """from images to the BEV: ground, bevformer, lift_splat or hdmapnet"""
    view_layers: int = 6
    """bevformer: attention layers"""
    view_heads: int = 8
    """bevformer: heads of each layer"""
    view_points: int = 4
    """bevformer: sampling points of each head at each height"""
    depth_bins: int = 60
    """lift_splat: depths that every pixel is spread over"""
    neck_channels: int = 48
    bev_channels: int = 64
    bev_half_channels: int = 0
    """of the BEV encoder at half the resolution, where they cost a quarter; 0: one and a half times bev_channels"""
    bev_quarter_channels: int = 0
    """at a quarter of the resolution; 0: twice bev_channels"""
    bev_length: float = 60.0
    bev_width: float = 30.0
    """region around the ego, m; in fact the whole number of cells that comes closest, as of 100 m 333 cells of 0.3 m"""
    feature_resolution: float = 0.3
    """cell of the BEV features, m"""
    layer_resolution: float = 0.15
    """cell of the published layers, m: half of that of the features"""
    prior_channels: int = 32
    prior_cell: float = 0.3
    """cell of the city prior, m"""
    prior_mix_channels: int = 0
    """evidence: of the convolutions that look at prior and frame together; 0: bev_channels"""
    prior_coarse_channels: int = 0
    """the same at half of the resolution and less; 0: as many, but 48 or more, and 64 at an eighth"""
    evidence_cap: float = 32.0
    """most evidence that a prior cell holds: bounds how long a changed street is remembered wrong"""
    fusion: str = "evidence"
    """how the prior is used and updated: evidence (map-aligned weighted mean) or paper (Xiong et al., CVPR 2023)"""
    align: bool = False
    """evidence: find the small shift and turn between what is seen and what is stored, and correct the pose by it"""
    slopes: bool = False
    """evidence: find how the road slopes under the car, by what is stored, and level what is seen"""
    prior_attention: bool = True
    """paper: current-to-prior cross-attention"""
    prior_gru: bool = True
    """paper: convolutional GRU; otherwise a moving average"""
    prior_position: bool = True
    """paper: learned position embeddings"""
    vector_heads: bool = False
    """also predict instance embeddings and directions, as HDMapNet does"""

    @property
    def feature_grid(self) -> BevGrid:
        cell = self.feature_resolution
        wanted = BevGrid(self.bev_length, self.bev_width, cell)
        # In whole cells, or what lies in the cells would be off by a part of one.
        return BevGrid(wanted.cols * cell, wanted.rows * cell, cell)

    @property
    def layer_grid(self) -> BevGrid:
        return self.feature_grid.with_resolution(self.layer_resolution)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """Build from JSON values; unknown keys, wrong types and sizes below zero are an :class:`NmpError`."""
        if not isinstance(values, dict):
            raise NmpError(f"network configuration: expected keys and values, got {values!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted({str(key) for key in values} - set(known))
        if unknown:
            raise NmpError(f"network configuration has unknown key(s) {', '.join(unknown)}: written by a newer nmp?")
        cleaned: dict[str, Any] = {}
        for name, value in values.items():
            cleaned[name] = _checked(name, value, known[name].default)
        return cls(**cleaned)


_MAY_BE_ZERO = ("bev_half_channels", "bev_quarter_channels", "prior_mix_channels", "prior_coarse_channels")
"""sizes that follow from another one where they are 0"""


def _checked(name: str, value: Any, default: Any) -> Any:
    """Return a value, if it is of the type of its default and of a size that there can be."""
    where = f"network configuration: {name}"
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise NmpError(f"{where} must be {len(default)} numbers, got {value!r}")
        return tuple(_number(where, v, float, positive=name == "std") for v in value)
    if isinstance(default, str | bool):
        if not isinstance(value, type(default)):
            raise NmpError(f"{where} must be {type(default).__name__}, got {value!r}")
        return value
    return _number(where, value, type(default), positive=name not in _MAY_BE_ZERO or value != 0)


def _number(where: str, value: Any, kind: type[int] | type[float], *, positive: bool) -> float:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (kind is float and isinstance(value, float) and math.isfinite(value)):
        raise NmpError(f"{where} must be {kind.__name__}, got {value!r}")
    if positive and value <= 0:
        raise NmpError(f"{where} is {value:g}: choose more than 0")
    return kind(value)
