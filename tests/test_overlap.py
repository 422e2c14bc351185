"""How drives overlap: counted on drives whose overlap is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nmp_train.cli import main
from nmp_train.sim.drive import Trajectory
from nmp_train.sim.overlap import overlaps, read_drives

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "real"
SPEED = 5.0


def drive(
    name: str, date: str, start: tuple[float, float], end: tuple[float, float], place: str = "here"
) -> Trajectory:
    a, b = np.array(start), np.array(end)
    count = int(np.hypot(*(b - a)) / SPEED * 2) + 1
    yaw = np.arctan2(*(b - a)[::-1])
    xy = a + (b - a) * np.linspace(0, 1, count)[:, None]
    return Trajectory(place, date, np.arange(count) / 2, np.column_stack([xy, np.full(count, yaw)]), name)


def test_a_road_driven_again_counts_once() -> None:
    there = drive("a", "2018-07-01", (0, 0), (200, 0))
    beside = drive("b", "2018-07-11", (0, 3), (200, 3))
    table = overlaps([there, beside])["all"]
    assert table.driven_km == pytest.approx(0.4)
    assert table.road_km == pytest.approx(0.2, abs=0.006)
    assert table.road_share == pytest.approx((0, 1, 0, 0, 0, 0))
    assert table.near == pytest.approx((0.5, 0.5, 0.5))
    assert table.same_direction == table.near == table.other_day and table.opposite_direction == (0, 0, 0)
    assert table.offset_m == pytest.approx((3, 3)) and table.days == (10, 10)


def test_directions_distances_and_crossings() -> None:
    first = drive("a", "2018-07-01", (0, 0), (200, 0))
    back = drive("b", "2018-07-03", (100, 8), (0, 8))
    across = drive("c", "2018-07-04", (150, -100), (150, 100))
    table = overlaps([across, back, first])["here"]
    # 8 m apart are two roads, and so are streets that cross
    assert table.road_share[0] == pytest.approx(1.0)
    frames = table.keyframes
    assert table.opposite_direction == pytest.approx((0, 41 / frames, 41 / frames))
    assert table.same_direction == (0, 0, 0)
    # a path 10 m to either side of the first drive: 4 keyframes of the crossing one are nearer
    assert table.near[1] == pytest.approx((41 + 7) / frames, abs=2 / frames)


def test_a_car_that_passes_twice_or_stands_counts_once() -> None:
    corners = np.array([[0, 0], [200, 0], [200, 30], [0, 30], [0, 0], [200, 0]])
    s = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    at = np.arange(0, s[-1], 2.5)
    xy = np.column_stack([np.interp(at, s, corners[:, k]) for k in (0, 1)])
    yaw = np.arctan2(*np.gradient(xy, axis=0).T[::-1])
    loop = Trajectory("here", "2018-07-01", np.arange(len(at)) / 2, np.column_stack([xy, yaw]), "loop")
    table = overlaps([loop])["all"]
    assert table.road_share[0] == 1 and table.road_km == pytest.approx(0.46, abs=0.03)
    still = Trajectory("here", "2018-07-02", np.arange(40) / 2, np.tile([100.0, 1.0, 0.0], (40, 1)), "still")
    table = overlaps([loop, still])["all"]
    assert table.near[0] == pytest.approx(40 / table.keyframes)
    assert overlaps([still])["all"].near == (0, 0, 0)


def test_locations_do_not_meet() -> None:
    one = drive("a", "2018-07-01", (0, 0), (200, 0))
    other = drive("b", "2018-07-02", (0, 0), (200, 0), "there")
    tables = overlaps([one, other])
    assert list(tables) == ["all", "here", "there"]
    assert tables["all"].near == (0, 0, 0) and tables["all"].road_km == pytest.approx(0.4, abs=0.01)


def test_the_order_is_that_of_the_logs(tmp_path: Path) -> None:
    def record(scene: str, log: str, x: float) -> dict[str, object]:
        poses = [[x + 2.0 * k, 0.0, 0.0] for k in range(10)]
        return {"scene": scene, "location": "here", "rate_hz": 2, "logfile": log, "poses_xyyaw": poses}

    later, earlier = "n015-2018-07-02-15-00-00+0800", "n015-2018-07-02-09-00-00+0800"
    path = tmp_path / "drives.json"
    path.write_text(json.dumps([record("scene-0001", later, 0.0), record("scene-0002", earlier, -200.0)]))
    assert [d.started for d in sorted(read_drives(path), key=lambda d: d.started)] == [
        "2018-07-02-09-00-00",
        "2018-07-02-15-00-00",
    ]


def test_the_command_compares_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poses = [[2.0 * k, 0.0, 0.0] for k in range(20)]
    scenes = [{"scene": n, "location": "here", "rate_hz": 2, "date": d, "poses_xyyaw": poses} for n, d in
              (("a", "2018-07-01"), ("b", "2018-07-05"))]  # fmt: skip
    (tmp_path / "twice.json").write_text(json.dumps(scenes))
    (tmp_path / "once.json").write_text(json.dumps({"seed": 1, "scenes": scenes[:1]}))
    out = tmp_path / "table.json"
    assert main(["overlap", str(tmp_path / "twice.json"), str(tmp_path / "once.json"), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "twice" in text and "once" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith("road driven 2 x")]
    assert row[-4:] == ["100.0", "0.0", "100.0", "0.0"]
    written = json.loads(out.read_text())
    assert written["twice"]["here"]["days"] == [4.0, 4.0] and written["once"]["all"]["days"] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.json"], "no trajectories at"),
        (["empty"], "holds no scene"),
        (["empty", "--version", "v1.0-mini"], "has no v1.0-mini/scene.json"),
        (["two"], "several versions (v1.0-a, v1.0-b)"),
        (["two", "--version", "v1.0-c"], "has no version v1.0-c"),
        (["two", "--version", "v1.0-a"], "cannot read"),
    ],
)
def test_sources_that_do_not_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("v1.0-a", "v1.0-b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "scene.json").write_text("[]")
    assert main(["overlap", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("nmp-train: error: ") and message in text


@pytest.mark.skipif(not REAL.exists(), reason="the real excerpts are not here")
def test_real_drives() -> None:
    tables = overlaps(read_drives(REAL / "val_trajectories.json"))
    assert tables["all"].scenes == 100 and list(tables)[1] == "boston-seaport"
    assert sum(t.driven_km for p, t in tables.items() if p != "all") == pytest.approx(tables["all"].driven_km)
    for table in tables.values():
        assert sum(table.road_share) == pytest.approx(1)
        assert table.road_km <= table.driven_km * 1.05 and table.near == tuple(sorted(table.near))
