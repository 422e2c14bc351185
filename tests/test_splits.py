"""Divisions into training and validation: by city, by overlap, and the one that comes with a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from nmp.errors import NmpError
from nmp_train import splits
from nmp_train.sim.drive import Trajectory, load_trajectories
from nmp_train.splits import city_split, coverage, original_split, overlap_split

SHARED = Path(__file__).parents[2] / "shared" / "real"


def drive(name: str, street: int, day: int, place: str = "boston-seaport", start_m: float = 0.0) -> Trajectory:
    """A drive of 20 s along a straight street; streets are 100 m apart."""
    s = start_m + np.arange(0.0, 160.0, 4.0)
    poses = np.column_stack([s, np.full(len(s), 100.0 * street + day % 3), np.zeros(len(s))])
    return Trajectory(place, f"2018-08-{day:02d}", np.arange(len(s)) / 2, poses, name)


@pytest.fixture
def drives() -> list[Trajectory]:
    """Ten streets of Boston; three are driven twice, one of these only in part. One street each of two more cities."""
    out = [drive(f"scene-{k:04d}", k, 1 + k) for k in range(10)]
    out += [drive(f"scene-{10 + k:04d}", k, 20 + k) for k in range(2)]
    out.append(drive("scene-0012", 2, 25, start_m=40.0))  # 40 m more than the first drive
    out += [drive("scene-0020", 0, 3, "singapore-onenorth"), drive("scene-0021", 0, 3, "singapore-queenstown")]
    return out


def test_validation_streets_were_all_driven_in_training(drives: list[Trajectory]) -> None:
    found = overlap_split(drives, share=0.2)
    assert found["val"] == ["scene-0010", "scene-0011"]  # the later drives; not the one that goes further
    assert sorted(found["train"] + found["val"]) == sorted(d.name for d in drives)
    assert coverage(drives, found["train"], found["val"]) == (1.0, 1.0, 1.0)
    assert overlap_split(drives[::-1], share=0.2) == found
    with pytest.raises(NmpError, match="needs streets driven twice"):
        overlap_split(drives[2:10])


def test_a_street_keeps_a_training_drive() -> None:
    """Of two drives of one street only one can be validated, however large the share."""
    found = overlap_split([drive("scene-0001", 0, 1), drive("scene-0002", 0, 2), drive("scene-0003", 1, 3)], share=0.9)
    assert found == {"train": ["scene-0001", "scene-0003"], "val": ["scene-0002"]}


def test_cities_are_parted_as_a_whole(drives: list[Trajectory]) -> None:
    found = city_split(drives, share=0.2)
    assert found["val"] == ["scene-0020", "scene-0021"] and len(found["train"]) == 13
    assert coverage(drives, found["train"], found["val"]) == (0.0, 0.0, 0.0)
    assert city_split(drives, share=0.05)["val"] == ["scene-0020"]
    with pytest.raises(NmpError, match="all scenes are in boston-seaport"):
        city_split(drives[:3])


def test_the_division_of_the_data_set_is_kept(
    drives: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v1.0-mini").mkdir()
    path = tmp_path / "v1.0-mini" / "splits.json"
    path.write_text(
        json.dumps({"train": ["scene-0002", "scene-0001", "scene-7777"], "val": [], "test": ["scene-0000"]})
    )
    assert original_split(drives, tmp_path, "v1.0-mini") == {
        "train": ["scene-0001", "scene-0002"],
        "test": ["scene-0000"],
    }
    path.write_text("[]")
    with pytest.raises(NmpError, match="holds no lists of scenes"):
        original_split(drives, tmp_path, "v1.0-mini")
    path.unlink()
    assert "scene-0003" in original_split(drives, tmp_path, "v1.0-mini")["val"]  # as nuScenes has it
    monkeypatch.setitem(__import__("sys").modules, "nuscenes.utils.splits", None)
    with pytest.raises(NmpError, match="need nuscenes-devkit"):
        original_split(drives, tmp_path, "v1.0-mini")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real trajectories")
@pytest.mark.parametrize("kind", ["city", "overlap"])
def test_command_on_real_drives(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    splits.add_arguments(parser)
    source = SHARED / "val_trajectories.json"
    written = []
    for name in ("a.json", "b.json"):
        splits.run(parser.parse_args(["--dataroot", str(source), "--kind", kind, "--out", str(tmp_path / name)]))
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    found = json.loads(written[0])
    drives = {d.name: d for d in load_trajectories(source)}
    assert sorted(found["train"] + found["val"]) == sorted(drives) and 8 <= len(found["val"]) <= 32
    train = [drives[n] for n in found["train"]]
    apart = []
    for name in found["val"]:
        paths = [t.resampled(10.0).poses_xyyaw[:, :2] for t in train if t.location == drives[name].location]
        if paths:
            apart.append(cKDTree(np.concatenate(paths)).query(drives[name].poses_xyyaw[:, :2])[0].max())
    assert max(apart) < 10.0 if kind == "overlap" else not apart
    share = "100.0 % within 10 m" if kind == "overlap" else "0.0 % within 10 m"
    assert share in capsys.readouterr().out


def test_wrong_options_are_named(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    splits.add_arguments(parser)
    arguments = ["--dataroot", str(tmp_path), "--out", str(tmp_path / "x.json"), "--kind", "city"]
    with pytest.raises(NmpError, match="--share 1.5 is out of range"):
        splits.run(parser.parse_args([*arguments, "--share", "1.5"]))
    with pytest.raises(NmpError):
        splits.run(parser.parse_args(arguments))
