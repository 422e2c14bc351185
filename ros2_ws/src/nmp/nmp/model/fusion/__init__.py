"""How a network remembers: what it reads from the cells of the map, and what it writes there."""

from __future__ import annotations

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.fusion.align import Alignment, Exactness, moved
from nmp.model.fusion.evidence import EVIDENCE_SCALE, LATENT_SCALE, MAX_WEIGHT, EvidenceFusion, means, sums
from nmp.model.fusion.geometry import ego_to_map, map_to_ego
from nmp.model.fusion.memory import Memory
from nmp.model.fusion.paper import PaperFusion
from nmp.model.fusion.slope import Slope

__all__ = [
    "EVIDENCE_SCALE",
    "LATENT_SCALE",
    "MAX_WEIGHT",
    "Alignment",
    "EvidenceFusion",
    "Exactness",
    "Memory",
    "PaperFusion",
    "Slope",
    "ego_to_map",
    "make_fusion",
    "map_to_ego",
    "means",
    "moved",
    "sums",
]


def make_fusion(config: NetworkConfig) -> EvidenceFusion | PaperFusion:
    """Return the fusion that a configuration names."""
    if config.fusion == "evidence":
        return EvidenceFusion(config)
    if config.fusion == "paper":
        return PaperFusion(config)
    raise NmpError(f"network configuration: fusion {config.fusion!r} is unknown: choose evidence or paper")
