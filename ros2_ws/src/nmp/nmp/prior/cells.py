"""The cells of one tile: what they hold, how drives add up, and how they are written as bytes."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nmp.prior.tiles import TILE
from nmp.prior.window import PriorSpec

FIELD_PLANES = 8
"""byte planes after the latent: evidence (2), last seen (4), traversals (2)"""
AGREES, CONTRADICTS = 0.15, 0.3
"""difference of two latents up to which they say the same, and from which they say another thing: |a - b|^2 as a share
of |a|^2 + |b|^2, 1 for latents that have nothing in common. With the shipped network 0.02 is usual between two drives
through an unchanged street (0.05 on a crossing), and 0.12 where a crossing has gone; benchmarks/prior_change.py"""
TAKEN_BACK = 2
"""evidence that a contradicted cell loses, for each unit that contradicts it"""
_NO_NOISE = np.float32(0)
_PREDICTED = 4
"""bits from which codes are written as differences to their left neighbours: 17 % smaller at 8 bits, larger below 4"""


class Cells:
    """The cells of one tile: a state of the city, or what one drive adds to it."""

    def __init__(self, channels: int) -> None:
        self.latent: NDArray[np.int8] = np.zeros((channels, TILE, TILE), np.int8)
        """mean latent; 0 where there is no evidence"""
        self.evidence: NDArray[np.uint16] = np.zeros((TILE, TILE), np.uint16)
        """weight behind the mean"""
        self.last_seen_s: NDArray[np.uint32] = np.zeros((TILE, TILE), np.uint32)
        """Unix time, s; 0 where no car has been"""
        self.traversals: NDArray[np.uint16] = np.zeros((TILE, TILE), np.uint16)
        """drives that saw the cell"""
        self.coded: NDArray[np.uint8] | None = None
        """the bytes that these cells were read from, with a coding: they are written as the same again"""

    @property
    def nbytes(self) -> int:
        return (len(self.latent) + FIELD_PLANES) * TILE * TILE

    def copy(self) -> Cells:
        """Return a copy."""
        cells = Cells(0)
        cells.latent, cells.evidence = self.latent.copy(), self.evidence.copy()
        cells.last_seen_s, cells.traversals = self.last_seen_s.copy(), self.traversals.copy()
        return cells

    def become(self, other: Cells) -> None:
        """Take over what another one holds, which is not to be used any more."""
        self.latent, self.evidence = other.latent, other.evidence
        self.last_seen_s, self.traversals, self.coded = other.last_seen_s, other.traversals, other.coded

    def pack(self) -> NDArray[np.uint8]:
        """Return a copy as bytes [channels + 8, 64, 64]; numbers of several bytes begin with the lowest."""
        channels = len(self.latent)
        planes = np.empty((channels + FIELD_PLANES, TILE, TILE), np.uint8)
        planes[:channels] = self.latent.view(np.uint8)
        planes[channels : channels + 2] = to_planes(self.evidence.astype("<u2", copy=False))
        planes[channels + 2 : channels + 6] = to_planes(self.last_seen_s.astype("<u4", copy=False))
        planes[channels + 6 :] = to_planes(self.traversals.astype("<u2", copy=False))
        return planes

    @classmethod
    def unpack(cls, planes: NDArray[np.uint8]) -> Cells:
        """Return the cells of bytes [channels + 8, 64, 64]."""
        channels = len(planes) - FIELD_PLANES
        cells = cls(channels)
        cells.latent[...] = planes[:channels].view(np.int8)
        cells.evidence[...] = from_planes(planes[channels : channels + 2], "<u2")
        cells.last_seen_s[...] = from_planes(planes[channels + 2 : channels + 6], "<u4")
        cells.traversals[...] = from_planes(planes[channels + 6 :], "<u2")
        return cells


def fold(state: Cells, drive: Cells, spec: PriorSpec) -> None:
    """Add what one drive saw to a state, in place.

    Where it contradicts what is known, that loses evidence first: a street that has changed is soon known as it is now.
    What a drive did not see, or had no view of (it adds no evidence there), stays as it was.

    The result is rounded to what is stored after every drive, so that a state which was compacted on the way gives
    the same bytes as one which was not. All intermediate numbers are whole and below 2^24: float32 holds them exactly.
    """
    state.coded = None
    seen = drive.last_seen_s > 0
    if spec.merge == "latest":
        np.copyto(state.latent, drive.latent, where=seen)
        np.copyto(state.evidence, np.minimum(drive.evidence, spec.evidence_cap), where=seen)
    else:
        before, added = state.evidence.astype(np.float32), drive.evidence.astype(np.float32)
        both = (before > 0) & (added > 0)
        if both.any():
            noise = spec.coding.noise_of(state.evidence, drive.evidence) if spec.coding else _NO_NOISE
            lost = np.rint(TAKEN_BACK * added * contradiction(state.latent, drive.latent, spec.bits, noise))
            before -= np.minimum(before, lost, where=both, out=np.zeros_like(before))
        total = before + added
        mean = state.latent * before
        mean += drive.latent * added
        mean /= np.maximum(total, 1)
        np.rint(mean, out=mean)
        np.copyto(state.latent, on_grid(mean.astype(np.int8), spec.bits), where=total > 0)
        state.evidence[...] = np.minimum(total, spec.evidence_cap)
    np.maximum(state.last_seen_s, drive.last_seen_s, out=state.last_seen_s)
    visits = state.traversals.astype(np.uint32) + drive.traversals
    state.traversals[...] = np.minimum(visits, 65535)
    if spec.coding:
        state.become(decode(encode(state, spec), spec))


def contradiction(
    a: NDArray[np.int8], b: NDArray[np.int8], bits: int, noise: NDArray[np.float32] | np.float32 = _NO_NOISE
) -> NDArray[np.float32]:
    """Return how much latents [channels, rows, cols] contradict each other, [rows, cols] in 0..1."""
    share = difference(a, b, bits, noise)
    return np.clip((share - np.float32(AGREES)) / np.float32(CONTRADICTS - AGREES), 0, 1)


def difference(
    a: NDArray[np.int8], b: NDArray[np.int8], bits: int, noise: NDArray[np.float32] | np.float32 = _NO_NOISE
) -> NDArray[np.float32]:
    """Return |a - b|^2 of latents [channels, rows, cols] as a share of |a|^2 + |b|^2, [rows, cols].

    What rounding to ``bits`` bits may make them differ is left out, and ``noise``, the mean square of what else does.
    Every copy of a city has to find the same to the bit: sums are of whole numbers, the rest is done cell by cell.
    """
    x, y = a.astype(np.int32), b.astype(np.int32)
    lengths = _squares(x) + _squares(y)
    x -= y
    step = np.float32(254 / (2**bits - 1))
    apart = np.maximum(_squares(x) - np.float32(len(a)) * step * step / np.float32(6) - noise, 0)
    share: NDArray[np.float32] = apart / np.maximum(lengths, 1)
    return share


def _squares(values: NDArray[np.int32]) -> NDArray[np.float32]:
    sums: NDArray[np.int32] = np.einsum("cij,cij->ij", values, values)
    return sums.astype(np.float32)


# -- as bytes -----------------------------------------------------------------------------------------------


def encode(cells: Cells, spec: PriorSpec) -> NDArray[np.uint8]:
    """Return the bytes [planes, 64, 64] in which committed cells are kept; their latents have to be on the grid."""
    if spec.coding:
        if cells.coded is not None:
            return cells.coded
        return spec.coding.write(cells.latent, cells.evidence, cells.last_seen_s, cells.traversals)
    planes = cells.pack()
    codes = planes[: spec.channels]
    if spec.bits < 8:
        codes[...] = _codes(spec.bits)[codes] * (cells.evidence > 0)
    if spec.bits >= _PREDICTED:
        codes[..., 1:] -= codes[..., :-1].copy()
        codes &= 2**spec.bits - 1
    return planes


def decode(planes: NDArray[np.uint8], spec: PriorSpec) -> Cells:
    """Return the cells that :func:`encode` wrote."""
    if spec.coding:
        coded = Cells(0)
        coded.latent, coded.evidence, coded.last_seen_s, coded.traversals = spec.coding.read(planes)
        coded.coded = planes
        return coded
    cells = Cells.unpack(planes)
    codes = planes[: spec.channels]
    if spec.bits >= _PREDICTED:
        codes = np.cumsum(codes, axis=-1, dtype=np.uint8) & np.uint8(2**spec.bits - 1)
    if spec.bits < 8:
        cells.latent[...] = _grid(spec.bits)[codes]
        cells.latent *= cells.evidence > 0
    else:
        cells.latent[...] = codes.view(np.int8)
    return cells


def plane_count(spec: PriorSpec) -> int:
    """Return how many byte planes committed cells take."""
    return spec.coding.planes if spec.coding else spec.channels + FIELD_PLANES


def digest(planes: NDArray[np.uint8]) -> int:
    """Return a hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(planes.tobytes(), digest_size=8).digest(), "little")


def on_grid(latent: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Return the nearest values that ``bits`` bits can tell apart: 2^bits steps over -127..127, or all of int8."""
    if bits == 8:
        return latent
    nearest: NDArray[np.int8] = _grid(bits)[_codes(bits)[latent.view(np.uint8)]]
    return nearest


@cache
def _grid(bits: int) -> NDArray[np.int8]:
    """Return the value of every code."""
    return np.rint(np.linspace(-127, 127, 2**bits)).astype(np.int8)


@cache
def _codes(bits: int) -> NDArray[np.uint8]:
    """Return the code of every value: index it with the value's byte."""
    values = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int32)
    return np.abs(values[:, None] - _grid(bits).astype(np.int32)).argmin(1).astype(np.uint8)


def to_planes(values: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Return the bytes of [rows, cols] values as [bytes, rows, cols]."""
    return np.moveaxis(values[..., None].view(np.uint8), -1, 0)


def from_planes(planes: NDArray[np.uint8], dtype: str) -> NDArray[np.unsignedinteger]:
    """Return the [rows, cols] values of [bytes, rows, cols] planes."""
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(dtype)[..., 0]
