"""The page of a drive in a headless browser: it plays, pauses, seeks, and shows what it should."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nmp.cli import main
from nmp.draw import CLASS_COLOURS
from nmp.frame import CAMERAS
from nmp.nodes.city import CitySoFar
from nmp.view.find import find_recordings
from nmp.view.live import LiveScreen
from nmp.view.server import PageServer
from nmp.view.sink import Note, Pose
from nmp.view.site import RecordedScreen, Site
from tests.bag_fixtures import jpeg
from tests.view_fixtures import FRAMES, FRONT_S, GRID, PERIOD_S, browser, layers_at, make_drive, served


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_drive(tmp_path_factory.mktemp("drive"))


@pytest.fixture(scope="module")
def address(drive: tuple[Path, Path]) -> Iterator[str]:
    [recording] = find_recordings(drive)
    screen = RecordedScreen(recording)
    with served(PageServer(Site([screen]))) as url:
        yield url
    screen.close()


class Looker:
    """A page that is looked at, and what it complained about."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.complaints = page, list[str]()
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", lambda request: self.complaints.append(request.url))
        page.on("response", lambda answer: self.complaints.append(answer.url) if answer.status >= 400 else None)
        page.goto(url)
        page.wait_for_url("**/drive.seen/**" if "live" not in url else "**")  # whatever the address was
        self.settle()

    def settle(self) -> None:
        """Wait until all pictures that were asked for are there and drawn."""
        self.until("pictures.size > 0 && [...pictures.values()].every(p => p.ready || p.failed) && !wanted")

    def until(self, condition: str) -> None:
        """Wait until something is so. (The page forbids itself what playwright's own waiting needs: eval.)"""
        for _ in range(1000):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(10)
        raise AssertionError(f"never came true: {condition}")

    @property
    def time(self) -> float:
        return float(self.page.evaluate("player.t"))

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """What is seen of an element, [H, W, 3]."""
        shot = self.page.locator(f"#{name}").screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))

    def count(self, name: str, colour: tuple[int, int, int]) -> int:
        """How many pixels of an element are nearly of a colour."""
        return int((np.abs(self.pixels(name).astype(int) - colour).max(axis=-1) < 40).sum())


@pytest.fixture(scope="module")
def opened(chromium: Any, address: str) -> Looker:
    return Looker(chromium.new_page(viewport={"width": 1280, "height": 720}), address)


@pytest.fixture
def looker(opened: Looker) -> Looker:
    """The one page, as after its start."""
    opened.page.evaluate("play(false); seek(0); get('rate').value = '1'; document.activeElement.blur()")
    opened.settle()
    return opened


def test_everything_is_shown_without_a_complaint(looker: Looker) -> None:
    for camera in CAMERAS:
        assert looker.pixels(camera).std() > 20  # a photograph, not a plate
    for name, colour in CLASS_COLOURS.items():
        assert looker.count("seen", colour) > 200, name
        assert looker.count("beside", colour) > 50, name  # thinner: as lines
        assert looker.count("city", colour) > 50, name
    assert looker.page.inner_text("h1") == "drive, seen"
    assert [e.inner_text() for e in looker.page.query_selector_all(".legend span")] == list(CLASS_COLOURS)
    assert looker.complaints == []


def test_the_picture_of_a_camera_is_that_of_its_moment(looker: Looker) -> None:
    """Every image differs, so each must show up at its own time and at no other."""
    names = list(CAMERAS)
    for index in (0, FRAMES - 1):
        looker.page.evaluate(f"seek({index * PERIOD_S + 0.05})")
        looker.settle()
        shown = looker.pixels("cam_back").astype(float)
        inside = np.s_[30:-5, 5:-5]  # without the name and the round corners
        errors = []
        for i in range(FRAMES):
            image = Image.open(io.BytesIO(jpeg(seed=6 * i + names.index("cam_back")))).convert("RGB")
            true = np.asarray(image.resize((shown.shape[1], shown.shape[0]), Image.Resampling.BILINEAR), float)
            errors.append(np.abs(true - shown)[inside].mean())
        assert int(np.argmin(errors)) == index and min(errors) < 12


def test_play_advances_and_pause_holds(looker: Looker) -> None:
    looker.page.click("#play")
    looker.until("player.t > 0.3")
    looker.page.keyboard.press("Space")  # the button has the focus
    assert not looker.page.evaluate("player.playing")
    held = looker.time
    looker.page.wait_for_timeout(150)
    assert looker.time == held > 0.3
    looker.page.select_option("#rate", "8")
    looker.page.click("#play")
    looker.until("!player.playing")  # at the end it stops by itself
    assert looker.time == looker.page.evaluate("drive.seconds")
    looker.page.click("#play")  # and begins anew
    looker.until("player.playing && player.t < drive.seconds")
    assert looker.complaints == []


def test_slider_and_keys_seek(looker: Looker) -> None:
    before = looker.pixels("city")
    box = looker.page.locator("#time").bounding_box()
    looker.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert abs(looker.time - looker.page.evaluate("drive.seconds") / 2) < 0.1
    looker.settle()
    assert (looker.pixels("city") != before).any(axis=-1).mean() > 0.005  # the city has grown, the car has moved
    looker.page.evaluate("document.activeElement.blur()")
    stamps = looker.page.evaluate("drive.layers.map(row => row[0])")
    assert np.allclose(np.diff(stamps), PERIOD_S, atol=0.002) and abs(stamps[0] - FRONT_S) < 0.002
    for key, expected in (
        ("Home", 0.0),
        ("ArrowRight", stamps[0]),
        ("ArrowRight", stamps[1]),
        ("ArrowLeft", stamps[0]),
    ):
        looker.page.keyboard.press(key)
        assert looker.time == pytest.approx(expected, abs=1e-6)
    looker.page.keyboard.press("End")
    assert looker.time == looker.page.evaluate("drive.seconds")
    looker.page.keyboard.press("Space")
    assert looker.page.evaluate("player.playing")


def test_the_city_grows_and_shrinks_with_the_time(looker: Looker) -> None:
    """Going back gives the same picture as coming there the first time."""
    seen = {}
    for at in (0.0, 1.6, 2.5, 1.6, 0.0):
        looker.page.evaluate(f"seek({at})")
        looker.settle()
        boundary = looker.count("city", CLASS_COLOURS["boundary"])
        assert seen.setdefault(at, boundary) == boundary
    assert seen[0.0] < seen[1.6] < seen[2.5]


def test_layers_are_drawn_from_where_the_car_is_by_now(looker: Looker) -> None:
    """Just before a keyframe the layers of the one before are moved and turned to where the car is by then."""
    at = looker.page.evaluate("drive.layers[3][0]")
    lines, crossings = [], []
    for t in (at - 0.01, at):
        looker.page.evaluate(f"seek({t})")
        looker.settle()
        mask = np.abs(looker.pixels("seen").astype(int) - CLASS_COLOURS["boundary"]).max(axis=-1) < 90
        rows, cols = mask.shape
        pixels_per_m = 0.985 * min(rows / GRID.length, cols / GRID.width)
        blue = np.abs(looker.pixels("seen").astype(int) - CLASS_COLOURS["crossing"]).max(axis=-1) < 90
        crossings.append(np.nonzero(blue)[0].mean() / pixels_per_m)
        right = mask[rows // 4 : -rows // 4, cols // 2 :]
        lines.append(np.polyfit(*np.nonzero(right), 1))  # column = slope * row + offset
    assert abs(lines[1][0]) < 0.002  # its own layers: the boundary runs straight ahead
    # the car has turned to the left by 0.05 rad/s since then, so what was straight ahead is to the right
    assert lines[0][0] == pytest.approx(-np.tan(0.05 * (PERIOD_S - 0.01)), abs=0.004)
    assert crossings[0] - crossings[1] == pytest.approx(8.0 * (PERIOD_S - 0.01), abs=0.3)  # it has come 8 m/s nearer


def test_small_screens_need_no_scrolling_sideways(chromium: Any, address: str) -> None:
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    looker = Looker(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#play").bounding_box()["y"] < 844  # the controls stay in sight
    assert looker.pixels("cam_front").std() > 20 and looker.complaints == []
    page.close()


def test_a_written_folder_opens_from_the_disk(
    chromium: Any, drive: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages"
    assert main(["view", *map(str, drive), "--out", str(out)]) == 0
    assert f"open {out / 'index.html'}" in capsys.readouterr().out
    page = chromium.new_page(viewport={"width": 1280, "height": 720})
    looker = Looker(page, (out / "index.html").as_uri())
    page.keyboard.press("End")
    looker.settle()
    assert looker.pixels("cam_back").std() > 20
    assert looker.count("seen", CLASS_COLOURS["boundary"]) > 200
    assert looker.complaints == []
    page.close()
    assert main(["view", *map(str, drive), "--out", str(out)]) == 0  # its own folder may be written again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    assert main(["view", *map(str, drive), "--out", str(tmp_path / "mine")]) == 2
    assert "holds other files" in capsys.readouterr().err and (tmp_path / "mine" / "letter.txt").exists()


def test_a_running_node_is_followed_until_somebody_looks_back(chromium: Any) -> None:
    screen = LiveScreen("mapping_node", "waiting")
    city = CitySoFar()

    def drive(index: int) -> None:
        local_map = layers_at(index)
        for camera in CAMERAS:
            screen.image(camera, local_map.stamp_ns, jpeg(index))
        screen.pose(Pose(local_map.stamp_ns, local_map.map_from_base))
        screen.layers(local_map)
        city.add(local_map)
        screen.city(local_map.stamp_ns, city.overview())

    drive(0)
    server = PageServer(Site([screen]), events=screen.events)
    page = chromium.new_page(viewport={"width": 1280, "height": 720})
    with served(server) as url:
        looker = Looker(page, f"{url}live/")
        for index in range(1, 6):
            drive(index)
        looker.until(
            "drive.layers.length === 5 && drive.seconds === 2.5 && player.t > 2"
        )  # the last one's lines may come
        looker.settle()
        assert looker.pixels("cam_back").std() > 20
        assert looker.count("seen", CLASS_COLOURS["boundary"]) > 200
        assert looker.count("city", CLASS_COLOURS["boundary"]) > 50
        page.keyboard.press("Home")
        assert looker.time == 0.0 and page.get_attribute("#newest", "aria-pressed") == "false"
        screen.note(Note(0, 2, "cam_back is silent"))
        drive(6)
        looker.until("drive.seconds === 3")
        assert looker.time == 0.0  # it stays where somebody looks
        page.click("#newest")
        looker.until("player.t > 2")
        assert page.inner_text("#notes li.error") == "cam_back is silent"
        assert looker.complaints == []
        page.close()
    city.close()
