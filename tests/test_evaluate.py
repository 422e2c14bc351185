"""``nmp-train eval``: what the mapper is given, what it is compared with, and where the scores are filed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nmp.changelog import Change, apply_changes
from nmp.citymap import CityMap
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, Frame
from nmp.geometry import BevGrid, yaw_of
from nmp.metrics import Breakdown
from nmp.model import BEVNetwork, NetworkConfig
from nmp.model.weights import save_network
from nmp.truth import rasterize
from nmp_train.cli import main
from nmp_train.distributed import PATIENCE
from nmp_train.evaluate import PROTOCOLS, Job, evaluate_dataset, merged, read_scenes, scene_frames, shards, split_scenes
from nmp_train.evaluate import score as score_job
from nmp_train.recordings import weather_of
from nmp_train.sim.changes import draw_changes
from nmp_train.sim.city import generate_city
from nmp_train.sim.dataset import Drive, write_dataset
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.localisation import LocalisationNoise
from nmp_train.sim.rig import FIRING_OFFSET_MS

BOSTON, VERSION = "boston-seaport", "v1.0-mini"
GRID = BevGrid()
FRAMES = 3
"""of every scene"""
FIRST_DAY, LAST_DAY = "2018-08-01", "2018-09-01"

HERE, FAR = 0.0, 90.0
"""how far a scene is from a place that changes, m"""
SCENES = {
    # Names do not follow time: the third drive is named first.
    "scene-0003": (FIRST_DAY, "day", HERE),
    "scene-0002": ("2018-08-20", "rain", HERE),
    "scene-0004": ("2018-08-25", "night", FAR),
    "scene-0001": (LAST_DAY, "night rain", HERE),
}
"""day, weather and place by name, in the order in which they were driven"""


SPLITS: dict[str, list[str]] = {
    "train": ["scene-0002", "scene-0003"],
    "val": ["scene-0001"],
    "two": ["scene-0002", "scene-0004"],
    "empty": [],
}


@dataclass(frozen=True)
class Site:
    """A data set, and what it was made from."""

    root: Path
    tables: dict[str, Any]
    changes: list[Change]
    drives: dict[str, Trajectory]
    starts: dict[str, int]
    """first stamp (ns) of the anchor camera by scene"""

    def truth(self, stamp_ns: int, *, date: str | None = None, pose: NDArray[np.float64] | None = None) -> Any:
        """Draw the truth at an anchor stamp from the drive itself; at a pose [4, 4] or on a date that differ, if so."""
        name = self.scene_at(stamp_ns)
        drive = self.drives[name]
        x, y, yaw = drive.at(self._seconds(name, stamp_ns))
        if pose is not None:
            x, y, yaw = pose[0, 3], pose[1, 3], yaw_of(pose)
        tables = apply_changes(self.tables, self.changes, date or drive.date)
        return rasterize(CityMap.from_tables(tables, BOSTON), float(x), float(y), float(yaw), GRID)

    def scene_at(self, stamp_ns: int) -> str:
        return max((n for n, start in self.starts.items() if start <= stamp_ns), key=self.starts.__getitem__)

    def _seconds(self, name: str, stamp_ns: int) -> float:
        return (stamp_ns - self.starts[name]) / 1e9 + FIRING_OFFSET_MS[ANCHOR_CAMERA] / 1000


def first_stamps(root: Path) -> dict[str, int]:
    """Return the first stamp (ns) of the anchor camera by scene."""
    scenes, images = (json.loads((root / VERSION / f"{n}.json").read_text()) for n in ("scene", "sample_data"))
    scene_of = {r["first_sample_token"]: r["name"] for r in scenes}
    front = [r for r in images if r["sample_token"] in scene_of and "/CAM_FRONT/" in r["filename"]]
    return {scene_of[r["sample_token"]]: r["timestamp"] * 1000 for r in front}


def blank(*_: Any, size: tuple[int, int], **__: Any) -> NDArray[np.uint8]:
    return np.full((6, size[1], size[0], 3), 90, np.uint8)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Four slow drives of 1.3 s, three of them past a place that changes; the cars know their poses badly."""
    tables = generate_city(5, BOSTON, 250.0)
    changes = draw_changes(tables, BOSTON, 3, (FIRST_DAY, LAST_DAY), 1)
    times = np.arange(0, 1.31, 0.1)
    drives, words = {}, []
    for name, (date, weather, aside) in SCENES.items():
        # towards the middle of the city, so that the second place is in it too
        way = np.sign(125.0 - changes[0].x)
        poses = np.column_stack(
            [changes[0].x + way * aside + 3.0 * times, np.full(len(times), changes[0].y), 0 * times]
        )
        drives[name] = Trajectory(BOSTON, date, times, poses, name)
        words.append(weather)
    out = tmp_path_factory.mktemp("eval") / "data"
    write_dataset(
        out,
        [Drive(d, w, 0.0, name=d.name) for d, w in zip(drives.values(), words, strict=True)],
        {BOSTON: tables},
        render=blank,
        image_size=(160, 90),
        seed=4,
        tilt=False,
        slopes=False,
        progress=False,
        changes={BOSTON: changes},
        localisation=LocalisationNoise(0.6, 0.02),
        splits=SPLITS,
    )
    return Site(out, tables, changes, drives, first_stamps(out))


@dataclass
class Mapper:
    """Stands in for the online mapper: draws what it is told to, and writes down what it was given."""

    draw: Callable[[Frame], NDArray[np.uint8]]
    runs: list[tuple[list[str], list[Frame]]] = field(default_factory=list)
    """the scenes that the prior was made of, and the frames, of every prior that was opened"""
    opened: list[dict[str, Any]] = field(default_factory=list)
    """the options of every mapper that was opened"""
    name_of: Callable[[Frame], str] = lambda frame: ""
    grid = GRID
    ready = False

    def open(self, weights: Path | None, prior_dir: Path, **options: Any) -> Mapper:
        self.prior_dir = prior_dir
        self.opened.append(options)
        return self

    def use(self, prior_dir: Path) -> None:
        self.close()
        self.prior_dir = prior_dir

    def update(self, frame: Frame) -> Any:
        use_prior = self.opened[-1]["use_prior"]
        name = self.name_of(frame)
        if not self.ready or not use_prior or self.runs[-1][1] and self.name_of(self.runs[-1][1][-1]) != name:
            known = sorted(p.name for p in self.prior_dir.iterdir()) if self.prior_dir.is_dir() else []
            self.runs.append((known, []))
            self.ready = True
        self.runs[-1][1].append(frame)
        if use_prior:
            self.prior_dir.mkdir(parents=True, exist_ok=True)
            (self.prior_dir / name).touch()
        masks = self.draw(frame)
        return SimpleNamespace(masks=masks, probabilities=masks.astype(np.float32))

    def close(self) -> None:
        self.ready = False

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


@pytest.fixture
def mapper(site: Site, monkeypatch: pytest.MonkeyPatch) -> Mapper:
    """A mapper that sees nothing."""
    fake = Mapper(lambda frame: np.zeros((3, *GRID.shape), np.uint8))
    fake.name_of = lambda frame: site.scene_at(frame.stamp_ns)
    monkeypatch.setattr("nmp.mapper.OnlineMapper", fake.open)
    return fake


def score(site: Site, protocol: str = "no_prior", **more: Any) -> Any:
    return evaluate_dataset(None, site.root, VERSION, protocol, progress=False, **more)


def test_truth_is_at_the_true_pose_in_the_map_of_the_day(site: Site, mapper: Mapper) -> None:
    mapper.draw = lambda frame: site.truth(frame.stamp_ns)
    right = score(site).percent()["all"]
    assert right["divider"] == right["boundary"] == right["miou"] == pytest.approx(100.0, abs=0.5)
    # What is right at the believed pose is not right, nor what was right on the first day.
    mapper.draw = lambda frame: site.truth(frame.stamp_ns, pose=frame.map_from_base)
    assert score(site).percent()["all"]["miou"] < 90.0
    mapper.draw = lambda frame: site.truth(frame.stamp_ns, date=FIRST_DAY)
    old = score(site, scenes=["scene-0001"]).percent()["all"]
    assert min(old[name] for name in ("divider", "crossing", "boundary") if np.isfinite(old[name])) < 97.0
    assert score(site, scenes=["scene-0003"]).percent()["all"]["miou"] > 99.0


def test_frames_carry_what_the_car_believed(site: Site, mapper: Mapper) -> None:
    (table,) = read_scenes(site.root, VERSION, ["scene-0002"])
    scene = scene_frames(table)
    assert (scene.location, scene.weather, len(scene.frames)) == (BOSTON, "rain", FRAMES)
    for frame, true in zip(scene.frames, scene.true_poses, strict=True):
        assert [s.camera.name for s in frame.shots][0] == ANCHOR_CAMERA and len(frame.shots) == 6
        assert np.ptp([s.stamp_ns for s in frame.shots]) < 0.1e9
        assert 0.01 < np.hypot(*(frame.map_from_base - true)[:2, 3]) < 3.0
        assert (frame.position_std, frame.yaw_std) == pytest.approx((0.6, 0.02))
        assert isinstance(frame.shots[0].image, bytes) and frame.shots[0].image[:2] == b"\xff\xd8"


def test_frames_are_filed_by_weather_ring_and_earlier_trips(site: Site, mapper: Mapper) -> None:
    result = score(site, "earlier_trips")
    frames = {name: result.meters[name].frames for name in result.percent()}
    everything, one = len(SCENES) * FRAMES, FRAMES
    assert frames == {
        "all": everything,
        "day": one,
        "rain": 2 * one,
        "night": 2 * one,
        "night rain": one,
        # one at the far place, and the first of three at the other
        "trips before: 0": 2 * one,
        "trips before: 1": one,
        "trips before: 2": one,
        "0-10 m": everything,
        "10-20 m": everything,
        "20-40 m": everything,
    }
    # Scenes that share no prior have no earlier trips.
    for protocol in ("no_prior", "empty"):
        assert not [name for name in score(site, protocol).percent() if name.startswith("trips")]


def test_the_fifth_trip_and_all_after_it_are_one_row(site: Site, mapper: Mapper) -> None:
    from nmp_train.evaluate import SceneFrames, _History

    pose = np.eye(4)
    scene = SceneFrames("scene-0001", BOSTON, "day", [], [pose])
    history, labels = _History(), []
    for _ in range(7):
        labels.append(history.label(BOSTON, pose))
        history.add(scene)
    assert [label.rpartition(" ")[2] for label in labels] == ["0", "1", "2", "3", "4", "5+", "5+"]
    assert history.label("singapore-onenorth", pose) == "trips before: 0"
    pose[0, 3] += 10.5
    assert history.label(BOSTON, pose) == "trips before: 0"


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("empty", [[], [], [], []]),
        (
            "earlier_trips",
            [
                [],
                ["scene-0003"],
                ["scene-0002", "scene-0003"],
                ["scene-0002", "scene-0003", "scene-0004"],
            ],
        ),
    ],
)
def test_priors_of_the_protocols(protocol: str, expected: list[list[str]], site: Site, mapper: Mapper) -> None:
    score(site, protocol)
    assert mapper.opened == [{"use_prior": True, "device": "auto"}]
    assert [run[0] for run in mapper.runs] == expected
    assert [mapper.name_of(run[1][0]) for run in mapper.runs] == list(SCENES)
    assert not mapper.prior_dir.exists()


def test_without_a_prior_one_mapper_sees_all_scenes_in_order(site: Site, mapper: Mapper) -> None:
    score(site, "no_prior", device="cpu")
    assert mapper.opened == [{"use_prior": False, "device": "cpu"}]
    assert [mapper.name_of(run[1][0]) for run in mapper.runs][::FRAMES] == list(SCENES)


def test_train_trips_score_every_scene_on_the_same_prior(site: Site, mapper: Mapper) -> None:
    train = ["scene-0002", "scene-0003"]
    result = score(site, "train_trips", scenes=["scene-0001", "scene-0004"], train_scenes=train)
    assert [run[0] for run in mapper.runs] == [[], ["scene-0003"], train, train]
    frames = {name: meter.frames for name, meter in result.meters.items()}
    assert frames["all"] == 2 * FRAMES and frames["trips before: 2"] == frames["trips before: 0"] == FRAMES
    assert frames["rain"] == frames["night rain"] == FRAMES


@pytest.mark.parametrize(
    ("description", "weather"),
    [
        ("Parked truck, construction, intersection", "day"),
        ("Rain, turn left", "rain"),
        ("Night, after rain, wait", "night rain"),
        ("Night, ped, knight rider", "night"),
        ("Wait for train, overnight parking", "day"),
    ],
)
def test_weather_of_a_description(description: str, weather: str) -> None:
    assert weather_of(description) == weather


def test_splits_are_those_of_the_data_set_or_of_the_devkit(site: Site, tmp_path: Path) -> None:
    assert split_scenes("val", site.root, VERSION) == ["scene-0001"]
    (tmp_path / VERSION).mkdir()
    assert "scene-0103" in split_scenes("mini_val", tmp_path, VERSION)
    with pytest.raises(NmpError, match="no split 'vel' in nuScenes: choose from mini_train"):
        split_scenes("vel", tmp_path, VERSION)
    (tmp_path / VERSION / "splits.json").write_text('["scene-0001"]')
    with pytest.raises(NmpError, match="splits.json holds no lists"):
        split_scenes("val", tmp_path, VERSION)


def test_splits_of_another_file(site: Site, mapper: Mapper, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"val": ["scene-0004"]}))
    assert split_scenes("val", site.root, VERSION, mine) == ["scene-0004"]
    assert split_scenes("val", site.root, VERSION) == SPLITS["val"]
    arguments = ["eval", "--dataroot", str(site.root), "--splits"]
    assert main([*arguments, str(mine), "--split", "val", "--no-vectors"]) == 0
    assert {site.scene_at(frame.stamp_ns) for _, frames in mapper.runs for frame in frames} == {"scene-0004"}
    for more, message in (
        ([str(mine)], "choose one of them with --split"),
        ([str(mine), "--split", "train"], f"no split 'train' in {mine}: choose from val"),
        ([str(tmp_path / "none.json"), "--split", "val"], "none.json holds no lists of scenes by split"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "vel"], "no split 'vel' in"),
        (["--split", "empty"], "no scenes to score"),
        (["--version", "v1.0-trainval"], "no tables 'v1.0-trainval'"),
        (["--version", "v1.0-trainval", "--split", "val"], "no tables 'v1.0-trainval'"),
        (["--protocol", "train_trips"], "name them with --split"),
        (["--protocol", "train_trips", "--split", "val", "--train-split", "empty"], "--train-split that has some"),
        (["--protocol", "train_trips", "--split", "train"], "scene-0002 would be scored on a prior that it wrote"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, site: Site, mapper: Mapper, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--dataroot", str(site.root), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("nmp-train: error: ") and message in shown and shown.count("\n") == 1
    assert not mapper.runs


def test_scenes_and_maps_that_are_missing_are_named(site: Site, mapper: Mapper, tmp_path: Path) -> None:
    with pytest.raises(NmpError, match="has no scene-0061: choose"):
        score(site, scenes=["scene-0061"])
    with pytest.raises(NmpError, match="no protocol 'nothing'"):
        score(site, "nothing")
    shutil.copytree(site.root / VERSION, tmp_path / VERSION)
    (tmp_path / "maps").mkdir()
    shutil.copy(next((site.root / "maps").glob("*.png")), tmp_path / "maps")
    with pytest.raises(NmpError, match=f"no map expansion for {BOSTON}"):
        evaluate_dataset(None, tmp_path, VERSION, "no_prior", progress=False)
    assert not mapper.runs


def test_the_command_with_the_shipped_weights(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    arguments = ["--split", "val", "--protocol", "empty", "--json", str(out)]
    assert main(["eval", "--dataroot", str(site.root), *arguments]) == 0
    table = capsys.readouterr().out
    assert f"all ({FRAMES})" in table and f"night rain ({FRAMES})" in table
    scores = json.loads(out.read_text())
    assert (scores["protocol"], scores["split"], scores["frames"]) == ("empty", "val", FRAMES)
    # Blank images have nothing to see.
    assert 0 <= scores["divider"] < 40
    assert set(scores["chamfer_m"]["recall"]) == {"divider", "crossing", "boundary", "mean"}
    assert list(scores["average_precision"]) == ["all", "0.5 m", "1 m", "1.5 m"]
    assert set(scores["breakdown"]) == {"night", "rain", "night rain", "0-10 m", "10-20 m", "20-40 m"}
    assert "average_precision" in scores["breakdown"]["10-20 m"]


# ------------------------------------------------------------------------------------------- several processes


SMALL = NetworkConfig(
    backbone_stages=2,
    input_width=64,
    input_height=32,
    neck_channels=4,
    bev_channels=8,
    prior_channels=4,
    feature_resolution=0.6,
    layer_resolution=0.3,
    prior_cell=0.6,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that answers to its prior."""
    torch.manual_seed(3)
    network = BEVNetwork(SMALL)
    torch.nn.init.normal_(network.fusion.prior_out.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(network, path, {})
    return path


def jobs(site: Site, protocol: str, count: int, **more: Any) -> list[list[str]]:
    """Return the names of the scenes of each part."""
    scenes = [s for s in read_scenes(site.root, VERSION) if s.name != more.get("train")]
    train = [s for s in read_scenes(site.root, VERSION) if s.name == more.get("train")]
    parts = shards(Job(None, site.root, protocol, tuple(scenes), tuple(train)), count)
    return [[s.name for s in (*part.train, *part.scenes)] for part in parts]


def test_scenes_that_meet_stay_in_one_process(site: Site) -> None:
    near = ["scene-0003", "scene-0002", "scene-0001"]
    assert jobs(site, "earlier_trips", 3) == [near, ["scene-0004"]]
    # Alone with its own prior, every scene can go anywhere; the order of driving stays.
    assert jobs(site, "empty", 2) == [["scene-0003", "scene-0004"], ["scene-0002", "scene-0001"]]
    # The scene that writes the prior goes where those are scored that see it.
    assert jobs(site, "train_trips", 2, train="scene-0001") == [["scene-0001", *near[:2]], ["scene-0004"]]
    assert jobs(site, "train_trips", 2, train="scene-0004") == [near]


def test_scenes_that_meet_for_a_network_that_sees_further_stay_together(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "far.safetensors"
    save_network(BEVNetwork(replace(SMALL, bev_length=100.0, bev_width=100.0)), path, {})
    scenes = tuple(read_scenes(site.root, VERSION))
    assert len(shards(Job(None, site.root, "earlier_trips", scenes), 2)) == 2
    assert len(shards(Job(path, site.root, "earlier_trips", scenes), 2)) == 1


def test_parts_merged_are_the_whole(site: Site, weights: Path) -> None:
    chosen = tuple(read_scenes(site.root, VERSION, ["scene-0002", "scene-0003", "scene-0004"]))
    whole = Job(weights, site.root, "earlier_trips", chosen, changed=True, vectors=False)
    parts = shards(whole, 2)
    assert len(parts) == 2
    serial = score_job(whole)
    # json, because a score that is not defined is a NaN, which equals nothing
    assert as_json(merged([score_job(part) for part in reversed(parts)])) == as_json(serial)
    # The scores depend on the prior, or nothing would be shown.
    apart = score_job(replace(whole, protocol="empty", scenes=chosen[:2]))
    assert apart.meters["rain"].intersection.tolist() != serial.meters["rain"].intersection.tolist()


def as_json(breakdown: Breakdown) -> str:
    return json.dumps(breakdown.scores(), sort_keys=True)


def test_two_processes_give_the_scores_of_one(site: Site, weights: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(weights), "--dataroot", str(site.root), "--protocol", "earlier_trips", "--split", "two"]
    for workers in (1, 2):
        more = ["--pose-noise", "0.3", "--workers", str(workers), "--json", str(tmp_path / f"{workers}.json")]
        assert main([*arguments, *more]) == 0
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_two_processes_of_torchrun_give_the_scores_of_one(site: Site, weights: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(weights), "--dataroot", str(site.root), "--protocol", "earlier_trips", "--split", "two"]
    arguments += ["--device", "cpu", "--json"]
    assert main([*arguments, str(tmp_path / "1.json")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "nmp_train.cli", *arguments, str(tmp_path / "2.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("All(mIoU)") == 1  # the first process prints, and it alone
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_torchrun_processes_wait_as_long_as_in_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []

    def join(backend: str, *, timeout: Any) -> None:
        waits.append((backend, timeout))
        raise NmpError("far enough")

    monkeypatch.setattr("torch.distributed.init_process_group", join)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NmpError, match="far enough"):
        score(site)
    assert waits == [("gloo", PATIENCE)]


def test_every_process_has_a_gpu_of_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = tuple(read_scenes(site.root, VERSION))

    def devices(given: str | None) -> list[str | None]:
        return [part.device for part in shards(Job(None, site.root, "empty", scenes, device=given), 3)]

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert devices(None) == [None] * 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for given in (None, "auto", "cuda"):
        assert devices(given) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cpu") == ["cpu"] * 3 and devices("cuda:1") == ["cuda:1"] * 3


def test_one_process_takes_a_gpu_where_there_is_one(site: Site, mapper: Mapper) -> None:
    score(site, scenes=["scene-0001"])
    score(site, scenes=["scene-0001"], device="cpu")
    assert [options["device"] for options in mapper.opened] == ["auto", "cpu"]


def test_what_goes_wrong_in_a_process_is_told(
    site: Site, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(site.root, tmp_path / "data")
    next((tmp_path / "data" / "samples" / "CAM_BACK").iterdir()).write_bytes(b"no image")
    arguments = ["eval", str(weights), "--dataroot", str(tmp_path / "data"), "--protocol", "empty", "--workers", "2"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("nmp-train: error: scene-000") and "cam_back: image data cannot be decoded" in shown
    next((tmp_path / "data" / "samples" / "CAM_FRONT").iterdir()).unlink()
    with pytest.raises(NmpError, match=r"cannot read .*CAM_FRONT.*unpack the camera files"):
        for scene in read_scenes(tmp_path / "data", VERSION):
            scene_frames(scene)


# ------------------------------------------------------------------------- localisation, changed places, elements


def test_added_noise_moves_what_the_mapper_is_told_and_not_the_truth(site: Site, mapper: Mapper) -> None:
    mapper.draw = lambda frame: site.truth(frame.stamp_ns)
    noise = LocalisationNoise(0.5, 0.01)
    assert score(site, noise=noise).percent()["all"]["miou"] == pytest.approx(100.0, abs=0.5)
    noisy = [frame for run in mapper.runs for frame in run[1]]
    mapper.runs.clear()
    score(site)
    exact = [frame for run in mapper.runs for frame in run[1]]
    offsets = []
    for believed, frame in zip(noisy, exact, strict=True):
        moved = believed.map_from_base @ np.linalg.inv(frame.map_from_base)
        for a, b in zip(believed.shots, frame.shots, strict=True):
            np.testing.assert_allclose(a.map_from_base, moved @ b.map_from_base, atol=1e-9)
        offsets.append((believed.map_from_base - frame.map_from_base)[:2, 3])
        assert believed.position_std == pytest.approx(np.hypot(0.6, 0.5))
    assert 0.2 < np.std(offsets) < 1.0
    # every drive has an error of its own, which is the same each time
    assert len({tuple(np.round(o, 9)) for o in offsets}) == len(offsets)
    mapper.runs.clear()
    score(site, noise=noise, scenes=["scene-0001"])
    again = [f.map_from_base for run in mapper.runs for f in run[1]]
    np.testing.assert_array_equal(again, [f.map_from_base for f in noisy[-FRAMES:]])


def test_what_changed_is_scored_apart(site: Site, mapper: Mapper) -> None:
    """A mapper that knows the first day only is wrong where the city has changed, and nowhere else."""
    mapper.draw = lambda frame: site.truth(frame.stamp_ns, date=FIRST_DAY)
    rows = score(site, scenes=["scene-0001"], changed=True).scores()
    assert rows["changed"]["miou"] < 90.0 and rows["unchanged"]["miou"] > 95.0
    assert rows["changed"]["frames"] == rows["unchanged"]["frames"] == FRAMES
    assert rows["changed"]["chamfer_m"]["chamfer"]["mean"] > 2 * rows["unchanged"]["chamfer_m"]["chamfer"]["mean"]
    # On the first day nothing has changed yet.
    assert "changed" not in score(site, scenes=["scene-0003"], changed=True).scores()


def test_without_a_change_log_nothing_can_be_told_apart(site: Site, mapper: Mapper, tmp_path: Path) -> None:
    shutil.copytree(site.root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "maps" / "changes")
    with pytest.raises(NmpError, match="no change log in maps/changes: leave out --changed"):
        evaluate_dataset(None, tmp_path / "data", VERSION, "no_prior", changed=True, progress=False)


def test_elements_of_perfect_layers_are_nearly_perfect(site: Site, mapper: Mapper) -> None:
    mapper.draw = lambda frame: site.truth(frame.stamp_ns)
    row = score(site).scores()["all"]
    assert row["average_precision"]["0.5 m"]["mean"] > 80.0 and row["chamfer_m"]["chamfer"]["mean"] < 0.3
    assert "average_precision" not in score(site, vectors=False).scores()["all"]


def test_help_names_the_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"{name} " in shown for name in PROTOCOLS)


def test_a_reader_who_goes_away_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poses = [[float(x), 0.0, 0.0] for x in range(5)]
    drive = {"scene": "scene-0001", "location": BOSTON, "rate_hz": 2, "poses_xyyaw": poses}
    (tmp_path / "drives.json").write_text(json.dumps([drive]))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        assert main(["overlap", str(tmp_path / "drives.json")]) == 1
        monkeypatch.undo()
    assert "Traceback" not in capsys.readouterr().err
