"""A street changes, or is hidden for a while: what the prior makes of it over several drives."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nmp.model.fusion import EVIDENCE_SCALE
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.cells import contradiction, on_grid

CITY = "boston-seaport"
CHANNELS = 16
CAP = 16.0
WINDOW = Window(-20, 40, 40, 40)
CROSSING = (slice(10, 20), slice(5, 35))
"""the part of the window where something changes"""
DAY_NS = 86_400 * 10**9

rng = np.random.default_rng(0)
ROAD, PAINT = rng.normal(0, 40, (2, CHANNELS, 1, 1)).round()
"""what a network says of plain asphalt, and of a crossing"""


def visit(
    folder: Path,
    day: int,
    crossing: bool,
    *,
    hidden: bool = False,
    frames: int = 12,
    weight: float = 0.5,
    spec: PriorSpec | None = None,
) -> None:
    """One drive: each frame adds what it sees, with the noise of a network, as the fusion does.

    :param hidden: something stands on the crossing: the network gives no weight to what it sees there
    """
    noise = np.random.default_rng(day)
    spec = spec or _spec()
    with CityPrior.open(folder, CITY, spec) as prior:
        for frame in range(frames):
            seen = np.broadcast_to(ROAD, (CHANNELS, *WINDOW.shape)).copy()
            w = np.full(WINDOW.shape, weight * EVIDENCE_SCALE)
            if hidden:
                seen[:, *CROSSING] = -ROAD
                w[CROSSING] = 0
            elif crossing:
                seen[:, *CROSSING] = PAINT
            seen += noise.normal(0, 8, seen.shape)
            latent, evidence = (values.astype(np.float64) for values in prior.read(WINDOW))
            total = evidence + w
            mean = (latent * evidence + seen * w) / np.maximum(total, 1)
            prior.write(
                WINDOW,
                mean.round().clip(-127, 127).astype(np.int8),
                total.round().astype(np.uint16),
                day * DAY_NS + frame * 500_000_000,
                np.ones(WINDOW.shape, bool),
            )


def _spec(bits: int = 8) -> PriorSpec:
    return PriorSpec(CHANNELS, 0.3, "abc123", bits=bits, evidence_cap=round(CAP * EVIDENCE_SCALE))


def stored(folder: Path, spec: PriorSpec | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much of the paint is in the cells of the window (0 none, 1 all), and their evidence."""
    with CityPrior.open(folder, CITY, spec or _spec(), read_only=True) as prior:
        latent, evidence = prior.read(WINDOW)
    direction = (PAINT - ROAD)[:, 0, 0]
    share = np.tensordot(direction, latent - ROAD, 1) / (direction @ direction)
    return share, evidence / EVIDENCE_SCALE


def test_a_removed_crossing_is_gone_after_few_visits(tmp_path: Path) -> None:
    for day in range(1, 5):
        visit(tmp_path, day, crossing=True)
    share, evidence = stored(tmp_path)
    assert share[CROSSING].min() > 0.8 and evidence.min() == CAP
    left = []
    for day in range(5, 8):
        visit(tmp_path, day, crossing=False)
        share, evidence = stored(tmp_path)
        left.append(float(share[CROSSING].mean()))
        beside = np.ones(WINDOW.shape, bool)
        beside[CROSSING] = False
        # the first to see it is believed less than what was known, and the cells say how little is known now
        if day == 5:
            assert evidence[CROSSING].max() < 0.7 * CAP
        assert evidence[beside].min() == CAP and np.abs(share[beside]).max() < 0.2
    assert left[0] < 0.5 and left[1] < 0.3 and left[2] < 0.2


def test_one_glimpse_does_not_undo_what_many_saw(tmp_path: Path) -> None:
    for day in range(1, 5):
        visit(tmp_path, day, crossing=True)
    visit(tmp_path, 5, crossing=False, frames=1, weight=0.3)
    share, evidence = stored(tmp_path)
    assert share[CROSSING].min() > 0.8 and evidence[CROSSING].min() > 0.9 * CAP


def test_an_occluded_crossing_stays_to_the_bit(tmp_path: Path) -> None:
    for day in range(1, 5):
        visit(tmp_path, day, crossing=True)
    with CityPrior.open(tmp_path, CITY, _spec(), read_only=True) as prior:
        before = prior.read(WINDOW)
    for day in range(5, 8):
        visit(tmp_path, day, crossing=True, hidden=True)
    with CityPrior.open(tmp_path, CITY, _spec(), read_only=True) as prior:
        after = prior.read(WINDOW)
    assert np.array_equal(before[0][:, *CROSSING], after[0][:, *CROSSING])
    assert np.array_equal(before[1][CROSSING], after[1][CROSSING])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_no_contradiction(bits: int) -> None:
    values = np.random.default_rng(1).normal(0, 40, (32, 64, 64)).clip(-127, 127).round().astype(np.int8)
    near = (values + np.random.default_rng(2).normal(0, 3, values.shape)).clip(-127, 127).round().astype(np.int8)
    other = np.roll(values, 7, axis=2)
    assert contradiction(on_grid(values, bits), on_grid(near, bits), bits).mean() < 0.01
    assert contradiction(on_grid(values, bits), on_grid(other, bits), bits).mean() > 0.99
    assert not contradiction(np.zeros_like(values), np.zeros_like(values), bits).any()
