"""What can be drawn of a city: its layers, its evidence, how old that is, and how many drives saw it.

A city is drawn in chunks of 128 x 128 cells, at two pixels to a cell. Of every pixel first come sums that can be
averaged over any area; colours are made of the averages, at whatever scale is wanted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmp.draw import (
    CLASS_COLOURS,
    Picture,
    colour_legend,
    colour_table,
    coloured,
    legend,
    opacity,
    shaded,
)
from nmp.errors import NmpError
from nmp.frame import CLASSES
from nmp.model.fusion import EVIDENCE_SCALE, MAX_WEIGHT
from nmp.model.weights import load_network
from nmp.page import hex_colour
from nmp.prior.city import CityPrior
from nmp.prior.ledger import Ledger
from nmp.prior.recall import CELL_PX, Recall
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE
from nmp.prior.window import Window

KINDS = ("layers", "evidence", "age", "traversals")
CHUNK = 2 * TILE
"""cells along each edge of a chunk"""
CHUNK_PX = CELL_PX * CHUNK
LINE_M = 0.75
"""width of a drawn line: that of the truth which the network was trained with"""
_RESIDENT_MB = 128
_UNITS = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))

Sums = NDArray[np.float32]
"""[planes, rows, cols]; the last plane is the share of each pixel that is known, the others are weighted with it"""


class City:
    """A stored city that is open for drawing; a context."""

    def __init__(self, place: str | Path) -> None:
        """Raise :class:`NmpError` where there is no city, a newer one, or one that no car has been in yet."""
        storage = Storage(place)
        self.ledger = Ledger.open(storage, read_only=True)
        records = self.ledger.active()
        if not any(len(record.tiles) for record in records):
            raise NmpError(f"the prior in {storage.name} holds no drive: there is nothing to draw yet")
        self.drives = sum(len(record.drives) or 1 for record in records)
        self.first_s = min(record.first_ns for record in records) / 1e9
        self.last_s = max(record.last_ns for record in records) / 1e9
        self.cell = self.ledger.spec.cell
        self.prior = CityPrior(
            storage.name, self.ledger.spec, self.ledger, None, resident_mb=_RESIDENT_MB, flush_interval_s=1.0
        )
        self.tiles = self.prior.places()

    @property
    def name(self) -> str:
        return self.ledger.location

    def chunks(self) -> NDArray[np.int64]:
        """Return (row, column) of every chunk that holds a tile, [N, 2]; rows grow with y."""
        return np.unique(self.tiles * TILE // CHUNK, axis=0)

    def __enter__(self) -> City:
        return self

    def __exit__(self, *_: object) -> None:
        self.prior.close()


class Sheet(ABC):
    """One kind of picture of a city."""

    name: str

    @abstractmethod
    def sums(self, row: int, col: int) -> Sums:
        """Return what is drawn of a chunk, [planes, 256, 256]; row 0 is the northern edge."""

    @abstractmethod
    def paint(self, means: Sums, metres_per_pixel: float) -> Picture:
        """Return the picture of sums that were averaged over pixels of this size."""

    @abstractmethod
    def legend(self, width: int, title: str, zoom: float) -> Picture:
        """Return the strip that stands above the picture."""

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Return the legend as JSON values, for a page."""


class LayerSheet(Sheet):
    """Dividers, crossings and boundaries, as the network reads them out of the prior alone."""

    name = "layers"

    def __init__(self, city: City, weights: Path | None = None) -> None:
        """Raise :class:`NmpError` for weights that do not load, or that are not those which wrote the city."""
        network, fingerprint = load_network(weights)
        spec = city.ledger.spec
        if fingerprint != spec.fingerprint:
            given = f"{weights} have" if weights else "the weights that come with nmp have"
            raise NmpError(
                f"the prior in {city.ledger.storage.name} was written with weights {spec.fingerprint}, {given} "
                f"{fingerprint}: give the ones that wrote it (--weights), or draw only evidence, age and traversals"
            )
        self._prior = city.prior
        self._recall = Recall(network)

    def sums(self, row: int, col: int) -> Sums:
        margin = self._recall.margin
        side = CHUNK + 2 * margin
        latent, evidence = self._prior.read(Window(row * CHUNK - margin, col * CHUNK - margin, side, side))
        inner = np.s_[margin : margin + CHUNK]
        known = _pixels(evidence[inner, inner] > 0)
        if not known.any():
            return np.zeros((len(CLASSES) + 1, CHUNK_PX, CHUNK_PX), np.float32)
        cut = np.s_[margin * CELL_PX : (margin + CHUNK) * CELL_PX]
        layers = opacity(self._recall(latent, evidence)[:, cut, cut])
        return np.concatenate([layers * known, known[None]])[:, ::-1]

    def paint(self, means: Sums, metres_per_pixel: float) -> Picture:
        # a line never gets thinner than a pixel, as on any map: otherwise it would fade away from afar
        opacities = np.minimum(means[:-1] * np.float32(max(1.0, metres_per_pixel / LINE_M)), 1.0)
        return coloured(opacities, np.clip(means[-1], 0, 1))

    def legend(self, width: int, title: str, zoom: float) -> Picture:
        return legend(width, title, zoom)

    def key(self) -> dict[str, Any]:
        return {"classes": [[name, hex_colour(CLASS_COLOURS[name])] for name in CLASSES]}


class ShadedSheet(Sheet):
    """A number that every cell has, in colours."""

    caption: str
    colours: str
    """of matplotlib's colour maps"""
    ticks: Sequence[tuple[float, str]]
    """places on the scale, 0..1, and what is written there"""

    def __init__(self, city: City) -> None:
        self._prior = city.prior
        self._table = colour_table(self.colours)

    @abstractmethod
    def read(self, window: Window) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
        """Return where on the scale (0..1) each cell [rows, cols] lies, and which cells are known."""

    def sums(self, row: int, col: int) -> Sums:
        values, known = self.read(Window(row * CHUNK, col * CHUNK, CHUNK, CHUNK))
        share = _pixels(known)
        return np.stack([_pixels(values) * share, share])[:, ::-1]

    def paint(self, means: Sums, metres_per_pixel: float) -> Picture:
        total, share = means
        values = total / np.maximum(share, np.float32(1e-6))
        return shaded(values, np.clip(share, 0, 1), self._table)

    def legend(self, width: int, title: str, zoom: float) -> Picture:
        return colour_legend(width, title, self.caption, self.ticks, self._table, zoom)

    def key(self) -> dict[str, Any]:
        colours = self._table[np.rint(np.linspace(0, 255, 16)).astype(int)]
        return {"caption": self.caption, "ticks": list(self.ticks), "colours": [hex_colour(c) for c in colours]}


class EvidenceSheet(ShadedSheet):
    """How much stands behind each cell, from nothing to the cap."""

    name, colours, caption = "evidence", "viridis", "evidence, in frames that saw the cell as well as can be"

    def __init__(self, city: City) -> None:
        super().__init__(city)
        self._most = city.ledger.spec.evidence_cap
        frames = self._most / EVIDENCE_SCALE / MAX_WEIGHT
        self.ticks = [(share, f"{share * frames:.3g}") for share in (0.0, 0.5, 1.0)]

    def read(self, window: Window) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
        evidence = self._prior.read(window)[1]
        return evidence / np.float32(self._most), evidence > 0


class AgeSheet(ShadedSheet):
    """How long before the newest drive's end each cell was seen last: the newest are the brightest."""

    name, colours = "age", "inferno"

    def __init__(self, city: City) -> None:
        super().__init__(city)
        self._table = self._table[::-1]
        self._last = math.ceil(city.last_s)
        self._span = max(self._last - math.floor(city.first_s), 1)
        unit, seconds = next(u for u in _UNITS if self._span >= 2 * u[1] or u[1] == 1.0)
        self.caption = f"last seen, {unit} before the newest drive ended"
        self.ticks = [(share, f"{share * self._span / seconds:.3g}") for share in (0.0, 0.5, 1.0)]

    def read(self, window: Window) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
        seen = self._prior.last_seen(window) // 1_000_000_000
        return (self._last - seen) / self._span, seen > 0


class TraversalSheet(ShadedSheet):
    """How many drives saw each cell, on a logarithmic scale from one to all of them."""

    name, colours, caption = "traversals", "cividis", "drives that saw the cell"

    def __init__(self, city: City) -> None:
        super().__init__(city)
        self._most = max(city.drives, 2)
        numbers = [n * 10**e for e in range(5) for n in (1, 2, 5) if n * 10**e < 0.8 * self._most]
        self.ticks = [(math.log(n) / math.log(self._most), str(n)) for n in [*numbers, self._most]]

    def read(self, window: Window) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
        counts = self._prior.traversals(window)
        return np.log(np.maximum(counts, 1)) / math.log(self._most), counts > 0


_SHADED: tuple[type[ShadedSheet], ...] = (EvidenceSheet, AgeSheet, TraversalSheet)


def sheets_of(city: City, kinds: Sequence[str], weights: Path | None = None) -> list[Sheet]:
    """Return what draws these of ``KINDS``.

    :param weights: for the layers; None for the ones that come with nmp

    Raises :class:`NmpError` for a kind that there is not, and what :class:`LayerSheet` raises.
    """
    shaded_kinds = {sheet.name: sheet for sheet in _SHADED}
    found: list[Sheet] = []
    for kind in dict.fromkeys(kinds):
        if kind not in KINDS:
            raise NmpError(f"there is no layer {kind!r} to draw: choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        found.append(LayerSheet(city, weights) if kind == LayerSheet.name else shaded_kinds[kind](city))
    return found


def _pixels(cells: NDArray[Any]) -> NDArray[np.float32]:
    """Return values of cells [rows, cols] as those of pixels."""
    return np.asarray(cells, np.float32).repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)
