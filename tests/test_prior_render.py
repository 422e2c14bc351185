"""Pictures of a stored city: what lies where, in which colour, without seams, and in bounded pieces."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nmp import cli
from nmp.draw import CLASS_COLOURS, GROUND, INK, colour_table, coloured, map_zoom, opacity
from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork
from nmp.model.weights import load_network
from nmp.png import PngStream
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.recall import CELL_PX, REACH, Recall
from nmp.prior.render import Frame, frame_of, resized, write_picture
from nmp.prior.sheets import CHUNK, CHUNK_PX, AgeSheet, City, EvidenceSheet, LayerSheet, TraversalSheet, sheets_of
from nmp.prior.web import prepare_folder, write_map

CITY = "boston-seaport"
SECOND, HOUR = 1_000_000_000, 3_600_000_000_000
SPEC = PriorSpec(2, 0.3, "abc123", evidence_cap=4096)


@cache
def shipped() -> tuple[Recall, PriorSpec]:
    """What reads the prior of the shipped weights, and what these keep in a cell."""
    network, fingerprint = load_network()
    spec = PriorSpec(network.state_channels, network.config.prior_cell, fingerprint, evidence_cap=4096)
    return Recall(network), spec


def drive(
    folder: Path, window: Window, evidence: int = 4096, stamp_ns: int = HOUR, spec: PriorSpec = SPEC, seed: int = 0
) -> Path:
    """Commit a drive that saw one block of cells, and return the city."""
    coarse = np.random.default_rng(seed).integers(-127, 128, (spec.channels, *(n // 8 + 1 for n in window.shape)))
    latent = coarse.astype(np.int8).repeat(8, 1).repeat(8, 2)[:, : window.rows, : window.cols]
    with CityPrior.open(folder, CITY, spec, flush_interval_s=1e6) as prior:
        before = prior.read(window)[1]
        prior.write(window, latent, (before + evidence).astype(np.uint16), stamp_ns)
    return folder / CITY


def ignore(count: int) -> None:
    pass


def picture_of(city: City, sheet: EvidenceSheet | LayerSheet, path: Path, metres: float) -> tuple[NDArray, Frame]:
    """The map in a picture, without legend, scale bar and rim."""
    frame = frame_of(city, metres)
    write_picture(city, sheet, path, frame, ignore)
    whole = np.asarray(Image.open(path))
    assert whole.shape[1] == max(frame.width, 760)
    left, head = (whole.shape[1] - frame.width) // 2, round(44 * map_zoom(whole.shape[1]))
    return whole[head : head + frame.height, left : left + frame.width], frame


# -- what the prior says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu_default", "gpu_default"])
def test_cells_beyond_the_margin_change_nothing(name: str) -> None:
    network = load_network(name)[0]
    recall = Recall(network)
    rng = np.random.default_rng(1)
    middle = recall.margin + 64
    side = 2 * middle + 8
    latent = rng.integers(-127, 128, (network.state_channels, side, side)).astype(np.int8)
    evidence = rng.integers(0, 4096, (side, side)).astype(np.uint16)
    whole = recall(latent, evidence)
    assert whole.shape == (3, 2 * side, 2 * side) and whole.std() > 0.05

    def inner(cut: int) -> float:
        """Largest difference of the eight cells in the middle when they are decoded with ``cut`` cells around them."""
        part = np.s_[middle - cut : middle + 8 + cut]
        alone = recall(np.ascontiguousarray(latent[:, part, part]), np.ascontiguousarray(evidence[part, part]))
        kept, there = np.s_[CELL_PX * cut : CELL_PX * (cut + 8)], np.s_[CELL_PX * middle : CELL_PX * (middle + 8)]
        return float(np.abs(alone[:, kept, kept] - whole[:, there, there]).max())

    assert inner(recall.margin) < 1e-4  # rounding; with 8 cells fewer it is 5e-4
    assert inner(8) > 1e-3


def test_latents_without_evidence_change_nothing() -> None:
    recall, spec = shipped()
    nowhere = np.zeros((24, 24), np.uint16)
    silent = recall(np.zeros((spec.channels, 24, 24), np.int8), nowhere)
    assert np.array_equal(recall(np.full((spec.channels, 24, 24), 99, np.int8), nowhere), silent)
    # no class anywhere, and the same in all cells that are not near the edge
    assert silent[:, 20:28, 20:28].max() < 0.25
    assert np.ptp(silent[:, 20:28:CELL_PX, 20:28:CELL_PX], axis=(1, 2)).max() < 1e-4


def test_the_recurrent_state_is_decoded_as_it_is() -> None:
    torch.manual_seed(0)
    config = NetworkConfig(bev_channels=16, fusion="paper", bev_length=9.0, bev_width=6.0, prior_cell=0.6)
    network = BEVNetwork(config)
    recall = Recall(network)
    latent = np.random.default_rng(0).integers(-127, 128, (16, 12, 20)).astype(np.int8)
    evidence = np.full((12, 20), 256, np.uint16)
    evidence[:, 10:] = 0
    state = torch.from_numpy(np.where(evidence > 0, latent, 0) / np.float32(127))[None].float()
    with torch.no_grad():
        expected = torch.sigmoid(network.decode(state.repeat_interleave(2, 2).repeat_interleave(2, 3)).logits)[0]
    found = recall(latent, evidence)
    assert found.shape == (3, 24, 40)
    # cells of 0.6 m under features of 0.3 m: layers of 0.15 m are averaged over two pixels of the picture
    averaged = expected.unflatten(1, (24, 2)).unflatten(3, (40, 2)).mean((2, 4)).numpy()
    assert np.abs(found - averaged).max() < 1e-4


# -- pictures -----------------------------------------------------------------------------------------------


def test_a_strip_at_a_time_gives_the_same_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (301, 97, 3)).astype(np.uint8)
    path = tmp_path / "new" / "a.png"
    with PngStream(path, 97, 301) as file:
        for start in (0, 1, 200):
            file.write(picture[start : {0: 1, 1: 200, 200: 301}[start]])
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    with pytest.raises(ZeroDivisionError), PngStream(tmp_path / "b.png", 97, 301) as file:
        file.write(picture[:100])
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["new"] and [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("metres, pixels", [(0.15, 2.0), (0.05, 6.0), (0.6, 0.5), (0.37, 104 / 128)])
def test_cells_lie_where_they_should_at_any_scale(tmp_path: Path, metres: float, pixels: float) -> None:
    # at negative coordinates, in several chunks with a gap between them
    drive(tmp_path, Window(-70, -200, 20, 30))
    city_folder = drive(tmp_path, Window(300, 100, 40, 8), evidence=1024, stamp_ns=2 * HOUR)
    with City(city_folder) as city:
        picture, frame = picture_of(city, EvidenceSheet(city), tmp_path / "a.png", metres)
    assert frame.chunk_px == CHUNK * pixels and frame.metres_per_pixel == pytest.approx(0.3 / pixels)
    # tiles of 64 cells: columns -256..128, rows -128..384
    assert picture.shape[:2] == (round(512 * pixels), round(384 * pixels))

    table = colour_table("viridis")
    for window, share in ((Window(-70, -200, 20, 30), 1.0), (Window(300, 100, 40, 8), 0.25)):
        middle_row, middle_col = (384 - window.row - window.rows / 2), window.col + window.cols / 2 + 256
        found = picture[int(middle_row * pixels), int(middle_col * pixels)]
        assert np.array_equal(found, table[round(share * 255)])
    known = (picture != np.array(INK, np.uint8)).any(axis=2)
    rows, cols = np.nonzero(known)
    edges = [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1]
    assert np.abs(np.array(edges) - np.array([384 - 340, 384 + 70, 56, 364]) * pixels).max() <= 1
    assert known.sum() == pytest.approx((20 * 30 + 40 * 8) * pixels**2, rel=0.2)


def test_layers_have_no_seams_and_lines_stay_visible_from_afar(tmp_path: Path) -> None:
    recall, spec = shipped()
    window = Window(100, 90, 60, 70)  # over the corner of four chunks
    folder = drive(tmp_path, window, evidence=2000, spec=spec)
    with City(folder) as city:
        sheet = LayerSheet(city)
        picture, _ = picture_of(city, sheet, tmp_path / "a.png", 0.15)
        # with all around it that has a say
        around = Window(64 - REACH, 64 - REACH, 128 + 2 * REACH, 128 + 2 * REACH)
        part = slice(2 * REACH, 2 * (REACH + 128))
        layers = recall(*city.prior.read(around))[:, part, part][:, ::-1]
    # tiles 1 and 2 of both axes: the picture is exactly that window
    assert picture.shape[:2] == (256, 256)
    known = np.zeros((128, 128), np.float32)
    known[100 - 64 : 160 - 64, 90 - 64 : 160 - 64] = 1.0
    known = known.repeat(2, 0).repeat(2, 1)[::-1]
    expected = coloured(opacity(layers) * known, known)
    assert np.abs(picture.astype(int) - expected).max() <= 1
    assert (picture[known == 0] == INK).all() and (expected != np.array(GROUND)).any(axis=2)[known > 0].mean() > 0.05

    sums = np.zeros((4, CHUNK_PX, CHUNK_PX), np.float32)
    sums[3] = 1.0
    sums[0, :, 128:133] = 1.0  # a divider of 0.75 m
    for side in (64, 16):
        far = sheet.paint(resized(sums, side), 38.4 / side)
        line = np.abs(far[side // 2].astype(int) - CLASS_COLOURS["divider"]).sum(axis=1)
        assert (line < 10).sum() >= 1 and (far[:, 0] == GROUND).all()


def test_age_and_traversals_are_told_by_drives(tmp_path: Path) -> None:
    drive(tmp_path, Window(0, 0, 40, 40), stamp_ns=HOUR)
    folder = drive(tmp_path, Window(0, 20, 40, 40), stamp_ns=5 * HOUR, seed=1)
    with City(folder) as city:
        age, visits = AgeSheet(city), TraversalSheet(city)
        assert age.caption.startswith("last seen, hours before") and [text for _, text in age.ticks] == ["0", "2", "4"]
        assert [text for _, text in visits.ticks] == ["1", "2"]
        old, new = age.paint(age.sums(0, 0), 0.15), visits.paint(visits.sums(0, 0), 0.15)
    first, both = (CHUNK_PX - 40, 20), (CHUNK_PX - 40, 60)
    inferno, cividis = colour_table("inferno"), colour_table("cividis")
    assert np.array_equal(old[first], inferno[0]) and np.array_equal(old[both], inferno[255])
    assert np.array_equal(new[first], cividis[0]) and np.array_equal(new[both], cividis[255])
    assert (old[0, 200] == INK).all()


# -- the map for a browser ----------------------------------------------------------------------------------


def test_the_map_is_a_pyramid_and_one_page(tmp_path: Path) -> None:
    drive(tmp_path, Window(-100, 0, 50, 60))
    folder = drive(tmp_path, Window(300, 600, 128, 128), evidence=1024, stamp_ns=2 * HOUR)
    out = tmp_path / "web"
    done: list[int] = []
    with City(folder) as city:
        prepare_folder(out)
        sheets = sheets_of(city, ("evidence", "age"))
        count = write_map(city, sheets, out, done.append)
        chunks = city.chunks()
    # rows -1..3 and columns 0..5 of chunks: three doublings
    assert sum(done) == 2 * len(chunks) and {p.name for p in (out / "evidence").iterdir()} == {"0", "1", "2", "3"}
    assert count == len(list(out.rglob("*.png")))
    at_the_bottom = {tuple(map(int, p.with_suffix("").parts[-2:])) for p in (out / "evidence" / "3").rglob("*.png")}
    # x from the west, y from the north; the second drive lies over four chunks, the first in one
    assert at_the_bottom == {(0, 4), (4, 0), (4, 1), (5, 0), (5, 1)}
    finest = np.asarray(Image.open(out / "evidence" / "3" / "0" / "4.png"))
    assert finest.shape == (256, 256, 3)
    # rows -100..-50 of the chunk of rows -128..0: 56 pixels above its southern edge, north up
    assert (finest[255 - 56 - 1, 1] == colour_table("viridis")[255]).all() and (finest[255 - 54, 1] == INK).all()
    root = np.asarray(Image.open(out / "evidence" / "0" / "0" / "0.png"))
    lit = (root != np.array(INK, np.uint8)).any(axis=2)
    assert lit[4 * 32 + 12 : 4 * 32 + 25, :15].all() and lit.sum() < 256 * 256 / 16

    page = (out / "index.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']|https?://|@import|fetch\(", page)
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert content["city"] == CITY and content["levels"] == 3 and content["size"] == [6 * 256, 5 * 256]
    assert content["west"] == 0 and content["north"] == pytest.approx(4 * 38.4) and content["metres"] == 0.15
    assert [kind["name"] for kind in content["kinds"]] == ["evidence", "age"]
    assert all(len(kind["colours"]) == 16 and kind["ticks"] for kind in content["kinds"])


def test_a_map_replaces_only_a_map(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "web")
    stale = tmp_path / "web" / "evidence" / "0" / "0" / "0.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    prepare_folder(tmp_path / "web")
    assert not stale.exists()
    mine = tmp_path / "mine" / "index.html"
    mine.parent.mkdir()
    mine.write_text("my page")
    with pytest.raises(NmpError, match="mine holds other files: choose a new folder"):
        prepare_folder(mine.parent)
    assert mine.read_text() == "my page"


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_draws_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = drive(tmp_path, Window(0, 0, 60, 60), spec=shipped()[1])
    out, web = tmp_path / "pictures", tmp_path / "web"
    assert cli.main(["prior", "render", str(folder), "--out", str(out), "--web", str(web)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["age.png", "evidence.png", "layers.png", "traversals.png"]
    assert {p.name for p in web.iterdir()} == {"index.html", "layers", "evidence", "age", "traversals"}
    assert "128 x 128 pixels of 0.15 m" in capsys.readouterr().out
    one = tmp_path / "one.png"
    assert cli.main(["prior", "render", str(folder), "--out", str(one), "--metres-per-pixel", "0.3"]) == 0
    assert "64 x 64" in capsys.readouterr().out and Image.open(one).width == 760


def test_bad_input_is_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = drive(tmp_path, Window(0, 0, 10, 10))
    (tmp_path / "file").write_text("")
    CityPrior.open(tmp_path / "new", CITY, SPEC).close()
    out = ["--out", str(tmp_path / "out")]
    shaded = ["--layer", "evidence"]
    for arguments, words in [
        ([str(tmp_path / "no"), *out], "there is no prior in"),
        ([str(tmp_path / "new" / CITY), *out], "holds no drive"),
        ([str(folder), *out], "was written with weights abc123, the weights that come with nmp have"),
        ([str(folder), *out, "--weights", str(tmp_path / "no.safetensors")], "is missing"),
        ([str(folder), *out, "--layer", "roads"], "there is no layer 'roads' to draw: choose layers, evidence, age or"),
        ([str(folder), *shaded], "nowhere to draw to"),
        ([str(folder), *out, *shaded, "--metres-per-pixel", "nan"], "--metres-per-pixel is nan: give 0.0375 to 38.4"),
        ([str(folder), *out, *shaded, "--metres-per-pixel", "0.01"], "--metres-per-pixel is 0.01"),
        ([str(folder), "--out", str(tmp_path / "file" / "x"), *shaded], "cannot write the picture"),
        ([str(folder), "--web", str(tmp_path / "file" / "x"), *shaded], "cannot write the map"),
        ([str(folder), "--web", str(tmp_path), *shaded], "holds other files"),
        ([str(folder), "--out", str(tmp_path / "a.png"), "--layer", "age", "evidence"], "is one picture, not 2"),
    ]:
        assert cli.main(["prior", "render", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.png").exists()


def test_too_large_a_picture_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    drive(tmp_path, Window(0, 0, 4, 4))
    folder = drive(tmp_path, Window(0, 40_000, 4, 4), stamp_ns=2 * HOUR)  # 12 km apart
    with City(folder) as city:
        with pytest.raises(NmpError, match="too large for most viewers: give --metres-per-pixel 0.37 or more"):
            frame_of(city, 0.15)
        assert frame_of(city, 0.37).width <= 32_767
        usual = frame_of(city)
        assert 1500 < usual.width < 1700 and math.isclose(usual.metres_per_pixel * usual.chunk_px, 38.4)
