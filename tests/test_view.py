"""Finding, opening and serving drives to look at; whatever is wrong with them is told in one line."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from PIL import Image

from nmp import topics
from nmp.bags.reader import STORE, BagMessage
from nmp.cli import main
from nmp.draw import CityCanvas, corners_of
from nmp.errors import NmpError
from nmp.evaluation import CityMaps
from nmp.frame import CAMERAS, CLASSES, LocalMap
from nmp.geometry import quaternion_of, transform_from_xyyaw
from nmp.layers import LayerWriter, read_layers, to_occupancy
from nmp.metrics import IouMeter
from nmp.page import page_with
from nmp.view.drive import RecordedDrive
from nmp.view.find import find_recordings
from nmp.view.live import KEEP_S, LiveScreen
from nmp.view.pictures import CAMERA_WIDTH, CityPieces, small_camera
from nmp.view.server import PageServer, warn_if_open
from nmp.view.sink import Elements, Line, Note, Pose
from nmp.view.site import RecordedScreen, Site
from tests.bag_fixtures import bag_messages, jpeg, make_bag, write_messages
from tests.test_truth import square_map
from tests.view_fixtures import FRAMES, GRID, layers_at, make_drive, served


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_drive(tmp_path_factory.mktemp("drive"))


@pytest.fixture(scope="module")
def opened(drive: tuple[Path, Path]) -> Iterator[RecordedDrive]:
    [recording] = find_recordings(drive)
    with RecordedDrive(recording) as found:
        yield found


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run ``nmp view`` with something wrong, and return the one line that it says."""
    assert main(["view", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    return line.removeprefix("nmp: error: ")


# ------------------------------------------------------------------------------------------------------ finding


def test_layers_go_to_the_bag_of_their_time(drive: tuple[Path, Path], tmp_path: Path) -> None:
    bag, layers = drive
    out = tmp_path / "out"
    shutil.copytree(bag, out / "bags" / "scene-1")
    for name in ("first_pass", "no_prior", "second_pass"):
        shutil.copytree(layers, out / "layers" / name)
    other = LayerWriter(out / "layers" / "elsewhere")  # of a drive a day later
    other.write(replace(layers_at(0), stamp_ns=layers_at(0).stamp_ns + 86_400 * 10**9))
    found = find_recordings([out])
    assert {r.name for r in found} == {"scene-1, first pass", "scene-1, no prior", "scene-1, second pass"}
    assert len({r.slug for r in found}) == 3 and all(r.bag == out / "bags" / "scene-1" for r in found)
    # a demo says which drives it made, in their order
    (out / "metrics.json").write_text(json.dumps({"drives": {"first_pass": {}, "second_pass": {}}}))
    assert [r.layers.name for r in find_recordings([out])][:2] == ["second_pass", "first_pass"]
    assert find_recordings([out / "bags" / "scene-1" / f"{bag.name}.mcap", layers])[0].layers == layers


def test_drives_of_one_name_are_told_apart(drive: tuple[Path, Path], tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        shutil.copytree(drive[0], tmp_path / day / "drive")
    shutil.copytree(drive[1], tmp_path / "seen")
    found = find_recordings([tmp_path])
    assert [(r.name, r.slug) for r in found] == [("drive, seen", "drive.seen"), ("drive, seen (2)", "drive.seen.2")]


def test_what_is_missing_is_named(drive: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag, layers = drive
    assert "nothing to look at" in error_of(capsys)
    assert error_of(capsys, tmp_path / "no").startswith(f"{tmp_path / 'no'} does not exist")
    assert "holds neither a bag nor layers" in error_of(capsys, tmp_path)
    assert error_of(capsys, bag).startswith(f"no layers were recorded of {bag}: make them (nmp map {bag}")
    assert "give the bag, too" in error_of(capsys, layers)
    assert "--live looks at a running node" in error_of(capsys, bag, "--live")
    assert "exclude each other" in error_of(capsys, bag, "--foxglove", "--out", tmp_path / "out")


def test_bags_that_cannot_be_shown(
    drive: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, layers = drive
    messages = bag_messages(bag)
    blind = write_messages(tmp_path / "blind", [m for m in messages if "image" not in m.topic])
    assert error_of(capsys, blind, layers).startswith(f"bag {blind} has no images (such as on /cam_front/image_raw")
    empty = write_messages(tmp_path / "empty", [])
    assert "has no images" in error_of(capsys, empty, layers)
    whole = (bag / f"{bag.name}.mcap").read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "is truncated or damaged" in error_of(capsys, cut, layers)
    later = tmp_path / "later"
    LayerWriter(later).write(replace(layers_at(0), stamp_ns=layers_at(0).stamp_ns + 60 * 10**9))
    assert "are not of the time of bag" in error_of(capsys, bag, later)
    nowhere = tmp_path / "nowhere"
    LayerWriter(nowhere).write(replace(layers_at(0), map_from_base=np.full((4, 4), np.nan)))
    assert "the pose is not finite" in error_of(capsys, bag, nowhere)
    broken = tmp_path / "broken"
    shutil.copytree(layers, broken)
    first = min(broken.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    assert "is not a layer file" in error_of(capsys, bag, broken)


def test_a_bag_without_odometry_or_with_few_cameras_is_shown(drive: tuple[Path, Path], tmp_path: Path) -> None:
    bag, layers = drive
    left_out = (topics.absolute(topics.ODOM), topics.absolute(topics.image_topic("cam_back")))
    some = write_messages(tmp_path / "some", [m for m in bag_messages(bag) if m.topic not in left_out])
    with RecordedDrive(find_recordings([some, layers])[0]) as found:
        assert set(found.shots) == set(CAMERAS) - {"cam_back"}
        assert [p.stamp_ns for p in found.poses] == [k.stamp_ns for k in found.keyframes]


def test_poses_that_are_not_finite_are_told_and_left_out(drive: tuple[Path, Path], tmp_path: Path) -> None:
    bag, layers = drive
    messages = bag_messages(bag)
    odom = [m for m in messages if m.topic == topics.absolute(topics.ODOM)]
    odom[3].message.pose.pose.position.x = float("nan")
    with RecordedDrive(find_recordings([write_messages(tmp_path / "lost", messages), layers])[0]) as found:
        assert len(found.poses) == len(odom) - 1
        assert [(n.level, n.text.split(" (")[0]) for n in found.notes] == [(1, "pose is not finite")]


# ------------------------------------------------------------------------------------------------------ opening


def test_every_image_comes_from_its_own_moment(opened: RecordedDrive) -> None:
    for number, camera in enumerate(CAMERAS):
        assert [opened.image(camera, i) for i in range(FRAMES)] == [jpeg(seed=6 * i + number) for i in range(FRAMES)]


def test_scores_are_those_of_nmp_eval(drive: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "maps" / "expansion"
    folder.mkdir(parents=True)
    x, y = layers_at(0).map_from_base[:2, 3]
    tables = square_map()
    tables["node"] = [{**node, "x": node["x"] + x, "y": node["y"] + y} for node in tables["node"]]
    (folder / f"{layers_at(0).location}.json").write_text(json.dumps(tables))
    maps = CityMaps(tmp_path)
    meter = IouMeter()
    with RecordedDrive(find_recordings(drive)[0], maps) as found:
        assert found.scores is not None and len(found.scores) == FRAMES
        for index in range(FRAMES):
            local_map = found.layers(index)
            meter.add(local_map.masks, maps.truth_of(local_map))
            expected = [meter.percent()[key] for key in (*CLASSES, "miou")]
            assert [np.nan if v is None else v for v in found.scores[index]] == pytest.approx(
                expected, abs=0.01, nan_ok=True
            )
        truth = found.truth(0)
        assert truth is not None and truth.any()


def test_the_pieces_of_a_city_make_the_whole(opened: RecordedDrive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece laid over piece is at every keyframe what the whole drive so far would be drawn as."""
    monkeypatch.setattr("nmp.view.pictures.WHOLE_EVERY", 4)
    city = CityPieces(opened)
    corners = np.concatenate([corners_of(k.map_from_base, k.grid) for k in opened.keyframes])
    canvas = CityCanvas(corners, city._canvas.resolution, 4096)
    west, _, _, north = city.edges
    shown: np.ndarray | None = None
    for index, piece in enumerate(city.pieces()):
        picture = cv2.imdecode(np.frombuffer(piece.png, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert piece.whole == (index % 4 == 0)
        if piece.whole:
            shown = picture.copy()
        assert shown is not None
        left = round((piece.edges[0] - west) / canvas.resolution)
        top = round((north - piece.edges[3]) / canvas.resolution)
        assert piece.whole or picture.size < shown.size
        shown[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        canvas.add(opened.layers(index))
        assert np.array_equal(shown, canvas.picture())


def test_cameras_are_made_small() -> None:
    image = Image.open(io.BytesIO(small_camera(jpeg(3, 1600, 900))))
    assert image.size == (CAMERA_WIDTH, 450)
    small = jpeg(3, 320, 180)
    assert small_camera(small) == small
    png = io.BytesIO()
    Image.new("RGB", (320, 180), (200, 30, 30)).save(png, "PNG")
    assert Image.open(io.BytesIO(small_camera(png.getvalue()))).format == "JPEG"
    with pytest.raises(NmpError, match="damaged"):
        small_camera(b"\xff\xd8 no picture")


def test_a_bag_may_hold_its_layers_itself(drive: tuple[Path, Path], tmp_path: Path) -> None:
    """As ``ros2 bag record -a`` leaves it: grids beside images, logged later than they are stamped."""
    bag, layers = drive
    messages = bag_messages(bag)
    expected = list(read_layers(layers))
    for local_map in expected:
        for name, grid in occupancy_grids(local_map).items():
            messages.append(BagMessage(f"/mapping_node/layers/{name}", local_map.stamp_ns + 300_000_000, grid))
    whole = write_messages(tmp_path / "whole", sorted(messages, key=lambda m: m.stamp_ns))
    [recording] = find_recordings([whole])
    assert recording.name == "whole"
    with RecordedDrive(recording) as found:
        assert found.location == expected[0].location
        assert [k.stamp_ns for k in found.keyframes] == [m.stamp_ns for m in expected]
        for index, local_map in enumerate(expected):
            shown = found.layers(index)
            assert np.array_equal(to_occupancy(shown), to_occupancy(local_map))
            assert np.allclose(shown.map_from_base, local_map.map_from_base, atol=1e-6)
    # both are offered where there are both
    shutil.copytree(whole, tmp_path / "both" / "whole")
    shutil.copytree(layers, tmp_path / "both" / "again")
    assert sorted(r.name for r in find_recordings([tmp_path / "both"])) == ["whole", "whole, again"]
    some = [m for m in messages if not m.topic.endswith("crossing")]
    with pytest.raises(NmpError, match="no layers were recorded of"):
        find_recordings([write_messages(tmp_path / "some", sorted(some, key=lambda m: m.stamp_ns))])


def occupancy_grids(local_map: LocalMap) -> dict[str, Any]:
    """Return what a mapping node publishes, as messages of rosbags."""
    kind = STORE.types
    grid = local_map.grid
    corner = local_map.map_from_base @ transform_from_xyyaw(-grid.length / 2, -grid.width / 2, 0.0)
    stamp = kind["builtin_interfaces/msg/Time"](local_map.stamp_ns // 10**9, local_map.stamp_ns % 10**9)
    place = kind["geometry_msgs/msg/Point"](corner[0, 3], corner[1, 3], 0.0)
    pose = kind["geometry_msgs/msg/Pose"](place, kind["geometry_msgs/msg/Quaternion"](*quaternion_of(corner)))
    info = kind["nav_msgs/msg/MapMetaData"](stamp, grid.resolution, grid.cols, grid.rows, pose)
    header = kind["std_msgs/msg/Header"](stamp, "map")
    cells = dict(zip(CLASSES, to_occupancy(local_map), strict=True))
    return {name: kind["nav_msgs/msg/OccupancyGrid"](header, info, plane.reshape(-1)) for name, plane in cells.items()}


def test_damaged_images_are_left_out(
    drive: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, layers = drive
    messages = bag_messages(bag)
    topic = topics.absolute(topics.image_topic("cam_back"))
    spoilt = next(m for m in messages if m.topic == topic)
    spoilt.message.data = spoilt.message.data[:100]
    broken = write_messages(tmp_path / "broken", messages)
    assert main(["view", str(broken), str(layers), "--out", str(tmp_path / "pages")]) == 0
    assert "1 images were left out; the first: cam_back at" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "pages" / "broken.seen" / "cameras" / "cam_back").iterdir()}
    assert written == {f"{i}.jpg" for i in range(1, FRAMES)}


# ------------------------------------------------------------------------------------------------------ serving


def ask(url: str, path: str, host: str | None = None) -> tuple[int, str, bytes]:
    """Return status, type and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers.get("Content-Type", answer.headers.get("Location", "")), body


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    name = "</script><!--<script>alert(1)"
    page = page_with("nmp.view", {"name": name})
    content = page.split('type="application/json">', 1)[1].split("</script>", 1)[0]
    assert json.loads(content) == {"name": name} and "<" not in content


def test_addresses(drive: tuple[Path, Path]) -> None:
    screen = RecordedScreen(find_recordings(drive)[0])
    with served(PageServer(Site([screen]))) as url:
        assert ask(url, "/")[:2] == ask(url, "/drive.seen")[:2] == (302, "/drive.seen/")
        status, kind, page = ask(url, "/drive.seen/")
        assert (status, kind) == (200, "text/html; charset=utf-8") and b"__CONTENT__" not in page
        for outside in (b"http://", b"https://", b"//cdn"):  # all that it needs is in it
            assert outside not in page
        for path, kind in (("cameras/cam_back/5.jpg", "image/jpeg"), ("layers/0.png", "image/png")):
            assert ask(url, f"/drive.seen/{path}")[:2] == (200, kind)
        assert Image.open(io.BytesIO(ask(url, "/drive.seen/layers/3.png")[2])).size == (GRID.cols, GRID.rows)
        wrong = ["/no/", "/drive.seen/layers/6.png", "/drive.seen/layers/-1.png", "/drive.seen/layers/0.jpg"]
        wrong += ["/drive.seen/cameras/cam_roof/0.jpg", "/drive.seen/truth/0.png", "/drive.seen/layers/%D9%A3.png"]
        wrong += ["/drive.seen/../../etc/passwd", "/drive.seen/cameras/..%2f..%2fetc/0.jpg", "/drive.seen/layers"]
        for path in wrong:
            assert ask(url, path)[0] == 404, path
        assert ask(url, "/drive.seen/", host="attacker.example")[0] == 403
        assert ask(url, "/drive.seen/", host="localhost")[0] == 200
    screen.close()


def test_ports_and_hosts(drive: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert error_of(capsys, *drive, "--port", port).startswith(f"port {port} of 127.0.0.1 is in use: give another")
    assert "no such port" in error_of(capsys, *drive, "--port", 70000)
    assert "cannot listen on no.such.host.invalid" in error_of(capsys, *drive, "--host", "no.such.host.invalid")
    for host in ("127.0.0.1", "::1", "localhost"):
        warn_if_open(host)
    assert capsys.readouterr().err == ""
    warn_if_open("0.0.0.0")
    assert "everybody who reaches 0.0.0.0" in capsys.readouterr().err


def test_without_the_sdk_one_line_says_how_to_get_it(
    drive: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "foxglove" or n.startswith("nmp.view.foxglove")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "foxglove", None)
    for arguments in (("--foxglove",), ("--mcap", tmp_path / "a.mcap")):
        assert main(["view", *map(str, (*drive, *arguments))]) == 2
        assert "pip install 'neural-map-prior[view]'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- live


def fed(screen: LiveScreen, count: int, begin: int = 0) -> None:
    for index in range(begin, begin + count):
        local_map = layers_at(index)
        screen.image("cam_front", local_map.stamp_ns, jpeg(index))
        screen.pose(Pose(local_map.stamp_ns, local_map.map_from_base))
        screen.layers(local_map)
        points = np.array([[400.0, 1100.0], [420.0, 1106.0]])
        screen.elements(Elements(local_map.stamp_ns, [Line("divider", 1, points, 0.9)]))


def test_a_running_node_is_kept_for_a_while() -> None:
    screen = LiveScreen("mapping_node", "waiting")
    assert screen.content()["location"] == "waiting" and screen.content()["layers"] == []
    fed(screen, 4)
    content = screen.content()
    assert [row[0] for row in content["layers"]] == [0.0, 0.5, 1.0, 1.5] and content["seconds"] == 1.5
    for kind in ("layers", "lines"):
        assert (screen.picture(kind, ["3"]) or b"").startswith(b"\x89PNG")
        assert screen.picture(kind, ["4"]) is None
    assert screen.picture("lines", ["3"]) != screen.picture("layers", ["3"])
    assert screen.picture("cameras", ["cam_front", "2"]) == jpeg(2)
    fed(screen, 100, begin=4)
    content = screen.content()
    kept = len(content["layers"])
    assert kept == round(KEEP_S / 0.5) + 1 and content["first"]["layers"] == 104 - kept
    assert screen.picture("layers", ["3"]) is None  # forgotten
    assert screen.picture("layers", [str(content["first"]["layers"])]) is not None
    assert content["from"] == content["seconds"] - KEEP_S == content["layers"][0][0]


def test_when_time_goes_back_a_new_drive_begins() -> None:
    screen = LiveScreen("mapping_node", "waiting")
    fed(screen, 10)
    late = layers_at(9)
    fed(screen, 2)  # the bag was started again
    content = screen.content()
    assert [row[0] for row in content["layers"]] == [0.0, 0.5] and content["first"]["layers"] == 10
    screen.layers(late)  # of the drive before: it took its time
    assert len(screen.content()["layers"]) == 2 and screen.content()["seconds"] == 0.5
    screen.note(Note(12345, 2, "cam_back is silent"))
    assert screen.content()["notes"] == [[0.5, 2, "cam_back is silent"]]
    events = screen.events()
    assert json.loads(next(events)) == screen._rows()
    third = layers_at(2)
    screen.pose(Pose(third.stamp_ns, third.map_from_base))
    assert json.loads(next(events))["seconds"] == 1.0


def test_what_comes_too_often_is_thinned_out() -> None:
    screen = LiveScreen("mapping_node", "waiting")
    for index in range(60):  # 60 Hz
        screen.image("cam_front", 10**18 + index * 10**9 // 60, jpeg(0))
    assert 4 <= len(screen.content()["cameras"]["cam_front"]) <= 7


def test_layers_may_reach_over_the_end_of_a_bag(tmp_path: Path) -> None:
    bag = make_bag(tmp_path, frames=2)
    writer = LayerWriter(tmp_path / "layers")
    for index in range(4):
        writer.write(layers_at(index))
    with RecordedDrive(find_recordings([bag, tmp_path / "layers"])[0]) as found:
        assert len(found.keyframes) == 4 and found.end_ns == found.keyframes[-1].stamp_ns


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_to_look_and_ends_quietly(drive: tuple[Path, Path], ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "nmp.cli", "view", *map(str, drive), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading drive, seen ...\n"
        said = process.stdout.readline()
        address = said.split()[1]
        assert said == f"open {address} (Ctrl-C ends)\n" and address.startswith("http://127.0.0.1:")
        assert ask(address, "/drive.seen/")[0] == 200
        process.send_signal(ending)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
