"""The online mapper: what it remembers, what it refuses, and that it repeats itself to the bit."""

import dataclasses
import io
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bag_fixtures import bag_messages, feed, jpeg, make_bag
from PIL import Image

from nmp.assembly import FrameAssembler
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Frame
from nmp.mapper import OnlineMapper
from nmp.model import BEVNetwork, NetworkConfig, save_network
from nmp.model.preprocess import network_input
from nmp.model.weights import DEFAULT_WEIGHTS, load_network, read_description, weights_file
from nmp.prior import CityPrior, Window
from nmp.prior.drive import OpenDrive
from nmp.prior.ledger import Ledger
from nmp.prior.storage import Storage
from nmp.prior.upkeep import digests

CONFIG = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)


def _write_weights(path: Path, seed: int, config: NetworkConfig = CONFIG) -> Path:
    torch.manual_seed(seed)
    network = BEVNetwork(config)
    if config.fusion == "evidence":
        torch.nn.init.normal_(network.fusion.prior_out.weight, std=0.1)  # an open door for the prior
    save_network(network, path, {})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_weights(tmp_path_factory.mktemp("weights") / "one.safetensors", 0)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Frame]:
    bag = make_bag(tmp_path_factory.mktemp("bag"), frames=4)
    return list(feed(FrameAssembler(), bag_messages(bag)))


def _run(weights: Path, prior: Path, frames: list[Frame]) -> list[np.ndarray]:
    with OnlineMapper(weights, prior) as mapper:
        return [mapper.update(f).probabilities for f in frames]


def _bytes(folder: Path) -> dict[str, bytes]:
    """The stored tiles."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "c" in p.parts
    }


def test_layers_have_the_promised_form(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        out = mapper.update(frames[0])
    assert out.probabilities.shape == (3, 200, 400) and out.probabilities.dtype == np.float32
    assert (out.probabilities >= 0).all() and (out.probabilities <= 1).all()
    assert out.evidence.shape == (200, 400) and (out.evidence > 0).all()
    assert (out.stamp_ns, out.location) == (frames[0].stamp_ns, frames[0].location)
    np.testing.assert_array_equal(out.map_from_base, frames[0].map_from_base)


def test_an_empty_prior_gives_the_layers_of_no_prior(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path / "prior") as mapper, OnlineMapper(weights, use_prior=False) as single:
        np.testing.assert_array_equal(mapper.update(frames[0]).probabilities, single.update(frames[0]).probabilities)
        known = mapper.update(frames[1]).probabilities
        assert np.abs(known - single.update(frames[1]).probabilities).max() > 1e-3


def test_a_lost_camera_is_masked_as_in_training(weights: Path, frames: list[Frame]) -> None:
    """Training blacks an image out and says that it is not present: the same layers must come of a frame without it."""
    frame = frames[0]
    five = dataclasses.replace(frame, shots=tuple(s for s in frame.shots if s.camera.name != "cam_back"))
    with OnlineMapper(weights, use_prior=False, min_cameras=5) as mapper:
        images, pixel_from_base, present = network_input(frame, mapper.config)
        lost = CAMERAS.index("cam_back")
        images = images.clone()
        images[:, lost], present[:, lost] = 0, 0.0
        expected = mapper._runner.run(images, pixel_from_base, present).probabilities.copy()
        masked = mapper.update(five).probabilities
        whole = mapper.update(frame).probabilities
    np.testing.assert_array_equal(masked, expected)
    behind = slice(0, masked.shape[2] // 4)
    assert np.abs(masked - whole)[:, :, behind].max() > 1e-3
    with OnlineMapper(weights, use_prior=False, min_cameras=6) as mapper, pytest.raises(NmpError, match="cam_back"):
        mapper.update(five)


def test_stages_and_size_are_measured(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        assert mapper.prior_counts()["tiles"] == 0
        mapper.update(frames[0])
        assert set(mapper.stages_s) == {"decoding", "reading prior", "network", "writing prior"}
        assert all(seconds > 0 for stage, seconds in mapper.stages_s.items() if stage != "writing prior")
        mapper.update(frames[1])
        assert mapper.stages_s["writing prior"] > 0  # of the frame before: it is written while others go on
        size = mapper.prior_counts()
        assert size["tiles"] > 0 and size["resident bytes"] > 0


def test_traversals_count_drives(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    _run(weights, tmp_path, frames[:2])
    with OnlineMapper(weights, tmp_path) as mapper:
        location, here = frames[2].location, frames[2].map_from_base[:2, 3]
        points = np.array([here, here + 3.0, here + 500.0])
        assert mapper.traversals(location, points) is None  # not open yet
        mapper.update(frames[2])
        mapper.settle()
        counts = mapper.traversals(location, points)
        assert counts is not None and counts.tolist() == [2, 2, 0]
        assert mapper.city(location).traversals(Window.around(*here, CONFIG.prior_cell, 4, 4)).max() == 2
        assert mapper.traversals(location, points[:0]) is None


def test_what_of_the_prior_is_damaged_is_told(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        assert mapper.damage == ""
        mapper.update(frames[0])
        counts = mapper.prior_counts()
        assert 0 < counts["resident tiles"] <= counts["tiles"]
        assert mapper.damage == ""
        told = CityPrior.statistics
        monkeypatch.setattr(CityPrior, "statistics", lambda city: told(city) | {"damaged_tiles": 2})
        monkeypatch.setattr(CityPrior, "damage", "tile 3 fails its checksum")
        assert (mapper.prior_counts()["damaged tiles"], mapper.damage) == (2, "tile 3 fails its checksum")


def test_two_runs_are_the_same_to_the_bit(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    one, two = (_run(weights, tmp_path / name, frames) for name in ("a", "b"))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b") != {}


def test_a_restart_continues_from_the_stored_prior(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    unbroken = _run(weights, tmp_path / "a", frames)
    broken = _run(weights, tmp_path / "b", frames[:2]) + _run(weights, tmp_path / "b", frames[2:])
    for first, second in zip(unbroken, broken, strict=True):
        np.testing.assert_array_equal(first, second)
    # the same cells, written by one drive and by two
    counts = [len(list((tmp_path / name).glob("*/commits/*.json"))) for name in ("a", "b")]
    assert counts == [1, 2]


def test_what_a_frame_adds_is_known_beyond_the_cap_of_the_evidence(frames: list[Frame], tmp_path: Path) -> None:
    capped = _write_weights(tmp_path / "capped.safetensors", 0, dataclasses.replace(CONFIG, evidence_cap=1.0))
    for again in (frames[0], frames[1]):
        with OnlineMapper(capped, tmp_path / "prior") as mapper:
            for frame in [again] * 8:
                mapper.update(frame)
            window = Window.around(*frames[0].map_from_base[:2, 3], CONFIG.prior_cell, 60, 60)
            assert mapper.city(frames[0].location).read(window)[1].max() == 256
    ledger = Ledger.open(Storage(tmp_path / "prior" / frames[0].location), read_only=True)
    assert len(ledger.drives()) == 2
    for drive in ledger.drives():
        added = ledger.load(drive, digests(drive))
        assert max(int(cells.evidence.max()) for cells in added.values()) > 2 * 256


def test_the_same_recording_counts_once(
    weights: Path, frames: list[Frame], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(weights, tmp_path, frames[:1])
    before = _bytes(tmp_path)
    with caplog.at_level("WARNING"):
        _run(weights, tmp_path, frames[:1])
    assert _bytes(tmp_path) == before and "counts once" in caplog.text


def test_the_papers_state_is_that_of_the_newest_drive(frames: list[Frame], tmp_path: Path) -> None:
    paper = _write_weights(tmp_path / "paper.safetensors", 0, dataclasses.replace(CONFIG, fusion="paper"))
    with OnlineMapper(paper, tmp_path / "prior") as mapper:
        mapper.update(frames[0])
        assert mapper.city(frames[0].location).spec.merge == "latest"


DAY_NS = 86_400_000_000_000


def _later(frame: Frame, days: float) -> Frame:
    return dataclasses.replace(frame, stamp_ns=frame.stamp_ns + round(days * DAY_NS))


def test_what_was_seen_long_ago_counts_for_less_and_stays_stored(
    weights: Path, frames: list[Frame], tmp_path: Path
) -> None:
    old, now = frames[:2]
    window = Window.around(*old.map_from_base[:2, 3], CONFIG.prior_cell, 20, 20)

    def visit(days: float, **settings: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prior = tmp_path / f"{days} {settings}"
        _run(weights, prior, [old])
        with OnlineMapper(weights, prior, **settings) as mapper:  # type: ignore[arg-type]
            layers = mapper.update(_later(now, days)).probabilities
            again = mapper.update(_later(now, days)).probabilities
            mapper.settle()
            return layers, again, mapper.city(old.location).read(window)[1].astype(int)

    with OnlineMapper(weights, use_prior=False) as single:
        alone = single.update(now).probabilities
    fresh, fresh_again, evidence = visit(1)
    same, _, _ = visit(300)
    np.testing.assert_array_equal(fresh, same)
    aged, aged_again, kept = visit(3 * 365)
    forgotten, _, _ = visit(30 * 365)
    never, _, _ = visit(30 * 365, stale_days=0.0)
    away = [float(np.abs(layers - alone).sum()) for layers in (fresh, aged, forgotten)]
    assert away[0] > 1.2 * away[1] > 0 and away[1] > 10 * away[2]
    np.testing.assert_array_equal(never, fresh)
    # a first look at an old street does not make young what was known of it before
    assert np.abs(aged_again - alone).sum() < np.abs(fresh_again - alone).sum()
    # what is stored has lost nothing by that: two frames came to it, whatever the network was told
    assert evidence.any() and np.abs(kept - evidence).max() <= 2


def test_evidence_grows_with_every_visit(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        means = [float(mapper.update(frames[0]).evidence.mean()) for _ in range(4)]
    assert means == sorted(means) and means[3] > 2 * means[0]


def test_without_prior_nothing_is_written(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path / "prior", use_prior=False) as mapper:
        mapper.update(frames[0])
    assert not (tmp_path / "prior").exists()


def _without_camera(frame: Frame) -> Frame:
    return dataclasses.replace(frame, shots=tuple(s for s in frame.shots if s.camera.name != "cam_back"))


def _with_image(frame: Frame, image: object) -> Frame:
    changed = [dataclasses.replace(s, image=image) if s.camera.name == "cam_back" else s for s in frame.shots]
    return dataclasses.replace(frame, shots=tuple(changed))


def _gif() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (1600, 900)).save(data, "GIF")
    return data.getvalue()


def _with_nan(frame: Frame) -> Frame:
    pose = frame.map_from_base.copy()
    pose[0, 3] = math.nan
    return dataclasses.replace(frame, map_from_base=pose)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_camera, "no image of cam_back"),
        (lambda f: _with_image(f, jpeg(width=80, height=45)), "cam_back: image is 80 x 45, camera_info says 160 x 90"),
        (lambda f: _with_image(f, np.zeros((45, 80, 3), np.uint8)), "cam_back: image is 80 x 45"),
        (lambda f: _with_image(f, _gif()), "cam_back: image data cannot be decoded"),
        (lambda f: _with_image(f, b"not a picture"), "cam_back: image data cannot be decoded"),
        (lambda f: _with_image(f, jpeg()[:300]), "cam_back: image data cannot be decoded"),
        (_with_nan, "pose is not finite"),
        (lambda f: dataclasses.replace(f, location=""), "names no location"),
    ],
)
def test_bad_frames_are_refused_and_nothing_stored_changes(
    spoil: object, message: str, weights: Path, frames: list[Frame], tmp_path: Path
) -> None:
    _run(weights, tmp_path, frames[:1])
    before = _bytes(tmp_path)
    with OnlineMapper(weights, tmp_path) as mapper:
        with pytest.raises(NmpError, match=message):
            mapper.update(spoil(frames[1]))  # type: ignore[operator]
    assert _bytes(tmp_path) == before
    with OnlineMapper(weights, tmp_path) as mapper:  # and it goes on
        mapper.update(frames[1])
    assert _bytes(tmp_path) != before


def test_a_prior_of_another_model_is_refused_and_unharmed(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    _run(weights, prior, frames[:1])
    before = _bytes(prior)
    other = _write_weights(tmp_path / "other.safetensors", 1)
    with pytest.raises(NmpError, match="another") as caught:
        OnlineMapper(other, prior)
    assert frames[0].location in str(caught.value) and "\n" not in str(caught.value)
    assert _bytes(prior) == before
    wider = _write_weights(tmp_path / "wide.safetensors", 0, dataclasses.replace(CONFIG, prior_channels=8))
    with pytest.raises(NmpError):
        OnlineMapper(wider, prior)
    assert _bytes(prior) == before


def test_weights_that_are_damaged_do_not_reach_the_prior(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        with torch.no_grad():
            mapper.network.decoder.out.bias.fill_(math.nan)
        with pytest.raises(NmpError, match="not finite"):
            mapper.update(frames[0])
    assert _bytes(tmp_path) == {}


def test_layers_do_not_wait_for_what_is_stored_but_the_next_frame_does(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, order = threading.Event(), []
    write, read = CityPrior.write, CityPrior.read

    def slow(*args: Any, **more: Any) -> None:
        assert go_on.wait(20)
        write(*args, **more)
        order.append("written")

    def noted(*args: Any, **more: Any) -> Any:
        order.append("read")
        return read(*args, **more)

    monkeypatch.setattr(CityPrior, "write", slow)
    monkeypatch.setattr(CityPrior, "read", noted)
    with OnlineMapper(weights, tmp_path) as mapper:
        mapper.update(frames[0])
        assert order == ["read"]
        threading.Timer(0.2, go_on.set).start()
        mapper.update(frames[1])
        assert order[:3] == ["read", "written", "read"]
        assert mapper.city(frames[0].location).extent() is not None
        assert order == ["read", "written", "read", "written"]


def test_a_failing_disk_does_not_stop_the_layers(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:

        def full(*_: object, **__: object) -> None:
            raise NmpError("cannot write tile (No space left on device): free some space")

        with monkeypatch.context() as patch:
            patch.setattr(CityPrior, "write", full)
            assert mapper.update(frames[0]).probabilities.shape == (3, 200, 400)
            mapper.settle()
            assert "No space left" in mapper.prior_error
        mapper.update(frames[1])
        mapper.settle()
        assert mapper.prior_error == ""


def test_a_prior_that_cannot_be_opened_does_not_blind_the_car(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when a drive begins, a store that cannot be reached, a head that is damaged."""
    monkeypatch.setattr("nmp.mapper.AGAIN_S", 3600.0)
    tried = []

    def full(*args: Any, **more: Any) -> CityPrior:
        tried.append(args)
        raise NmpError("cannot write boston/city.json (No space left on device): free disk space")

    with OnlineMapper(weights, tmp_path, tolerant=True) as mapper, OnlineMapper(weights, use_prior=False) as single:
        with monkeypatch.context() as patch:
            patch.setattr(CityPrior, "open", full)
            for frame in frames[:2]:
                expected = single.update(frame).probabilities
                np.testing.assert_array_equal(mapper.update(frame).probabilities, expected)
                assert "No space left" in mapper.prior_error and "without a prior" in mapper.prior_error
            assert len(tried) == 1  # not with every frame
            with pytest.raises(NmpError, match="No space left"):
                mapper.flush()
            with pytest.raises(NmpError, match="No space left"), OnlineMapper(weights, tmp_path / "strict") as strict:
                strict.update(frames[0])
        monkeypatch.setattr("nmp.mapper.AGAIN_S", 0.0)
        mapper.update(frames[2])  # begins another attempt
        mapper.flush()  # waits for it
        mapper.update(frames[3])
        assert mapper.prior_counts()["tiles"] > 0 and not mapper.prior_error


def test_cells_that_cannot_be_read_do_not_blind_the_car(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmp.mapper.AGAIN_S", 3600.0)
    _run(weights, tmp_path, frames[:1])
    before = _bytes(tmp_path)
    tried = []

    def gone(*args: Any, **more: Any) -> None:
        tried.append(args)
        raise NmpError("cannot read tile 3 (the store does not answer): check the network")

    with OnlineMapper(weights, tmp_path, tolerant=True) as mapper, OnlineMapper(weights, use_prior=False) as single:
        with monkeypatch.context() as patch:
            patch.setattr(CityPrior, "read", gone)
            for frame in frames[1:3]:
                expected = single.update(frame).probabilities
                np.testing.assert_array_equal(mapper.update(frame).probabilities, expected)
                assert "does not answer" in mapper.prior_error
            assert len(tried) == 1
        mapper.flush()
        assert _bytes(tmp_path) == before  # what was seen without the prior cannot be added to it
        monkeypatch.setattr(mapper, "_read_again_s", 1e-9)
        mapper.update(frames[3])
        mapper.settle()
        assert not mapper.prior_error and mapper.prior_counts()["dirty tiles"]


def test_a_city_that_is_expected_is_open_before_its_first_frame(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, really = [], CityPrior.open

    def noted(*args: Any, **more: Any) -> CityPrior:
        opened.append(args[1])
        return really(*args, **more)

    with OnlineMapper(weights, tmp_path) as mapper:
        monkeypatch.setattr(CityPrior, "open", noted)
        mapper.expect(frames[0].location)
        assert opened == [frames[0].location]
        mapper.update(frames[0])
        assert len(opened) == 1


def test_an_attempt_to_open_a_city_holds_no_frame_up(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmp.mapper.AGAIN_S", 0.0)
    go_on, really = threading.Event(), CityPrior.open
    answers = iter([NmpError("the store cannot be reached"), None])

    def slow(*args: Any, **more: Any) -> CityPrior:
        if (error := next(answers)) is not None:
            raise error
        assert go_on.wait(20)
        return really(*args, **more)

    monkeypatch.setattr(CityPrior, "open", slow)
    with OnlineMapper(weights, tmp_path, tolerant=True) as mapper:
        for frame in frames[:3]:
            mapper.update(frame)
        assert "cannot be reached" in mapper.prior_error
        go_on.set()
        mapper.flush()
        mapper.update(frames[0])
        assert not mapper.prior_error and mapper.prior_counts()["tiles"] > 0


def test_a_disk_that_stays_full_is_told_in_every_frame(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnlineMapper(weights, tmp_path, flush_interval_s=0.02) as mapper:
        city = mapper.city(frames[0].location)

        def wait(full: bool) -> None:
            end = time.monotonic() + 20
            while bool(city.unsaved) is not full:
                assert time.monotonic() < end
                time.sleep(0.01)

        with monkeypatch.context() as patch:
            patch.setattr(OpenDrive, "save", lambda _, tiles: dict.fromkeys(tiles, "No space left on device"))
            mapper.update(frames[0])
            wait(full=True)
            for frame in (frames[1], frames[1], frames[1]):
                mapper.update(frame)
                mapper.settle()
                assert "No space left" in mapper.prior_error
        wait(full=False)
        mapper.update(frames[1])
        mapper.settle()
        assert mapper.prior_error == ""


def test_the_shipped_weights_are_the_default(frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(None, tmp_path) as mapper:
        out = mapper.update(frames[0])
    assert out.probabilities.shape == (3, 200, 400)
    assert DEFAULT_WEIGHTS.stat().st_size < 16 * 2**20


def test_weights_for_a_gpu_are_shipped_by_name(tmp_path: Path) -> None:
    network, fingerprint = load_network("gpu_default")
    assert (network.config.input_width, network.config.prior_channels) == (704, 32)
    assert read_description("gpu_default")["network"]["prior_channels"] == 32
    assert weights_file("gpu_default").stat().st_size < 16 * 2**20
    assert fingerprint != load_network()[1]
    assert weights_file("mine/net.safetensors") == Path("mine/net.safetensors")
    assert weights_file("../weights/gpu_default") == Path("../weights/gpu_default")
