"""Makes of vehicles and people: sizes, colours, and the boxes that they are built of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nmp_train.sim.boxes import BODY, CABIN, PEDESTRIAN, Boxes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Make:
    """A make: mean size (length, width, height, m), its parts, and how common it is."""

    category: str
    """nuScenes category"""
    size: tuple[float, float, float]
    parts: tuple[tuple[int, float, float, float, float, float], ...]
    """(kind, middle along the length, length, width, bottom, top), fractions of the size"""
    moving: float
    """share of moving vehicles"""
    parked: float
    """share of parked vehicles"""


MAKES: tuple[Make, ...] = (
    Make(
        "vehicle.car", (4.5, 1.85, 1.55), ((BODY, 0, 1, 1, 0.12, 0.58), (CABIN, -0.05, 0.56, 0.84, 0.58, 1)), 0.60, 0.66
    ),
    Make(
        "vehicle.car", (4.7, 1.92, 1.75), ((BODY, 0, 1, 1, 0.12, 0.60), (CABIN, -0.09, 0.70, 0.88, 0.60, 1)), 0.15, 0.16
    ),
    Make(
        "vehicle.car", (5.2, 2.0, 2.2), ((BODY, 0, 1, 1, 0.10, 0.52), (CABIN, -0.07, 0.86, 0.94, 0.52, 1)), 0.08, 0.08
    ),
    Make(
        "vehicle.truck",
        (7.2, 2.4, 3.0),
        ((BODY, -0.14, 0.72, 1, 0.14, 1), (CABIN, 0.38, 0.24, 0.9, 0.10, 0.76)),
        0.06,
        0.04,
    ),
    Make(
        "vehicle.truck", (5.6, 2.05, 1.9), ((BODY, 0, 1, 1, 0.14, 0.55), (CABIN, 0.08, 0.36, 0.9, 0.55, 1)), 0.03, 0.02
    ),
    Make(
        "vehicle.bus.rigid", (11.5, 2.7, 3.3), ((BODY, 0, 1, 1, 0.08, 0.42), (CABIN, 0, 0.99, 0.98, 0.42, 1)), 0.03, 0.0
    ),
    Make(
        "vehicle.motorcycle",
        (2.1, 0.75, 1.6),
        ((BODY, 0, 1, 0.45, 0.1, 0.6), (PEDESTRIAN, -0.1, 0.3, 0.8, 0.45, 1)),
        0.04,
        0.02,
    ),
    Make(
        "vehicle.bicycle",
        (1.75, 0.6, 1.65),
        ((BODY, 0, 1, 0.25, 0.0, 0.5), (PEDESTRIAN, 0, 0.3, 0.85, 0.4, 1)),
        0.01,
        0.02,
    ),
)
PERSON = Make("human.pedestrian.adult", (0.6, 0.6, 1.7), ((PEDESTRIAN, 0, 1, 1, 0, 1),), 0, 0)

CATEGORIES: tuple[str, ...] = tuple(sorted({m.category for m in (*MAKES, PERSON)}))

_PAINT = np.array(
    [
        [0.85, 0.85, 0.84],
        [0.07, 0.07, 0.08],
        [0.55, 0.56, 0.58],
        [0.28, 0.29, 0.31],
        [0.12, 0.17, 0.35],
        [0.50, 0.07, 0.07],
        [0.85, 0.72, 0.12],
        [0.10, 0.28, 0.18],
    ]
)
_SHARES = np.array([0.24, 0.19, 0.22, 0.15, 0.08, 0.06, 0.03, 0.03])


@dataclass(frozen=True)
class Fleet:
    """The makes, sizes [A, 3] (length, width, height, m) and colours [A, 3] of some vehicles or people."""

    makes: tuple[Make, ...]
    size: Array
    rgb: Array

    def __len__(self) -> int:
        return len(self.makes)

    def pick(self, index: NDArray[np.int64]) -> Fleet:
        return Fleet(tuple(self.makes[i] for i in index), self.size[index], self.rgb[index])

    @staticmethod
    def joined(parts: list[Fleet]) -> Fleet:
        makes = tuple(m for p in parts for m in p.makes)
        size = np.concatenate([np.zeros((0, 3)), *(p.size for p in parts)])
        return Fleet(makes, size, np.concatenate([np.zeros((0, 3)), *(p.rgb for p in parts)]))


def draw_vehicles(rng: np.random.Generator, count: int, parked: bool = False) -> Fleet:
    """Draw vehicles at random."""
    share = np.array([m.parked if parked else m.moving for m in MAKES])
    makes = tuple(MAKES[i] for i in rng.choice(len(MAKES), count, p=share / share.sum()))
    size = np.array([m.size for m in makes]).reshape(-1, 3) * np.exp(rng.normal(0, 0.05, (count, 3)))
    rgb = np.clip(_PAINT[rng.choice(len(_PAINT), count, p=_SHARES)] + rng.normal(0, 0.03, (count, 3)), 0.02, 0.95)
    return Fleet(makes, size, rgb)


def draw_people(rng: np.random.Generator, count: int) -> Fleet:
    """Draw pedestrians at random."""
    size = np.array(PERSON.size) * np.exp(rng.normal(0, 0.08, (count, 3)))
    return Fleet((PERSON,) * count, size, rng.uniform(0.05, 0.75, (count, 3)))


def build(fleet: Fleet, xyyaw: Array, velocity: Array, instance: NDArray[np.int64]) -> Boxes:
    """Return the parts of vehicles or people whose middles are at ``xyyaw`` [A, 3]."""
    if len(fleet) == 0:
        return Boxes.empty()
    counts = np.array([len(m.parts) for m in fleet.makes])
    owner = np.repeat(np.arange(len(fleet)), counts)
    table = np.array([part for m in fleet.makes for part in m.parts], dtype=np.float64)
    whole = fleet.size[owner]
    size = np.column_stack([table[:, 2], table[:, 3], table[:, 5] - table[:, 4]]) * whole
    forward = table[:, 1] * whole[:, 0]
    yaw = xyyaw[owner, 2]
    x = xyyaw[owner, 0] + forward * np.cos(yaw)
    y = xyyaw[owner, 1] + forward * np.sin(yaw)
    z = (table[:, 4] + table[:, 5]) / 2 * whole[:, 2]
    kind = table[:, 0].astype(np.int64)
    rgb = fleet.rgb[owner].copy()
    # Cabins are mostly glass.
    rgb[kind == CABIN] = 0.35 * rgb[kind == CABIN] + 0.05
    rider = (kind == PEDESTRIAN) & (counts[owner] > 1)
    rgb[rider] = 1 - rgb[rider] * 0.8
    return Boxes(np.column_stack([x, y, z]), size, yaw, rgb, kind, instance[owner], velocity[owner])
