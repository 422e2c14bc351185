"""The demo as a person starts it, on a nuScenes folder: bags, player, node, recorder, report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bag_fixtures import LOCATION, make_nuscenes

from nmp.view.find import find_recordings

ROOT = Path(__file__).resolve().parents[1]


def _demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "demo" / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def _empty_map(root: Path) -> None:
    """A map expansion with one square of road under the car."""
    corners = {"a": (300, 1000), "b": (500, 1000), "c": (500, 1200), "d": (300, 1200)}
    tables: dict[str, object] = {
        name: [] for name in ("line", "lane", "road_divider", "lane_divider", "ped_crossing", "walkway")
    }
    tables["node"] = [{"token": t, "x": x, "y": y} for t, (x, y) in corners.items()]
    tables["polygon"] = [{"token": "p", "exterior_node_tokens": list(corners), "holes": []}]
    tables["road_segment"] = [{"token": "r", "polygon_token": "p"}]
    folder = root / "maps" / "expansion"
    folder.mkdir(parents=True)
    (folder / f"{LOCATION}.json").write_text(json.dumps(tables))


def test_every_keyframe_of_a_folder_is_mapped_and_shown(tmp_path: Path) -> None:
    root = make_nuscenes(tmp_path / "data", keyframes=3)
    _empty_map(root)
    out = tmp_path / "out"
    done = _demo("--dataroot", root, "--version", "v1.0-mini", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "No accuracy is claimed" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    drive = metrics["drives"]["scene-0001"]
    assert drive["keyframes"] == drive["frames_answered"] == drive["recorded"] == 3
    assert metrics["prior_bytes"] > 0
    assert "<img" in (out / "report.html").read_text() and (out / "film_strip.png").stat().st_size > 0
    # what it says at its end works
    assert done.stdout.rstrip().endswith(f"nmp view {out}")
    assert [r.name for r in find_recordings([out])] == ["scene-0001"]
    assert list((out / "prior" / LOCATION).rglob("c/*/*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataroot", "nowhere", "--version", "v1.0-mini"), "nowhere"),
        (("--weights", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = _demo(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    [line] = [text for text in done.stderr.splitlines() if "error" in text]
    assert message in line and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("difference", "answered", "expected"), [(0.1, 42, True), (0.11, 42, False), (0.0, 41, None), (5.0, 41, None)]
)
def test_replay_must_score_as_dds_does(
    difference: float, answered: int, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    from simulated import agrees  # type: ignore[import-not-found]

    assert agrees(difference, answered, 42) is expected
