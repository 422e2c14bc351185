"""Which frames make a group, and which groups make a step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch.utils.data import Sampler

from nmp.errors import NmpError

if TYPE_CHECKING:
    from nmp_train.config import StageConfig

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

SAME_STREET_M = 30.0
"""scenes overlap where two of their frames are this close: as far as the map reaches to the side, twice"""
TRIES = 12
"""targets that are drawn until one has enough earlier frames near it"""
SEQUENCE, OTHER_DRIVES = 0.3, 0.35
"""shares of the groups that are a piece of one drive, or a frame and what other drives saw; the rest are any frames"""
FAR_APART_M = 1e7
"""between two places in the index of positions"""


@dataclass(frozen=True)
class Places:
    """Where and when all frames of a source were taken."""

    place: Indices
    """[N] number of the city: positions in different ones are not compared"""
    xy: Array
    """[N, 2] map frame of the city, m"""
    scene: Indices
    """[N] number of the drive, from 0 on, over all cities"""
    time_s: Array
    """[N] s since 1970"""
    changed_s: Array | None = None
    """[N] when what a frame shows changes, on the time scale of ``time_s``; infinite where it stays as it is"""

    @functools.cached_property
    def _index(self) -> cKDTree:
        return cKDTree(self._positions)

    @functools.cached_property
    def _positions(self) -> Array:
        return np.column_stack([self.xy, self.place * FAR_APART_M])

    def earlier(self, target: int, radius_m: float) -> Indices:
        """Return the frames within a distance (m) of a frame that were taken before it, in the order of time."""
        near = np.array(self._index.query_ball_point(self._positions[target], radius_m), dtype=np.int64)
        near = near[self.time_s[near] < self.time_s[target]]
        return near[np.lexsort((near, self.time_s[near]))]

    def group(self, rng: np.random.Generator, target: int, size: int, radius_m: float) -> Indices | None:
        """Draw a group [size] that ends with ``target``: earlier frames near it, in the order of time.

        Some groups are a piece of one drive, some hold other drives only, some are any earlier frames. None where
        fewer than ``size - 1`` earlier frames lie within ``radius_m``.
        """
        wanted = size - 1
        near = self.earlier(target, radius_m) if wanted else np.zeros(0, np.int64)
        if len(near) < wanted:
            return None
        own = self.scene[near] == self.scene[target]
        kind = rng.random()
        if kind < SEQUENCE and own.sum() >= wanted:
            chosen = near[own][len(near[own]) - wanted :]
        else:
            pool = near[~own] if kind < SEQUENCE + OTHER_DRIVES and (~own).sum() >= wanted else near
            chosen = pool[np.sort(rng.choice(len(pool), wanted, replace=False))]
        return np.append(chosen, target)

    @functools.cached_property
    def changed(self) -> Indices:
        """The frames that show something which has changed."""
        return np.flatnonzero(self.time_s >= self.changed_s) if self.changed_s is not None else np.zeros(0, np.int64)

    def changed_group(self, rng: np.random.Generator, target: int, size: int, radius_m: float) -> Indices | None:
        """Draw a group [size] that ends with one of ``changed``: at least one frame of before the change, in the order
        of time.

        None where fewer than ``size - 1`` earlier frames, or none of before the change, lie within ``radius_m``.
        """
        assert self.changed_s is not None
        wanted = size - 1
        near = self.earlier(target, radius_m)
        since = self.time_s[near] >= self.changed_s[target]
        before = len(near) - int(since.sum())
        fewest, most = max(1, wanted - (len(near) - before)), min(before, wanted)
        if fewest > most:
            return None
        count = int(rng.integers(fewest, most + 1))
        parts = [(near[~since], count), (near[since], wanted - count)]
        chosen = [pool[np.sort(rng.choice(len(pool), n, replace=False))] for pool, n in parts if n]
        return np.append(np.concatenate(chosen), target)

    def padded_group(self, target: int, size: int, radius_m: float) -> Indices:
        """Return the earlier frames that there are; the first is repeated, as if the car had stood there."""
        found = np.append(self.earlier(target, radius_m), target)[-size:]
        return np.concatenate([np.repeat(found[:1], size - len(found)), found])

    def streets(self, reach_m: float = SAME_STREET_M) -> Indices:
        """Return [scenes] the number of the street that each scene is on: scenes that overlap have the same.

        Scenes overlap where frames of both lie within ``reach_m``; chains of such scenes are one street.
        """
        pairs = self._index.query_pairs(reach_m, output_type="ndarray")
        a, b = self.scene[pairs[:, 0]], self.scene[pairs[:, 1]]
        count = int(self.scene.max()) + 1
        links = coo_matrix((np.ones(len(a)), (a, b)), shape=(count, count))
        return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)


class Targets:
    """Which frame each group of a run is about: any, or in the geographic order those of a lane of their own.

    Slot ``index % batch`` of every step draws from lane ``index % batch``. What a group is made of depends on the
    seed and its number only, so it is the same on any number of ranks.
    """

    def __init__(self, places: Places, stage: StageConfig, seed: int, *, geographic: bool = False) -> None:
        self.places, self.stage, self.seed = places, stage, seed
        everything = np.arange(len(places.time_s))
        self.lanes = [everything]
        if geographic:
            lane = geographic_lanes(places, stage.batch)
            self.lanes = [everything[lane[places.scene] == k] for k in range(stage.batch)]

    def generator(self, index: int) -> np.random.Generator:
        """Return the source of everything that is random about a group."""
        return np.random.default_rng((self.seed, index))

    def group(self, rng: np.random.Generator, index: int) -> Indices:
        """Return the frames [stage.group] of a group, in the order of time."""
        size, radius = self.stage.group, self.stage.radius_m
        lane = index % len(self.lanes)
        if self.stage.changed_groups and rng.random() < self.stage.changed_groups and len(self.places.changed):
            for target in rng.choice(self.places.changed, TRIES):
                found = self.places.changed_group(rng, int(target), size, radius)
                if found is not None:
                    return found
        first = target = self._target(rng, index, lane)
        for _ in range(TRIES):
            found = self.places.group(rng, target, size, radius)
            if found is not None:
                return found
            target = int(rng.choice(self.lanes[lane]))
        return self.places.padded_group(first, size, radius)

    def _target(self, rng: np.random.Generator, index: int, lane: int) -> int:
        frames = self.lanes[lane]
        if len(self.lanes) == 1:
            return int(rng.choice(frames))
        # Every frame of a lane has its turn before one comes again; lanes need not be of one length.
        epoch, at = divmod(index // len(self.lanes), len(frames))
        order = np.random.default_rng((self.seed, 41, lane, epoch)).permutation(len(frames))
        return int(frames[order[at]])


def geographic_lanes(places: Places, lanes: int) -> Indices:
    """Part the scenes of a source into lanes of about as many frames each, streets as a whole; returns [scenes].

    Scenes whose streets overlap are in one lane: two processes that train different lanes never work on one street at
    the same time. The biggest street goes first, always to the lane that has least. A street that is bigger than a
    fair share makes its lane longer, which is logged: its frames then come less often than others.

    Raises :class:`NmpError` when there are fewer streets than lanes.
    """
    street = places.streets()
    frames = np.bincount(street[places.scene])
    if len(frames) < lanes:
        raise NmpError(
            f"{len(frames)} streets do not overlap, too few for {lanes} groups a step: lower the stage's batch, "
            "or choose sampler: shuffled"
        )
    fair = len(places.scene) / lanes
    if (frames > fair).any():
        log.warning(
            "%d of %d streets hold more than a lane's fair share of %.0f frames (the biggest %d, %.1f times as many): "
            "their frames come less often than others",
            (frames > fair).sum(),
            len(frames),
            fair,
            frames.max(),
            frames.max() / fair,
        )
    return dealt(frames, lanes)[street]


def dealt(sizes: Indices, parts: int) -> Indices:
    """Deal things of sizes [N] out to parts of about the same size; returns [N] the part of each.

    The biggest goes first, always to the part that has least.
    """
    load = np.zeros(parts, dtype=np.int64)
    part = np.zeros(len(sizes), dtype=np.int64)
    for k in np.argsort(-sizes, kind="stable"):
        part[k] = load.argmin()
        load[part[k]] += sizes[k]
    return part


class StepSampler(Sampler[list[int]]):
    """Numbers of the groups of each step: slot r, r + ranks, ... of every step are those of rank r."""

    def __init__(self, length: int, batch: int, *, rank: int = 0, ranks: int = 1, start: int = 0) -> None:
        """:param length: groups of the whole run; what does not fill a step is left out, unless it is all
        :param batch: groups a step, over all ranks
        :param start: groups that are left out at the beginning: whole steps
        """
        if batch % ranks:
            raise NmpError(f"{batch} groups a step cannot be shared by {ranks} processes: choose a multiple for batch")
        if start % batch:
            raise NmpError(f"a run cannot go on at group {start}: steps have {batch} groups")
        if length < batch and ranks > 1:
            raise NmpError(f"{length} groups do not fill one step of {batch}: ask for more, or use one process")
        super().__init__()
        self.length, self.batch, self.rank, self.ranks, self.start = length, batch, rank, ranks, start

    def __len__(self) -> int:
        whole = max(self.length // self.batch, 1 if self.length else 0)
        return max(0, whole - self.start // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start // self.batch, self.start // self.batch + len(self)):
            last = min((step + 1) * self.batch, self.length)
            yield list(range(step * self.batch + self.rank, last, self.ranks))
