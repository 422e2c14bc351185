"""One element of the map, as it is published and written to files."""

from __future__ import annotations

from dataclasses import dataclass

from shapely.geometry import LineString, Polygon


@dataclass(frozen=True)
class MapElement:
    """A divider, a crossing or a boundary, in the map frame of its city."""

    id: int
    """from 1; no other element of the same map has it, of whatever class"""
    name: str
    """one of ``nmp.frame.CLASSES``"""
    geometry: LineString | Polygon
    """map frame, m; a polygon for a crossing, else a line"""
    confidence: float
    """mean probability along the line or outline, 0..1"""
    first_seen_ns: int
    last_seen_ns: int
    frames: int
    """frames that saw it"""
    traversals: int | None = None
    """visits that saw it (:mod:`nmp.vectors.raster`); live, drives of the prior; None where only one drive is known"""
    evidence: float | None = None
    """mean evidence of the prior along it, None where only layers are known"""

    @property
    def age_s(self) -> float:
        """How long it has been known when it was last seen, s."""
        return (self.last_seen_ns - self.first_seen_ns) / 1e9
