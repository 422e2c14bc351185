"""Cities built from recorded drives: the same bytes however they are built, and nothing that is not whole."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nmp import cli
from nmp.bags.nuscenes_to_bag import write_bag
from nmp.errors import NmpError
from nmp.fleet import worker
from nmp.fleet.build import Built, build
from nmp.fleet.plan import Plan
from nmp.fleet.survey import SPACING_M, Survey, evenly, survey
from nmp.fleet.worker import Worker
from nmp.frame import LocalMap
from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork
from nmp.model.weights import save_network
from nmp.prior import CityPrior, PriorSpec, Window, upkeep
from nmp.prior.ledger import Ledger
from nmp.prior.record import Record
from nmp.prior.storage import Storage
from nmp.prior.tiles import blocks
from tests.bag_fixtures import LOCATION, START_NS, make_shots
from tests.test_prior_drives import files

SECOND = 1_000_000_000
DRIVES = {"first": (0, 0.0), "second": (60, 20.0), "elsewhere": (30, 500.0)}
"""when they begin (s), how far along x (m): the first two are of one place"""


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bags")
    shots = make_shots(folder / "images", 2)
    for name, (later, east) in DRIVES.items():
        moved = [
            replace(s, stamp_ns=s.stamp_ns + later * SECOND, pose=([s.pose[0][0] + east, *s.pose[0][1:]], s.pose[1]))
            for s in shots
        ]
        write_bag(moved, LOCATION, folder / name)
    return {name: folder / name for name in DRIVES}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learned nothing, and looks for its pose in what is stored."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    small = {"backbone_stages": 2, "input_width": 64, "input_height": 32, "neck_channels": 8, "bev_channels": 16}
    save_network(BEVNetwork(NetworkConfig(**small, prior_channels=4, align=True)), path, {})  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def one_by_one(bags: dict[str, Path], weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the city that ``nmp map`` makes, bag after bag in the order of time."""
    folder = tmp_path_factory.mktemp("mapped")
    for name in ("first", "elsewhere", "second"):
        out = ["--out", str(folder / name), "--prior", str(folder / "prior"), "--weights", str(weights)]
        assert cli.main(["map", str(bags[name]), *out, "--threads", "1"]) == 0
    return files(folder / "prior")


def make(prior: Path, weights: Path, bags: list[Path], **options: Any) -> Built:
    return build(bags, prior, weights=weights, threads=1, **options)


def city(prior: Path) -> Ledger:
    return Ledger.open(Storage(prior / LOCATION))


# -- the same bytes -----------------------------------------------------------------------------------------


def test_bags_in_any_order_give_what_mapping_them_one_by_one_does(
    bags: dict[str, Path], weights: Path, one_by_one: dict[str, bytes], tmp_path: Path
) -> None:
    built = make(tmp_path, weights, [bags[name] for name in ("second", "elsewhere", "first", "first")])
    assert (built.drives, built.frames, built.known, built.late, built.dropped) == (3, 6, 1, 0, 0)
    assert built.speedup == 1.5  # two of three have to wait for each other
    assert files(tmp_path) == one_by_one
    assert sum(name.startswith(f"{LOCATION}/commits/") for name in one_by_one) == 3


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_several_workers_make_no_difference(
    bags: dict[str, Path], weights: Path, one_by_one: dict[str, bytes], tmp_path: Path
) -> None:
    assert make(tmp_path, weights, [*bags.values()][::-1], count=2).drives == 3
    assert files(tmp_path) == one_by_one


def test_the_order_of_time_matters(
    bags: dict[str, Path], weights: Path, one_by_one: dict[str, bytes], tmp_path: Path
) -> None:
    """Otherwise the tests above would show nothing. A drive that comes late is told of."""
    make(tmp_path, weights, [bags["second"]])
    assert make(tmp_path, weights, [bags["first"]]).late == 1
    drives = [f"{LOCATION}/commits/{record.id}.json" in one_by_one for record in city(tmp_path).drives()]
    assert drives == [False, False]


# -- interrupted --------------------------------------------------------------------------------------------


def test_an_interrupted_build_goes_on_where_it_stopped(
    bags: dict[str, Path], weights: Path, one_by_one: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps_of, calls = worker.maps_of, []

    def stop_in_the_second(bag: Path, mapper: Any, *arguments: Any, **options: Any) -> Iterator[LocalMap]:
        calls.append(bag)
        for local_map in maps_of(bag, mapper, *arguments, **options):
            mapper.flush()
            if len(calls) == 2:
                raise KeyboardInterrupt
            yield local_map

    monkeypatch.setattr(worker, "maps_of", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, weights, [*bags.values()])
    assert [record.recordings for record in city(tmp_path).drives()] == [(survey(bags["first"]).recording,)]
    built = make(tmp_path, weights, [*bags.values()])
    assert (built.drives, built.known) == (2, 1)
    assert files(tmp_path) == one_by_one


def test_nothing_is_kept_of_a_drive_that_was_killed(tmp_path: Path) -> None:
    spec, window = PriorSpec(2, 0.3, "x"), Window(0, 0, 5, 5)
    killed = CityPrior.open(tmp_path, LOCATION, spec, whole=True)
    latent, evidence = killed.read(window)
    killed.write(window, latent, evidence + np.uint16(9), SECOND)
    killed.flush()
    CityPrior.open(tmp_path, LOCATION, spec).close()
    assert len(list((tmp_path / LOCATION / "building").iterdir())) == 1  # it still goes on
    assert killed._drive is not None
    killed._drive.release()  # as the kernel does it
    CityPrior.open(tmp_path, LOCATION, spec).close()
    assert not list((tmp_path / LOCATION / "building").iterdir()) and not city(tmp_path).drives()
    killed._end()
    with pytest.raises(RuntimeError), CityPrior.open(tmp_path, LOCATION, spec, whole=True) as failing:
        failing.write(window, latent, evidence + np.uint16(9), SECOND)
        raise RuntimeError
    assert not city(tmp_path).drives()


def test_a_worker_that_is_asked_twice_maps_once(bags: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    mapping = Worker(tmp_path, weights, "", 1)
    looked = mapping.look(7, bags["first"])
    assert looked.number == 7 and looked.found is not None
    assert [mapping.map(3, looked.found).frames for _ in range(2)] == [2, 0]
    assert len(city(tmp_path).drives()) == 1


def test_compacted_drives_are_known(bags: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    make(tmp_path, weights, [bags["first"]])
    upkeep.compact(city(tmp_path))
    assert make(tmp_path, weights, [bags["first"]]).known == 1
    assert not city(tmp_path).drives()


def test_a_build_compacts_when_asked(
    bags: dict[str, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*more: str) -> int:
        given = [str(bags["first"]), str(bags["second"]), "--prior", str(tmp_path), "--weights", str(weights)]
        return cli.main(["prior", "build", *given, "--threads", "1", *more])

    assert command("--compact") == 0
    assert "0 drives were folded" in capsys.readouterr().out and len(city(tmp_path).drives()) == 2
    assert command("--compact", "0") == 0  # nothing is mapped again
    assert "2 were known" in (told := capsys.readouterr().out) and "2 drives were folded" in told
    base = city(tmp_path).base()
    assert base is not None and len(base.drives) == 2 and not city(tmp_path).drives()
    assert command("--compact", "-1") == 2


def test_records_without_a_recording_keep_their_names() -> None:
    record = Record("c", PriorSpec(2, 0.3, "x"), "", 1, 2, upkeep.tile_table([]))
    assert record.id == "c740c663002cfcb391eedf22db7bfdae"
    assert replace(record, recordings=("a",)).id != record.id


# -- bad bags -----------------------------------------------------------------------------------------------


def test_bad_bags_are_named_together(
    bags: dict[str, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = Path(shutil.copytree(bags["first"], tmp_path / "half"))
    storage = next(half.glob("*.mcap"))
    storage.write_bytes(storage.read_bytes()[: storage.stat().st_size // 2])
    given = [str(half), str(bags["second"]), str(tmp_path / "none")]
    prior = tmp_path / "prior"
    command = ["prior", "build", *given, "--prior", str(prior), "--weights", str(weights), "--threads", "1"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "nothing can be made of 2 of 3 bags" in said and "--skip-bad" in said and said.count("nmp: error") == 1
    assert "half" in said and "truncated" in said and "none does not exist" in said
    assert not (prior / LOCATION).exists()
    assert cli.main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "left out" in said and "truncated" in said and "1 drives came in (2 frames" in said
    assert [record.recordings for record in city(prior).drives()] == [(survey(bags["second"]).recording,)]


def test_a_bag_that_turns_out_bad_leaves_nothing(
    bags: dict[str, Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps_of = worker.maps_of

    def damaged(bag: Path, *arguments: Any, **options: Any) -> Iterator[LocalMap]:
        for local_map in maps_of(bag, *arguments, **options):
            yield local_map
            if bag == bags["first"]:
                raise NmpError("the rest is damaged")

    monkeypatch.setattr(worker, "maps_of", damaged)
    two = [bags["second"], bags["first"]]
    with pytest.raises(NmpError, match="1 of 2 bags: mend them.*\n.*first: the rest is damaged"):
        make(tmp_path, weights, two)
    assert not city(tmp_path).drives()
    built = make(tmp_path, weights, two, skip_bad=True)
    assert built.bad == {bags["first"]: "the rest is damaged"} and built.drives == 1
    assert [record.recordings for record in city(tmp_path).drives()] == [(survey(bags["second"]).recording,)]


def test_what_is_wrong_with_a_bag(bags: dict[str, Path], tmp_path: Path) -> None:
    shots = make_shots(tmp_path / "images", 1)
    far = [replace(s, pose=([i * 3e4, 0.0, 0.0], s.pose[1])) for i, s in enumerate(shots)]
    lost = [replace(s, pose=([float("nan")] * 3, s.pose[1])) for s in shots]
    for name, given, place, message in (
        ("nowhere", shots, "", "names no city.*--location"),
        ("far", far, LOCATION, "leap by 30 km"),
        ("lost", lost, LOCATION, "no finite pose"),
    ):
        write_bag(given, place, tmp_path / name)
        with pytest.raises(NmpError, match=message):
            survey(tmp_path / name)
    assert survey(tmp_path / "nowhere", "boston-seaport").location == "boston-seaport"


def test_a_prior_that_cannot_be_used_is_no_bad_bag(bags: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    CityPrior.open(tmp_path, LOCATION, PriorSpec(4, 0.3, "another")).close()
    with pytest.raises(NmpError, match="was written by model another"):
        make(tmp_path, weights, [bags["first"]], skip_bad=True)


def test_one_build_at_a_time_and_sane_numbers(
    bags: dict[str, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nmp.fleet.build import _alone

    with _alone(tmp_path), pytest.raises(NmpError, match="another build is at work"):
        make(tmp_path, weights, [bags["first"]])
    for option in ("--workers", "--threads"):
        assert cli.main(["prior", "build", str(bags["first"]), "--prior", str(tmp_path), option, "0"]) == 2
        assert f"{option} is 0" in capsys.readouterr().err


def test_what_is_wrong_with_ray(
    bags: dict[str, Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(NmpError, match="no Ray cluster answers at 127.0.0.1"):
            make(tmp_path, weights, [bags["first"]], address=f"127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NmpError, match="need Ray: pip install.*or build with --workers 1"):
        make(tmp_path, weights, [bags["first"]], count=2)


# -- what is known before -----------------------------------------------------------------------------------


def test_a_survey_tells_drives_apart_and_copies_not(bags: dict[str, Path], tmp_path: Path) -> None:
    found = {name: survey(bag) for name, bag in bags.items()}
    assert len({drive.recording for drive in found.values()}) == 3
    assert survey(Path(shutil.copytree(bags["first"], tmp_path / "copy"))).recording == found["first"].recording
    first = found["first"]
    assert (first.location, first.frames) == (LOCATION, 2)
    assert first.first_ns - START_NS == 8_000_000  # when the anchor camera fires
    assert found["second"].first_ns - first.first_ns == 60 * SECOND


def test_the_tiles_of_a_drive_hold_every_window_on_its_way() -> None:
    rng = np.random.default_rng(0)
    side, cell = 226, 0.3
    for _ in range(20):
        points = rng.uniform(-40, 40, (int(rng.integers(1, 6)), 2)).cumsum(0)
        path = evenly(points)
        assert np.abs(np.diff(path, axis=0)).max(initial=0) <= SPACING_M + 1e-9
        tiles = Survey(Path(), "", "", 0, 1, path).tiles(side, cell)
        for at in rng.uniform(0, len(points) - 1, 50):
            x, y = (np.interp(at, range(len(points)), points[:, axis]) for axis in (0, 1))
            assert {block.key for block in blocks(Window.around(x, y, cell, side, side))} <= tiles


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_keeps_what_meets_in_order_and_lets_the_rest_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    touched = [set(rng.integers(0, 12, rng.integers(1, 4)).tolist()) for _ in range(15)]
    plan, running, ended = Plan(touched, [1.0] * 15), set[int](), list[int]()
    while plan.ready or running:
        while plan.ready:
            job = plan.take()
            assert not any(touched[job] & touched[other] for other in running)
            running.add(job)
        waiting = set(range(15)) - running - set(ended)
        for job in waiting:  # nobody waits for nothing
            assert any(touched[job] & touched[other] for other in (running | waiting) if other < job)
        last = running.pop()
        ended.append(last)
        plan.done(last)
    assert len(ended) == 15
    for place, job in enumerate(ended):
        assert not any(other < job and touched[other] & touched[job] for other in ended[place + 1 :])


def test_the_longest_chain_comes_first() -> None:
    plan = Plan([{"a"}, {"b"}, {"c"}, {"b"}, {"b"}], [5.0, 3.0, 4.0, 1.0, 2.0])
    assert [plan.take() for _ in range(3)] == [1, 0, 2] and not plan.ready
    assert plan.speedup == 15 / 6
    assert Plan([], []).speedup == 1.0
