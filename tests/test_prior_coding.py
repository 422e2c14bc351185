"""How cells are written by blocks: what is kept, what is left out, and that it is the same everywhere."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_prior_drives import AREA, CITY, CODED, SPEC, content, drive, flip_a_bit, ledger, merge, same

from nmp import cli
from nmp.errors import NmpError
from nmp.prior import CityPrior, PriorSpec, upkeep
from nmp.prior.cells import Cells, contradiction, decode, encode, fold
from nmp.prior.coding import Coding, make_coding, pack, unpack
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE

CHANNELS = 12
READS = np.diag(np.linspace(2.0, 0.2, CHANNELS))
"""what a network makes of latents: it looks at the first channels more than at the last"""
NOW = 1_700_000_000


def street(seed: int, painted: bool = False) -> Cells:
    """A tile as a network writes it: four patterns of lines behind twelve channels, and some noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(0, 25, (CHANNELS, 4))
    y, x = np.mgrid[:TILE, :TILE] / TILE
    patterns = np.stack([np.exp(-(((a * x + y) % 1 - 0.5) ** 2) * 60) for a in (0.3, 0.9, 1.7, 2.6)])
    if painted:
        patterns[3, 20:40, 20:40] += 3 * (np.arange(20) % 4 < 2)
    cells = Cells(CHANNELS)
    latent = np.tensordot(mixing, patterns, 1) + rng.normal(0, 2, (CHANNELS, TILE, TILE)) + 10
    seen = np.hypot(x - 0.5, y - 0.4) < 0.45
    cells.evidence[...] = np.where(seen, 256 * rng.uniform(2.5, 3.5) * (1.2 - x), 0)
    cells.latent[...] = np.rint(latent).clip(-127, 127) * seen
    cells.last_seen_s[...], cells.traversals[...] = NOW * seen, seen
    return cells


@pytest.fixture(scope="module")
def spec() -> PriorSpec:
    coding = make_coding([street(seed) for seed in range(4)], READS, 30.0)
    return PriorSpec(CHANNELS, 0.3, "abc123", evidence_cap=4096, coding=coding)


def test_what_the_network_looks_at_is_kept(spec: PriorSpec) -> None:
    given = street(7)
    again = decode(encode(given, spec), spec)
    both = (given.evidence > 0) & (again.evidence > 0)
    assert both.sum() > 0.98 * (given.evidence > 0).sum()
    error = (again.latent.astype(float) - given.latent)[:, both]
    assert np.sqrt((error[0] ** 2).mean()) < 5 < np.sqrt((error[-1] ** 2).mean())
    assert np.abs(again.evidence[both] / 256.0 - given.evidence[both] / 256).mean() < 0.25
    assert (again.last_seen_s[both] <= NOW).all() and (again.last_seen_s[both] > NOW - 64).all()
    assert (again.traversals[both] == 1).all()
    unknown = again.evidence == 0
    assert not (again.latent[:, unknown].any() or again.last_seen_s[unknown].any() or again.traversals[unknown].any())


def test_few_components_carry_it(spec: PriorSpec) -> None:
    assert spec.coding is not None and spec.coding.components < CHANNELS
    coarse = make_coding([street(seed) for seed in range(4)], READS, 120.0)
    assert coarse.components <= spec.coding.components and coarse.noise > spec.coding.noise > 0
    planes = encode(street(7), spec)
    assert (encode(street(7), replace(spec, coding=coarse)) != 0).sum() < (planes != 0).sum() < planes.size / 10


def test_sums_do_not_depend_on_their_order(spec: PriorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers of any precision give the same bytes as float64: nothing was rounded on the way."""
    cells = street(3)
    planes = encode(cells, spec)
    read = decode(planes, spec)
    seen: list[float] = []
    product = np.matmul

    def exact(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        assert (a == np.rint(a)).all() and (b == np.rint(b)).all()
        seen.append(float(product(np.abs(a), np.abs(b)).max()))
        return product(a[..., ::-1], b[..., ::-1, :])

    monkeypatch.setattr("nmp.prior.coding.product", exact)
    assert np.array_equal(encode(street(3), spec), planes)
    again = decode(planes.copy(), spec)
    assert len(seen) >= 7 and max(seen) < 2**53
    for name in ("latent", "evidence", "last_seen_s", "traversals"):
        assert np.array_equal(getattr(read, name), getattr(again, name)), name


def test_the_bytes_are_those_of_every_version() -> None:
    """What was written by an earlier nmp has to be read as the same cells, and written as the same bytes."""
    rng = np.random.default_rng(0)
    mixing = rng.integers(-40, 41, (2, CHANNELS, CHANNELS)) / 8 + 12 * np.eye(CHANNELS)
    coding = Coding(tuple(range(CHANNELS)), pack(mixing[0] * 2.0**14), pack(mixing[1] * 2.0**7))
    patterns = rng.integers(-99, 100, (CHANNELS, 16, 16)).repeat(4, 1).repeat(4, 2).astype(np.int8)
    evidence = rng.integers(0, 4097, (TILE, TILE)).astype(np.uint16)
    seconds = rng.integers(0, 2**32, (TILE, TILE)).astype(np.uint32)
    planes = coding.write(patterns, evidence, seconds, evidence // 7)
    found = hashlib.sha256(planes.tobytes() + b"".join(values.tobytes() for values in coding.read(planes)))
    assert planes[:-2].any() and found.hexdigest()[:16] == "8c6128fe858dcbc8"


def test_cells_that_were_read_are_written_as_the_same_bytes(spec: PriorSpec) -> None:
    planes = encode(street(1), spec)
    assert np.array_equal(encode(decode(planes, spec), spec), planes)
    assert decode(planes, spec).copy().coded is None
    state = Cells(CHANNELS)
    for seed in range(3):
        fold(state, decode(encode(street(seed), spec), spec), spec)
    again = decode(encode(state, spec), spec)
    assert np.array_equal(again.latent, state.latent) and np.array_equal(again.evidence, state.evidence)


def test_rounding_is_no_contradiction_and_a_change_still_is_one(spec: PriorSpec) -> None:
    assert spec.coding is not None
    one, two, other = (decode(encode(cells, spec), spec) for cells in (street(1), street(2), street(2, painted=True)))
    both = (one.evidence > 0) & (two.evidence > 0)
    noise = spec.coding.noise_of(one.evidence, two.evidence)
    assert (contradiction(one.latent, two.latent, 8, noise)[both] > 0).mean() < 0.02
    assert contradiction(one.latent, other.latent, 8, noise)[20:40, 20:40].mean() > 0.3


def test_what_was_hardly_seen_is_left_out(spec: PriorSpec) -> None:
    cells = street(1)
    cells.evidence[...] = 10 * (cells.evidence > 0)
    assert not encode(cells, spec).any()
    cells.evidence[30:40, 30:40] = 1000
    again = decode(encode(cells, spec), spec)
    assert (again.evidence[30:40, 30:40] > 0).all() and not again.evidence[:16, :16].any()


def test_damaged_or_foreign_codings_are_refused() -> None:
    assert CODED.coding is not None
    values = CODED.coding.to_dict()
    assert Coding.from_dict(values) == CODED.coding and Coding.from_dict(values).name == CODED.coding.name
    for change in ({"forward": "AAAA"}, {"mean": []}, {"back": None}, {"noise": -1.0}, {"evidence_step": 0}):
        with pytest.raises(NmpError, match="coding of the prior is damaged"):
            Coding.from_dict({**values, **change})
    with pytest.raises(NmpError, match="belongs to the weights"):
        replace(SPEC, channels=4, coding=CODED.coding)
    with pytest.raises(NmpError, match="too few"):
        make_coding([Cells(3)], np.eye(3), 10.0)
    with pytest.raises(ValueError):
        unpack("no base64")


def test_a_city_keeps_the_coding_that_it_began_with(tmp_path: Path) -> None:
    drive(tmp_path / "coded", 1, CODED)
    drive(tmp_path / "plain", 1, SPEC)
    for name, spec in (("coded", SPEC), ("plain", CODED)):
        drive(tmp_path / name, 2, spec)  # by a car whose weights say otherwise
    codings = [ledger(tmp_path / name).spec.coding for name in ("coded", "plain")]
    assert codings == [CODED.coding, None]
    with pytest.raises(NmpError, match="different ways"):
        merge(tmp_path / "plain", tmp_path / "coded")


def test_a_lost_coding_is_mended(tmp_path: Path) -> None:
    drive(tmp_path, 1, CODED)
    city, before = tmp_path / CITY, content(tmp_path)
    for damaged in ("coding.json", "coding.copy.json", "city.json"):
        flip_a_bit(city / damaged)
        assert cli.main(["prior", "verify", str(city)]) == 2, damaged
        assert cli.main(["prior", "verify", str(city), "--repair"]) == 0
        assert same(content(tmp_path), before)
    for name in ("coding.json", "coding.copy.json"):
        flip_a_bit(city / name)
    with pytest.raises(NmpError, match="has lost coding.json and its copy"):
        Ledger.open(Storage(city))


def test_a_coded_city_is_exported_and_imported(tmp_path: Path) -> None:
    drive(tmp_path / "here", 1, CODED)
    book = ledger(tmp_path / "here", read_only=True)
    upkeep.export(book, tmp_path / "city.zip")
    assert cli.main(["prior", "import", str(tmp_path / "there" / CITY), str(tmp_path / "city.zip")]) == 0
    with CityPrior.open(tmp_path / "there", CITY, SPEC, read_only=True) as prior:
        assert np.array_equal(prior.read(AREA)[0], content(tmp_path / "here")[0])
