"""How much of a street's ground does not agree with the map."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nmp.errors import NmpError

MOST = 0.9
"""a share does not grow beyond this"""


@dataclass(frozen=True)
class Clutter:
    """Shares (0..1) and densities of everything that makes a ground ambiguous; 0 leaves it out.

    Densities have their unit in the name. :meth:`scaled` turns all of them up or down together.
    """

    # lines of the map
    unpainted_quiet: float = 0.17
    """share of dividers without any paint, on roads with one lane per direction"""
    unpainted_busy: float = 0.08
    faint: float = 0.12
    """share of painted lines with 5 to 20 % of their paint left"""
    worn: float = 0.25
    fading: float = 0.5
    """share of painted lines whose paint fades along them"""
    missing_dashes: float = 0.25
    """share of dashed lines that have lost some"""
    repainted: float = 0.1
    """share of painted lines with an older one beside them"""
    paint_patches_per_km: float = 10.0

    # crossings of the map
    crossing_unpainted: float = 0.1
    crossing_faint: float = 0.14
    crossing_worn: float = 0.3
    crossing_brick: float = 0.1
    crossing_ramp: float = 0.8

    # paint that is not in the map
    edge_lines: float = 0.3
    bays: float = 0.35
    bike_lanes: float = 0.1
    stop_lines: float = 0.65
    zigzags: float = 0.4
    arrows: float = 0.35
    words: float = 0.1
    hatches: float = 0.04
    box_junctions: float = 0.25
    humps: float = 0.07
    false_lines: float = 0.1
    """share of roadsides with a line parallel to the kerb somewhere on the road: forgotten, erased or temporary"""

    # the asphalt
    seams: float = 0.45
    """share of dividers and roadsides that have a seam in parallel"""
    tones: float = 0.3
    """share of those whose two sides differ in tone"""
    trenches: float = 0.16
    tracks: float = 0.5
    concrete: float = 0.08
    cracks_per_ha: float = 40.0
    patches_per_ha: float = 10.0
    lids_per_ha: float = 14.0
    stains_per_ha: float = 40.0
    skids_per_ha: float = 5.0
    puddles_per_ha: float = 8.0

    # the edge of the road
    flush: float = 0.1
    """share of roadsides without any kerb"""
    dull_kerbs: float = 0.25
    striped_kerbs: float = 0.35
    """share of blocks with black and white kerbs, where traffic keeps left"""
    gutters: float = 0.3
    second_kerbs: float = 0.3
    openings_per_km: float = 7.0
    """dropped kerbs in front of drives that the map does not have"""
    asphalt_walks: float = 0.15
    overgrown: float = 0.3
    dirt: float = 0.6
    drains_per_km: float = 30.0
    car_park_zebras: float = 0.06

    def scaled(self, difficulty: float) -> Clutter:
        """Return all strengths multiplied by ``difficulty`` (0 is a clean map, 1 the default)."""
        if not 0 <= difficulty <= 5:
            raise NmpError(f"difficulty {difficulty:g} of the ground is out of range: choose 0 to 5")

        def value(name: str) -> float:
            old = float(getattr(self, name))
            return old * difficulty if "_per_" in name else min(old * difficulty, max(MOST, old))

        return replace(self, **{f.name: value(f.name) for f in fields(self)})
