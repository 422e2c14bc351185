"""``nmp-train sim``: data sets from a seed, and from maps and drives that somebody else recorded."""

import filecmp
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nuscenes.nuscenes import NuScenes

from nmp.changelog import apply_changes
from nmp.citymap import CityMap
from nmp_train.cli import main
from nmp_train.sim.changes import draw_changes, removed_markings
from nmp_train.sim.drive import sample_routes
from nmp_train.sim.make import _Grounds
from nmp_train.sim.surface import Surface

BOSTON = "boston-seaport"


@pytest.fixture(scope="module", autouse=True)
def near_ground() -> Iterator[None]:
    """Paint little ground: how far it reaches is of no account here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmp_train.sim.make.VIEW_M", 25.0)
        yield


@pytest.fixture(scope="module")
def recorded(boston: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a stranger would bring it: one map, two drives of 1.2 seconds."""
    root = tmp_path_factory.mktemp("recorded")
    (root / "maps" / "expansion").mkdir(parents=True)
    (root / "maps" / "expansion" / f"{BOSTON}.json").write_text(json.dumps(boston))
    scenes = []
    for i, route in enumerate(sample_routes(boston, 6, 2, 1.2, 5.0)):
        poses = route.poses_xyyaw.round(3).tolist()
        scenes.append({"scene": f"scene-{i + 7:04d}", "location": BOSTON, "rate_hz": 5, "poses_xyyaw": poses})
    (root / "drives.json").write_text(json.dumps(scenes))
    return root


def _sim(recorded: Path, out: Path, *more: object) -> int:
    drives = recorded / "drives.json"
    arguments = ["--maps", recorded, "--trajectories", drives, "--render-scale", 0.05, "--seed", 1, "--out", out, *more]
    return main(["sim", *map(str, arguments)])


@pytest.fixture(scope="module")
def simulated(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated") / "out"
    assert _sim(recorded, root) == 0
    return root


def test_recorded_drives_become_a_data_set(recorded: Path, simulated: Path) -> None:
    data = NuScenes("v1.0-mini", str(simulated), verbose=False)
    assert [s["name"] for s in data.scene] == ["scene-0007", "scene-0008"]
    first = data.get("sample", data.scene[0]["first_sample_token"])
    front = data.get("sample_data", first["data"]["CAM_FRONT"])
    pose = data.get("ego_pose", front["ego_pose_token"])["translation"]
    wanted = json.loads((recorded / "drives.json").read_text())[0]["poses_xyyaw"][0]
    assert pose[:2] == pytest.approx(wanted[:2], abs=0.5)  # the camera fires a moment after the drive begins
    assert (simulated / front["filename"]).stat().st_size > 1000


def test_the_same_seed_gives_the_same_bytes(recorded: Path, simulated: Path, tmp_path: Path) -> None:
    assert _sim(recorded, tmp_path / "again") == 0
    files = [p.relative_to(simulated) for p in simulated.rglob("*") if p.is_file()]
    same, different, missing = filecmp.cmpfiles(simulated, tmp_path / "again", map(str, files), shallow=False)
    assert len(same) == len(files) > 30 and not different and not missing


def _change_map(recorded: Path, folder: Path, change: Any) -> Path:
    path = folder / "maps" / "expansion" / f"{BOSTON}.json"
    path.parent.mkdir(parents=True)
    tables = json.loads((recorded / "maps" / "expansion" / f"{BOSTON}.json").read_text())
    change(tables)
    path.write_text(json.dumps(tables))
    (folder / "drives.json").write_text((recorded / "drives.json").read_text())
    return folder


def test_a_self_crossing_road_is_mended(recorded: Path, tmp_path: Path) -> None:
    def cross(tables: dict[str, Any]) -> None:
        road = tables["road_segment"][0]["polygon_token"]
        tokens = next(p for p in tables["polygon"] if p["token"] == road)["exterior_node_tokens"]
        tokens[1], tokens[2] = tokens[2], tokens[1]

    changed = _change_map(recorded, tmp_path / "in", cross)
    assert _sim(changed, tmp_path / "out", "--scenes", 1) == 0


def _move(scenes: list[dict[str, Any]]) -> None:
    for pose in scenes[0]["poses_xyyaw"]:
        pose[0] += 900.0


def _rename(scenes: list[dict[str, Any]]) -> None:
    scenes[0]["location"] = "atlantis"


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (_move, (), "scene-0007 leaves the map of boston-seaport"),
        (_rename, (), "no map expansion for atlantis"),
        (lambda s: None, ("--scenes", 3), "holds 2 trajectories"),
        (lambda s: s.clear(), (), "holds no scene"),
        (lambda s: s[0].pop("rate_hz"), (), "rate_hz"),
    ],
)
def test_bad_input_is_one_line(
    change: Any,
    more: tuple[object, ...],
    message: str,
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = _change_map(recorded, tmp_path / "in", lambda tables: None)
    scenes = json.loads((changed / "drives.json").read_text())
    change(scenes)
    (changed / "drives.json").write_text(json.dumps(scenes))
    assert _sim(changed, tmp_path / "out", *more) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("nmp-train: error: ") and message in text
    assert not (tmp_path / "out").exists()


def test_polygons_that_are_none_are_named(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shrink(tables: dict[str, Any]) -> None:
        road = tables["road_segment"][0]["polygon_token"]
        record = next(p for p in tables["polygon"] if p["token"] == road)
        record["exterior_node_tokens"] = record["exterior_node_tokens"][:2]

    changed = _change_map(recorded, tmp_path / "in", shrink)
    assert _sim(changed, tmp_path / "out") == 2
    assert f"{BOSTON}.json is not a map expansion" in capsys.readouterr().err


def test_maps_and_trajectories_go_together(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--maps", str(recorded), "--out", str(tmp_path / "out")]) == 2
    assert "go together" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_data_set(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nmp_train.sim.tables.Tables.write", full)
    assert _sim(recorded, tmp_path / "out", "--scenes", 1) == 2
    assert "No space left on device): free some space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("cv2.imwrite", lambda *_: False)
    assert _sim(recorded, tmp_path / "out", "--scenes", 1) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _bench(out: Path, *more: object) -> int:
    arguments = ["--bench", "--cities", 1, "--scenes", 4, "--size", 250, "--duration", 2, "--render-scale", 0.05]
    return main(["sim", *map(str, [*arguments, "--seed", 2, "--out", out, *more])])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench") / "all"
    assert _bench(root, "--changes", 1, "--pose-noise", "--device", "cpu") == 0
    return root


def test_the_bench_is_a_data_set_with_splits_changes_and_believed_poses(bench: Path) -> None:
    data = NuScenes("v1.0-mini", str(bench), verbose=False)
    names = [s["name"] for s in data.scene]
    assert names == [f"scene-000{k}" for k in range(1, 5)]
    dates = [data.get("log", s["log_token"])["date_captured"] for s in data.scene]
    assert dates == sorted(dates) and len(set(dates)) > 1
    splits = json.loads((bench / "v1.0-mini" / "splits.json").read_text())
    assert sorted(splits["train"] + splits["val"]) == names
    assert len(json.loads((bench / "maps" / "changes" / f"{BOSTON}.json").read_text())["changes"]) == 1
    believed = json.loads((bench / "v1.0-mini" / "ego_pose_estimate.json").read_text())
    assert {r["token"] for r in believed} == {r["token"] for r in data.ego_pose}
    true = {r["token"]: r for r in data.ego_pose}
    off = [abs(r["translation"][0] - true[r["token"]]["translation"][0]) for r in believed]
    assert 0 < max(off) < 0.6


def test_one_scene_alone_is_as_in_the_whole_bench(bench: Path, tmp_path: Path) -> None:
    assert _bench(tmp_path / "one", "--changes", 1, "--only", "scene-0003") == 0
    images = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.jpg"))
    data = NuScenes("v1.0-mini", str(tmp_path / "one"), verbose=False)
    assert [s["name"] for s in data.scene] == ["scene-0003"] and len(images) == 6 * data.scene[0]["nbr_samples"]
    same, different, missing = filecmp.cmpfiles(bench, tmp_path / "one", map(str, images), shallow=False)
    assert len(same) == len(images) and not different and not missing


def test_the_ground_is_that_of_the_drives_date(boston: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    city = boston
    drive = sample_routes(city, 6, 1, 4.0, 2.0)[0]
    changes = draw_changes(city, BOSTON, 3, ("2018-08-01", "2018-09-30"), 4)
    painted: list[tuple[CityMap, Any, Any, int]] = []

    def paint(city: CityMap, bounds: Any, seed: int, ghosts: Any) -> Surface:
        painted.append((city, bounds, ghosts, seed))
        return Surface(0.0, 0.0, 0.1, torch.zeros(1, dtype=torch.int32), ((0, 1, 1),))

    monkeypatch.setattr("nmp_train.sim.make.paint_surface", paint)
    grounds = _Grounds({BOSTON: city}, [drive], {BOSTON: changes}, {BOSTON: 7}, torch.device("cpu"))
    for date in ("2018-08-01", "2018-08-01", "2018-09-30", "2018-12-01", "2018-08-01"):
        grounds.of(replace(drive, date=date))
    # painted when the map changes, and not for every drive
    assert len(painted) == 3 and {p[1] for p in painted} == {painted[0][1]} and {p[3] for p in painted} == {7}
    (before, _, no_ghosts, _), (after, _, ghosts, _), (again, *_) = painted
    assert not no_ghosts and ghosts == removed_markings(changes, "2018-09-30")
    expected = CityMap.from_tables(apply_changes(city, changes, "2018-09-30"), BOSTON)
    assert _shapes(after) == _shapes(expected) != _shapes(before) == _shapes(again)


def _shapes(city: CityMap) -> list[bytes]:
    layers = (city.road_dividers, city.lane_dividers, city.crossings, city.road_segments)
    return [geometry.wkb for layer in layers for geometry in layer.geometries]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cities", 2], "--cities goes with --bench"),
        (["--plan"], "--plan goes with --bench"),
        (["--scenes", 3], "--scenes goes with --bench or --maps and --trajectories, not with a data set of one city"),
        (["--bench", "--weather", "rain"], "--weather goes with"),
        (["--bench", "--routes", 2], "--routes goes with a data set of one city"),
        (["--bench", "--maps", ".", "--trajectories", "x"], "--bench makes its own cities"),
        (["--bench", "--cities", 0], "--cities 0 is out of range"),
        (["--bench", "--plan", "--only", "scene-0001"], "--plan draws no images"),
        (["--routes", 0], "--routes 0 is out of range"),
        (["--changes", -1, "--size", 250], "-1 changes are not possible"),
        (["--changes", 2, "--passes", 1, "--size", 250, "--duration", 2], "changes need drives of a city on two days"),
        (["--pose-noise", 3], "position_m = 3 is out of range"),
        (["--seed", -1], "--seed -1 is out of range"),
        (["--bench", "--cities", 1, "--scenes", 2, "--duration", 2, "--only", "scene-0009"], "scene-0009"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("nmp-train: error: ") and message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--size", "250", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
