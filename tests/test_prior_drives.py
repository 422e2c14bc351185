"""A city made of drives: merged in any order, rolled back, compacted, verified, by hand and by command."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nmp import cli
from nmp.errors import NmpError
from nmp.prior import CityPrior, PriorSpec, Window, upkeep
from nmp.prior import ledger as books
from nmp.prior.cells import FIELD_PLANES, Cells, fold, to_planes
from nmp.prior.coding import Coding, pack
from nmp.prior.drive import Tile, open_planes
from nmp.prior.ledger import Ledger, State
from nmp.prior.record import checked, name_of
from nmp.prior.storage import Storage
from nmp.prior.tiles import TILE, Key
from nmp.prior.tileset import TileSet

CITY = "boston-seaport"
SECOND = 1_000_000_000
DAY = 86_400 * SECOND
SPEC = PriorSpec(3, 0.3, "abc123", evidence_cap=4096)
AREA = Window(-80, -80, 200, 200)
CODED = replace(SPEC, coding=Coding((5, -3, 0), pack(np.eye(3) * 2.0**20 / 40), pack(np.eye(3) * 2.0**8 * 40), 900.0))
"""a city whose cells are written by blocks; random cells cannot be written well, which makes no difference here"""
SPECS = {
    "sum": SPEC,
    "coarse": replace(SPEC, bits=3),
    "latest": replace(SPEC, merge="latest"),
    "coded": CODED,
    "coded latest": replace(CODED, merge="latest"),
}


def drive(
    place: Path | str, seed: int, spec: PriorSpec = SPEC, *, day: int | None = None, vehicle: str = "", frames: int = 4
) -> str:
    """Drive once through the city, as the mapper does it, and return the id of the drive."""
    rng = np.random.default_rng(seed)
    start = DAY * (10_000 + (rng.integers(0, 5).item() if day is None else day))
    with CityPrior.open(place, CITY, spec, flush_interval_s=1e6, vehicle=vehicle) as prior:
        for frame in range(frames):
            window = Window(*rng.integers(-80, 50, 2).tolist(), 60, 70)
            latent, evidence = prior.read(window)
            weight = rng.integers(0, 256, window.shape)
            seen = rng.integers(-127, 128, latent.shape)
            after = evidence + weight
            mean = np.rint((latent * evidence.astype(float) + seen * weight) / np.maximum(after, 1)).astype(np.int8)
            prior.write(window, mean, after.astype(np.uint16), start + frame * SECOND, weight > 20)
        record = prior.close()
    assert record is not None
    return record.id


def content(place: Path | str, spec: PriorSpec = SPEC) -> list[NDArray[np.generic]]:
    """Everything that a reader sees of the city."""
    with CityPrior.open(place, CITY, spec, read_only=True) as prior:
        return [*prior.read(AREA), prior.last_seen(AREA), prior.traversals(AREA)]


def same(one: list[NDArray[np.generic]], two: list[NDArray[np.generic]]) -> bool:
    return all(map(np.array_equal, one, two))


def files(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, but for locks."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def ledger(folder: Path | str, read_only: bool = False) -> Ledger:
    return Ledger.open(Storage(f"{folder}/{CITY}"), read_only=read_only)


def merge(target: Path, source: Path) -> upkeep.Merged:
    return upkeep.merge(Storage(target / CITY), ledger(source, read_only=True))


def flip_a_bit(file: Path, position: int = 777) -> bytes:
    before = file.read_bytes()
    damaged = bytearray(before)
    damaged[position // 8 % len(damaged)] ^= 1 << position % 8
    file.write_bytes(damaged)
    return before


# -- what a drive adds --------------------------------------------------------------------------------------


def test_what_a_drive_adds_is_the_sum_of_its_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    window, shape = Window(0, 0, 10, 10), (3, 10, 10)
    drive(tmp_path, 5)
    sums, weights = np.zeros(shape), np.zeros((10, 10))
    with CityPrior.open(tmp_path, CITY, SPEC) as prior:
        for _ in range(40):  # far beyond the cap
            latent, evidence = prior.read(window)
            weight = rng.integers(100, 256, (10, 10))
            seen = np.full(shape, 60) + rng.integers(-20, 21, shape)
            mean = np.rint((latent * evidence.astype(float) + seen * weight) / (evidence + weight)).astype(np.int8)
            prior.write(window, mean, (evidence + weight).astype(np.uint16), SECOND)
            sums, weights = sums + seen * weight, weights + weight
        assert prior.read(window)[1].max() == SPEC.evidence_cap
        record = prior.close()
    assert record is not None
    [cells] = ledger(tmp_path).load(record, upkeep.digests(record)).values()
    assert np.array_equal(cells.evidence[:10, :10], weights)
    # up to what rounding the mean after every frame costs
    assert np.abs(cells.latent[:, :10, :10] - sums / weights).max() < 4
    assert (cells.traversals[:10, :10] == 1).all() and not cells.evidence[10:].any()


def test_fold_is_the_weighted_mean_and_the_newest() -> None:
    state, new = Cells(2), Cells(2)
    state.latent[:, 0, 0], state.evidence[0, 0], state.last_seen_s[0, 0], state.traversals[0, 0] = 100, 30, 9, 65535
    new.latent[:, 0, 0], new.evidence[0, 0], new.last_seen_s[0, 0], new.traversals[0, 0] = -50, 10, 5, 1
    total, latest = Cells.unpack(state.pack()), Cells.unpack(state.pack())
    fold(total, new, PriorSpec(2, 0.3, "x", evidence_cap=35))
    # they contradict each other: of the 30, twice 10 are taken back
    assert total.latent[:, 0, 0].tolist() == [25, 25]  # (100 * 10 - 50 * 10) / 20
    assert (total.evidence[0, 0], total.last_seen_s[0, 0], total.traversals[0, 0]) == (20, 9, 65535)
    fold(latest, new, PriorSpec(2, 0.3, "x", merge="latest"))
    assert latest.latent[:, 0, 0].tolist() == [-50, -50] and latest.evidence[0, 0] == 10
    assert not total.latent[:, 1:].any() and not latest.latent[:, 1:].any()
    agreeing = Cells.unpack(state.pack())
    new.latent[:, 0, 0] = 78
    fold(agreeing, new, PriorSpec(2, 0.3, "x", evidence_cap=35))
    assert agreeing.latent[:, 0, 0].tolist() == [94, 94]  # (100 * 30 + 78 * 10) / 40 = 94.5, to even
    assert agreeing.evidence[0, 0] == 35


@pytest.mark.parametrize("place", ["folder", "memory://"])
def test_folders_and_urls_hold_the_same(tmp_path: Path, place: str) -> None:
    there = str(tmp_path / "there") if place == "folder" else f"memory://{tmp_path.name}"
    ids = [drive(there, seed) for seed in (1, 2)]
    here = [drive(tmp_path / "here", seed) for seed in (1, 2)]
    assert ids == here and same(content(there), content(tmp_path / "here"))
    upkeep.compact(ledger(there))
    assert same(content(there), content(tmp_path / "here"))


# -- fleets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_merging_makes_no_difference(tmp_path: Path, seed: int, name: str) -> None:
    rng = random.Random(seed)
    spec = SPECS[name]
    cars = [tmp_path / f"car-{number}" for number in range(4)]
    for number, car in enumerate(cars):
        for trip in range(rng.randint(1, 2)):
            drive(car, 100 * seed + 10 * number + trip, spec)
    results = []
    for attempt in range(3):
        center = tmp_path / f"center-{attempt}"
        order = [*cars, *rng.sample(cars, 2)]  # some twice
        rng.shuffle(order)
        for car in order:
            merge(center, car)
        assert merge(center, cars[0]).drives == []
        results.append((files(center), content(center, spec)))
    for other in results[1:]:
        assert other[0] == results[0][0] and same(other[1], results[0][1])


def test_a_drive_that_comes_late_is_merged_exactly_within_the_horizon_and_told_of_beyond_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in (0, 1, 5, 10):
        drive(tmp_path / f"car-{day}", day, day=day)
    for day in (10, 0):
        merge(tmp_path / "early", tmp_path / f"car-{day}")
    assert "holds 1 drives" in run(capsys, "compact", tmp_path / "early" / CITY)
    # of day 5: newer than what was folded
    assert merge(tmp_path / "early", tmp_path / "car-5").late == []
    for day in (0, 5, 10):
        merge(tmp_path / "never", tmp_path / f"car-{day}")
    assert same(content(tmp_path / "early"), content(tmp_path / "never"))
    # of day 1, where days 0 to 5 were folded
    assert "holds 2 drives" in run(capsys, "compact", tmp_path / "early" / CITY, "--older-than", 4)
    late = ledger(tmp_path / "car-1").drives()[0].id
    told = run(capsys, "merge", tmp_path / "early" / CITY, tmp_path / "car-1" / CITY)
    assert "1 drives are older than the base" in told and late[:12] in told
    # a copy that takes the base over has an older drive of its own
    merge(tmp_path / "new", tmp_path / "car-1")
    upkeep.leave_out(ledger(tmp_path / "early"), [late])
    done = merge(tmp_path / "new", tmp_path / "early")
    assert done.base and [record.id for record in done.late] == [late]


def test_merging_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    drive(tmp_path / "a", 1)
    drive(tmp_path / "b", 2, PriorSpec(3, 0.3, "other", evidence_cap=4096))
    before = files(tmp_path / "a")
    with pytest.raises(NmpError, match="/b/.* was written by model other, these weights are abc123"):
        merge(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path / "a") == before


def test_a_damaged_drive_is_not_merged(tmp_path: Path) -> None:
    drive(tmp_path / "a", 1)
    drive(tmp_path / "b", 2)
    flip_a_bit(next((tmp_path / "b").rglob("c/0/*/*")))
    before = content(tmp_path / "a")
    with pytest.raises(NmpError, match="is damaged: run nmp prior verify --repair there"):
        merge(tmp_path / "a", tmp_path / "b")
    assert same(content(tmp_path / "a"), before) and len(ledger(tmp_path / "a").drives()) == 1


WRITER = """
    import sys
    sys.path[:0] = {path!r}
    import numpy as np
    from pathlib import Path
    from test_prior_drives import drive
    for seed in range({first}, {last}):
        drive(Path({place!r}), seed)
        print(seed, flush=True)
"""


def start_writer(place: Path, first: int, last: int) -> subprocess.Popen[str]:
    path = [str(Path(__file__).parent), *sys.path]
    code = textwrap.dedent(WRITER).format(path=path, first=first, last=last, place=str(place))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_writing_one_city_lose_nothing(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, first, first + 3) for first in (0, 100)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    drives = ledger(tmp_path).drives()
    assert len(drives) == 6
    assert upkeep.verify(ledger(tmp_path)) == [] and not list((tmp_path / CITY / "open").iterdir())


@pytest.mark.parametrize("place", ["folder", "memory://"])
def test_a_drive_that_is_half_gone_after_its_commit_counts_once(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = str(tmp_path / "there") if place == "folder" else f"memory://{tmp_path.name}"

    def half(storage: Storage) -> None:
        """A crash while a folder is cleared."""
        for key in storage.keys()[::2]:
            storage.delete(key)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "clear", half)
        patch.setattr(shutil, "rmtree", lambda path, **_: half(Storage(path)))
        committed = drive(there, 1)
    before = content(there)
    assert Storage(f"{there}/{CITY}/open").keys()
    CityPrior.open(there, CITY, SPEC).close()
    assert [record.id for record in ledger(there).drives()] == [committed] and same(content(there), before)
    assert not Storage(f"{there}/{CITY}/open").keys()


def test_a_crashed_drive_of_an_earlier_version_is_committed(tmp_path: Path) -> None:
    """Its tiles hold sums of weight x latent, three bytes each, where now they hold what was there before it."""
    spec = PriorSpec(5, 0.3, "abc123", evidence_cap=4096)
    drive(tmp_path, 1, spec, day=0)
    prior = CityPrior.open(tmp_path, CITY, spec, flush_interval_s=1e6)
    latent, evidence = prior.read(AREA)
    rng = np.random.default_rng(2)
    new = rng.integers(-127, 128, latent.shape).astype(np.int8)
    prior.write(AREA, new, evidence + rng.integers(0, 300, evidence.shape).astype(np.uint16), 20_000 * DAY)
    prior.flush()
    shutil.copytree(tmp_path / CITY, tmp_path / "old" / CITY)
    prior.close()

    room = next((tmp_path / "old" / CITY / "open").iterdir())
    session = json.loads((room / "session.json").read_text())
    (room / "session.json").write_bytes(checked({k: session[k] for k in ("vehicle", "first_ns")}))
    storage = Storage(room / "tiles")
    now = TileSet(storage, open_planes(spec), level=1)
    tiles = {key: Tile.unpack(planes, spec) for key, planes in now.load(now.keys(), lambda *_: None).items()}
    assert any(tile.before is not None for tile in tiles.values())
    shutil.rmtree(room / "tiles")
    TileSet(storage, 4 * spec.channels + FIELD_PLANES + 3, level=1).save({k: _format_1(t) for k, t in tiles.items()})

    CityPrior.open(tmp_path / "old", CITY, spec).close()
    assert same(content(tmp_path / "old", spec), content(tmp_path, spec))
    assert [r.id for r in ledger(tmp_path / "old").drives()] == [r.id for r in ledger(tmp_path).drives()]


def _format_1(tile: Tile) -> NDArray[np.uint8]:
    cells, before = tile.cells, tile.before or Cells(len(tile.cells.latent))
    assert tile.touched is not None and (before.evidence == 0).all() or (tile.kept == 1).all()
    sums = cells.latent.astype(np.int32) * cells.evidence - before.latent.astype(np.int32) * before.evidence
    planes = np.moveaxis(sums.astype("<i4").view(np.uint8).reshape(-1, TILE, TILE, 4)[..., :3], -1, 0)
    weight = to_planes(tile.weight.astype("<u2"))
    return np.concatenate([cells.pack(), tile.touched[None].view(np.uint8), weight, *planes])


def test_a_crashed_drive_of_a_newer_version_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would be read as if it were laid out as now, and its tiles put aside as corrupt."""
    prior = CityPrior.open(tmp_path / "crashed", CITY, SPEC, flush_interval_s=1e6)
    prior.write(Window(0, 0, 5, 5), np.ones((3, 5, 5), np.int8), np.ones((5, 5), np.uint16), SECOND)
    prior.flush()
    shutil.copytree(tmp_path / "crashed" / CITY, tmp_path / "now" / CITY)
    prior.close()
    session = next((tmp_path / "now" / CITY / "open").glob("*/session.json"))
    content_now = session.read_bytes()
    values = json.loads(content_now)
    session.write_bytes(checked({**{k: v for k, v in values.items() if k != "sha256"}, "format": 3}))
    before = files(tmp_path / "now")
    with caplog.at_level(logging.WARNING):
        CityPrior.open(tmp_path / "now", CITY, SPEC).close()
    assert "has format 3, this nmp reads up to 2: update nmp" in caplog.text
    assert files(tmp_path / "now") == before and not ledger(tmp_path / "now").drives()
    session.write_bytes(content_now)
    CityPrior.open(tmp_path / "now", CITY, SPEC).close()
    assert len(ledger(tmp_path / "now").drives()) == 1


@pytest.mark.parametrize("what", ["drive", "base", "city"])
def test_records_of_a_newer_version_are_refused_and_stay(tmp_path: Path, what: str) -> None:
    drive(tmp_path, 1, day=0)
    if what == "base":
        upkeep.compact(ledger(tmp_path))
    drive(tmp_path, 2, day=1)
    city = tmp_path / CITY
    if what == "city":
        values = json.loads((city / "city.json").read_text())
        (city / "city.json").write_bytes(checked({**{k: v for k, v in values.items() if k != "sha256"}, "format": 9}))
    else:
        record = next(city.glob("commits/*.json" if what == "drive" else "bases/*/record.json"))
        raw = record.read_bytes().replace(b'"format": 2', b'"format": 3')
        name = name_of(raw)
        if what == "drive":
            (city / "commits" / f"{name}.json").write_bytes(raw)
        else:
            record.parent.rename(city / "bases" / name)
            for copy in ("record.json", "2.record.json"):
                (city / "bases" / name / copy).write_bytes(raw)
            ledger(tmp_path).change_head(lambda head: replace(head, base=name))
    before = files(tmp_path)
    for action in (
        lambda: CityPrior.open(tmp_path, CITY, SPEC),
        lambda: upkeep.verify(ledger(tmp_path), repair=True),
        lambda: upkeep.compact(ledger(tmp_path)),
    ):
        with pytest.raises(NmpError, match="has format [39], this nmp reads up to [24]: update nmp"):
            action()
    if what == "city":
        with pytest.raises(NmpError, match="update nmp"):
            upkeep.mend_city(Storage(city))
    assert files(tmp_path) == before


def test_a_crashed_drive_without_any_intact_tile_adds_nothing(tmp_path: Path) -> None:
    prior = CityPrior.open(tmp_path, CITY, SPEC, flush_interval_s=1e6)
    prior.write(Window(0, 0, 5, 5), np.ones((3, 5, 5), np.int8), np.ones((5, 5), np.uint16), SECOND)
    prior.flush()
    copy = shutil.copytree(tmp_path / CITY, tmp_path / "copy" / CITY)
    flip_a_bit(next(copy.glob("open/*/tiles/c/0/*/*")), 99)
    CityPrior.open(tmp_path / "copy", CITY, SPEC).close()
    assert not ledger(tmp_path / "copy").drives()
    prior.close()


def test_killed_drives_are_committed_up_to_their_last_flush(tmp_path: Path) -> None:
    rng = random.Random(1)
    for number in range(3):
        code = f"""
            import sys
            sys.path[:0] = {sys.path!r}
            import numpy as np
            from nmp.prior import CityPrior, PriorSpec, Window
            prior = CityPrior.open({str(tmp_path)!r}, {CITY!r}, PriorSpec(3, 0.3, "abc123"), flush_interval_s=1e6)
            window, start = Window(0, {number} * 128, 100, 100), {number + 1} * 10**9
            for count in range(1, 6000):
                latent, evidence = prior.read(window)
                prior.write(window, np.full_like(latent, {number}), evidence + np.uint16(1), start + count)
                prior.flush()
                print(count, flush=True)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        lines += child.communicate(timeout=30)[0].splitlines(keepends=True)
        flushed = max(int(line) for line in lines if line.endswith("\n"))
        spec = PriorSpec(3, 0.3, "abc123")
        CityPrior.open(tmp_path, CITY, spec).close()
        drives = ledger(tmp_path).drives()
        assert len(drives) == number + 1
        added = ledger(tmp_path).load(drives[-1], upkeep.digests(drives[-1]))
        assert len(added) == 4
        for cells in added.values():
            seen = cells.last_seen_s > 0
            assert flushed <= cells.evidence[seen].min() and (cells.latent[:, seen] == number).all()
    assert upkeep.verify(ledger(tmp_path)) == []


# -- versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sum", "coded"])
def test_rollback_restores_the_earlier_bytes(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    kept = drive(tmp_path, 1, spec, day=0)
    before, stored = content(tmp_path), files(tmp_path)
    later = [drive(tmp_path, seed, spec, day=seed) for seed in (2, 3)]
    after = content(tmp_path)
    assert not same(before, after)
    book = ledger(tmp_path)
    upkeep.leave_out(book, [r.id for r in upkeep.drives_after(book, book.find(kept))])
    assert same(content(tmp_path), before)
    assert set(ledger(tmp_path).head().left_out) == set(later)
    assert all(files(tmp_path)[name] == raw for name, raw in stored.items())
    upkeep.take_back(ledger(tmp_path), later)
    assert same(content(tmp_path), after)
    # and any single one
    upkeep.leave_out(ledger(tmp_path), [kept])
    assert content(tmp_path)[3].max() <= 2 and len(ledger(tmp_path).active()) == 2


def test_difference_counts_cells(tmp_path: Path) -> None:
    first, second = drive(tmp_path, 1, day=0), drive(tmp_path, 2, day=1)
    book = ledger(tmp_path)
    nothing, one, both = (upkeep.state_at(book, name) for name in ("empty", first[:8], second))
    found = upkeep.difference(nothing, one)
    assert found.added == book.find(first).cells and found.removed == found.changed == 0
    back = upkeep.difference(both, one)
    assert back.removed == (content(tmp_path)[3] > 0).sum() - book.find(first).cells
    assert 0 < back.changed <= book.find(second).cells and back.evidence < 0 and back.mean_latent > 0
    assert upkeep.difference(both, upkeep.state_at(book, "now")) == ([], 0, 0, 0, 0.0, 0)


# -- growth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_compaction_keeps_every_later_state(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    for name in ("plain", "compact"):
        for seed in range(6):
            drive(tmp_path / name, seed, spec, day=seed)
            if name == "compact" and seed in (2, 4):
                upkeep.compact(ledger(tmp_path / name), older_than_days=1, keep=False)
    book = ledger(tmp_path / "compact")
    base = book.base()
    assert base is not None and len(base.drives) == 4 and len(book.drives()) == 2
    assert same(content(tmp_path / "plain", spec), content(tmp_path / "compact", spec))
    upkeep.compact(book, keep=False)
    assert same(content(tmp_path / "plain", spec), content(tmp_path / "compact", spec))
    # the same drives, compacted at once: the same bytes
    upkeep.compact(ledger(tmp_path / "plain"), keep=False)
    assert files(tmp_path / "plain") == files(tmp_path / "compact")
    assert not list((tmp_path / "plain" / CITY / "drives").iterdir())


@pytest.mark.parametrize("name", ["sum", "coded"])
def test_a_compacted_city_grows_with_the_road_and_not_with_the_drives(tmp_path: Path, name: str) -> None:
    """Eight cars along one road see the same, each with noise of its own."""
    spec = SPECS[name]
    y, x = np.mgrid[:128, :512] / 20.0
    street = np.stack([60 * np.sin(x + channel) * np.cos(y - channel) for channel in range(3)])

    def size_after(drives: int) -> dict[str, int]:
        place = tmp_path / str(drives)
        rng = np.random.default_rng(0)
        for number in range(drives):
            with CityPrior.open(place, CITY, spec, flush_interval_s=1e6) as prior:
                for part in range(0, 512, 128):
                    window = Window(0, part, 128, 128)
                    latent, evidence = prior.read(window)
                    seen = street[:, :, part : part + 128] + rng.normal(0, 3, (3, 128, 128))
                    mean = np.rint((latent * evidence.astype(float) + seen * 300) / (evidence + 300))
                    prior.write(window, mean.astype(np.int8), evidence + np.uint16(300), (number + 1) * DAY)
        apart = Storage(place / CITY / "drives").size()
        upkeep.compact(ledger(place), keep=False)
        whole, base = Storage(place / CITY).size(), Storage(place / CITY / "bases").size()
        assert apart and whole and base
        return {"apart": apart, "whole": whole, "base": base}

    one, eight = size_after(1), size_after(8)
    assert eight["apart"] > 7 * one["apart"]
    assert eight["base"] < 1.15 * one["base"] and eight["whole"] < 1.15 * one["whole"]


def test_drives_inside_the_base_are_known(tmp_path: Path) -> None:
    for seed in range(3):
        drive(tmp_path / "center", seed, day=seed)
    merge(tmp_path / "car", tmp_path / "center")
    dropped = ledger(tmp_path / "center").drives()[1].id
    upkeep.leave_out(ledger(tmp_path / "center"), [dropped])
    before = content(tmp_path / "center")
    upkeep.compact(ledger(tmp_path / "center"))
    done = merge(tmp_path / "center", tmp_path / "car")
    assert done.drives == [] and done.known == 3
    assert same(content(tmp_path / "center"), before) and ledger(tmp_path / "center").head().left_out == ()
    with pytest.raises(NmpError, match="was compacted into the base"):
        ledger(tmp_path / "center").find(ledger(tmp_path / "car").drives()[0].id)
    # a new copy takes the base over
    assert merge(tmp_path / "new", tmp_path / "center").base
    assert same(content(tmp_path / "new"), before)
    # two bases, each with what the other lacks, cannot be told apart
    drive(tmp_path / "car", 9, day=9)
    upkeep.leave_out(ledger(tmp_path / "car"), [ledger(tmp_path / "car").drives()[0].id])
    upkeep.compact(ledger(tmp_path / "car"))
    with pytest.raises(NmpError, match="both compacted"):
        merge(tmp_path / "center", tmp_path / "car")


def test_a_reader_follows_a_compaction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(3):
        drive(tmp_path, seed)
    before = content(tmp_path)
    with CityPrior.open(tmp_path, CITY, SPEC) as prior, caplog.at_level(logging.WARNING):
        upkeep.compact(ledger(tmp_path), keep=False)
        assert same([*prior.read(AREA)], before[:2])
    assert not caplog.records


def test_a_compaction_that_was_interrupted_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        drive(tmp_path, seed)
    before = content(tmp_path)
    for step in ("change_head", "publish"):
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, step, lambda *_, **__: (_ for _ in ()).throw(NmpError("killed")))
            with pytest.raises(NmpError, match="killed"):
                upkeep.compact(ledger(tmp_path))
        assert same(content(tmp_path), before) and len(ledger(tmp_path).drives()) == 3
    with monkeypatch.context() as patch:  # the base is current, nothing was deleted yet
        patch.setattr(upkeep, "_sweep", lambda *_: None)
        upkeep.compact(ledger(tmp_path))
    assert same(content(tmp_path), before) and ledger(tmp_path).drives() == []
    upkeep.compact(ledger(tmp_path), keep=False)
    assert not list((tmp_path / CITY / "drives").iterdir())


# -- damage -------------------------------------------------------------------------------------------------


def test_a_corrupt_record_is_reported_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drive(tmp_path, 1)
    one = content(tmp_path)
    lost = drive(tmp_path, 2)
    both = content(tmp_path)
    file = tmp_path / CITY / "commits" / f"{lost}.json"
    raw = flip_a_bit(file)
    with caplog.at_level(logging.WARNING), CityPrior.open(tmp_path, CITY, SPEC) as prior:
        assert same([*prior.read(AREA)], one[:2])
    assert len(caplog.records) == 1 and lost in caplog.text and "kept as" in caplog.text
    damage = (f"record of drive {lost[:12]}", False)
    assert upkeep.verify(ledger(tmp_path)) == [damage]
    flip_a_bit(next((tmp_path / CITY / "commits").glob("*.json")))
    assert len(upkeep.verify(ledger(tmp_path, read_only=True))) == 2
    flip_a_bit(next((tmp_path / CITY / "commits").glob("*.json")))
    assert upkeep.verify(ledger(tmp_path), repair=True) == [(f"record of drive {lost[:12]}", True)]
    assert file.read_bytes() == raw and same(content(tmp_path), both) and upkeep.verify(ledger(tmp_path)) == []


def test_every_file_of_a_city_is_verified_and_spares_are_mended(tmp_path: Path) -> None:
    drive(tmp_path, 1, day=0, frames=1)
    upkeep.compact(ledger(tmp_path), keep=False)
    upkeep.leave_out(ledger(tmp_path), [drive(tmp_path, 2, day=1, frames=1)])
    before = files(tmp_path)
    for name in before:
        file = tmp_path / name
        flip_a_bit(file, 1234)
        if name.endswith("city.json"):
            assert upkeep.mend_city(Storage(tmp_path / CITY))
        elif "/c/" in name:
            assert [f.repaired for f in upkeep.verify(ledger(tmp_path), repair=True)] == [False]
            file.write_bytes(before[name])
        else:
            assert [f.repaired for f in upkeep.verify(ledger(tmp_path, read_only=True))] == [False], name
            assert all(f.repaired for f in upkeep.verify(ledger(tmp_path), repair=True)), name
        assert file.read_bytes() == before[name]
    assert upkeep.verify(ledger(tmp_path)) == []


@pytest.mark.parametrize("name", ["head.json", "head.copy.json"])
def test_a_damaged_head_is_read_from_its_copy(tmp_path: Path, name: str) -> None:
    drive(tmp_path, 1)
    upkeep.leave_out(ledger(tmp_path), [drive(tmp_path, 2)])
    before = content(tmp_path)
    raw = flip_a_bit(tmp_path / CITY / name)
    assert same(content(tmp_path), before)
    assert upkeep.verify(ledger(tmp_path), repair=True) == [(name, True)]
    assert (tmp_path / CITY / name).read_bytes() == raw
    for both in ("head.json", "head.copy.json"):
        flip_a_bit(tmp_path / CITY / both)
    with pytest.raises(NmpError, match="both damaged"):
        content(tmp_path)


def test_a_first_change_of_the_head_that_was_interrupted_is_no_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = [drive(tmp_path, seed, day=seed) for seed in range(2)]
    upkeep.leave_out(ledger(tmp_path), before[1:])
    (tmp_path / CITY / "head.json").unlink()  # the copy is written first
    with caplog.at_level(logging.WARNING):
        assert ledger(tmp_path).head().left_out == tuple(before[1:])
        assert upkeep.verify(ledger(tmp_path)) == []
    assert not caplog.records
    assert upkeep.verify(ledger(tmp_path), repair=True) == [] and (tmp_path / CITY / "head.json").exists()


@pytest.mark.parametrize("position", [777, -9], ids=["tile", "index"])
@pytest.mark.parametrize("version", [2, 4])
def test_tiles_are_mended_from_what_a_base_was_made_of_or_another_copy(
    tmp_path: Path, version: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "FORMAT", version)
    for seed in range(4):
        drive(tmp_path / "city", seed, day=seed)
    book = ledger(tmp_path / "city")
    upkeep.compact(book, older_than_days=2)
    merge(tmp_path / "copy", tmp_path / "city")
    upkeep.compact(book, older_than_days=1)
    base = book.base()
    assert base is not None and len(base.drives) == 3

    def repaired(city: str, other: str = "") -> bool:
        found = upkeep.verify(ledger(tmp_path / city), repair=True, other=ledger(tmp_path / other) if other else None)
        assert len(found) == 1 or position < 0 and version == 4 and len(found) > 1
        assert len({finding.repaired for finding in found}) == 1
        return found[0].repaired

    def mended(city: str, folder: str, other: str = "") -> bool:
        """Damage a file, and tell whether all is as before once it is repaired, where ``other`` is needed for it."""
        before = content(tmp_path / city)
        file = next((tmp_path / city / CITY / folder).rglob("c/0/*/*"))
        raw = flip_a_bit(file, position)
        kept = file.read_bytes()
        if other:  # what could not be mended can be later
            assert not repaired(city) and not same(content(tmp_path / city), before)
        assert repaired(city, other)
        assert [p.read_bytes() for p in file.parent.glob("*.corrupt")] == [kept]
        whole = file.read_bytes() == raw and same(content(tmp_path / city), before)
        return whole and upkeep.verify(ledger(tmp_path / city)) == []

    assert mended("city", f"bases/{base.id}")
    upkeep.compact(book, keep=False)
    assert mended("city", "bases", other="copy")
    merge(tmp_path / "third", tmp_path / "copy")
    assert mended("copy", "drives", other="third")


def test_a_base_is_mended_by_default_until_the_next_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    city = tmp_path / CITY
    old = [drive(tmp_path, seed, day=seed) for seed in range(2)]
    before = content(tmp_path)
    assert "the next compaction deletes that" in run(capsys, "compact", city, "--older-than", 0)
    assert sorted(path.name for path in (city / "drives").iterdir()) == sorted(old)
    assert [len(record.drives) for record in ledger(tmp_path).active()] == [2]
    flip_a_bit(next((city / "bases").rglob("c/0/*/*")))
    assert "repaired" in run(capsys, "verify", city, "--repair") and same(content(tmp_path), before)

    first = ledger(tmp_path).head().base
    run(capsys, "compact", city, "--older-than", 0)  # there is nothing to fold: what is kept stays
    assert len(list((city / "drives").iterdir())) == 2
    new = drive(tmp_path, 5, day=5)
    before = content(tmp_path)
    run(capsys, "compact", city, "--older-than", 0)
    assert [path.name for path in (city / "drives").iterdir()] == [new]
    assert {path.name for path in (city / "bases").iterdir()} == {first, ledger(tmp_path).head().base}
    flip_a_bit(next((city / "bases" / ledger(tmp_path).head().base).rglob("c/0/*/*")))
    assert "repaired" in run(capsys, "verify", city, "--repair") and same(content(tmp_path), before)

    run(capsys, "compact", city, "--older-than", 0, "--drop")
    assert not list((city / "drives").iterdir()) and len(list((city / "bases").iterdir())) == 1
    flip_a_bit(next((city / "bases").rglob("c/0/*/*")))
    assert "1 damaged parts" in run(capsys, "verify", city, "--repair", code=2)


def test_what_is_kept_to_mend_a_base_is_verified_as_well(tmp_path: Path) -> None:
    drive(tmp_path, 1, day=0, frames=1)
    upkeep.compact(ledger(tmp_path))
    drive(tmp_path, 2, day=1, frames=1)
    upkeep.compact(ledger(tmp_path))
    base = ledger(tmp_path).head().base
    kept = {name for name in files(tmp_path) if "/drives/" in name or "/bases/" in name and base not in name}
    assert sum("/c/" not in name for name in kept) == 5, "of a base and a drive: records and copies, zarr.json, tiles"
    before = files(tmp_path)
    for name in sorted(kept):
        file = tmp_path / name
        flip_a_bit(file, 1234)
        assert upkeep.verify(ledger(tmp_path, read_only=True)), name
        mended = upkeep.verify(ledger(tmp_path), repair=True)
        assert {finding.repaired for finding in mended} == {"/c/" not in name}, name
        # a record without a copy is what tells what the tiles are: they go with it
        assert file.exists() == ("/drives/" not in name or "record" not in name)
        shutil.rmtree(tmp_path / CITY)
        for path, raw in before.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(raw)


@pytest.mark.parametrize("older", ["from", "into"])
def test_cities_of_an_older_format_go_on_and_merge_with_new_ones(
    tmp_path: Path, older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(place: Path, version: int, seeds: Sequence[int]) -> None:
        monkeypatch.setattr(books, "FORMAT", version)
        CityPrior.open(place, CITY, CODED).close()
        for seed in seeds:
            drive(place, seed, CODED, day=seed)
            upkeep.compact(ledger(place)) if seed == 1 else None
        monkeypatch.undo()

    fill(tmp_path / "all", 4, [1, 2, 3])
    fill(tmp_path / "from", 3 if older == "from" else 4, [1, 2])
    fill(tmp_path / "into", 3 if older == "into" else 4, [])
    merge(tmp_path / "into", tmp_path / "from")
    drive(tmp_path / "into", 3, CODED, day=3)
    assert same(content(tmp_path / "into", CODED), content(tmp_path / "all", CODED))
    assert [r.id for r in ledger(tmp_path / "into").active()] == [r.id for r in ledger(tmp_path / "all").active()]
    assert upkeep.verify(ledger(tmp_path / "into")) == []
    count = {name: len(list((tmp_path / name).rglob("c/0/*/*"))) for name in ("from", "into", "all")}
    assert count["all"] < count[older] and sum(count.values()) > 3


# -- the format before --------------------------------------------------------------------------------------


def old_city(folder: Path) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Write a city of format 1 with one tile."""
    rng = np.random.default_rng(0)
    planes = np.zeros((SPEC.channels + 6, TILE, TILE), np.uint8)
    latent = rng.integers(-127, 128, (SPEC.channels, TILE, TILE)).astype(np.int8)
    evidence = rng.integers(0, 3, (TILE, TILE)).astype(np.uint16)
    planes[: SPEC.channels], planes[SPEC.channels] = latent.view(np.uint8), evidence
    planes[SPEC.channels + 3] = 7 * (evidence > 0)  # 7 x 256 s
    storage = Storage(folder / CITY)
    storage.put(
        "prior.json",
        json.dumps(
            {"format": 1, "location": CITY, "spec": {"channels": 3, "cell": 0.3, "fingerprint": "abc123"}}
        ).encode(),
    )
    TileSet(storage.below("cells"), len(planes)).save({(0, -1): planes})
    return latent * (evidence > 0), evidence


def test_format_1_is_imported_as_one_drive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent, evidence = old_city(tmp_path / "old")
    with pytest.raises(NmpError, match=r"has format 1.*nmp prior import NEW"):
        content(tmp_path / "old")
    assert cli.main(["prior", "import", str(tmp_path / "new" / CITY), str(tmp_path / "old" / CITY)]) == 0
    with CityPrior.open(tmp_path / "new", CITY, SPEC, read_only=True) as prior:
        window = Window(0, -TILE, TILE, TILE)
        assert all(map(np.array_equal, prior.read(window), (latent, evidence)))
        assert np.array_equal(prior.last_seen(window), (evidence > 0) * 1792 * SECOND)
    assert "imported" in capsys.readouterr().out
    assert cli.main(["prior", "import", str(tmp_path / "new" / CITY), str(tmp_path)]) == 2


# -- the command --------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert cli.main(["prior", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    city = tmp_path / CITY
    ids = [drive(tmp_path, seed, day=seed, vehicle=f"car {seed}") for seed in range(3)]
    before = content(tmp_path)
    assert [e["id"] for e in json.loads(run(capsys, "log", city, "--json"))] == ids
    table = run(capsys, "log", city)
    assert "car 1" in table and "1997-05-20" in table and table.count("abc123") == 3 and len(table.splitlines()) == 4
    shown = json.loads(run(capsys, "show", city, "--json"))
    assert (shown["drives"], shown["fingerprint"], shown["location"]) == (3, "abc123", CITY)
    assert "car 2" in run(capsys, "show", city, ids[2][:6])
    first = ledger(tmp_path).find(ids[0])
    listed = json.loads(run(capsys, "show", city, ids[0][:8], "--tiles", "--json"))["tile_list"]
    assert [(tile["row"], tile["col"], tile["cells"]) for tile in listed] == [row[:3] for row in first.tiles.tolist()]
    assert all(tile["x_min_m"] == pytest.approx(tile["col"] * TILE * 0.3) for tile in listed)
    assert len(run(capsys, "show", city, ids[0][:8], "--tiles").splitlines()) == 14 + len(listed) + 1
    assert "give the beginning of its id" in run(capsys, "show", city, "--tiles", code=2)
    found = json.loads(run(capsys, "diff", city, "empty", ids[0], "--json"))
    assert found["tiles"] == len(listed) and [tile["added"] for tile in found["tile_list"]] == [
        t["cells"] for t in listed
    ]
    assert found["tile_list"][0]["y_max_m"] == pytest.approx((found["tile_list"][0]["row"] + 1) * TILE * 0.3)
    assert "tile_list" not in run(capsys, "diff", city, "empty", "now")
    assert json.loads(run(capsys, "diff", city, "empty", "now", "--json"))["added"] == (before[3] > 0).sum()

    archive = tmp_path / "city.zip"
    run(capsys, "export", city, "--out", archive)
    assert "exists" in run(capsys, "export", city, "--out", archive, code=2)
    run(capsys, "export", city, "--out", tmp_path / "one.zip", "--drives", ids[0][:7])
    run(capsys, "import", tmp_path / "new" / CITY, tmp_path / "one.zip")
    assert "2 drives came in, 1 were known" in run(capsys, "import", tmp_path / "new" / CITY, archive)
    assert same(content(tmp_path / "new"), before)

    run(capsys, "rollback", city, "--to", ids[0][:7])
    assert run(capsys, "log", city).count("left out") == 2
    run(capsys, "rollback", city, "--undo", ids[1], ids[2][:9])
    assert same(content(tmp_path), before)
    run(capsys, "rollback", city, "--drop", ids[1])
    assert "0 drives came in" in run(capsys, "merge", city, tmp_path / "new" / CITY)

    assert "none 7 days older than the newest" in run(capsys, "compact", city)
    assert "holds 2 drives" in run(capsys, "compact", city, "--older-than", 0)
    assert "nothing to compact" in run(capsys, "compact", city, "--older-than", 0)
    run(capsys, "export", city, "--out", tmp_path / "base.zip")
    assert "and the base" in run(capsys, "import", tmp_path / "third" / CITY, tmp_path / "base.zip")
    assert same(content(tmp_path / "third"), content(tmp_path))

    assert "all checksums are right" in run(capsys, "verify", city)
    flip_a_bit(next(city.rglob("c/0/*/*")))
    flip_a_bit(city / "city.json")
    assert "city.json is unreadable" in run(capsys, "verify", city, code=2)
    assert "repaired" in run(capsys, "verify", city, "--repair", "--from", tmp_path / "third" / CITY)
    assert same(content(tmp_path / "third"), content(tmp_path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["log", "nowhere"], "there is no prior in"),
        (["show", CITY, "zz"], "no drive of .* begin with 'zz'"),
        (["rollback", CITY, "--undo", "zz"], "left out begin with 'zz'"),
        (["compact", CITY, "--older-than", "-1"], "--older-than is -1.0 days"),
        (["import", CITY, "none.zip"], "none.zip does not exist"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    import re

    drive(tmp_path, 1, frames=1)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run(capsys, *arguments, code=2))


# -- ahead of the car ---------------------------------------------------------------------------------------


def test_prefetch_brings_in_what_lies_ahead_in_the_order_in_which_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = np.ones((3, 1, 1), np.int8), np.ones((1, 1), np.uint16)
    with CityPrior.open(tmp_path, CITY, SPEC) as prior:
        for tile in range(-8, 9):
            prior.write(Window(0, tile * TILE, 1, 1), *one, SECOND)
    loaded: list[int] = []
    load = State.load

    def spy(state: State, keys: Iterable[Key]) -> dict[Key, Cells]:
        found = load(state, keys)
        loaded.extend(col for _, col in found)
        return found

    monkeypatch.setattr(State, "load", spy)
    with CityPrior.open(tmp_path, CITY, SPEC, read_only=True) as prior:
        prior.read(Window(0, 0, 1, TILE))
        for x, heading, seen in ((0.0, 0.0, [0, -1, 1, 2, 3, 4]), (-9.0, np.pi, [-2, -3, -4, -5, -6])):
            loaded.clear() if x else None
            prior.prefetch(x, 0.0, heading)
            deadline = time.monotonic() + 5
            while len(loaded) < len(seen) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert loaded == seen
        assert prior.read(Window(0, 0, 1, 5 * TILE))[1].sum() == 5 and len(loaded) == 5, "all in memory"
        with pytest.raises(NmpError, match="not finite"):
            prior.prefetch(float("nan"), 0.0, 0.0)


def test_a_drive_that_goes_on_reads_from_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the first window is there, what a car comes to was folded in the background."""
    for seed in range(3):
        drive(tmp_path, seed, CODED)
    waited_for: list[Key] = []
    load = CityPrior._load

    def spy(prior: CityPrior, keys: list[Key]) -> dict[Key, Tile]:
        found = load(prior, keys)
        waited_for.extend(found)
        return found

    monkeypatch.setattr(CityPrior, "_load", spy)
    with CityPrior.open(tmp_path, CITY, CODED) as prior:
        places = set(map(tuple, prior.places().tolist()))
        for x in range(-60, 60, 2):
            prior.prefetch(x, 0.0, 0.0)
            prior.read(Window.around(x, 0.0, 0.3, 100, 100))
            if x == -60:
                waited_for.clear()
            time.sleep(0.02)
    assert len(places) > 8 and not waited_for
