"""The city prior: what is written is read back, whatever happens in between."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior import CityPrior, PriorSpec, Window, ledger, upkeep
from nmp.prior.cells import Cells, decode, encode, on_grid
from nmp.prior.drive import Tile
from nmp.prior.ledger import Ledger
from nmp.prior.record import Record, checked, tile_table, unchecked
from nmp.prior.storage import Storage
from nmp.prior.tiles import ORIGIN, TILE, blocks

CITY = "boston-seaport"
SPEC = PriorSpec(channels=4, cell=0.3, fingerprint="abc123")
SECOND = 1_000_000_000


def opened(folder: Path, spec: PriorSpec = SPEC, **options: object) -> CityPrior:
    """Open a prior that saves only when told to."""
    return CityPrior.open(folder, CITY, spec, **{"flush_interval_s": 1e6, **options})  # type: ignore[arg-type]


def cells(window: Window, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Return random content for a window, with some cells of evidence 0."""
    rng = np.random.default_rng(seed)
    latent = rng.integers(-128, 128, (SPEC.channels, *window.shape)).astype(np.int8)
    return latent, rng.choice([0, 1, 255, 256, 65535], window.shape).astype(np.uint16)


def tile_file(folder: Path, row: int = 0, col: int = 0) -> Path:
    """The file of a tile in the only drive of a city."""
    [drive] = (folder / CITY / "drives").iterdir()
    shard = Ledger.open(Storage(folder / CITY), read_only=True).shard
    return drive / "c" / "0" / str((row + ORIGIN) // shard) / str((col + ORIGIN) // shard)


def write_once(folder: Path, window: Window, seed: int = 0, **options: object) -> None:
    """Commit a drive."""
    with opened(folder, **options) as prior:  # type: ignore[arg-type]
        prior.write(window, *cells(window, seed), SECOND)


def drive_files(folder: Path) -> dict[str, bytes]:
    """What was committed."""
    root = folder / CITY
    return {
        str(p.relative_to(root)): p.read_bytes()
        for n in ("commits", "drives")
        for p in (root / n).rglob("*")
        if p.is_file()
    }


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


# -- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(224, 224), (5, 8), (1, 1)])
@pytest.mark.parametrize("x, y", [(0.0, 0.0), (-0.1, -1234.56), (2817.3, 1.4999)])
def test_window_around_is_snapped_and_centred(x: float, y: float, rows: int, cols: int) -> None:
    window = Window.around(x, y, 0.3, rows, cols)
    assert window.shape == (rows, cols)
    assert abs((window.col + cols / 2) * 0.3 - x) <= 0.15 + 1e-9
    assert abs((window.row + rows / 2) * 0.3 - y) <= 0.15 + 1e-9


def test_window_around_one_cell_is_the_floor() -> None:
    assert Window.around(-0.1, 0.31, 0.3, 1, 1) == Window(row=1, col=-1, rows=1, cols=1)


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_window_around_nowhere_is_refused(x: float) -> None:
    with pytest.raises(NmpError, match="localisation"):
        Window.around(x, 0, 0.3, 4, 4)


@pytest.mark.parametrize("window", [Window(-70, -1, 140, 2), Window(0, 0, 64, 64), Window(63, -64, 2, 200)])
def test_blocks_cover_a_window_once(window: Window) -> None:
    seen = np.zeros(window.shape, int)
    for block in blocks(window):
        seen[block.in_window] += 1
        # the first cell of the block is the same one, counted from the tile and from the window
        assert block.key[0] * TILE + block.in_tile[0].start == window.row + block.in_window[0].start
        assert block.key[1] * TILE + block.in_tile[1].start == window.col + block.in_window[1].start
    assert (seen == 1).all()


@pytest.mark.parametrize("merge", ["sum", "latest"])
def test_tile_survives_packing(merge: str) -> None:
    window = Window(0, 0, TILE, TILE)
    spec = PriorSpec(4, 0.3, "abc123", merge=merge)
    tile = Tile(Cells(SPEC.channels), spec)
    everywhere = slice(None), slice(None)
    for seed in (0, 1):
        latent, evidence = cells(window, seed)
        tile.store(everywhere, latent, np.maximum(evidence, tile.cells.evidence), 4_000_000_000, evidence > 0)
    again = Tile.unpack(tile.pack(), spec)
    for name in ("latent", "evidence", "last_seen_s", "traversals"):
        assert np.array_equal(getattr(tile.cells, name), getattr(again.cells, name)), name
        assert np.array_equal(getattr(tile.contribution(), name), getattr(again.contribution(), name)), name


@pytest.mark.parametrize("cap", [300, 4096, 65535])
def test_a_drive_adds_what_it_saw_and_nothing_of_what_was_there(cap: int) -> None:
    rng = np.random.default_rng(0)
    spec = PriorSpec(5, 0.3, "abc123", evidence_cap=cap)
    known = Cells(5)
    known.evidence[...] = rng.integers(0, min(cap, 5000) + 1, (TILE, TILE))
    known.latent[...] = rng.integers(-128, 128, (5, TILE, TILE)) * (known.evidence > 0)
    tile = Tile(known, spec)
    # What the drive saw by itself: exact sums, of which the cap takes the same share as of what is stored.
    sums, parts, weights = np.zeros((5, TILE, TILE)), np.zeros((TILE, TILE)), np.zeros((TILE, TILE), np.int64)
    kept = np.ones((TILE, TILE))
    for frame in range(90):
        row, col = rng.integers(0, 40, 2)
        block = (slice(row, row + 24), slice(col, col + 24)) if frame % 4 else (slice(0, TILE), slice(0, TILE))
        latent, evidence = (v[..., *block].astype(int) for v in (tile.cells.latent, tile.cells.evidence))
        shape = evidence.shape
        after = np.minimum(evidence + rng.integers(0, 3000, shape) * (rng.random(shape) > 0.2), 65535)
        new = rng.integers(-128, 128, latent.shape).astype(np.int8)
        changed = rng.random(shape) > 0.3
        adds = changed & (after > evidence)
        left = np.where(adds, np.minimum(after, cap) / np.maximum(after, 1), 1.0)
        sums[:, *block] = (sums[:, *block] + np.where(adds, new.astype(int) * after - latent * evidence, 0)) * left
        parts[block] = (parts[block] + np.where(adds, after - evidence, 0)) * left
        kept[block] *= left
        weights[block] += np.where(adds, after - evidence, 0)
        tile.store(block, new, after.astype(np.uint16), 1000 + frame, changed)
        if frame == 20:  # it was dropped from memory, and is loaded again
            tile = Tile.unpack(tile.copy().pack(), spec)
    np.testing.assert_allclose(tile.kept, kept, rtol=1e-4)
    own = tile.contribution()
    assert np.array_equal(own.evidence, np.minimum(weights, 65535)) and (weights > 60000).any()
    seen = parts >= 1
    expected = (sums / np.maximum(parts, 1))[:, seen].clip(-128, 127)
    np.testing.assert_allclose(own.latent[:, seen], expected, atol=0.51 if cap == 65535 else 0.6)
    assert seen.mean() > 0.9 and (np.abs(expected) > 100).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_committed_cells_survive_packing(bits: int) -> None:
    spec = PriorSpec(4, 0.3, "abc123", bits=bits)
    given = Cells(4)
    latent, given.evidence[...] = cells(Window(0, 0, TILE, TILE))
    given.latent[...] = on_grid(latent, bits) * (given.evidence > 0)
    given.last_seen_s[...], given.traversals[...] = 3_000_000_000, 300
    planes = encode(given, spec)
    again = decode(planes, spec)
    for name in ("latent", "evidence", "last_seen_s", "traversals"):
        assert np.array_equal(getattr(given, name), getattr(again, name)), name
    assert planes[: spec.channels].max() < 2**bits
    # never further away than half of a step
    assert np.abs(on_grid(latent, bits).astype(int) - latent.clip(-127, 127)).max() <= 127 / (2**bits - 1) + 1


# -- reading and writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, col", [(0, 0), (-100, -70), (-1, 63), (100_000, -100_000)])
def test_what_is_written_is_read_before_and_after_reopening(tmp_path: Path, row: int, col: int) -> None:
    window = Window(row, col, 150, 97)
    latent, evidence = cells(window)
    expected = np.where(evidence > 0, latent, 0)
    with opened(tmp_path) as prior:
        prior.write(window, latent, evidence, 7 * SECOND)
        assert all(map(np.array_equal, prior.read(window), (expected, evidence)))
    with opened(tmp_path) as prior:
        found_latent, found_evidence = prior.read(window)
        assert found_latent.dtype == np.int8 and found_evidence.dtype == np.uint16
        assert np.array_equal(found_latent, expected) and np.array_equal(found_evidence, evidence)
        assert np.array_equal(prior.last_seen(window), (evidence > 0) * 7 * SECOND)
        # seen through another window: one ring of unknown cells around it
        _, wide = prior.read(Window(row - 1, col - 1, 152, 99))
        assert np.array_equal(wide, np.pad(evidence, 1))


def test_only_changed_cells_are_stored(tmp_path: Path) -> None:
    window = Window(-10, -10, 90, 90)
    first, second = cells(window, 1), cells(window, 2)
    everywhere = np.ones(window.shape, bool)
    changed = np.random.default_rng(3).random(window.shape) < 0.5
    with opened(tmp_path) as prior:
        prior.write(window, *first, 5 * SECOND, everywhere)
        prior.write(window, *second, 9 * SECOND, changed)
        latent, evidence = prior.read(window)
        grown = changed & (second[1] > first[1])  # what adds no evidence was seen, and says nothing new
        assert 0.1 < grown.mean() < 0.4
        assert np.array_equal(latent, np.where(grown, second[0], np.where(first[1] > 0, first[0], 0)))
        assert np.array_equal(evidence, np.where(grown, second[1], first[1]))
        assert np.array_equal(prior.last_seen(window), np.where(changed, 9, 5) * SECOND)


def test_a_read_is_a_copy(tmp_path: Path) -> None:
    window = Window(0, 0, 4, 4)
    with opened(tmp_path) as prior:
        prior.write(window, *cells(window), SECOND)
        before = prior.read(window)
        expected = before[0].copy()
        before[0][...] = 1
        assert np.array_equal(prior.read(window)[0], expected)


def test_nothing_changed_creates_nothing(tmp_path: Path) -> None:
    window = Window(0, 0, 100, 100)
    latent, evidence = cells(window)
    with opened(tmp_path) as prior:
        prior.write(window, latent, evidence, SECOND, np.zeros(window.shape, bool))
        assert prior.extent() is None and prior.statistics()["tiles"] == 0
        assert not prior.read(window)[1].any() and prior.statistics()["resident_tiles"] == 0


def test_the_first_second_of_a_simulated_clock_is_not_never(tmp_path: Path) -> None:
    window = Window(0, 0, 1, 1)
    with opened(tmp_path) as prior:
        prior.write(window, *cells(window), 0, np.ones((1, 1), bool))
        assert prior.last_seen(window) == SECOND


def test_extent_and_statistics(tmp_path: Path) -> None:
    one = np.ones((SPEC.channels, 1, 1), np.int8), np.ones((1, 1), np.uint16)
    with opened(tmp_path) as prior:
        prior.write(Window(-1, 5, 1, 1), *one, SECOND)
        prior.write(Window(130, 5, 1, 1), *one, SECOND)
        assert prior.extent() == Window(-64, 0, 256, 64)
        assert prior.statistics()["dirty_tiles"] == prior.statistics()["tiles"] == 2
        prior.flush()
        assert prior.statistics()["dirty_tiles"] == 0 and prior.statistics()["tiles"] == 2
    with opened(tmp_path, read_only=True) as prior:
        assert prior.extent() == Window(-64, 0, 256, 64) and prior.statistics()["resident_tiles"] == 0


def test_statistics_of_a_large_city_look_at_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for every few seconds, between two frames."""
    opened(tmp_path).close()
    for seed in range(2):  # both drives were at the same places
        rows = [(row, col, 4096, seed) for row in range(-300, 300) for col in range(500)]
        record = Record(CITY, SPEC, f"car {seed}", SECOND, SECOND, tile_table(rows))
        Storage(tmp_path / CITY).put(f"commits/{record.id}.json", record.to_bytes())
    with opened(tmp_path) as prior:
        one = np.ones((SPEC.channels, 1, 1), np.int8), np.ones((1, 1), np.uint16)
        prior.write(Window(400 * TILE, 0, 1, 1), *one, SECOND)
        with monkeypatch.context() as patch:
            for owner, name in ((Storage, "get"), (Storage, "keys"), (Storage, "size"), (os, "walk"), (os, "stat")):
                patch.setattr(owner, name, lambda *_: pytest.fail("something stored was looked at"))
            begin = time.thread_time()
            found = prior.statistics()
            assert time.thread_time() - begin < 0.01
        assert (found["tiles"], found["resident_tiles"], found["damaged_tiles"]) == (300_001, 1, 0)
        assert not prior.damage
        prior.read(Window(0, 0, 1, 1))  # the files of these tiles were never there
        assert prior.statistics()["damaged_tiles"] == 2 and prior.damage.startswith("tile (0, 0) of ")
        assert "has vanished" in prior.damage
        prior.discard()


def test_results_do_not_depend_on_eviction_or_saving(tmp_path: Path) -> None:
    spec = PriorSpec(channels=64, cell=0.3, fingerprint="big")  # a tile of 1.4 MiB: five fill 8 MiB
    rng = np.random.default_rng(0)
    with (
        opened(tmp_path / "large", spec) as large,
        opened(tmp_path / "small", spec, resident_mb=8, flush_interval_s=0.01) as small,
    ):
        for step in range(15):
            window = Window(*rng.integers(-300, 300, 2).tolist(), 90, 110)
            evidence = rng.integers(0, 3, window.shape).astype(np.uint16)
            merged = []
            for prior in (large, small):
                latent, old = prior.read(window)
                latent += rng.integers(-5, 6) if prior is large else 0
                merged.append((latent, old))
            assert np.array_equal(merged[0][1], merged[1][1])
            # what one of them read and changed goes into both
            for prior in (large, small):
                prior.write(window, merged[0][0], merged[0][1] + evidence, step * SECOND)
        everything = Window(-320, -320, 800, 800)
        assert all(map(np.array_equal, large.read(everything), small.read(everything)))
        assert np.array_equal(large.last_seen(everything), small.last_seen(everything))
        small.flush()
        small.read(everything)
        assert small.statistics()["resident_bytes"] <= 2**23
        assert small.statistics()["tiles"] == large.statistics()["tiles"] > 30
    assert drive_files(tmp_path / "large") == drive_files(tmp_path / "small") != {}


def test_unsaved_tiles_do_not_fill_the_memory(tmp_path: Path) -> None:
    spec = PriorSpec(channels=64, cell=0.3, fingerprint="big")
    one = np.ones((64, 1, 1), np.int8), np.ones((1, 1), np.uint16)
    with opened(tmp_path, spec, resident_mb=8) as prior:
        for tile in range(20):
            prior.write(Window(0, tile * TILE, 1, 1), *one, SECOND)
            assert prior.statistics()["resident_bytes"] <= 2**23
        assert prior.read(Window(0, 0, 1, 20 * TILE))[1].sum() == 20


def test_background_thread_saves(tmp_path: Path) -> None:
    window = Window(0, 0, 10, 10)
    with opened(tmp_path, flush_interval_s=0.02) as prior:
        prior.write(window, *cells(window), SECOND)
        wait_until(lambda: prior.statistics()["dirty_tiles"] == 0)
        assert [p for p in (tmp_path / CITY / "open").rglob(str(ORIGIN)) if p.is_file()]


# -- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": np.zeros((4, 5, 5), np.float32)}, "latent .* float32 .* pass int8"),
        ({"latent": np.zeros((3, 5, 5), np.int8)}, r"latent .*\[3, 5, 5\].*\[4, 5, 5\]"),
        ({"evidence": np.zeros((5, 5), np.uint8)}, "evidence"),
        ({"changed": np.zeros((5, 4), bool)}, "changed"),
        ({"stamp_ns": -1}, "stamp"),
        ({"stamp_ns": 2**63}, "stamp"),
        ({"window": Window(2**26, 0, 5, 5)}, "localisation"),
        ({"window": Window(0, -(2**26) - 1, 5, 5)}, "localisation"),
    ],
)
def test_unfit_arguments_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    window = Window(0, 0, 5, 5)
    latent, evidence = cells(window)
    good = {"window": window, "latent": latent, "evidence": evidence, "stamp_ns": SECOND}
    with opened(tmp_path) as prior:
        with pytest.raises(NmpError, match=message):
            prior.write(**{**good, "changed": np.ones((5, 5), bool), **change})  # type: ignore[arg-type]
        assert prior.extent() is None


@pytest.mark.parametrize("location", ["", ".", "..", "a/b", "../a"])
def test_location_has_to_be_a_plain_name(tmp_path: Path, location: str) -> None:
    with pytest.raises(NmpError, match="location"):
        CityPrior.open(tmp_path / "prior", location, SPEC)


def test_closed_prior_says_so(tmp_path: Path) -> None:
    prior = opened(tmp_path)
    prior.close()
    prior.close()
    window = Window(0, 0, 5, 5)
    for action in (prior.flush, prior.extent, lambda: prior.read(window)):
        with pytest.raises(NmpError, match="closed"):
            action()
    with pytest.raises(NmpError, match="closed"):
        prior.write(window, *cells(window), SECOND)


def test_read_only(tmp_path: Path) -> None:
    window = Window(0, 0, 5, 5)
    with opened(tmp_path / "missing", read_only=True) as prior:
        assert prior.extent() is None and not prior.read(window)[0].any()
        assert prior.statistics()["tiles"] == 0
        with pytest.raises(NmpError, match="read-only"):
            prior.write(window, *cells(window), SECOND)
        prior.flush()
    assert not (tmp_path / "missing").exists()


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NmpError, match="--prior"):
        opened(tmp_path / "file")


# -- compatibility ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    "spec, message",
    [
        (PriorSpec(4, 0.3, "def456"), "written by model abc123, these weights are def456: .*another --prior"),
        (PriorSpec(8, 0.3, "abc123"), "has 4 channels .* wants 8"),
        (PriorSpec(4, 0.6, "abc123"), "cells of 0.3 m, .* in 0.6 m"),
        (PriorSpec(4, 0.3, "abc123", merge="latest"), "merge rule sum, not latest"),
        (PriorSpec(4, 0.3, "abc123", bits=4), "bits per channel 8, not 4"),
        (PriorSpec(4, 0.3, "abc123", evidence_cap=9), "evidence cap 65535, not 9"),
    ],
)
def test_other_latents_are_refused(tmp_path: Path, spec: PriorSpec, message: str, read_only: bool) -> None:
    opened(tmp_path).close()
    with pytest.raises(NmpError, match=message):
        opened(tmp_path, spec, read_only=read_only)
    opened(tmp_path).close()  # the refusal left no lock


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 5}, "format 5, .* update nmp"),
        ({"format": "x"}, "unreadable"),
        ({"location": "singapore-queenstown"}, "holds singapore-queenstown, not boston"),
        ({"spec": {"channels": 4}}, "unreadable"),
        ({"spec": {"channels": "4", "cell": 0.3, "fingerprint": "abc123"}}, "unreadable"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    opened(tmp_path).close()
    path = tmp_path / CITY / "city.json"
    path.write_bytes(checked({**unchecked(path.read_bytes()), **change}))
    with pytest.raises(NmpError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    opened(tmp_path).close()
    (tmp_path / CITY / "city.json").write_bytes(content)
    with pytest.raises(NmpError, match="city.json is unreadable.*verify --repair"):
        opened(tmp_path)


def test_tiles_without_a_manifest_are_refused(tmp_path: Path) -> None:
    write_once(tmp_path, Window(0, 0, 5, 5))
    file = tile_file(tmp_path)
    (tmp_path / CITY / "city.json").unlink()
    for read_only in (False, True):
        with pytest.raises(NmpError, match="city.json is unreadable"):
            opened(tmp_path, read_only=read_only)
    assert file.is_file()


def test_a_damaged_array_description_harms_nothing(tmp_path: Path) -> None:
    window = Window(0, 0, 5, 5)
    write_once(tmp_path, window)
    next((tmp_path / CITY / "drives").glob("*/zarr.json")).write_bytes(b"{")
    with opened(tmp_path) as prior:
        assert np.array_equal(prior.read(window)[1], cells(window)[1])


def test_two_writers_add_up(tmp_path: Path) -> None:
    window = Window(0, 0, 5, 5)
    latent, _ = cells(window)
    with opened(tmp_path) as one, opened(tmp_path) as two:
        for prior, seconds in ((one, 5), (two, 9)):
            prior.write(window, latent, np.full((5, 5), 10, np.uint16), seconds * SECOND)
    with opened(tmp_path, read_only=True) as prior:
        found, evidence = prior.read(window)
        assert np.array_equal(found, latent) and (evidence == 20).all()
        assert (prior.last_seen(window) == 9 * SECOND).all() and (prior.traversals(window) == 2).all()


# -- damage -------------------------------------------------------------------------------------------------


def flip_a_bit(content: bytes, position: int) -> bytes:
    damaged = bytearray(content)
    damaged[position // 8] ^= 1 << position % 8
    return bytes(damaged)


@pytest.fixture(params=[2, 4])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cities are made in the format where every tile is a file, and in that where they share files."""
    number: int = request.param
    monkeypatch.setattr(ledger, "FORMAT", number)
    return number


def test_corrupt_tile_is_unknown_reported_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    window = Window(0, 0, TILE, 2 * TILE)
    write_once(tmp_path, window)
    evidence = cells(window)[1]
    evidence[:, :TILE] = 0
    file = tile_file(tmp_path)
    damaged = flip_a_bit(file.read_bytes(), 4321)
    file.write_bytes(damaged)

    with opened(tmp_path, read_only=True) as prior, caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert np.array_equal(prior.read(window)[1], evidence)
    assert len(caplog.records) == 1 and file.read_bytes() == damaged
    caplog.clear()

    with opened(tmp_path) as prior, caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert np.array_equal(prior.read(window)[1], evidence)
        assert "(0, 0)" in caplog.text and str(file) in caplog.text and len(caplog.records) == 1
        prior.write(window, *cells(window, 5), 2 * SECOND)
    if version == 4:  # the other tile is in the same file
        assert file.read_bytes() == damaged
        return
    assert file.with_name(f"{ORIGIN}.corrupt").read_bytes() == damaged
    file.write_bytes(damaged)  # a second time: the first file stays
    with opened(tmp_path) as prior:
        assert np.array_equal(prior.read(window)[1][:, :TILE], cells(window, 5)[1][:, :TILE])
    assert len(list(file.parent.glob("*.corrupt"))) == 2


def test_corrupt_tile_is_kept_when_a_write_comes_first(tmp_path: Path, version: int) -> None:
    window = Window(0, 0, 5, 5)
    write_once(tmp_path, window)
    file = tile_file(tmp_path)
    file.write_bytes(b"")
    with opened(tmp_path) as prior:
        prior.write(Window(20, 20, 5, 5), *cells(window, 2), 2 * SECOND)
        assert not prior.read(window)[1].any()
    assert (file if version == 4 else file.with_name(f"{ORIGIN}.corrupt")).read_bytes() == b""


def test_corrupt_tile_of_the_drive_under_way_falls_back_to_what_was_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = PriorSpec(64, 0.3, "big")
    one = np.ones((64, 1, 1), np.int8), np.ones((1, 1), np.uint16)
    with opened(tmp_path, spec) as prior:
        prior.write(Window(0, 0, 1, 1), *one, SECOND)
    with opened(tmp_path, spec, resident_mb=4) as prior, caplog.at_level(logging.WARNING):
        prior.write(Window(0, 0, 1, 1), one[0], 5 * one[1], SECOND)
        prior.flush()
        prior.read(Window(0, TILE, 1, 1))
        for tile in range(1, 20):  # so that the first one leaves the memory
            prior.write(Window(0, tile * TILE, 1, 1), *one, SECOND)
            prior.flush()
        [file] = [p for p in (tmp_path / CITY / "open").rglob(f"{ORIGIN}/{ORIGIN}") if p.is_file()]
        file.write_bytes(flip_a_bit(file.read_bytes(), 99))
        assert prior.read(Window(0, 0, 1, 1))[1] == 1
        assert "drive under way" in caplog.text


def test_every_bit_flip_and_cut_is_detected(tmp_path: Path, version: int) -> None:
    window = Window(0, 0, TILE, TILE)
    write_once(tmp_path, window)
    file = tile_file(tmp_path)
    content = file.read_bytes()
    rng = random.Random(0)
    for number in range(100):
        cut = content[: rng.randrange(len(content))]
        file.write_bytes(cut if number % 5 == 0 else flip_a_bit(content, rng.randrange(8 * len(content))))
        with opened(tmp_path, read_only=True) as prior:
            assert not prior.read(window)[1].any(), number


def test_vanished_tile_is_unknown_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int) -> None:
    window = Window(0, 0, 5, 5)
    write_once(tmp_path, window)
    with opened(tmp_path) as prior, caplog.at_level(logging.WARNING):
        tile_file(tmp_path).unlink()
        assert not prior.read(window)[1].any() and not prior.read(window)[1].any()
        assert len(caplog.records) == 1 and "vanished" in caplog.text


def test_a_file_that_cannot_be_read_is_not_called_corrupt(tmp_path: Path, version: int) -> None:
    window = Window(0, 0, 5, 5)
    write_once(tmp_path, window)
    with opened(tmp_path) as prior:
        file = tile_file(tmp_path)
        saved = file.read_bytes()
        file.unlink()
        file.symlink_to(file)  # stands for a failing disk: present, but no bytes come
        with pytest.raises(NmpError, match="cannot read .* check the disk"):
            prior.read(window)
        with pytest.raises(NmpError, match="cannot read"):
            prior.write(window, *cells(window), SECOND)
        file.unlink()
        file.write_bytes(saved)
        assert prior.read(window)[1].any()


# -- failing and dying --------------------------------------------------------------------------------------


def test_failed_save_is_told_kept_and_repeated(tmp_path: Path) -> None:
    window = Window(0, 0, 10, 10)
    latent, evidence = cells(window)
    with opened(tmp_path, flush_interval_s=0.02) as prior:
        obstacle = tmp_path / CITY / "open"
        obstacle.write_text("")  # a file where tiles want a folder
        prior.write(window, latent, evidence, SECOND)
        wait_until(lambda: bool(prior.unsaved))
        assert re.match("cannot save 1 tiles of the prior in .*: free disk space", prior.unsaved)
        prior.write(Window(0, 20, 10, 10), latent, evidence, SECOND)
        with pytest.raises(NmpError, match="Not a directory|File exists"):
            prior.flush()
        assert prior.statistics()["dirty_tiles"] == 1
        # what is written meanwhile is stored none the less
        assert np.array_equal(prior.read(Window(0, 20, 10, 10))[1], evidence)
        obstacle.unlink()
        prior.flush()
        assert not prior.unsaved
    with opened(tmp_path) as prior:
        assert np.array_equal(prior.read(Window(0, 20, 10, 10))[1], evidence)


def test_memory_is_bounded_while_nothing_can_be_saved(tmp_path: Path) -> None:
    spec = PriorSpec(channels=64, cell=0.3, fingerprint="big")
    one = np.ones((64, 1, 1), np.int8), np.ones((1, 1), np.uint16)
    prior = opened(tmp_path, spec, resident_mb=8)
    obstacle = tmp_path / CITY / "open"
    obstacle.write_text("")
    stored = 0
    for tile in range(20):
        try:
            prior.write(Window(0, tile * TILE, 1, 1), *one, SECOND)
            stored += 1
        except NmpError:
            pass
    assert prior.statistics()["resident_bytes"] <= 2**23
    assert prior.read(Window(0, 0, 1, 20 * TILE))[1].sum() == stored < 20
    with pytest.raises(NmpError, match="cannot save"):
        prior.close()
    obstacle.unlink()
    opened(tmp_path, spec).close()  # the lock is free all the same


def run_child(code: str, folder: Path, **options: object) -> subprocess.Popen[str]:
    """Start python code that finds this module's names and ``folder``."""
    prelude = f"""
        import importlib.util, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        import numpy as np
        from nmp.errors import NmpError
        from nmp.prior import CityPrior, PriorSpec, Window
        folder = Path({str(folder)!r})
        spec = PriorSpec({SPEC.channels}, {SPEC.cell}, {SPEC.fingerprint!r})
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_full_disk_harms_nothing_stored(tmp_path: Path) -> None:
    # a limit on the size of files stands for the full disk: part of the tile is written, then an error comes
    child = run_child(
        f"""
        import resource
        window = Window(0, 0, 64, 64)
        noise = np.random.default_rng(0).integers(-128, 128, (4, 64, 64)).astype(np.int8)
        with CityPrior.open(folder, {CITY!r}, spec) as prior:
            prior.write(window, noise // 64, np.ones((64, 64), np.uint16), 10**9)
        prior = CityPrior.open(folder, {CITY!r}, spec, flush_interval_s=1e6)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        prior.write(window, noise, np.full((64, 64), 2, np.uint16), 10**9)
        try:
            prior.flush()
        except NmpError as error:
            print(error, flush=True)
        reader = CityPrior.open(folder, {CITY!r}, spec, read_only=True)
        print(reader.read(window)[1].max(), prior.read(window)[1].max(), flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        prior.close()
        """,
        tmp_path,
    )
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    message, seen = output.splitlines()
    assert "cannot save 1 tiles" in message and "File too large" in message and "[" not in message
    assert seen == "1 2"
    with opened(tmp_path, read_only=True) as prior:
        assert (prior.traversals(Window(0, 0, 64, 64)) == 2).all()


def test_kill_during_writes_loses_nothing_flushed_and_tears_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    window = Window(-64, -64, 192, 192)  # nine whole tiles
    writer = f"""
        window = Window(-64, -64, 192, 192)
        noise = np.random.default_rng(0).integers(-99, 99, (4, 192, 192)).astype(np.int8)
        spec = PriorSpec({SPEC.channels}, {SPEC.cell}, {SPEC.fingerprint!r}, merge="latest")
        with CityPrior.open(folder, {CITY!r}, spec, flush_interval_s=0.001) as prior:
            for number in range(FIRST, 60000):
                latent = np.full((4, 192, 192), number % 100, np.int8)
                if number % 2:  # files of very different sizes, for what a shorter one leaves of a longer one
                    latent[1:] = noise[1:]
                prior.write(window, latent, np.full((192, 192), number, np.uint16), number * 10**9)
                if number % 5 == 0:
                    prior.flush()
                    print(number, flush=True)
    """
    rng = random.Random(0)
    flushed = 1
    latest = PriorSpec(SPEC.channels, SPEC.cell, SPEC.fingerprint, merge="latest")
    for _ in range(6):
        child = run_child(writer.replace("FIRST", str(flushed + 1000)), tmp_path)
        assert child.stdout is not None
        flushed = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        lines = child.communicate(timeout=30)[0].splitlines(keepends=True)
        flushed = max([flushed, *(int(line) for line in lines if line.endswith("\n"))])
        with opened(tmp_path, latest) as prior, caplog.at_level(logging.WARNING):
            latent, evidence = prior.read(window)
            seconds = prior.last_seen(window) // SECOND
        assert not caplog.records, "no tile was corrupt"
        for row in (0, 64, 128):
            for col in (0, 64, 128):
                tile = slice(row, row + 64), slice(col, col + 64)
                number = int(evidence[tile][0, 0])
                assert number >= flushed, "a flushed tile was lost"
                assert (evidence[tile] == number).all() and (seconds[tile] == number).all()
                assert (latent[0][tile] == number % 100).all()
    assert not list((tmp_path / CITY / "open").iterdir()), "what the crash left was cleaned"


def test_new_folders_are_synced_before_anything_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power may fail at any moment: a file that was synced is lost with a folder that was not."""
    calls: list[tuple[str, str]] = []
    opened_as: dict[int, str] = {}
    mkdir, open_, fsync, rename = os.mkdir, os.open, os.fsync, Path.rename

    def spy_open(path: str | Path, *arguments: int, **options: int) -> int:
        descriptor = open_(path, *arguments, **options)
        opened_as[descriptor] = str(path)
        return descriptor

    def spy(name: str, path: object, action: Callable[[], object]) -> object:
        result = action()
        calls.append((name, str(path)))
        return result

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "mkdir", lambda path, *more: spy("mkdir", path, lambda: mkdir(path, *more)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: spy("sync", opened_as[descriptor], lambda: fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda path, to: spy("rename", path, lambda: rename(path, to)))
    place = tmp_path / "new" / "prior"
    folders: set[str] = set()
    for seed in range(2):
        with opened(place) as prior:
            prior.write(Window(0, 0, 150, 150), *cells(Window(0, 0, 150, 150), seed), (seed + 1) * SECOND)
            prior.flush()
            folders |= {str(path) for path in place.rglob("*") if path.is_dir()}
    upkeep.compact(Ledger.open(Storage(place / CITY)))
    folders |= {str(path) for path in place.rglob("*") if path.is_dir()}
    made = [path for name, path in calls if name == "mkdir"]
    assert {"open", "drives", "commits", "bases"} <= {
        Path(path).parent.name for path in folders | {f"{place}/commits/x"}
    }
    assert folders <= set(made), "nobody else makes folders"
    for (name, path), after in zip(calls, calls[1:], strict=False):
        if name in ("mkdir", "rename"):  # a drive that is over is renamed before it is deleted
            assert after == ("sync", str(Path(path).parent))


def test_a_kill_loses_no_more_than_the_last_flush_interval(tmp_path: Path) -> None:
    """Nothing flushes by hand: the background thread saves."""
    rng = random.Random(0)
    interval_s, margin_s = 0.5, 1.5  # on a machine that is busy with other tests
    code = f"""
        import time
        prior = CityPrior.open(folder, {CITY!r}, spec, flush_interval_s={interval_s})
        window = Window(0, 0, 100, 100)
        for count in range(1, 60000):
            latent, evidence = prior.read(window)
            prior.write(window, np.full_like(latent, 7), evidence + np.uint16(1), count * 10**9)
            print(count, time.monotonic(), flush=True)
            time.sleep(0.01)
    """
    for number in range(2):
        child = run_child(code, tmp_path / str(number))
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(interval_s + margin_s + rng.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        lines += child.communicate(timeout=30)[0].splitlines(keepends=True)
        written = [line.split() for line in lines if line.endswith("\n")]
        safe = [int(count) for count, at_s in written if float(at_s) < killed_s - interval_s - margin_s]
        with opened(tmp_path / str(number)) as prior:
            found = prior.read(Window(0, 0, 100, 100))[1]
        assert safe and safe[-1] <= found.min() and found.max() <= int(written[-1][0]) + 1


def test_unfinished_longer_file_does_not_spoil_the_next_tile(tmp_path: Path) -> None:
    window = Window(0, 0, 5, 5)
    with opened(tmp_path) as prior:
        prior.write(window, *cells(window), SECOND)
        prior.flush()
        [file] = [p for p in (tmp_path / CITY / "open").rglob(f"{ORIGIN}/{ORIGIN}") if p.is_file()]
        file.with_name(f"{ORIGIN}.__lock").write_bytes(b"x" * 1_000_000)
        prior.write(window, *cells(window, 2), SECOND)
        prior.flush()
        assert file.stat().st_size < 10_000
        expected = prior.read(window)[1]
    with opened(tmp_path) as prior:
        assert np.array_equal(prior.read(window)[1], np.maximum(expected, cells(window)[1]))


def test_a_removed_folder_is_noticed_and_what_is_in_memory_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    window = Window(0, 0, 5, 5)
    with opened(tmp_path) as prior, caplog.at_level(logging.ERROR):
        prior.write(window, *cells(window), SECOND)
        prior.flush()
        shutil.rmtree(tmp_path / CITY / "open")
        prior.write(Window(0, TILE, 5, 5), *cells(window, 2), SECOND)
        prior.flush()
        assert "is gone" in caplog.text
    with opened(tmp_path) as prior:
        assert np.array_equal(prior.read(window)[1], cells(window)[1])
        assert np.array_equal(prior.read(Window(0, TILE, 5, 5))[1], cells(window, 2)[1])


def test_program_that_forgets_to_close_is_saved(tmp_path: Path) -> None:
    child = run_child(
        f"""
        prior = CityPrior.open(folder, {CITY!r}, spec, flush_interval_s=1e6)
        prior.write(Window(0, 0, 2, 2), np.ones((4, 2, 2), np.int8), np.ones((2, 2), np.uint16), 10**9)
        """,
        tmp_path,
    )
    child.communicate(timeout=30)
    assert child.returncode == 0
    with opened(tmp_path, read_only=True) as prior:
        assert prior.read(Window(0, 0, 2, 2))[1].all()
