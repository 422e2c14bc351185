"""Replay without DDS: the same bytes every time, and clear words when nothing comes of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer

from nmp.assembly import FrameAssembler
from nmp.bags.nuscenes_to_bag import STORE, Shot, write_bag
from nmp.bags.reader import BagReader
from nmp.cli import main
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Frame, LocalMap
from nmp.geometry import BevGrid
from nmp.layers import read_layers
from nmp.mapper import Decoded
from nmp.model.config import NetworkConfig
from nmp.model.network import BEVNetwork
from nmp.model.weights import save_network
from nmp.replay import frames_of, keyframes_of, replay
from tests.bag_fixtures import LOCATION, make_bag, make_shots

FRAMES = 3


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"), FRAMES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learned nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_network(BEVNetwork(NetworkConfig(input_width=176, input_height=96)), path, {})
    return path


class FakeMapper:
    """Answers every frame, or refuses those at the given positions."""

    def __init__(self, refuse: tuple[int, ...] = (), device: str = "cpu") -> None:
        self.refuse = refuse
        self.device = torch.device(device)
        self.config, self.min_cameras = NetworkConfig(input_width=176, input_height=96), len(CAMERAS)
        self.seen = self.flushed = 0

    def update(self, frame: Frame, decoded: Decoded) -> LocalMap:
        self.seen += 1
        assert decoded.images.shape == (1, 6, 3, 96, 176)
        if self.seen - 1 in self.refuse:
            raise NmpError(f"frame {self.seen - 1} is no good: take another")
        grid = BevGrid()
        values = np.full((3, *grid.shape), 0.25, np.float32)
        return LocalMap(
            frame.stamp_ns, frame.location, frame.map_from_base, grid, values, np.ones(grid.shape, np.float32)
        )

    def flush(self) -> None:
        self.flushed += 1


def test_a_process_beside_a_gpu_makes_no_difference(drive: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        mapper = FakeMapper(refuse=(1,), device=device)
        summary = replay(drive, mapper, tmp_path / device, progress=False)  # type: ignore[arg-type]
        assert (summary.frames, mapper.flushed, dict(summary.drops)) == (FRAMES - 1, 1, {"refused by the mapper": 1})
    assert digest(tmp_path / "cpu") == digest(tmp_path / "cuda")


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.npz"))}


def map_bag(drive: Path, out: Path, *arguments: str) -> int:
    return main(["map", str(drive), "--out", str(out), *arguments])


def test_every_keyframe_is_mapped(drive: Path, tmp_path: Path) -> None:
    with BagReader(drive) as reader:
        assert keyframes_of(reader) == FRAMES
        frames = list(frames_of(reader, FrameAssembler()))
    assert [f.location for f in frames] == [LOCATION] * FRAMES
    assert all(tuple(s.camera.name for s in f.shots) == CAMERAS for f in frames)
    mapper = FakeMapper()
    summary = replay(drive, mapper, tmp_path, progress=False)  # type: ignore[arg-type]
    assert (summary.frames, sum(summary.drops.values()), mapper.flushed) == (FRAMES, 0, 1)
    assert [m.stamp_ns for m in read_layers(tmp_path)] == [f.stamp_ns for f in frames]
    assert "3 frames in" in str(summary) and "dropped: none" in str(summary)


def test_frames_that_are_not_stored_are_told(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bag(make_shots(tmp_path / "images", 2), LOCATION, tmp_path / "drive", position_std=5.0)
    where = ["--weights", str(weights), "--prior", str(tmp_path / "prior")]
    assert map_bag(tmp_path / "drive", tmp_path / "out", *where) == 0
    assert "pose uncertain: 2; last: pose is known to 5.00 m" in capsys.readouterr().out


def test_location_can_be_given(drive: Path) -> None:
    with BagReader(drive) as reader:
        frames = list(frames_of(reader, FrameAssembler(), location="boston-seaport"))
    assert {f.location for f in frames} == {"boston-seaport"} and len(frames) == FRAMES


def test_refused_frames_are_counted(drive: Path, tmp_path: Path) -> None:
    summary = replay(drive, FakeMapper(refuse=(1,)), tmp_path, progress=False)  # type: ignore[arg-type]
    assert summary.frames == 2 and dict(summary.drops) == {"refused by the mapper": 1}
    assert summary.reasons["refused by the mapper"] == "frame 1 is no good: take another"
    assert "dropped: 1 refused by the mapper" in str(summary)
    with pytest.raises(NmpError, match="no frame could be made.*3 x refused by the mapper.*frame 2 is no good"):
        replay(drive, FakeMapper(refuse=(0, 1, 2)), tmp_path / "none", progress=False)  # type: ignore[arg-type]


def test_runs_repeat_to_the_bit_and_the_prior_matters(drive: Path, weights: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prior = str(tmp_path / f"prior-{name}")
        assert map_bag(drive, tmp_path / name, "--prior", prior, "--weights", str(weights)) == 0
        assert map_bag(drive, tmp_path / f"{name}-again", "--prior", prior, "--weights", str(weights)) == 0
    assert map_bag(drive, tmp_path / "none", "--no-prior", "--weights", str(weights), "--bev") == 0
    assert len(digest(tmp_path / "a")) == FRAMES
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a-again") == digest(tmp_path / "b-again")
    assert (tmp_path / "prior-a" / LOCATION).is_dir()
    pictures = sorted((tmp_path / "none" / "bev").glob("*.png"))
    assert [p.stem for p in pictures] == [Path(name).stem for name in digest(tmp_path / "none")]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (800, 400)


def test_the_device_can_be_chosen(
    drive: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[tuple[str, bool]] = []

    def note(*_: object, device: str, compiled: bool, **__: object) -> None:
        opened.append((device, compiled))
        raise NmpError("far enough")

    with monkeypatch.context() as patch:
        patch.setattr("nmp.mapper.OnlineMapper", note)
        for more in ([], ["--device", "cuda:1", "--compile"]):
            assert map_bag(drive, tmp_path / "out", "--no-prior", *more) == 2
            assert "far enough" in said(capsys)
    assert opened == [("cpu", False), ("cuda:1", True)]
    given = ["--no-prior", "--weights", str(weights), "--device"]
    assert map_bag(drive, tmp_path / "out", *given, "tpu") == 2
    assert "device 'tpu' is unknown: choose auto, cpu, cuda" in said(capsys)
    assert map_bag(drive, tmp_path / "out", *given, "cpu", "--compile") == 0  # is left out on a CPU


def said(capsys: pytest.CaptureFixture[str]) -> str:
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nmp: error: ")]
    assert len(error) == 1
    return error[0]


def test_wrong_arguments(drive: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert map_bag(drive, tmp_path / "out") == 2
    assert "no prior folder: give --prior DIR" in said(capsys)
    assert map_bag(drive, tmp_path / "out", "--no-prior", "--prior", str(tmp_path)) == 2
    assert "exclude each other" in said(capsys)
    assert map_bag(drive, tmp_path / "out", "--no-prior", "--threads", "0") == 2
    assert "--threads is 0" in said(capsys)
    assert map_bag(drive, tmp_path / "out", "--no-prior", "--weights", str(tmp_path / "none.safetensors")) == 2
    assert "none.safetensors is missing" in said(capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1.npz").write_bytes(b"")
    assert map_bag(drive, tmp_path / "out", "--no-prior", "--weights", str(weights)) == 2
    assert "already holds layers" in said(capsys)


def test_truncated_bag(drive: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(drive, tmp_path / "copy"))
    storage = next(copy.glob("*.mcap"))
    storage.write_bytes(storage.read_bytes()[: storage.stat().st_size // 2])
    assert map_bag(copy, tmp_path / "out", "--no-prior", "--weights", str(weights)) == 2
    assert "truncated or damaged" in said(capsys)


def _bag_of(shots: list[Shot], out: Path, location: str = LOCATION) -> Path:
    write_bag(shots, location, out)
    return out


def test_why_no_frame_could_be_made(tmp_path: Path) -> None:
    """Each fault by itself: a camera without images, images of another size, no location."""
    shots = make_shots(tmp_path / "images", 2)

    wrong = next(s for s in shots if s.camera == "cam_back")
    small = Image.open(wrong.path).resize((80, 45))
    for shot in shots:
        if shot.camera == "cam_back":
            small.save(shot.path, "JPEG")
    bag = _bag_of(shots, tmp_path / "small")
    with pytest.raises(NmpError, match="2 x wrong image size.*cam_back: image is 80 x 45 pixels"):
        replay(bag, FakeMapper(), tmp_path / "out", progress=False)  # type: ignore[arg-type]

    shots = make_shots(tmp_path / "more", 2)
    bag = _bag_of(shots, tmp_path / "nowhere", location="")
    with pytest.raises(NmpError, match="no location"):
        replay(bag, FakeMapper(), tmp_path / "out", progress=False)  # type: ignore[arg-type]
    assert replay(bag, FakeMapper(), tmp_path / "out", location=LOCATION, progress=False).frames == 2  # type: ignore[arg-type]

    nan = [Shot(**{**vars(s), "pose": ([float("nan"), 0.0, 0.0], s.pose[1])}) for s in shots]
    bag = _bag_of(nan, tmp_path / "nan")
    with pytest.raises(NmpError, match="pose.*not finite"):
        replay(bag, FakeMapper(), tmp_path / "out2", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "topic", ["/cam_back_left/image_raw/compressed", "/cam_front/camera_info", "/odom", "/tf_static"]
)
def test_missing_topic_is_named(drive: Path, tmp_path: Path, topic: str) -> None:
    out = tmp_path / "part"
    with BagReader(drive) as reader, Writer(out, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        kept = {
            name: writer.add_connection(name, t.msgtype, typestore=STORE)
            for name, t in reader.topics.items()
            if name != topic
        }
        for name, stamp, data in reader.raw_messages(kept):
            writer.write(kept[name], stamp, data)
    with pytest.raises(NmpError, match=f"no (images|messages) on {topic}.*record"):
        replay(out, FakeMapper(), tmp_path / "out", progress=False)  # type: ignore[arg-type]
