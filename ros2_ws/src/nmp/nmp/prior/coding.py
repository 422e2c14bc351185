"""How the cells of a tile are written with few bytes: what a network makes no use of is left out.

As in a picture format: channels are decorrelated, then the cells of each 8 x 8 block (cosine transform: Ahmed,
Natarajan, Rao, "Discrete Cosine Transform", 1974), and what comes out is rounded. The channels are turned so that an
error of one step means the same to the network in each of them; most are then never more than rounding and cost
nothing. A cell with little evidence counts less to the network, and is written less exactly.

Every copy of a city has to read the same bytes as the same cells, on any machine. Sums are therefore of whole numbers
that float64 holds exactly, whatever their order; the rest is done number by number.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.tiles import TILE

if TYPE_CHECKING:
    from nmp.prior.cells import Cells

BLOCK = 8
_SIZE = BLOCK * BLOCK
_BLOCKS = TILE // BLOCK
_SECONDS = 64
"""resolution of the time at which a cell was last seen, s"""
_UNIT = 256
"""steps of evidence per unit"""
_FAINTEST = 77
"""root of the evidence below which a cell counts as unknown, in 1/256: 0.3, evidence 0.09"""
_TRUST = 128
"""steps of the weight evidence / (evidence + 1) with which the network reads a cell"""
_ROUND_UP = 0.4
"""of a step from which a number is rounded up, as zeros are cheap: 6 % fewer bytes for the same error"""
_IN_BITS, _FORWARD_BITS, _BACK_BITS, _COSINE_BITS = 6, 20, 8, 12
"""fractional bits: of values before the cosine transform, of the two matrices, of the cosines"""

Array = NDArray[np.float64]
_Number = TypeVar("_Number", bound=np.generic)
product = np.matmul
"""takes whole numbers whose sums stay below 2^53"""


@dataclass(frozen=True)
class Coding:
    """The numbers behind it: part of a city, as nothing in it can be read without them.

    Raises :class:`NmpError` when they do not fit each other.
    """

    mean: tuple[int, ...]
    """[channels] what is taken off the latents, in steps of int8"""
    forward: str
    """[components, channels] latents to components whose step is 1, as :func:`pack` writes it, in 2^-20"""
    back: str
    """[channels, components] the way back, in 2^-8"""
    noise: float = 0.0
    """mean square of what it changes of trust x latent, summed over the channels, in steps of int8"""
    evidence_step: float = 1.0
    """of the cosine transform of the root of the evidence"""

    def __post_init__(self) -> None:
        channels = len(self.mean)
        try:
            fits = self._forward.size == self._back.size > 0 and self._forward.size % channels == 0
        except (ValueError, TypeError, ZeroDivisionError):
            fits = False
        if not fits or not (self.noise >= 0 and self.evidence_step >= 0.25):
            raise NmpError("the coding of the prior is damaged: restore it from a copy of the weights or of the city")

    @cached_property
    def name(self) -> str:
        """What cities call it: 64 bits of SHA-256 of its content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def channels(self) -> int:
        return len(self.mean)

    @cached_property
    def components(self) -> int:
        return self._forward.size // self.channels

    @property
    def planes(self) -> int:
        """Byte planes of a tile: the components, the evidence, and time and traversals by block."""
        return self.components + 2

    @cached_property
    def _forward(self) -> Array:
        return unpack(self.forward)

    @cached_property
    def _back(self) -> Array:
        return unpack(self.back)

    def to_dict(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "mean": list(self.mean),
            "forward": self.forward,
            "back": self.back,
            "noise": self.noise,
            "evidence_step": self.evidence_step,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Coding:
        """Return what :meth:`to_dict` wrote. Raises :class:`NmpError` when it is damaged."""
        try:
            mean = tuple(int(value) for value in values["mean"])
            numbers = float(values["noise"]), float(values["evidence_step"])
            return cls(mean, str(values["forward"]), str(values["back"]), *numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise NmpError(f"the coding of the prior is damaged ({error}): restore it from a copy") from error

    def noise_of(self, *evidence: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return the mean square [rows, cols] by which latents with these evidences differ for being written."""
        total = np.zeros(evidence[0].shape, np.float32)
        for steps in evidence:
            known = np.maximum(steps, 1).astype(np.float32)
            total += np.float32(self.noise) * ((known + _UNIT) / known) ** 2
        return total

    # -- cells to bytes ---------------------------------------------------------------------------------------

    def write(
        self,
        latent: NDArray[np.int8],
        evidence: NDArray[np.uint16],
        last_seen_s: NDArray[np.uint32],
        traversals: NDArray[np.uint16],
    ) -> NDArray[np.uint8]:
        """Return the planes [components + 2, 64, 64] of a tile's cells."""
        planes = np.zeros((self.planes, TILE, TILE), np.uint8)
        evidence, last_seen_s, traversals = _by_block(evidence), _by_block(last_seen_s), _by_block(traversals)
        root = np.rint(np.sqrt(evidence.astype(np.float64) * _UNIT))
        planes[-2] = _bytes(np.rint(_cosines(root) / (self.evidence_step * _UNIT * 2.0 ** (2 * _COSINE_BITS))))
        known, trust = self._trust(planes[-2])
        centred = _by_block(latent) - np.array(self.mean, np.float64)[:, None, None]
        centred *= trust * (evidence > 0)
        values = _mixed(self._forward.reshape(-1, self.channels), centred)
        values *= 2.0 ** (_IN_BITS - _FORWARD_BITS) / _TRUST
        steps = _cosines(np.rint(values, out=values))
        steps *= 2.0 ** -(_IN_BITS + 2 * _COSINE_BITS)
        sizes = np.abs(steps)
        sizes += _ROUND_UP
        np.floor(sizes, out=sizes)
        planes[:-2] = _bytes(np.copysign(sizes, steps, out=sizes)).reshape(-1, TILE, TILE)
        there = (last_seen_s > 0) & (known > 0)
        seconds = np.where(there, last_seen_s // _SECONDS + 1, 0).max(1).astype("<u4")
        visits = np.where(there, traversals, 0).max(1).astype("<u2")
        planes[-1, :4] = seconds.reshape(-1, 1).view(np.uint8).T
        planes[-1, 4:6] = visits.reshape(-1, 1).view(np.uint8).T
        return planes if planes[-1].any() else np.zeros_like(planes)

    def read(
        self, planes: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int8], NDArray[np.uint16], NDArray[np.uint32], NDArray[np.uint16]]:
        """Return latent, evidence, last seen (s) and traversals of what :meth:`write` wrote.

        The evidence comes first: it says how exactly the latents are written.
        """
        known, trust = self._trust(planes[-2])
        values = _values(planes[:-2])
        values *= 2.0 ** (_IN_BITS - 2 * _COSINE_BITS)
        np.rint(values, out=values)
        latent = _mixed(self._back.reshape(self.channels, -1), values.reshape(self.components, *trust.shape))
        latent /= 2.0 ** (_BACK_BITS + _IN_BITS) * np.maximum(trust, 1) / _TRUST
        latent += np.array(self.mean, np.float64)[:, None, None]
        whole = np.rint(latent, out=latent).astype(np.int32)
        there = known > 0
        codes = np.clip(whole, -127, 127, out=whole).astype(np.int8)
        codes *= there
        seconds = np.ascontiguousarray(planes[-1, :4].T).view("<u4").astype(np.uint32)
        visits = np.ascontiguousarray(planes[-1, 4:6].T).view("<u2").astype(np.uint16)
        times = np.where(seconds > 0, np.maximum((np.maximum(seconds, 1) - 1) * _SECONDS, 1), 0)
        return (
            _by_cell(codes),
            _by_cell(known),
            _by_cell((times * there).astype(np.uint32)),
            _by_cell((visits * there).astype(np.uint16)),
        )

    def _trust(self, plane: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], Array]:
        """Return the evidence that a plane of codes stands for, and the weight of each cell in 1/128, by block."""
        root = np.rint(_values(plane) * (self.evidence_step * _UNIT) / 2.0 ** (2 * _COSINE_BITS))
        evidence = np.floor(root * root / _UNIT).clip(0, 65535)
        evidence[root < _FAINTEST] = 0
        return evidence.astype(np.uint16), np.rint(_TRUST * evidence / (evidence + _UNIT))


def coding_of(description: dict[str, Any]) -> Coding | None:
    """Return how cities that weights begin are written; None: channel by channel.

    :param description: the JSON beside the weights, as :func:`nmp.model.weights.read_description` returns it. It is not
        read here, as that would bring torch to all who open a city

    Raises :class:`NmpError` when the coding is damaged.
    """
    values = description.get("prior", {}).get("coding")
    return Coding.from_dict(values) if values else None


def make_coding(tiles: Sequence[Cells], reads: Array, step: float) -> Coding:
    """Return the coding for a network, from cells that it wrote.

    The best linear coding of channels with a covariance C whose errors count as e' G e turns them by the eigenvectors
    of G^1/2 C G^1/2 (the Karhunen-Loeve transform in the metric of the error) and rounds all components alike.

    :param tiles: what was written along some streets
    :param reads: [outputs, channels] the first thing that the network makes of trust x latent
    :param step: of all components, in steps of int8 of an average channel

    Raises :class:`NmpError` where the tiles hold too little, and for a step out of range.
    """
    if not step >= 1:
        raise NmpError(f"a coding with steps of {step}: choose 1 or more")
    there = [tile for tile in tiles if tile.evidence.any()]
    count = sum(int((tile.evidence > 0).sum()) for tile in there)
    if count < 100 * reads.shape[1]:
        raise NmpError(f"{count} cells are too few to make a coding from: map a few hundred metres of road")
    latent = np.concatenate([tile.latent[:, tile.evidence > 0] for tile in there], axis=1).astype(np.float64)
    evidence = np.concatenate([tile.evidence[tile.evidence > 0] for tile in there]) / _UNIT
    trust = evidence / (evidence + 1)
    mean = np.rint((latent * trust).sum(1) / trust.sum()).clip(-127, 127)
    centred = (latent - mean[:, None]) * trust
    metric = reads.T @ reads
    metric *= len(metric) / np.trace(metric)
    # what the convolution ignores is still searched for the pose: it may not get lost altogether
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(np.maximum(values, 1e-2)) @ vectors.T
    variance, turn = np.linalg.eigh(root @ (centred @ centred.T / count) @ root)
    # the cosine transform makes 8 times the value of a block that is all alike
    used = np.flatnonzero(3 * BLOCK * np.sqrt(np.maximum(variance, 0)) > step / 2)[::-1]
    turn = turn[:, used if len(used) else [-1]]
    forward, back = turn.T @ root / step, np.linalg.inv(root) @ turn * step
    whole = tuple(int(value) for value in mean)
    coding = Coding(whole, pack(forward * 2.0**_FORWARD_BITS), pack(back * 2.0**_BACK_BITS))
    return replace(coding, noise=round(float(np.mean([_error(coding, tile) for tile in there])), 1))


def _error(coding: Coding, tile: Cells) -> float:
    """Return the mean square by which trust x latent of a tile's cells changes, summed over the channels."""
    planes = coding.write(tile.latent, tile.evidence, tile.last_seen_s, tile.traversals)
    latent, evidence, *_ = coding.read(planes)
    trust = evidence / (evidence + float(_UNIT))
    squares = ((latent - tile.latent.astype(np.float64)) ** 2).sum(0) * trust**2
    return float(squares.sum() / max((trust > 0).sum(), 1))


def pack(matrix: Array) -> str:
    """Return whole numbers of 32 bits as text, row by row."""
    return base64.b64encode(np.rint(matrix).astype("<i4").tobytes()).decode()


def unpack(text: str) -> Array:
    """Return the numbers that :func:`pack` wrote. Raises ValueError when that is not what the text is."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<i4").astype(np.float64)


# -- blocks -------------------------------------------------------------------------------------------------
#
# By block, the cells of a tile are [..., block, place in the block]: the cosine transform of all blocks is then a
# product of matrices, and so is what is done to the channels. What comes out lies as it is written, [frequency, ...,
# block]. Products are of matrices so small that numpy's library starts no threads for them in any process: these would
# take longer than the product, and stand in the way of those that map.


def _table() -> Array:
    """Return the cosine transform [frequency, place] of a block, orthonormal but for rounding, in 2^-24.

    The lowest frequencies come first.
    """
    k = np.arange(BLOCK)
    table = np.sqrt(2 / BLOCK) * np.cos(np.pi * (2 * k + 1) * k[:, None] / (2 * BLOCK))
    table[0] /= np.sqrt(2)
    whole = np.rint(table * 2.0**_COSINE_BITS)
    order = sorted(range(_SIZE), key=lambda n: (n // BLOCK + n % BLOCK, n))
    both: Array = np.kron(whole, whole)[order]
    return both


_COSINES = _table()


def _mixed(matrix: Array, values: Array) -> Array:
    """Return a matrix [M, N] times values by block, [N, 64, 64]."""
    return np.ascontiguousarray(product(matrix, values.swapaxes(0, 1)).swapaxes(0, 1))


def _cosines(values: Array) -> Array:
    """Return the cosine transform [frequency, N] of values by block, [N, 64] in any shape, times 2^24."""
    parts = values.reshape(-1, _BLOCKS * _BLOCKS, _SIZE)
    return product(_COSINES, parts.swapaxes(1, 2)).swapaxes(0, 1).reshape(_SIZE, -1)


def _values(planes: NDArray[np.uint8]) -> Array:
    """Return by block, [N, 64], the values whose cosine transform :func:`_bytes` wrote, times 2^24."""
    codes = np.ascontiguousarray(planes).view(np.int8).reshape(_SIZE, -1, _BLOCKS * _BLOCKS)
    used = np.flatnonzero(codes.any((1, 2)))  # of most tiles the high frequencies are zero
    count = int(used[-1]) + 1 if len(used) else 1
    parts = codes[:count].astype(np.float64).transpose(1, 2, 0)
    return product(parts, _COSINES[:count]).reshape(-1, _SIZE)


def _bytes(codes: Array) -> NDArray[np.uint8]:
    """Return codes [frequency, N] as planes of bytes, [64, 64] or as many: in this order zeros come last."""
    whole = codes.astype(np.int32)
    return np.clip(whole, -127, 127, out=whole).astype(np.int8).view(np.uint8).reshape(-1, TILE)


def _by_block(values: NDArray[_Number]) -> NDArray[_Number]:
    """Return cells [..., 64, 64] by block."""
    rows = _row_of_a_block(values.reshape(*values.shape[:-2], _BLOCKS, BLOCK, _BLOCKS, BLOCK))
    return rows.swapaxes(-3, -2).copy().view(values.dtype).reshape(*values.shape[:-2], -1, _SIZE)


def _by_cell(values: NDArray[_Number]) -> NDArray[_Number]:
    """Return what lies by block as cells [..., 64, 64]."""
    rows = _row_of_a_block(values.reshape(*values.shape[:-2], _BLOCKS, _BLOCKS, BLOCK, BLOCK))
    return rows.swapaxes(-3, -2).copy().view(values.dtype).reshape(*values.shape[:-2], TILE, TILE)


def _row_of_a_block(values: NDArray[_Number]) -> NDArray[Any]:
    """Return 8 numbers of a byte that follow each other as one of 8 bytes, which moves faster; others as they are."""
    return np.ascontiguousarray(values).view(np.uint64) if values.itemsize == 1 else values
