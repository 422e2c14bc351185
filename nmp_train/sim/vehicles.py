"""Makes of vehicles, people and things on the road: sizes, colours, and the boxes that they are built of."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nmp_train.sim.boxes import BARRIER, BODY, CABIN, CONE, PEDESTRIAN, SIGN, Boxes

Array = NDArray[np.float64]

OWN, LOAD, DARK, METAL, LIT, RIDER, ORANGE = range(7)
"""What a part is painted with: the vehicle's own colour, that of its load, or a fixed one."""

Part = tuple[int, float, float, float, float, float, int]
"""(kind, middle along the length, length, width, bottom, top, paint); all but kind and paint are shares of the size"""


@dataclass(frozen=True)
class Make:
    """A make: mean size (length, width, height, m), its parts, and how common it is.

    Shares are pairs: Boston, Singapore. They need not sum to one.
    """

    name: str
    category: str
    """nuScenes category"""
    size: tuple[float, float, float]
    parts: tuple[Part, ...]
    moving: tuple[float, float] = (0.0, 0.0)
    """share of moving vehicles"""
    parked: tuple[float, float] = (0.0, 0.0)
    """share of parked vehicles"""
    stopping: tuple[float, float] = (0.0, 0.0)
    """share of those that stop in a lane beside the kerb"""
    paints: tuple[tuple[float, float, float], ...] = ()
    """colours; empty: those of private cars"""
    tail: str = ""
    """name of the make that it draws"""


def _car(start: float, length: float, width: float = 0.86, waist: float = 0.58) -> tuple[Part, ...]:
    """A body, and a cabin of a length (share) whose middle lies at ``start`` of the length."""
    return (BODY, 0, 1, 1, 0.12, waist, OWN), (CABIN, start, length, width, waist, 1, OWN)


def _bus(low: float, waist: float) -> tuple[Part, ...]:
    return (BODY, 0, 1, 1, low, waist, OWN), (CABIN, 0, 0.99, 0.98, waist, 1, OWN)


_CAB: tuple[Part, ...] = ((BODY, 0.36, 0.28, 0.94, 0.12, 0.40, OWN), (CABIN, 0.37, 0.24, 0.92, 0.40, 0.74, OWN))
_LOW_CAB: tuple[Part, ...] = ((BODY, 0.36, 0.28, 0.94, 0.14, 0.52, OWN), (CABIN, 0.36, 0.26, 0.92, 0.52, 1, OWN))
_CHASSIS: Part = (BODY, -0.14, 0.72, 0.9, 0.14, 0.30, DARK)
_WHITE, _GREY, _YELLOW = (0.82, 0.82, 0.80), (0.5, 0.51, 0.53), (0.62, 0.44, 0.12)
_LORRY = (_WHITE, _WHITE, (0.12, 0.2, 0.45), (0.55, 0.1, 0.08), (0.15, 0.33, 0.22), _YELLOW)
_CITY_BUS = (_WHITE, (0.6, 0.53, 0.2), (0.45, 0.1, 0.12), (0.2, 0.36, 0.17), (0.3, 0.2, 0.36))
_SIGN: Part = (BARRIER, -0.02, 0.04, 0.35, 1.0, 1.1, LIT)
_CYCLE: Part = (BODY, 0, 1, 0.22, 0.0, 0.5, DARK)

MAKES: tuple[Make, ...] = (
    Make("small car", "vehicle.car", (3.85, 1.70, 1.50), _car(-0.04, 0.68), (0.10, 0.15), (0.13, 0.16)),
    Make("sedan", "vehicle.car", (4.70, 1.84, 1.45), _car(-0.05, 0.54, 0.84), (0.23, 0.22), (0.26, 0.27)),
    Make("estate", "vehicle.car", (4.75, 1.85, 1.50), _car(-0.13, 0.70), (0.08, 0.06), (0.09, 0.07)),
    Make("suv", "vehicle.car", (4.70, 1.92, 1.72), _car(-0.10, 0.70, 0.88, 0.60), (0.17, 0.10), (0.22, 0.12)),
    Make("large suv", "vehicle.car", (5.15, 2.02, 1.90), _car(-0.10, 0.72, 0.9, 0.60), (0.06, 0.02), (0.07, 0.02)),
    Make("people carrier", "vehicle.car", (4.85, 1.90, 1.80), _car(-0.04, 0.84, 0.90), (0.03, 0.07), (0.04, 0.08)),
    Make(
        "taxi",
        "vehicle.car",
        (4.70, 1.84, 1.48),
        (*_car(-0.05, 0.54, 0.84), _SIGN),
        (0.05, 0.11),
        (0.01, 0.02),
        (0.25, 0.30),
        (_WHITE, (0.05, 0.2, 0.55), (0.86, 0.7, 0.1), (0.05, 0.2, 0.55), (0.6, 0.08, 0.08)),
    ),
    Make("small van", "vehicle.car", (4.5, 1.75, 1.95), _car(-0.02, 0.92, 0.95, 0.52), (0.03, 0.06), (0.03, 0.06)),
    Make(
        "panel van",
        "vehicle.truck",
        (5.9, 2.05, 2.55),
        (
            (BODY, -0.14, 0.72, 1, 0.08, 1, OWN),
            (BODY, 0.36, 0.28, 0.98, 0.08, 0.46, OWN),
            (CABIN, 0.29, 0.20, 0.94, 0.46, 0.92, OWN),
        ),
        (0.05, 0.05),
        (0.05, 0.05),
        (0.35, 0.25),
        (_WHITE, _WHITE, _WHITE, _GREY, (0.35, 0.22, 0.12)),
    ),
    Make("pick-up", "vehicle.truck", (5.6, 2.02, 1.88), _car(0.08, 0.36, 0.9, 0.55), (0.04, 0.01), (0.05, 0.01)),
    Make(
        "box truck",
        "vehicle.truck",
        (7.4, 2.4, 3.2),
        (*_CAB, (BODY, -0.14, 0.72, 1, 0.14, 1, LOAD)),
        (0.03, 0.04),
        (0.02, 0.03),
        (0.20, 0.15),
        _LORRY,
    ),
    Make(
        "flatbed",
        "vehicle.truck",
        (6.4, 2.2, 2.6),
        (*_LOW_CAB, _CHASSIS, (BARRIER, -0.16, 0.64, 0.96, 0.30, 0.55, LOAD)),
        (0.01, 0.05),
        (0.01, 0.03),
        (0.03, 0.08),
        _LORRY,
    ),
    Make(
        "tanker",
        "vehicle.truck",
        (9.0, 2.5, 3.3),
        (*_CAB, _CHASSIS, (BARRIER, -0.15, 0.68, 0.92, 0.32, 1, METAL)),
        (0.006, 0.008),
        paints=_LORRY,
    ),
    Make(
        "cement mixer",
        "vehicle.truck",
        (8.8, 2.5, 3.8),
        (*_CAB, _CHASSIS, (BARRIER, -0.08, 0.42, 0.86, 0.30, 0.96, LOAD), (BARRIER, -0.38, 0.2, 0.6, 0.4, 1.0, LOAD)),
        (0.008, 0.012),
        paints=_LORRY,
    ),
    Make(
        "tractor",
        "vehicle.truck",
        (6.2, 2.5, 3.4),
        (
            (BODY, 0.30, 0.38, 1, 0.12, 0.42, OWN),
            (CABIN, 0.32, 0.32, 0.96, 0.42, 1, OWN),
            (BODY, -0.2, 0.6, 0.9, 0.12, 0.3, DARK),
        ),
        (0.012, 0.015),
        paints=_LORRY,
        tail="trailer",
    ),
    Make(
        "trailer",
        "vehicle.trailer",
        (12.0, 2.5, 3.8),
        ((BARRIER, 0, 1, 1, 0.30, 1, LOAD), (BODY, -0.3, 0.34, 0.92, 0.03, 0.30, DARK)),
        parked=(0.008, 0.004),
    ),
    Make(
        "city bus",
        "vehicle.bus.rigid",
        (11.8, 2.55, 3.15),
        _bus(0.08, 0.44),
        (0.025, 0.04),
        stopping=(0.12, 0.12),
        paints=_CITY_BUS,
    ),
    Make(
        "double-decker",
        "vehicle.bus.rigid",
        (12.0, 2.55, 4.35),
        (
            (BODY, 0, 1, 1, 0.06, 0.28, OWN),
            (CABIN, 0, 0.99, 0.98, 0.28, 0.58, OWN),
            (CABIN, 0, 1, 1, 0.58, 1, OWN),
        ),
        (0.0, 0.03),
        stopping=(0.0, 0.10),
        paints=_CITY_BUS,
    ),
    Make("minibus", "vehicle.bus.rigid", (6.9, 2.1, 2.65), _bus(0.10, 0.48), (0.012, 0.02), (0.01, 0.02), (0.05, 0.05)),
    Make(
        "bendy bus",
        "vehicle.bus.bendy",
        (9.2, 2.55, 3.1),
        _bus(0.08, 0.44),
        (0.008, 0.008),
        paints=_CITY_BUS,
        tail="bendy bus rear",
    ),
    Make("bendy bus rear", "vehicle.bus.bendy", (8.2, 2.55, 3.1), _bus(0.08, 0.44)),
    Make(
        "excavator",
        "vehicle.construction",
        (6.5, 2.6, 3.0),
        (
            (BARRIER, -0.15, 0.6, 1, 0, 0.3, DARK),
            (BARRIER, -0.22, 0.5, 0.9, 0.34, 0.7, OWN),
            (CABIN, -0.06, 0.22, 0.4, 0.4, 1, OWN),
            (BARRIER, 0.24, 0.5, 0.14, 0.6, 0.95, OWN),
        ),
        paints=(_YELLOW, (0.6, 0.3, 0.08)),
    ),
    Make(
        "wheel loader",
        "vehicle.construction",
        (7.0, 2.5, 3.2),
        (
            (BODY, -0.1, 0.8, 0.9, 0.1, 0.55, OWN),
            (CABIN, -0.08, 0.24, 0.6, 0.55, 1, OWN),
            (BARRIER, 0.42, 0.16, 1, 0.04, 0.4, DARK),
        ),
        (0.003, 0.003),
        paints=(_YELLOW,),
    ),
    Make(
        "motorcycle",
        "vehicle.motorcycle",
        (2.1, 0.75, 1.6),
        ((BODY, 0, 1, 0.45, 0.1, 0.6, OWN), (PEDESTRIAN, -0.1, 0.3, 0.8, 0.45, 1, RIDER)),
        (0.01, 0.07),
    ),
    Make(
        "parked motorcycle",
        "vehicle.motorcycle",
        (2.1, 0.75, 1.15),
        ((BODY, 0, 1, 0.45, 0.1, 0.8, OWN), (BARRIER, 0.3, 0.1, 1, 0.85, 1, DARK)),
        parked=(0.01, 0.03),
    ),
    Make(
        "bicycle",
        "vehicle.bicycle",
        (1.75, 0.6, 1.65),
        (_CYCLE, (PEDESTRIAN, 0, 0.3, 0.85, 0.4, 1, RIDER)),
        (0.025, 0.015),
    ),
    Make(
        "parked bicycle",
        "vehicle.bicycle",
        (1.75, 0.5, 1.05),
        ((BODY, 0, 1, 0.2, 0.0, 0.75, OWN), (BARRIER, 0.3, 0.06, 1, 0.85, 1, DARK)),
        parked=(0.015, 0.01),
    ),
)

PEOPLE: tuple[Make, ...] = (
    Make("adult", "human.pedestrian.adult", (0.6, 0.6, 1.7), ((PEDESTRIAN, 0, 1, 1, 0, 1, OWN),), (0.92, 0.92)),
    Make("child", "human.pedestrian.child", (0.45, 0.45, 1.2), ((PEDESTRIAN, 0, 1, 1, 0, 1, OWN),), (0.04, 0.04)),
    Make(
        "worker",
        "human.pedestrian.construction_worker",
        (0.65, 0.65, 1.75),
        ((PEDESTRIAN, 0, 1, 1, 0, 1, OWN),),
        (0.04, 0.04),
        paints=((0.75, 0.75, 0.1), (0.85, 0.35, 0.05)),
    ),
)

THINGS: tuple[Make, ...] = (
    Make("cone", "movable_object.trafficcone", (0.4, 0.4, 0.75), ((CONE, 0, 1, 1, 0, 1, ORANGE),)),
    Make(
        "barrier",
        "movable_object.barrier",
        (2.0, 0.5, 1.0),
        ((BARRIER, 0, 1, 1, 0, 1, OWN),),
        paints=((0.85, 0.3, 0.06), (0.85, 0.3, 0.06), (0.8, 0.8, 0.78), (0.58, 0.57, 0.54)),
    ),
    Make(
        "works board",
        "movable_object.barrier",
        (0.1, 1.2, 1.3),
        ((SIGN, 0, 1, 1, 0.1, 1, OWN),),
        paints=((0.85, 0.4, 0.05), (0.8, 0.1, 0.08)),
    ),
)

ALL: tuple[Make, ...] = (*MAKES, *PEOPLE, *THINGS)
NUMBER: dict[str, int] = {make.name: k for k, make in enumerate(ALL)}
"""place of a make in ``ALL``, by name"""

CATEGORIES: tuple[str, ...] = tuple(sorted({m.category for m in ALL}))

_PAINT = np.array(
    [
        [0.85, 0.85, 0.84],
        [0.07, 0.07, 0.08],
        [0.55, 0.56, 0.58],
        [0.28, 0.29, 0.31],
        [0.12, 0.17, 0.35],
        [0.50, 0.07, 0.07],
        [0.42, 0.38, 0.32],
        [0.10, 0.28, 0.18],
    ]
)
_PAINT_SHARES = np.array([0.24, 0.20, 0.21, 0.16, 0.08, 0.06, 0.03, 0.02])
_LOADS = np.array([[0.82, 0.82, 0.8], [0.7, 0.71, 0.72], [0.2, 0.32, 0.5], [0.5, 0.16, 0.12], [0.45, 0.4, 0.3]])
_LOAD_SHARES = np.array([0.45, 0.2, 0.12, 0.11, 0.12])
_FIXED = {DARK: [0.06, 0.06, 0.065], METAL: [0.66, 0.67, 0.69], LIT: [0.9, 0.85, 0.55], ORANGE: [0.9, 0.32, 0.05]}

_TABLE = np.array([part for make in ALL for part in make.parts], dtype=np.float64)
_COUNT = np.array([len(make.parts) for make in ALL])
_FIRST = np.concatenate([[0], np.cumsum(_COUNT)[:-1]])
_SIZE = np.array([make.size for make in ALL])


@dataclass(frozen=True)
class Fleet:
    """Some vehicles, people or things: places in ``ALL`` [A], sizes [A, 3] (length, width, height, m), colours [A, 3].

    ``load`` [A, 3] is the colour of what a lorry carries.
    """

    number: NDArray[np.int64]
    size: Array
    rgb: Array
    load: Array

    def __len__(self) -> int:
        return len(self.number)

    @functools.cached_property
    def makes(self) -> tuple[Make, ...]:
        """The make of each."""
        return tuple(ALL[i] for i in self.number)

    def pick(self, index: NDArray[np.int64] | slice) -> Fleet:
        """Return some of them."""
        return Fleet(self.number[index], self.size[index], self.rgb[index], self.load[index])

    @staticmethod
    def joined(parts: list[Fleet]) -> Fleet:
        """Return several fleets as one."""
        return Fleet(
            np.concatenate([np.zeros(0, np.int64), *(p.number for p in parts)]),
            *(
                np.concatenate([np.zeros((0, 3)), *(getattr(p, name) for p in parts)])
                for name in ("size", "rgb", "load")
            ),
        )


@functools.cache
def _shares(use: str, region: int, alone: bool) -> Array:
    makes = PEOPLE if use == "people" else MAKES
    field = "moving" if use == "people" else use
    share = np.array([0.0 if alone and m.tail else getattr(m, field)[region] for m in makes])
    return share / share.sum()


@functools.cache
def _paints(number: int) -> Array:
    return np.array(ALL[number].paints).reshape(-1, 3)


def draw_vehicles(
    rng: np.random.Generator, count: int, use: str = "moving", location: str = "", alone: bool = False
) -> Fleet:
    """Draw vehicles at random as they are common in a location.

    :param use: "moving", "parked" or "stopping" (in a lane beside the kerb)
    :param alone: none that draw another one
    """
    share = _shares(use, int(location.startswith("singapore")), alone)
    return draw(rng, rng.choice(len(MAKES), count, p=share).astype(np.int64))


def draw_people(rng: np.random.Generator, count: int) -> Fleet:
    """Draw pedestrians at random."""
    first = len(MAKES)
    return draw(rng, first + rng.choice(len(PEOPLE), count, p=_shares("people", 0, False)).astype(np.int64))


def draw(rng: np.random.Generator, number: NDArray[np.int64]) -> Fleet:
    """Draw sizes and colours for makes that are given by their places [A] in ``ALL``."""
    count = len(number)
    person = (number >= len(MAKES)) & (number < len(MAKES) + len(PEOPLE))
    size = _SIZE[number] * np.exp(rng.normal(0, 1, (count, 3)) * np.where(person, 0.08, 0.04)[:, None])
    rgb = _PAINT[rng.choice(len(_PAINT), count, p=_PAINT_SHARES)]
    # Clothes: any brightness, and rather grey.
    grey = rng.uniform(0.03, 0.6, (count, 1))
    rgb[person] = (0.65 * grey + 0.35 * rng.uniform(0.03, 0.6, (count, 3)))[person]
    lot = rng.random(count)
    for make in np.unique(number):
        own = _paints(int(make))
        if len(own):
            mine = np.flatnonzero(number == make)
            rgb[mine] = own[(lot[mine] * len(own)).astype(np.int64)]
    rgb = np.clip(rgb + rng.normal(0, 0.03, (count, 1)) + rng.normal(0, 0.006, (count, 3)), 0.02, 0.95)
    return Fleet(number, size, rgb, _LOADS[rng.choice(len(_LOADS), count, p=_LOAD_SHARES)])


def tail_of(fleet: Fleet) -> tuple[Fleet, NDArray[np.int64]]:
    """Return what the vehicles of a fleet draw behind them: (tails [T], place of each one's head in the fleet [T])."""
    head = np.flatnonzero([bool(ALL[i].tail) for i in fleet.number])
    number = np.array([NUMBER[ALL[i].tail] for i in fleet.number[head]], dtype=np.int64)
    size = _SIZE[number].reshape(-1, 3).copy()
    size[:, 1] = fleet.size[head, 1]
    return Fleet(number, size, fleet.rgb[head], fleet.load[head]), head


def build(fleet: Fleet, xyyaw: Array, velocity: Array, instance: NDArray[np.int64]) -> Boxes:
    """Return the parts of vehicles, people or things whose middles are at ``xyyaw`` [A, 3]."""
    counts = _COUNT[fleet.number]
    owner = np.repeat(np.arange(len(fleet)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = _TABLE[_FIRST[fleet.number][owner] + within]
    whole = fleet.size[owner]
    size = np.column_stack([table[:, 2], table[:, 3], table[:, 5] - table[:, 4]]) * whole
    forward = table[:, 1] * whole[:, 0]
    yaw = xyyaw[owner, 2]
    x = xyyaw[owner, 0] + forward * np.cos(yaw)
    y = xyyaw[owner, 1] + forward * np.sin(yaw)
    z = (table[:, 4] + table[:, 5]) / 2 * whole[:, 2]
    kind, paint = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64)
    rgb = fleet.rgb[owner]
    rgb[paint == LOAD] = fleet.load[owner[paint == LOAD]]
    for code, colour in _FIXED.items():
        rgb[paint == code] = colour
    rgb[paint == RIDER] = 0.5 - 0.5 * rgb[paint == RIDER]
    return Boxes(np.column_stack([x, y, z]), size, yaw, rgb, kind, instance[owner], velocity[owner])
