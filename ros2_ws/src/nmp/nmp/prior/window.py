"""What the cells of a prior hold, and which of them are meant."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nmp.errors import NmpError

if TYPE_CHECKING:
    from nmp.prior.coding import Coding

MERGES = ("sum", "latest")


@dataclass(frozen=True)
class PriorSpec:
    """What makes two priors compatible.

    Raises :class:`NmpError` when a value cannot describe a prior.
    """

    channels: int
    """latent channels per cell"""
    cell: float
    """edge of a cell, m"""
    fingerprint: str
    """of the model whose latents these are: no other model can read them"""
    bits: int = 8
    """of each latent channel once a drive is committed: 2 to 8"""
    merge: str = "sum"
    """how drives add up: sum (mean weighted by evidence) or latest (a cell is what the newest drive left there)"""
    evidence_cap: int = 65535
    """most evidence that a cell holds: bounds how long a changed street is remembered wrong"""
    coding: Coding | None = None
    """how the cells of committed drives are written; None: each channel by itself, in ``bits``. A new city gets it from
    whoever makes it, afterwards the city's own counts"""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise NmpError(f"prior has {self.channels} channels per cell: it needs at least 1")
        if not (math.isfinite(self.cell) and self.cell > 0):
            raise NmpError(f"prior has cells of {self.cell} m: give a size above 0")
        if not self.fingerprint:
            raise NmpError("prior has no model fingerprint: give that of the weights which write it")
        if not 2 <= self.bits <= 8:
            raise NmpError(f"prior with {self.bits} bits per channel: choose 2 to 8")
        if self.merge not in MERGES:
            raise NmpError(f"prior with merge rule {self.merge!r}: choose {' or '.join(MERGES)}")
        if not 1 <= self.evidence_cap <= 65535:
            raise NmpError(f"prior with an evidence cap of {self.evidence_cap}: choose 1 to 65535")
        if self.coding is not None and (self.coding.channels != self.channels or self.bits != 8):
            raise NmpError(
                f"prior of {self.channels} channels in {self.bits} bits with a coding of {self.coding.channels} in 8: "
                "use the one that belongs to the weights"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the coding as values for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "coding"}


@dataclass(frozen=True)
class Window:
    """A block of cells in the city's map frame: rows grow with y, columns with x.

    Raises :class:`NmpError` when the block is empty.
    """

    row: int
    """floor(y / cell) of its first row; may be negative"""
    col: int
    """floor(x / cell) of its first column; may be negative"""
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise NmpError(f"prior window of {self.rows} x {self.cols} cells is empty: give at least 1 x 1")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @classmethod
    def around(cls, x: float, y: float, cell: float, rows: int, cols: int) -> Window:
        """Return the block of ``rows`` x ``cols`` cells whose centre is nearest to (x, y).

        ``x``, ``y`` and ``cell`` are metres. The block is snapped to the cells, so its true centre lies within
        half a cell of (x, y) along each axis. Raises :class:`NmpError` when the position is not finite.
        """
        if not (math.isfinite(x) and math.isfinite(y)):
            raise NmpError(f"position ({x}, {y}) is not finite: check the localisation")
        return cls(math.floor(y / cell - rows / 2 + 0.5), math.floor(x / cell - cols / 2 + 0.5), rows, cols)
