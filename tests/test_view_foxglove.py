"""What Foxglove gets: channels, messages that decode, buttons that work, and a layout that names them."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

foxglove = pytest.importorskip("foxglove", reason="foxglove-sdk is missing: pip install 'neural-map-prior[view]'")
websockets = pytest.importorskip("websockets.sync.client")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: E402

from nmp.cli import main  # noqa: E402
from nmp.errors import NmpError  # noqa: E402
from nmp.frame import CAMERAS, CLASSES  # noqa: E402
from nmp.geometry import flatten_to_plane, inverse, yaw_of  # noqa: E402
from nmp.view import layout  # noqa: E402
from nmp.view.control import FoxglovePlayer  # noqa: E402
from nmp.view.drive import RecordedDrive  # noqa: E402
from nmp.view.find import find_recordings  # noqa: E402
from nmp.view.foxglove import FoxgloveSink, layout_path, serve  # noqa: E402
from nmp.view.sink import Elements, Line  # noqa: E402
from tests.bag_fixtures import jpeg  # noqa: E402
from tests.view_fixtures import FRAMES, GRID, layers_at, make_drive  # noqa: E402

CHANNELS = {
    **{f"/{camera}/image": "foxglove.CompressedImage" for camera in CAMERAS},
    "/layers": "foxglove.Grid",
    "/city": "foxglove.Grid",
    "/vectors": "foxglove.SceneUpdate",
    "/pose": "foxglove.PoseInFrame",
    "/tf": "foxglove.FrameTransforms",
    "/log": "foxglove.Log",
}
DATA, PLAYBACK_STATE, PLAYBACK_CONTROL = 1, 5, 3
"""opcodes of the Foxglove WebSocket protocol, v1"""


class Viewer:
    """A WebSocket client that takes everything. The protocol: github.com/foxglove/ws-protocol."""

    def __init__(self, port: int) -> None:
        self._connection = websockets.connect(
            f"ws://127.0.0.1:{port}", subprotocols=["foxglove.sdk.v1"], max_size=None, max_queue=None
        )
        self.socket = self._connection.__enter__()
        self.info: dict[str, Any] = {}
        self.channels: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        self.states: list[tuple[int, int, float, bool, str]] = []
        self.found: dict[str, list[tuple[int, Any]]] = {}
        """log times and messages so far, by channel"""
        while len(self.channels) < len(CHANNELS):
            said = json.loads(self.socket.recv(timeout=10))
            if said["op"] == "serverInfo":
                self.info = said
            for channel in said.get("channels", ()):
                self.channels[channel["topic"]] = channel
        wanted = [{"id": c["id"] + 100, "channelId": c["id"]} for c in self.channels.values()]
        self._names = {c["id"] + 100: name for name, c in self.channels.items()}
        self.socket.send(json.dumps({"op": "subscribe", "subscriptions": wanted}))

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__(None, None, None)

    def next(self) -> tuple[str, int, Any] | None:
        """Return channel, log time (ns) and decoded message; None for anything else."""
        said = self.socket.recv(timeout=10)
        if isinstance(said, str) or said[0] not in (DATA, PLAYBACK_STATE):
            return None
        if said[0] == PLAYBACK_STATE:
            status, at, speed, jumped, length = struct.unpack_from("<BQfBI", said, 1)
            self.states.append((status, at, speed, bool(jumped), said[19 : 19 + length].decode()))
            return None
        number, stamp = struct.unpack_from("<IQ", said, 1)
        name, message = self._names[number], decoded(self.channels[self._names[number]], said[13:])
        self.found.setdefault(name, []).append((stamp, message))
        return name, stamp, message

    def collect(self, names: set[str]) -> dict[str, list[tuple[int, Any]]]:
        """Wait until every one of these channels has said something."""
        end = time.monotonic() + 20
        while not names <= self.found.keys():
            assert time.monotonic() < end, names - self.found.keys()
            self.next()
        return self.found

    def control(self, *, play: bool, speed: float = 1.0, seek_ns: int | None = None, request: str = "r") -> None:
        seek = struct.pack("<BQ", seek_ns is not None, seek_ns or 0)
        body = struct.pack("<BBf", PLAYBACK_CONTROL, 0 if play else 1, speed) + seek
        self.socket.send(body + struct.pack("<I", len(request)) + request.encode())

    def until_told(self, request: str) -> tuple[int, int, float, bool, str]:
        """Wait for the answer to a request."""
        end = time.monotonic() + 10
        while not (found := [s for s in self.states if s[4] == request]):
            assert time.monotonic() < end
            self.next()
        return found[0]


def decoded(channel: dict[str, Any], data: bytes) -> Any:
    """Decode a protobuf message with nothing but the schema that came with its channel."""
    assert channel["encoding"] == "protobuf"
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(channel["schema"]))
    for file in files.file:
        pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(channel["schemaName"]))
    return kind.FromString(data)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_drive(tmp_path_factory.mktemp("drive"))


@pytest.fixture(scope="module")
def drive(places: tuple[Path, Path]) -> Iterator[RecordedDrive]:
    with RecordedDrive(find_recordings(places)[0]) as found:
        yield found


def cells_of(grid: Any) -> np.ndarray:
    """Return the cells of a foxglove.Grid, [fields, rows, cols]."""
    assert [f.name for f in grid.fields] == ["red", "green", "blue", "alpha", *CLASSES]
    data = np.frombuffer(grid.data, np.uint8)
    return data.reshape(-1, grid.row_stride // grid.cell_stride, grid.cell_stride).transpose(2, 0, 1)


def test_a_recorded_drive_is_served_and_decodes(drive: RecordedDrive) -> None:
    with FoxglovePlayer(drive, "127.0.0.1", 0) as served, Viewer(served.server.port) as viewer:
        assert {name: c["schemaName"] for name, c in viewer.channels.items()} == CHANNELS
        assert set(viewer.info["capabilities"]) == {"time", "playbackControl"}
        start = viewer.info["dataStartTime"]
        assert start["sec"] * 10**9 + start["nsec"] == drive.start_ns
        viewer.control(play=False, seek_ns=drive.keyframes[3].stamp_ns, request="here")
        status, at, _, jumped, _ = viewer.until_told("here")
        assert (status, at, jumped) == (1, drive.keyframes[3].stamp_ns, True)
        found = viewer.collect(set(CHANNELS))
        with Viewer(served.server.port) as late:  # who comes later sees the same, though nothing is played
            assert late.collect(set(CHANNELS))["/layers"][-1][0] == drive.keyframes[3].stamp_ns
    stamp, grid = found["/layers"][-1]
    assert stamp == drive.keyframes[3].stamp_ns
    pose = flatten_to_plane(drive.keyframes[3].map_from_base)
    corner = inverse(pose) @ [grid.pose.position.x, grid.pose.position.y, 0, 1]
    assert corner[:2] == pytest.approx([-GRID.length / 2, -GRID.width / 2])
    cells = cells_of(grid)
    expected = layers_at(3)
    assert cells.shape[1:] == GRID.shape and grid.cell_size.x == pytest.approx(GRID.resolution)
    assert (cells[4:, expected.evidence == 0] == 255).all()  # never seen
    assert (cells[3] > 200).sum() == ((expected.probabilities * expected.evidence).max(axis=0) > 0.5).sum()
    for index, plane in enumerate(cells[4:]):
        known = expected.evidence > 0
        assert np.array_equal(plane[known] > 50, expected.masks[index][known] == 1)
    for number, camera in enumerate(CAMERAS):
        stamp, image = found[f"/{camera}/image"][-1]
        index = max(i for i, s in enumerate(drive.shots[camera]) if s.stamp_ns <= drive.keyframes[3].stamp_ns)
        assert image.data == jpeg(seed=6 * index + number) and image.format == "jpeg"
    stamp, scene = found["/vectors"][-1]
    assert {e.id.split()[0] for e in scene.entities} == set(CLASSES)
    ahead = np.array([[p.x, p.y, 0, 1] for e in scene.entities for p in e.lines[0].points]) @ inverse(pose).T
    assert np.abs(ahead[:, 0]).max() <= GRID.length / 2 + 0.5  # lines lie where the car is
    transforms = [t for _, message in found["/tf"] for t in message.transforms]
    assert {t.child_frame_id for t in transforms} >= {"base_link", "cam_front_optical_frame"}
    stamp, city = found["/city"][-1]
    assert cells_of(city)[6].astype(int).max() > 50 and yaw_of(np.eye(4)) == city.pose.orientation.z == 0
    assert "keyframe 4 of 6" in found["/log"][-1][1].message


def test_buttons(drive: RecordedDrive) -> None:
    with FoxglovePlayer(drive, "127.0.0.1", 0) as served, Viewer(served.server.port) as viewer:
        viewer.control(play=False, seek_ns=drive.start_ns, request="stop")
        viewer.until_told("stop")
        player = served.player
        assert player.control(play=False, speed=1.0, seek_ns=None).at_ns == drive.start_ns
        viewer.control(play=True, speed=4.0, request="go")
        assert viewer.until_told("go")[::2] == (0, 4.0, "go")
        stamps: list[int] = []
        while len(stamps) < FRAMES:  # every keyframe comes, in order, once
            message = viewer.next()
            if message is not None and message[0] == "/layers" and message[1] > drive.start_ns:
                stamps.append(message[1])
        assert stamps == [k.stamp_ns for k in drive.keyframes]
        while viewer.states[-1][0] != 3:  # ended; it does not begin again by itself once somebody has pressed a button
            viewer.next()
        assert viewer.states[-1][1] == drive.end_ns
        viewer.control(play=True, speed=1.0, request="again")
        assert viewer.until_told("again")[:2] == (0, drive.start_ns)
        assert player.failure is None


def test_without_buttons_it_plays_over_and_over(drive: RecordedDrive) -> None:
    with FoxglovePlayer(drive, "127.0.0.1", 0) as served, Viewer(served.server.port) as viewer:
        served.player._speed = 100.0
        seen: list[int] = []
        while not any(later < earlier for earlier, later in zip(seen, seen[1:], strict=False)):
            message = viewer.next()
            if message is not None and message[0] == "/layers":
                seen.append(message[1])


def test_a_running_node_is_passed_on() -> None:
    sink = FoxgloveSink()
    server = serve(sink, "node", "127.0.0.1", 0)
    with Viewer(server.port) as viewer:
        while not sink.wants_image("cam_front") or not sink.wants_city():
            time.sleep(0.01)
        assert viewer.info["capabilities"] == []  # nothing to seek in
        sink.image("cam_front", 5, jpeg(1))
        lines = [Line("divider", 7, np.array([[1.0, 2.0], [3.0, 4.0]]), 0.5)]
        sink.elements(Elements(6, lines, [("boundary", 3)]))
        found = viewer.collect({"/cam_front/image", "/vectors"})
        assert found["/cam_front/image"][0][0] == 5
        scene = found["/vectors"][0][1]
        assert [e.id for e in scene.entities] == ["divider 7"] and [d.id for d in scene.deletions] == ["boundary 3"]
        assert [(p.x, p.y) for p in scene.entities[0].lines[0].points] == [(1.0, 2.0), (3.0, 4.0)]
        viewer.found.clear()
        sink.elements(Elements(7, [], afresh=True))
        assert viewer.collect({"/vectors"})["/vectors"][0][1].deletions[0].type == 1  # all
        with pytest.raises(NmpError, match=f"port {server.port} of 127.0.0.1 is in use"):
            serve(FoxgloveSink(), "other", "127.0.0.1", server.port)
    server.stop()


def test_an_mcap_file_holds_the_whole_drive(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "drive.mcap"
    arguments = ["view", *map(str, places), "--mcap", str(out)]
    assert main(arguments) == 0
    from mcap.reader import make_reader

    with out.open("rb") as stream:
        reader = make_reader(stream)
        summary = reader.get_summary()
        assert summary is not None and summary.statistics is not None
        counts = {c.topic: summary.statistics.channel_message_counts[c.id] for c in summary.channels.values()}
        stamps = [m.log_time for _, _, m in reader.iter_messages(topics=["/layers"])]
    assert counts["/cam_back/image"] == counts["/layers"] == counts["/vectors"] == len(set(stamps)) == FRAMES
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_shipped_layout_is_up_to_date_and_names_channels() -> None:
    text = layout_path().read_text()
    assert text == layout.text(), "run python -m nmp.view.layout"
    shown = {word for word in text.replace('"', " ").split() if word.startswith("/")}
    assert shown == set(CHANNELS) - {"/tf"}
