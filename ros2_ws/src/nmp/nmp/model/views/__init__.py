"""From image features to BEV features: four ways behind one interface."""

from __future__ import annotations

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.views.base import View
from nmp.model.views.bevformer import BevFormer
from nmp.model.views.ground import GroundLift
from nmp.model.views.hdmapnet import PlanView
from nmp.model.views.lift_splat import LiftSplat

VIEWS: dict[str, type[View]] = {
    "ground": GroundLift,
    "bevformer": BevFormer,
    "lift_splat": LiftSplat,
    "hdmapnet": PlanView,
}


def make_view(config: NetworkConfig) -> View:
    """Return the view transform that ``config.view`` names; raises :class:`NmpError` for a name without one."""
    if config.view not in VIEWS:
        raise NmpError(f"unknown view {config.view!r}: choose one of {', '.join(VIEWS)}")
    return VIEWS[config.view](config)


__all__ = ["VIEWS", "BevFormer", "GroundLift", "LiftSplat", "PlanView", "View", "make_view"]
