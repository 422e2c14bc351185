"""FrameAssembler: whole frames from single messages, and every loss counted with its cause."""

from __future__ import annotations

import array
import copy
import io
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from nmp import messages
from nmp.assembly import FrameAssembler
from nmp.bags.reader import STORE, BagMessage
from nmp.errors import NmpError
from nmp.frame import ANCHOR_CAMERA, CAMERAS, Frame
from nmp.geometry import transform_from
from nmp.messages import CHANNELS, stamp_of_cdr
from tests.bag_fixtures import HEIGHT, LOCATION, START_NS, WIDTH, bag_messages, camera_rig, ego, feed, jpeg, make_bag

NS = 10**9
Messages = list[BagMessage]


@pytest.fixture(scope="module")
def keyframes(tmp_path_factory: pytest.TempPathFactory) -> Messages:
    return bag_messages(make_bag(tmp_path_factory.mktemp("keyframes"), frames=5))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Messages:
    """12 Hz, as with sweeps."""
    return bag_messages(make_bag(tmp_path_factory.mktemp("stream"), frames=24, period=1 / 12))


def image_of(camera: str) -> str:
    return f"/{camera}/image_raw/compressed"


def moved(message: BagMessage, by_ns: int) -> BagMessage:
    """The same message with other stamps."""
    new = copy.deepcopy(message)
    for header in [new.message.header] if hasattr(new.message, "header") else []:
        total = header.stamp.sec * NS + header.stamp.nanosec + by_ns
        header.stamp.sec, header.stamp.nanosec = total // NS, total % NS
    return new._replace(stamp_ns=message.stamp_ns + by_ns)


def changed(messages: Messages, topic: str, index: int, change: Any) -> Messages:
    """The messages with ``change`` applied to the index-th one of a topic (all: -1)."""
    out, seen = [], 0
    for m in messages:
        if m.topic == topic:
            if index in (-1, seen):
                m = copy.deepcopy(m)
                change(m.message)
            seen += 1
        out.append(m)
    return out


def without(messages: Messages, topic: str, index: int = -1) -> Messages:
    """The messages without the index-th one of a topic (all: -1)."""
    at = [i for i, m in enumerate(messages) if m.topic == topic]
    gone = set(at if index == -1 else [at[index]])
    return [m for i, m in enumerate(messages) if i not in gone]


def run(messages: Messages, assembler: FrameAssembler | None = None, *, flush: bool = True) -> tuple[list[Frame], Any]:
    assembler = assembler or FrameAssembler()
    frames = list(feed(assembler, messages))
    return frames + (assembler.flush() if flush else []), assembler


# ------------------------------------------------------------------------------------------------------ good input


def test_keyframes(keyframes: Messages) -> None:
    frames, assembler = run(keyframes, flush=False)
    assert len(frames) == 5 and not assembler.drops
    for i, frame in enumerate(frames):
        assert [s.camera.name for s in frame.shots] == list(CAMERAS)
        assert frame.location == LOCATION
        assert frame.stamp_ns == frame.shots[0].stamp_ns == START_NS + i * NS // 2 + 8_000_000
        np.testing.assert_array_equal(frame.map_from_base, frame.shots[0].map_from_base)
        assert (frame.position_std, frame.yaw_std) == pytest.approx((0.05, 0.005))
        for c, shot in enumerate(frame.shots):
            assert shot.image == jpeg(6 * i + c)
            # Every image has the pose of its own moment, exactly as recorded.
            want = ego((shot.stamp_ns - START_NS) / NS)
            np.testing.assert_allclose(shot.map_from_base, transform_from(*map(np.array, want)), atol=1e-9)
            mount = transform_from(*map(np.array, camera_rig(shot.camera.name)))
            np.testing.assert_allclose(shot.camera.base_from_camera, mount, atol=1e-9)
            assert (shot.camera.width, shot.camera.height) == (WIDTH, HEIGHT)


def test_frame_comes_with_its_last_image(keyframes: Messages) -> None:
    assembler = FrameAssembler()
    for m in keyframes:
        frames = list(feed(assembler, [m]))
        assert bool(frames) == (m.topic == image_of("cam_back_left"))


def test_stream_and_same_order_same_result(stream: Messages) -> None:
    frames, assembler = run(stream, flush=False)
    assert len(frames) == 24 and not assembler.drops
    again, _ = run(stream, flush=False)
    assert [f.stamp_ns for f in frames] == [f.stamp_ns for f in again]


def test_a_long_drive_needs_no_more_memory(stream: Messages) -> None:
    assembler = FrameAssembler()
    count = 0
    for minute in range(8):
        count += len(list(feed(assembler, [moved(m, minute * 2 * NS) for m in stream])))
        assert sum(len(q) for q in assembler._images.values()) <= 60
    assert count == 8 * 24 and not assembler.drops


def test_uneven_period_as_in_nuscenes(stream: Messages) -> None:
    """20 Hz LIDAR, 12 Hz cameras: they skip turns, so gaps are 50 and 100 ms."""
    turns, turn = [], 0
    for i in range(24):
        turns.append(turn)
        turn += 1 if i % 5 in (1, 3, 4) else 2
    shift = [t * 50_000_000 - round(i / 12 * 1e6) * 1000 for i, t in enumerate(turns)]
    per_topic: dict[str, int] = {}
    out = []
    for m in stream:
        i = per_topic.get(m.topic, 0)
        per_topic[m.topic] = i + 1
        if m.topic in ("/odom", "/tf"):
            i //= 6
        out.append(m if i >= 24 or m.topic in ("/tf_static", "/location") else moved(m, shift[i]))
    frames, assembler = run(sorted(out, key=lambda m: m.stamp_ns))
    assert len(frames) == 24 and not assembler.drops
    for frame in frames:
        stamps = [s.stamp_ns for s in frame.shots]
        assert max(stamps) - min(stamps) < 60_000_000


def test_jitter_of_delivery_loses_nothing(stream: Messages) -> None:
    """Topics overtake one another by up to 30 ms; each stays in order."""
    rng = random.Random(1)
    clock: dict[str, int] = {}
    arrivals = []
    for m in stream:
        clock[m.topic] = max(clock.get(m.topic, 0), m.stamp_ns + rng.randrange(30_000_000))
        arrivals.append(m.stamp_ns if m.topic in ("/tf_static", "/location") else clock[m.topic])
    order = sorted(range(len(stream)), key=lambda i: arrivals[i])
    frames, assembler = run([stream[i] for i in order])
    assert len(frames) == 24 and not assembler.drops
    assert all(abs(s.stamp_ns - f.stamp_ns) < 42_000_000 for f in frames for s in f.shots)


def test_pose_between_neighbours(keyframes: Messages) -> None:
    """A pose topic of its own rate: poses are interpolated, and waited for."""
    base = next(m for m in keyframes if m.topic == "/odom")
    poses = []
    for i in range(-2, 60):
        seconds = i * 0.05
        pose = copy.deepcopy(base)
        total = START_NS + round(seconds * NS)
        pose.message.header.stamp.sec, pose.message.header.stamp.nanosec = total // NS, total % NS
        (x, y, _), (_, _, z, w) = ego(seconds)
        p = pose.message.pose.pose
        p.position.x, p.position.y, p.orientation.z, p.orientation.w = x, y, z, w
        poses.append(pose._replace(stamp_ns=total))
    messages = sorted(without(keyframes, "/odom") + poses, key=lambda m: m.stamp_ns)
    messages.sort(key=lambda m: m.topic not in ("/tf_static", "/location"))
    frames, assembler = run(messages)
    assert len(frames) == 5 and not assembler.drops
    for shot in frames[2].shots:
        want = transform_from(*map(np.array, ego((shot.stamp_ns - START_NS) / NS)))
        np.testing.assert_allclose(shot.map_from_base, want, atol=1e-3)


ORDER = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2, 0], "bgra8": [2, 1, 0, 0], "mono8": [0]}
"""channels of RGB pixels in raw images; what is in alpha does not matter"""


@pytest.fixture(params=["cv_bridge", "OpenCV"])
def colours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With what colours are turned round."""
    if request.param == "OpenCV":
        monkeypatch.setitem(sys.modules, "cv_bridge.boost.cv_bridge_boost", None)
    else:
        pytest.importorskip("cv_bridge")
    messages._to_rgb.cache_clear()
    yield
    messages._to_rgb.cache_clear()


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("encoding", CHANNELS)
@pytest.mark.parametrize("kind", [np.asarray, lambda a: array.array("B", a.tobytes()), lambda a: a.tolist()])
def test_raw_images(keyframes: Messages, encoding: str, kind: Any) -> None:
    rgb = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint32).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)
    if encoding == "mono8":
        rgb[:] = rgb[..., :1]
    step = CHANNELS[encoding] * WIDTH + 4  # padded rows
    rows = np.zeros((HEIGHT, step), np.uint8)
    rows[:, :-4] = rgb[..., ORDER[encoding]].reshape(HEIGHT, -1)

    def to_raw(m: BagMessage) -> BagMessage:
        if "compressed" not in m.topic:
            return m
        message = SimpleNamespace(
            header=m.message.header, encoding=encoding, width=WIDTH, height=HEIGHT, step=step, data=kind(rows.ravel())
        )
        return m._replace(message=message)

    frames, assembler = run([to_raw(m) for m in keyframes])
    assert len(frames) == 5 and not assembler.drops
    image = frames[0].shots[3].image
    assert isinstance(image, np.ndarray)
    np.testing.assert_array_equal(image, rgb)


def test_extrinsics_through_a_chain(keyframes: Messages) -> None:
    def chain(message: Any) -> None:
        front = next(t for t in message.transforms if t.child_frame_id == "cam_front_optical_frame")
        rig = copy.deepcopy(front)
        rig.child_frame_id, front.header.frame_id = "roof", "roof"
        rig.transform.rotation.x = rig.transform.rotation.y = rig.transform.rotation.z = 0.0
        rig.transform.rotation.w = 1.0
        message.transforms.append(rig)

    frames, _ = run(changed(keyframes, "/tf_static", 0, chain))
    xyz, _ = camera_rig("cam_front")
    np.testing.assert_allclose(frames[0].shots[0].camera.base_from_camera[:3, 3], 2 * np.array(xyz), atol=1e-9)


# ------------------------------------------------------------------------------------------------------- bad input


def only(assembler: FrameAssembler, cause: str, count: int) -> str:
    assert dict(assembler.drops) == {cause: count}
    text = assembler.last_error[cause]
    assert "\n" not in text
    return text


@pytest.mark.parametrize("camera", CAMERAS)
def test_one_missing_image(keyframes: Messages, camera: str) -> None:
    frames, assembler = run(without(keyframes, image_of(camera), 2))
    assert len(frames) == 4
    assert camera in only(assembler, "missing camera", 1)


@pytest.mark.parametrize("camera", ["cam_back", ANCHOR_CAMERA])
def test_a_camera_that_never_sends(keyframes: Messages, camera: str) -> None:
    frames, assembler = run(without(keyframes, image_of(camera)))
    assert not frames
    text = only(assembler, "missing camera", 5)
    assert f"{camera} has no image within 0.1 s" in text and f"check {camera}/image_raw/compressed" in text


def test_missing_camera_is_given_up_by_stamps_and_memory_is_bounded(stream: Messages) -> None:
    assembler = FrameAssembler()
    assert not list(feed(assembler, without(stream, image_of("cam_back"))))
    assert assembler.drops["missing camera"] >= 15  # all but the last 0.6 s
    assert max(len(q) for q in assembler._images.values()) <= 10


def test_one_missing_image_in_a_stream_is_bridged(stream: Messages) -> None:
    """A neighbour within the spread stands in for a lost image: it has its own pose."""
    frames, assembler = run(without(stream, image_of("cam_back"), 7))
    assert len(frames) == 24 and not assembler.drops
    # With a limit under the period there is none.
    frames, assembler = run(without(stream, image_of("cam_back"), 7), FrameAssembler(max_camera_spread=0.05))
    assert len(frames) == 23
    assert "cam_back has no image" in only(assembler, "missing camera", 1)


def test_a_keyframe_that_lacks_a_camera_tells_the_stamps(stream: Messages, caplog: pytest.LogCaptureFixture) -> None:
    assembler = FrameAssembler(max_camera_spread=0.05)
    assembler.limits = replace(assembler.limits, keyframe_rate=2.0)
    with caplog.at_level("DEBUG", "nmp"):
        run(without(stream, image_of("cam_back"), 6), assembler)
    assert assembler.drops == {"missing camera": 1}
    (text,) = caplog.messages
    # the images before and after the lost one are there
    assert "cam_back has no image within 0.05 s" in text and "-0.058, +0.108];" in text
    assert "cam_front_right: newest +" in text


def test_wrong_image_size(keyframes: Messages) -> None:
    def shrink(m: Any) -> None:
        m.data = np.frombuffer(jpeg(1, 80, 45), np.uint8)

    frames, assembler = run(changed(keyframes, image_of("cam_back"), 1, shrink))
    assert len(frames) == 4
    assert "cam_back: image is 80 x 45 pixels but cam_back/camera_info says 160 x 90" in only(
        assembler, "wrong image size", 1
    )


def gif() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(out, "GIF")
    return out.getvalue()


@pytest.mark.parametrize("data", [b"", b"no image", jpeg()[:-40], jpeg()[:30], gif()])
def test_bad_image(keyframes: Messages, data: bytes) -> None:
    def spoil(m: Any) -> None:
        m.data = np.frombuffer(data, np.uint8)

    frames, assembler = run(changed(keyframes, image_of("cam_back"), 1, spoil))
    assert len(frames) == 4
    assert "cam_back/image_raw/compressed at" in only(assembler, "bad image", 1)


def test_bad_raw_image(keyframes: Messages) -> None:
    def raw(encoding: str, size: int) -> Messages:
        out = []
        for m in keyframes:
            if m.topic == image_of("cam_back"):
                data = bytes(size)
                fields = dict(encoding=encoding, width=WIDTH, height=HEIGHT, step=3 * WIDTH, data=data)
                m = m._replace(message=SimpleNamespace(header=m.message.header, **fields))
            out.append(m)
        return out

    _, assembler = run(raw("16UC1", 3 * WIDTH * HEIGHT))
    assert "cam_back/image_raw: encoding '16UC1' is not supported: publish one of" in only(assembler, "bad image", 5)
    _, assembler = run(raw("bayer_rggb8", 3 * WIDTH * HEIGHT))
    assert "'bayer_rggb8' is not supported: let image_proc debayer it" in only(assembler, "bad image", 5)
    _, assembler = run(raw("rgb8", 10))
    assert "10 bytes do not hold 160 x 90" in only(assembler, "bad image", 5)


@pytest.mark.parametrize("field", ["position.x", "position.z", "orientation.w"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pose_not_finite(keyframes: Messages, field: str, value: float) -> None:
    part, axis = field.split(".")
    # It never enters: its neighbours 8 ms away bridge the gap ...
    spoil = lambda m: setattr(getattr(m.pose.pose, part), axis, value)  # noqa: E731
    frames, assembler = run(changed(keyframes, "/odom", 7, spoil))
    assert len(frames) == 5
    assert "odom at 1532402927.508" in only(assembler, "pose not finite", 1)
    assert all(np.isfinite(s.map_from_base).all() for f in frames for s in f.shots)
    # ... and where there are none near enough, the frame has no pose.
    frames, assembler = run(changed(keyframes, "/odom", 6, spoil))
    assert len(frames) == 4
    assert assembler.drops == {"pose not finite": 1, "no pose": 1}


def test_zero_quaternion_and_bad_covariance(keyframes: Messages) -> None:
    _, assembler = run(changed(keyframes, "/odom", -1, lambda m: setattr(m.pose.pose.orientation, "w", 0.0)))
    assert assembler.drops["pose not finite"] == 0  # z is not zero: still a rotation
    _, assembler = run(changed(keyframes, "/odom", 3, lambda m: m.pose.covariance.__setitem__(7, float("nan"))))
    assert "covariance" in assembler.last_error["pose not finite"]


def test_no_pose(keyframes: Messages) -> None:
    frames, assembler = run(without(keyframes, "/odom"))
    assert not frames
    assert "nearest: none received): check odom" in only(assembler, "no pose", 5)


def test_pose_too_far_away(keyframes: Messages) -> None:
    late = [moved(m, 250_000_000) if m.topic == "/odom" else m for m in keyframes]
    frames, assembler = run(sorted(late, key=lambda m: m.stamp_ns))
    assert not frames
    assert "raise max_pose_age" in only(assembler, "no pose", 5)


@pytest.mark.parametrize(("attribute", "value"), [("frame", "odom"), ("child", "imu_link")])
def test_wrong_pose_frame(keyframes: Messages, attribute: str, value: str) -> None:
    def change(m: Any) -> None:
        if attribute == "frame":
            m.header.frame_id = value
        else:
            m.child_frame_id = value

    frames, assembler = run(changed(keyframes, "/odom", -1, change))
    assert not frames
    assert f"'{value}'" in assembler.last_error["wrong pose frame"]


def test_no_calibration(keyframes: Messages) -> None:
    frames, assembler = run(without(keyframes, "/cam_back/camera_info"))
    assert not frames
    assert "check the topic cam_back/camera_info" in only(assembler, "no calibration", 5)
    frames, assembler = run(changed(keyframes, "/cam_back/camera_info", -1, lambda m: m.k.fill(0)))
    assert not frames
    assert "cam_back/camera_info: no usable calibration" in only(assembler, "no calibration", 5)


def test_no_extrinsics(keyframes: Messages) -> None:
    def remove(m: Any) -> None:
        m.transforms = [t for t in m.transforms if t.child_frame_id != "cam_back_optical_frame"]

    def ring(m: Any) -> None:
        t = next(t for t in m.transforms if t.child_frame_id == "cam_back_optical_frame")
        t.header.frame_id = "cam_back_optical_frame"

    for change in (remove, ring):
        frames, assembler = run(changed(keyframes, "/tf_static", 0, change))
        assert not frames
        assert "no transform from base_link to cam_back_optical_frame" in only(assembler, "no extrinsics", 5)


def test_late_calibration_is_waited_for(keyframes: Messages) -> None:
    order = sorted(keyframes, key=lambda m: m.stamp_ns + 100_000_000 * (m.topic in ("/tf_static", "/location")))
    frames, assembler = run(order, flush=False)
    assert len(frames) == 5 and not assembler.drops


def test_no_location(keyframes: Messages) -> None:
    frames, assembler = run(without(keyframes, "/location"))
    assert not frames
    assert "parameter 'location'" in only(assembler, "no location", 5)


def test_change_of_location_drops_what_waits(keyframes: Messages) -> None:
    assembler = FrameAssembler()
    first = [m for m in keyframes if m.stamp_ns <= START_NS + 20_000_000]
    assert not list(feed(assembler, first))
    assembler.set_location("boston-seaport")
    frames = list(feed(assembler, keyframes[len(first) :]))
    assert [f.location for f in frames] == ["boston-seaport"] * 4
    assembler.set_location(" ")
    assert assembler.location == "boston-seaport" and assembler.drops["no location"] == 1


def test_camera_spread(keyframes: Messages) -> None:
    def split(m: BagMessage) -> BagMessage:
        by = {image_of("cam_back"): 60_000_000, image_of("cam_front_left"): -60_000_000}.get(m.topic)
        return moved(m, by) if by else m

    poses = [moved(m, by) for m in keyframes if m.topic == "/odom" for by in (-60_000_000, 60_000_000)]
    messages = sorted([split(m) for m in keyframes] + poses, key=lambda m: m.stamp_ns)
    frames, assembler = run(messages)
    assert not frames
    assert "0.153 s apart (cam_front_left to cam_back)" in only(assembler, "camera spread", 5)
    frames, assembler = run(messages, FrameAssembler(max_camera_spread=0.2))
    assert len(frames) == 5


def test_clock_jump_clears_queues_but_not_calibration(keyframes: Messages) -> None:
    """The bag starts again in the middle of a frame, without its latched messages."""
    middle = next(i for i, m in enumerate(keyframes) if m.stamp_ns > START_NS + 2_020_000_000)
    again = [m for m in keyframes if "camera_info" not in m.topic and m.topic not in ("/tf_static", "/location")]
    frames, assembler = run(keyframes[:middle] + again)
    assert [f.stamp_ns for f in frames] == 2 * [START_NS + 8_000_000 + i * NS // 2 for i in range(4)] + [
        START_NS + 2_008_000_000
    ]
    assert "went back by 2.0 s" in only(assembler, "clock jump", 1)
    assert assembler.epoch == 1


@pytest.mark.parametrize("late", ["/odom", *(image_of(c) for c in CAMERAS)])
def test_what_comes_late_of_the_time_line_before_costs_nothing_of_the_next(stream: Messages, late: str) -> None:
    """Topics are served in turn: one still brings its last messages when the others have begun again."""
    sensors = [m for m in stream if m.topic == "/odom" or "image_raw" in m.topic]
    begun = [m for m in sensors if m.stamp_ns < START_NS + 150_000_000]
    last = [m for m in stream if m.topic == late][-3:]
    rest = [m for m in stream if m not in last]
    frames, assembler = run(rest + [m for m in begun if m.topic != late] + last, flush=False)
    after = [m for m in begun if m.topic == late] + [m for m in sensors if m not in begun]
    again, _ = run(after, assembler, flush=False)
    assert [f.stamp_ns for f in again] == [f.stamp_ns for f in run(stream, flush=False)[0]]
    assert 20 <= len(frames) <= 24 and assembler.epoch == 1
    assert set(assembler.drops) <= {"clock jump", "camera spread"}  # the latter of the last frames before


def test_a_camera_whose_clock_goes_back_alone_stops_the_others_for_half_a_second_at_most(stream: Messages) -> None:
    half = len(stream) // 2
    odd = image_of("cam_back")
    messages = stream[:half] + [moved(m, -3600 * NS) if m.topic == odd else m for m in stream[half:]]
    frames, _ = run(messages, FrameAssembler(min_cameras=5))
    assert 24 - len(frames) <= 8 and frames[-1].stamp_ns == run(stream)[0][-1].stamp_ns


def test_a_jump_forward_costs_nothing_that_is_complete(keyframes: Messages) -> None:
    hour = 3600 * NS
    later = [moved(m, hour) for m in keyframes if m.topic not in ("/tf_static", "/location")]
    frames, assembler = run([*keyframes, *later])
    stamps = [frame.stamp_ns for frame in frames]
    assert len(stamps) == 10 and not assembler.drops
    assert [b - a for a, b in zip(stamps[:5], stamps[5:], strict=True)] == [hour] * 5
    # and back: a new time line
    frames, assembler = run([*keyframes, *later, *keyframes])
    assert len(frames) == 15 and assembler.drops == {"clock jump": 1}


def test_what_is_lost_at_a_jump_is_counted_and_what_is_complete_is_not_lost(stream: Messages) -> None:
    """12 Hz, and the poses of the last 0.3 s never come: some frames wait for them when the bag begins again."""
    end = stream[-1].stamp_ns
    short = [m for m in stream if m.topic != "/odom" or m.stamp_ns < end - 300_000_000]
    first, waiting = run(short, flush=False)
    assert not waiting.drops and 20 <= len(first) < 22
    frames, assembler = run(short + stream, flush=False)
    assert len(frames) == len(first) + 24
    assert "went back" in only(assembler, "clock jump", 24 - len(first))
    # All but one camera's last image has come when the bag begins again: where five are enough, they are a frame.
    last = [m for m in stream if m.topic == image_of("cam_back_left")][-1]
    five = FrameAssembler(min_cameras=5, max_camera_spread=0.045)
    frames, assembler = run([m for m in stream if m is not last] + stream, five, flush=False)
    assert [len(f.shots) for f in frames] == [6] * 23 + [5] + [6] * 24


def test_small_steps_back_are_no_jump(keyframes: Messages) -> None:
    """A late or repeated image is counted, and nothing is cleared."""
    image = next(m for m in keyframes if m.topic == image_of(ANCHOR_CAMERA))
    at = next(i for i, m in enumerate(keyframes) if m.stamp_ns > START_NS + 400_000_000)
    _, assembler = run(keyframes[:at] + [image] + keyframes[at:])
    only(assembler, "late image", 1)
    first = keyframes.index(image)
    frames, assembler = run(keyframes[: first + 1] + [image] + keyframes[first + 1 :])
    assert len(frames) == 5
    only(assembler, "duplicate image", 1)


def test_a_camera_with_its_own_clock_is_the_one_named(stream: Messages) -> None:
    ahead = [moved(m, 500 * NS) if m.topic == image_of("cam_back") else m for m in stream]
    frames, assembler = run(ahead)
    assert not frames
    assert "cam_back has no image" in only(assembler, "missing camera", 24)
    assert "newest is +499.942 s" in assembler.last_error["missing camera"]


def test_distortion_is_noted(keyframes: Messages) -> None:
    frames, assembler = run(changed(keyframes, "/cam_back/camera_info", -1, lambda m: m.d.__setitem__(0, 0.1)))
    assert len(frames) == 5
    assert "rectify" in assembler.notes["cam_back/camera_info"]


def test_limits_are_checked() -> None:
    for limits in ({"max_camera_spread": 0.0}, {"max_pose_age": float("nan")}, {"queue_size": 1}):
        with pytest.raises(NmpError, match=next(iter(limits))):
            FrameAssembler(**limits)


# ------------------------------------------------------------------------------ lost cameras, mounting, relocalisation


def cameras_of(frames: list[Frame]) -> list[list[str]]:
    return [[s.camera.name for s in f.shots] for f in frames]


def test_a_lost_camera_is_done_without_as_far_as_wanted(stream: Messages) -> None:
    """The camera is silent for a second; 12 Hz."""
    topic = image_of("cam_back")
    shots = [m for m in stream if m.topic == topic]
    silent = {id(m) for m in shots[6:18]}
    messages = [m for m in stream if id(m) not in silent]
    five = [c for c in CAMERAS if c != "cam_back"]

    frames, assembler = run(messages, FrameAssembler(min_cameras=5, max_camera_spread=0.05))
    assert not assembler.drops and len(frames) == 24
    assert cameras_of(frames) == [list(CAMERAS)] * 6 + [five] * 12 + [list(CAMERAS)] * 6
    assert not assembler.lost
    # With the default every camera is needed.
    frames, assembler = run(messages, FrameAssembler(max_camera_spread=0.05))
    assert len(frames) == 12 and assembler.drops == {"missing camera": 12}
    # Four are needed, but only three are left.
    three = [m for m in messages if not any(m.topic == image_of(c) for c in CAMERAS[1:4])]
    frames, assembler = run(three, FrameAssembler(min_cameras=4))
    assert not frames and set(assembler.drops) == {"missing camera"}


def test_a_lost_camera_is_waited_for_once(stream: Messages) -> None:
    messages = without(stream, image_of("cam_back_left"))
    assembler = FrameAssembler(min_cameras=5)
    delays: list[float] = []
    newest = 0
    for message in messages:
        if message.topic.endswith("compressed"):
            newest = max(newest, message.stamp_ns)
        delays += [(newest - f.stamp_ns) / NS for f in feed(assembler, [message])]
    assert list(assembler.lost) == ["cam_back_left"] and not assembler.drops
    assert delays[0] > 0.5 and len(delays) >= 20
    assert max(delays[-10:]) < 0.2  # not the patience of half a second for every frame


def test_the_front_camera_alone_goes_on(stream: Messages) -> None:
    others = [image_of(c) for c in CAMERAS if c != ANCHOR_CAMERA]
    frames, assembler = run([m for m in stream if m.topic not in others], FrameAssembler(min_cameras=1))
    assert cameras_of(frames) == [[ANCHOR_CAMERA]] * 24 and not assembler.drops
    frames, assembler = run(without(stream, image_of(ANCHOR_CAMERA)), FrameAssembler(min_cameras=1))
    assert not frames and set(assembler.drops) == {"missing camera"}  # it gives the moments


def test_damaged_and_uncalibrated_cameras_are_lost_ones(keyframes: Messages) -> None:
    damaged = changed(keyframes, image_of("cam_back"), 1, lambda m: setattr(m, "data", np.zeros(50, np.uint8)))
    frames, assembler = run(damaged, FrameAssembler(min_cameras=5))
    assert [len(f.shots) for f in frames] == [6, 5, 6, 6, 6] and not assembler.drops
    half = changed(keyframes, "/cam_back/camera_info", -1, lambda m: setattr(m, "width", 80))
    frames, assembler = run(half, FrameAssembler(min_cameras=5))
    assert [len(f.shots) for f in frames] == [5] * 5 and "80 x 90" in assembler.lost["cam_back"]
    blind = without(keyframes, "/cam_back/camera_info")
    frames, assembler = run(blind, FrameAssembler(min_cameras=5))
    assert [len(f.shots) for f in frames] == [5] * 5 and not assembler.drops


def test_a_late_camera_is_not_lost(stream: Messages) -> None:
    """Messages of one camera arrive 0.3 s after the others: within the patience, nothing is left out."""
    late = sorted(stream, key=lambda m: m.stamp_ns + (300_000_000 if m.topic == image_of("cam_back") else 0))
    frames, assembler = run(late, FrameAssembler(min_cameras=1))
    assert cameras_of(frames) == [list(CAMERAS)] * 24 and not assembler.drops


def test_mounting_from_a_file_needs_no_transforms(keyframes: Messages) -> None:
    prefixes = [f"left/{c}" for c in CAMERAS]
    mounting = {
        p: transform_from(*(np.array(v) for v in camera_rig(c))) for p, c in zip(prefixes, CAMERAS, strict=True)
    }
    known = FrameAssembler(prefixes=prefixes, extrinsics=mounting)
    frames, assembler = run(without(keyframes, "/tf_static"), known)
    expected, _ = run(keyframes)
    assert len(frames) == 5 and not assembler.drops
    for frame, other in zip(frames, expected, strict=True):
        for mine, theirs in zip(frame.shots, other.shots, strict=True):
            np.testing.assert_allclose(mine.camera.base_from_camera, theirs.camera.base_from_camera, atol=1e-9)
    _, assembler = run(without(keyframes, image_of("cam_back")), FrameAssembler(prefixes=prefixes))
    assert "left/cam_back/image_raw" in assembler.last_error["missing camera"]


@pytest.mark.parametrize(
    ("metres", "degrees", "lost"), [(0.4, 0.0, 0), (3.0, 0.0, 1), (0.0, 30.0, 1), (500.0, 90.0, 1)]
)
def test_a_relocalisation_costs_the_frame_across_it(stream: Messages, metres: float, degrees: float, lost: int) -> None:
    """From the middle of the twelfth frame on the pose is another."""
    middle = START_NS + round(11 / 12 * NS) + 30_000_000
    turn = Rotation.from_euler("z", degrees, degrees=True)

    def moved_pose(message: BagMessage) -> BagMessage:
        if message.topic != "/odom" or message.stamp_ns < middle:
            return message
        new = copy.deepcopy(message)
        pose = new.message.pose.pose
        pose.position.x += metres
        q = pose.orientation
        q.x, q.y, q.z, q.w = (turn * Rotation.from_quat([q.x, q.y, q.z, q.w])).as_quat()
        return new

    frames, assembler = run([moved_pose(m) for m in stream])
    assert len(frames) == 24 - lost and assembler.drops["pose jump"] == lost
    assert not lost or "relocalisation" in assembler.last_error["pose jump"]


def test_frames_come_no_faster_than_wanted(stream: Messages) -> None:
    frames, assembler = run(stream, FrameAssembler(max_rate=4.0))
    # 12 Hz: every third image of the front camera
    assert [f.stamp_ns for f in frames] == [f.stamp_ns for f in run(stream)[0]][::3]
    assert assembler.skipped == 16 and not assembler.drops
    assert len(run(stream, FrameAssembler(max_rate=20.0))[0]) == 24
    # a rate that is no part of the cameras' is reached all the same: 5 of 12 Hz, by turns every second and third image
    frames, _ = run(stream, FrameAssembler(max_rate=5.0))
    assert len(frames) == 10
    steps = {round((b.stamp_ns - a.stamp_ns) / NS * 12) for a, b in pairwise(frames)}
    assert steps == {2, 3}


def test_a_rate_is_kept_though_stamps_are_not_exact(stream: Messages) -> None:
    rng = random.Random(1)
    shift = {}
    for m in stream:
        shift.setdefault(m.stamp_ns // 80_000_000, rng.randint(-12_000_000, 12_000_000))
    jittered = [moved(m, shift[m.stamp_ns // 80_000_000]) if "image_raw" in m.topic else m for m in stream]
    frames, _ = run(sorted(jittered, key=lambda m: m.stamp_ns), FrameAssembler(max_rate=4.0))
    assert {round((b.stamp_ns - a.stamp_ns) / NS * 12) for a, b in pairwise(frames)} == {3}


def test_reset_forgets_what_waits_but_no_calibration(keyframes: Messages) -> None:
    assembler = FrameAssembler()
    assert len(list(feed(assembler, keyframes))) == 5
    assembler.reset()
    calibration = [m for m in keyframes if m.topic.endswith("camera_info") or m.topic in ("/tf_static", "/location")]
    frames, _ = run([m for m in keyframes if m not in calibration], assembler)
    assert len(frames) == 5 and not assembler.drops  # the same stamps again, and no clock jump


# ---------------------------------------------------------------------------------------------------- fast cameras


def test_only_images_of_frames_are_opened(stream: Messages) -> None:
    """Sealed images are those that come serialised: 12 Hz, of which 4 Hz are mapped."""
    assembler = FrameAssembler(max_rate=4.0)
    opened: list[str] = []
    frames = []
    for m in stream:
        camera = m.topic.split("/")[1]
        if m.topic == image_of(camera):
            data = STORE.serialize_cdr(m.message, "sensor_msgs/msg/CompressedImage")

            def fetch(data: Any = data, camera: str = camera) -> Any:
                opened.append(camera)
                return STORE.deserialize_cdr(data, "sensor_msgs/msg/CompressedImage")

            assert stamp_of_cdr(bytes(data)) == m.stamp_ns
            assembler.add_sealed_image(camera, stamp_of_cdr(bytes(data)), fetch, "compressed")
            frames += assembler.pop_frames()
        else:
            frames += feed(assembler, [m])
    plain, _ = run(stream, FrameAssembler(max_rate=4.0), flush=False)
    assert [f.stamp_ns for f in frames] == [f.stamp_ns for f in plain] and len(frames) == 8
    assert all(a.shots[5].image == b.shots[5].image for a, b in zip(frames, plain, strict=True))
    # now and then a neighbour is looked at before the nearest image is there
    assert 6 * len(frames) <= len(opened) < 9 * len(frames)


def test_a_serialised_stamp_is_read_in_both_byte_orders() -> None:
    assert stamp_of_cdr(b"\0\1\0\0" + (5).to_bytes(4, "little") + (7).to_bytes(4, "little")) == 5 * NS + 7
    assert stamp_of_cdr(b"\0\0\0\0" + (5).to_bytes(4, "big") + (7).to_bytes(4, "big") + b"more") == 5 * NS + 7
    with pytest.raises(NmpError, match="11 bytes has no header"):
        stamp_of_cdr(bytes(11))


def test_bytes_that_are_no_message_are_a_bad_image(keyframes: Messages) -> None:
    assembler = FrameAssembler(min_cameras=5)

    def broken() -> Any:
        raise RuntimeError("buffer is too small")

    frames = []
    for m in keyframes:
        if m.topic == image_of("cam_back"):
            assembler.add_sealed_image("cam_back", m.stamp_ns, broken, "compressed")
        else:
            frames += feed(assembler, [m])
    assert [len(frame.shots) for frame in frames] == [5] * 5
    assert "no message (buffer is too small)" in assembler.lost["cam_back"]


def test_keyframes_are_an_interval_apart(stream: Messages) -> None:
    frames, _ = run(stream, FrameAssembler(max_rate=4.0), flush=False)
    assert not any(f.keyframe for f in frames)  # none unless asked for
    assembler = FrameAssembler()
    assembler.limits = replace(assembler.limits, keyframe_rate=2.0)
    frames, _ = run(stream, assembler, flush=False)
    assert [i for i, f in enumerate(frames) if f.keyframe] == [0, 6, 12, 18]
    with pytest.raises(NmpError, match="keyframe_rate is -1"):
        replace(assembler.limits, keyframe_rate=-1.0)
