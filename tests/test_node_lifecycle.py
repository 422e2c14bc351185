"""The mapping node's lifecycle, parameters and services over real DDS."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ros_fixtures import Ros, ros, until

pytest.importorskip("rclpy")
pytest.importorskip("tf2_msgs")
pytest.importorskip("nmp_msgs")

from diagnostic_msgs.msg import DiagnosticStatus  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from nav_msgs.msg import OccupancyGrid  # noqa: E402
from nmp_msgs.srv import ExportPrior, LoadPrior, PauseMapping, ResetMapping, SavePrior  # noqa: E402
from rcl_interfaces.msg import Log  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from visualization_msgs.msg import Marker, MarkerArray  # noqa: E402

from nmp import topics  # noqa: E402
from nmp.assembly import FrameAssembler  # noqa: E402
from nmp.errors import NmpError  # noqa: E402
from nmp.nodes import interface, prior_jobs  # noqa: E402
from nmp.nodes.conversions import to_ns, to_time  # noqa: E402
from nmp.nodes.diagnostics import Condition, Reports  # noqa: E402
from nmp.nodes.mapping_node import MappingNode  # noqa: E402
from nmp.nodes.qos import profile  # noqa: E402
from nmp.nodes.runtime import forward_log  # noqa: E402
from nmp.nodes.settings import Settings  # noqa: E402
from nmp.nodes.statistics import RunStatistics  # noqa: E402
from nmp.prior.ledger import Ledger  # noqa: E402
from nmp.prior.storage import Storage  # noqa: E402
from tests.bag_fixtures import LOCATION, START_NS, bag_messages, make_bag, write_messages  # noqa: E402
from tests.test_mapping_node import FakeMapper, Rig  # noqa: E402

NOT_READY, REFUSED = SavePrior.Response.RESULT_NOT_READY, SavePrior.Response.RESULT_REFUSED
SUCCESS, FAILED = SavePrior.Response.RESULT_SUCCESS, SavePrior.Response.RESULT_FAILED


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"), frames=4)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ros]:
    monkeypatch.setattr("nmp.nodes.mapping_node.REPORT_PERIOD", 0.1)
    with ros() as r:
        yield r


def ask(rig: Rig, kind: Any, name: str, **fields: Any) -> Any:
    client = rig.probe.create_client(kind, name.replace("~", "/mapping_node"))
    assert client.wait_for_service(timeout_sec=5)
    future = client.call_async(kind.Request(**fields))
    assert until(future.done, 15)
    return future.result()


def change(rig: Rig, transition: int) -> bool:
    """Ask for a transition as ``ros2 lifecycle set`` does."""
    return bool(ask(rig, ChangeState, "~/change_state", transition=Transition(id=transition)).success)


def play(rig: Rig, bag: Path, frames: int = 4) -> None:
    """Play a bag fast, until its frames are mapped, skipped or held up by a job."""
    images = rig.node.statistics.received + frames
    rig.play(bag, rate=10.0, seconds=0.05)
    assert until(lambda: rig.node.statistics.received == images)


def answered(rig: Rig, count: int) -> bool:
    return until(lambda: rig.node.statistics.answered == count)


def listeners(rig: Rig) -> int:
    return len(rig.node.get_subscriptions_info_by_topic("/cam_back/image_raw/compressed"))


# ------------------------------------------------------------------------------------------------------- lifecycle


class Making:
    """Counts the mappers that a node makes."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[FakeMapper]] = []
        self.threads: set[str] = set()
        self.error: Exception | None = None

    def __call__(self, settings: Settings) -> FakeMapper:
        if self.error:
            raise self.error
        mapper = FakeMapper()
        self.threads.add(threading.current_thread().name)
        self.made.append(weakref.ref(mapper))
        return mapper


def managed(world: Ros, making: Making, **parameters: Any) -> Rig:
    rig = Rig(world, autostart=False, queue_size=10, **parameters)
    rig.node._make_mapper = making
    return rig


def test_the_whole_life(world: Ros, drive: Path) -> None:
    making = Making()
    rig = managed(world, making)
    assert (rig.node.state, listeners(rig), making.made) == ("unconfigured", 0, [])
    assert rig.status(DiagnosticStatus.WARN, "unconfigured: nothing is mapped")
    assert not change(rig, Transition.TRANSITION_ACTIVATE)  # not possible yet, and nothing breaks
    assert change(rig, Transition.TRANSITION_CONFIGURE)
    assert (rig.node.state, listeners(rig), len(making.made)) == ("inactive", 0, 1)
    for count in (1, 2):
        assert change(rig, Transition.TRANSITION_ACTIVATE)
        assert rig.node.state == "active" and until(lambda: listeners(rig) == 1)
        play(rig, drive)
        assert answered(rig, 4 * count) and not rig.drops
        told = {v.key: v.value for v in rig.report().values}
        assert told["state"] == "active" and told["frames answered"] == str(4 * count)
        stages = ("transport", "assembling", "waiting", "network", "publishing")
        assert all(float(told[f"latency {stage} (s)"]) >= 0 for stage in stages)
        assert told["prior tiles"] == "7" and told["cameras lost"] == "none"
        mapper = making.made[-1]()
        assert mapper is not None
        assert change(rig, Transition.TRANSITION_DEACTIVATE)
        assert (rig.node.state, mapper.closed, mapper.threads) == ("inactive", 1, {"mapper"})
        del mapper
        gc.collect()
        # nothing holds it any more: neither does its memory on a GPU stay
        assert making.made[-1]() is None and len(making.made) == count
        assert until(lambda: listeners(rig) == 0)
    assert change(rig, Transition.TRANSITION_CLEANUP)
    assert rig.node.state == "unconfigured"
    assert making.threads == {"mapper"}  # where it runs too: see MappingNode._load
    assert not rig.node.get_publishers_info_by_topic("/mapping_node/layers/divider")
    assert change(rig, Transition.TRANSITION_CONFIGURE) and change(rig, Transition.TRANSITION_CLEANUP)
    assert rig.node.shutdown() == 0 and rig.node.state == "finalized" and world.stop.is_set()


def test_what_fails_leaves_the_state_and_what_breaks_is_released(world: Ros) -> None:
    making = Making()
    rig = managed(world, making)
    making.error = NmpError("weights /w.safetensors do not exist: check the path")
    assert not change(rig, Transition.TRANSITION_CONFIGURE)
    assert rig.node.state == "unconfigured" and rig.status(DiagnosticStatus.ERROR, "/w.safetensors do not exist")
    making.error = RuntimeError("oops")  # nobody foresaw this one: error processing
    assert not change(rig, Transition.TRANSITION_CONFIGURE)
    assert rig.node.state == "unconfigured" and rig.status(DiagnosticStatus.ERROR, "RuntimeError('oops')")
    making.error = None
    assert change(rig, Transition.TRANSITION_CONFIGURE) and change(rig, Transition.TRANSITION_ACTIVATE)

    def full(self: FakeMapper) -> None:
        raise NmpError("cannot save 3 tiles: free disk space")

    mapper = making.made[-1]()
    assert mapper is not None
    mapper.close = full.__get__(mapper)  # type: ignore[method-assign]
    assert not change(rig, Transition.TRANSITION_DEACTIVATE)
    assert rig.node.state == "unconfigured" and rig.status(DiagnosticStatus.ERROR, "free disk space")
    assert until(lambda: listeners(rig) == 0) and rig.node.worker is None
    assert change(rig, Transition.TRANSITION_CONFIGURE) and change(rig, Transition.TRANSITION_ACTIVATE)
    assert rig.node.state == "active"


def test_a_disk_that_hangs_does_not_hold_the_node(world: Ros, monkeypatch: pytest.MonkeyPatch, drive: Path) -> None:
    monkeypatch.setattr("nmp.nodes.mapping_node.LOAD_TIMEOUT", 0.3)
    go, hanging = threading.Event(), FakeMapper()
    rig = managed(world, Making())

    def make(settings: Settings) -> FakeMapper:
        go.wait(20)
        return hanging

    rig.node._make_mapper = make
    assert not change(rig, Transition.TRANSITION_CONFIGURE)
    assert rig.node.state == "unconfigured" and rig.status(DiagnosticStatus.ERROR, "not loaded within 0.3 s")
    go.set()
    assert until(lambda: hanging.closed == 1)  # when it comes back after all
    rig.node._make_mapper = Making()
    assert change(rig, Transition.TRANSITION_CONFIGURE) and change(rig, Transition.TRANSITION_ACTIVATE)
    play(rig, drive)
    assert answered(rig, 4)


def test_configure_opens_the_city_that_is_named(world: Ros, tmp_path: Path) -> None:
    from tests.test_mapper import _write_weights

    weights = _write_weights(tmp_path / "w.safetensors", 0)
    given = {"weights": str(weights), "prior_dir": str(tmp_path / "prior"), "device": "cpu", "location": LOCATION}
    node = world.add(MappingNode(threading.Event(), **world.options(autostart=False, **given)))
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert (tmp_path / "prior" / LOCATION / "city.json").is_file()
    assert node.shutdown() == 0


def test_a_stuck_network_does_not_hold_the_node(world: Ros, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmp.nodes.mapping_node.STOP_TIMEOUT", 0.2)
    rig = Rig(world, FakeMapper(seconds=3.0))
    rig.play(drive, seconds=0.0)
    assert until(lambda: rig.mapper.frames)
    with pytest.raises(NmpError, match="did not come back within 0.2 s"):
        rig.node.shutdown()


# ------------------------------------------------------------------------------------------------------ parameters


def test_parameters_are_validated_when_they_change(world: Ros) -> None:
    rig = Rig(world)

    def tried(name: str, value: Any) -> str:
        (result,) = rig.node.set_parameters([Parameter(name, value=value)])
        return "" if result.successful else result.reason

    assert not tried("queue_size", 5) and rig.node.settings["queue_size"] == 5
    assert not tried("max_pose_age", 0.5) and rig.node.assembler.limits.max_pose_age == 0.5
    assert tried("queue_size", 0) and tried("min_cameras", 7) and tried("queue_size", "many")
    assert rig.node.settings["queue_size"] == 5
    assert "deactivate and clean up" in tried("image_transport", "raw")
    assert tried("autostart", False)
    assert change(rig, Transition.TRANSITION_DEACTIVATE) and change(rig, Transition.TRANSITION_CLEANUP)
    assert "choose compressed or raw" in tried("image_transport", "theora")
    assert "6 different ones" in tried("cameras", ["a", "b", "c", "d", "e", "e"])
    assert "6 different ones" in tried("cameras", ["a", "b"])
    assert not tried("image_transport", "raw") and not tried("cameras", list("abcdef"))
    assert change(rig, Transition.TRANSITION_CONFIGURE) and change(rig, Transition.TRANSITION_ACTIVATE)
    assert len(rig.node.get_subscriptions_info_by_topic("/f/image_raw")) == 1


@pytest.mark.parametrize(("transport", "pose"), [("compressed", "odometry"), ("raw", "pose_with_covariance")])
def test_the_node_has_the_topics_and_services_that_are_documented(world: Ros, transport: str, pose: str) -> None:
    node = world.add(
        MappingNode(
            world.stop,
            make_mapper=lambda settings: FakeMapper(),
            **world.options(image_transport=transport, pose_type=pose),
        )
    )

    def shown(found: list[tuple[str, list[str]]]) -> dict[str, str]:
        standard = ("/rosout", "/parameter_events", "/mapping_node/transition_event")
        return {name: types[0] for name, types in found if name not in standard}

    def declared(rows: Any) -> dict[str, str]:
        return {topics.absolute(row.name.replace("~", "/mapping_node")): row.type for row in rows}

    assert until(lambda: node.count_subscribers("/odom"))
    me = ("mapping_node", "/")

    def told() -> list[dict[str, str]]:
        services = shown(node.get_service_names_and_types_by_node(*me))
        return [
            shown(node.get_subscriber_names_and_types_by_node(*me)),
            shown(node.get_publisher_names_and_types_by_node(*me)),
            {name: kind for name, kind in services.items() if "nmp_msgs" in kind},
        ]

    written = [declared(rows) for rows in (interface.inputs(transport, pose), interface.OUTPUTS, interface.SERVICES)]
    # which node an endpoint belongs to is told by a message of its own, a little later
    until(lambda: told() == written)
    assert told() == written


def test_other_camera_names_mounting_from_a_file_and_five_cameras(world: Ros, tmp_path: Path) -> None:
    names = ["front", "right", "back_right", "rear", "back_left", "left"]
    mounting = tmp_path / "mounting.yaml"
    lines = [f"{n}: {{translation: [{i}, 0, 1.5], rotation: [-0.5, 0.5, -0.5, 0.5]}}" for i, n in enumerate(names)]
    mounting.write_text("\n".join(lines))
    rename = dict(zip((f"/{c}/" for c in topics.CAMERAS), (f"/{n}/" for n in names), strict=True))
    messages = []
    for m in bag_messages(make_bag(tmp_path, frames=4)):
        old = next((c for c in rename if m.topic.startswith(c)), "")
        messages.append(m._replace(topic=m.topic.replace(old, rename[old])) if old else m)
    lame = [m for m in messages if m.topic not in ("/rear/image_raw/compressed", "/tf_static")]
    bag = write_messages(tmp_path / "bag", lame)
    rig = Rig(world, cameras=names, extrinsics_file=str(mounting), min_cameras=5, queue_size=10)
    rig.play(bag, delay=1.5)  # the player does not know that the node listens to these names
    assert until(lambda: len(rig.mapper.frames) == 4) and not rig.drops
    for frame in rig.mapper.frames:
        assert [s.camera.name for s in frame.shots] == [c for c in topics.CAMERAS if c != "cam_back"]
        assert [s.camera.base_from_camera[0, 3] for s in frame.shots] == [0, 1, 2, 4, 5]
    assert rig.status(DiagnosticStatus.WARN, "rear")


# ------------------------------------------------------------------------------------------------ pause, idle, time


def test_pause_and_idle(world: Ros, drive: Path) -> None:
    rig = Rig(world, queue_size=10, idle_without_subscribers=True)
    assert ask(rig, PauseMapping, topics.PAUSE, paused=True).result == SUCCESS
    play(rig, drive)
    assert rig.node.statistics.skips == {"paused": 4} and not rig.mapper.frames
    assert ask(rig, PauseMapping, topics.PAUSE, paused=False).result == SUCCESS
    play(rig, drive)
    assert answered(rig, 4)
    for subscription in list(rig.probe.subscriptions):
        rig.probe.destroy_subscription(subscription)
    assert until(lambda: rig.node.outputs is not None and not rig.node.outputs.wanted)
    play(rig, drive)
    assert rig.node.statistics.skips == {"paused": 4, "no subscribers": 4} and len(rig.mapper.frames) == 4
    assert rig.drops == {"clock jump": 2}


def test_no_frame_is_lost_where_a_recording_begins_again(world: Ros, drive: Path) -> None:
    """The network is slow: frames of the first round wait for it while the second begins."""
    rig = Rig(world, FakeMapper(seconds=0.15), queue_size=10)
    rig.play(drive, rate=10.0, seconds=0.0)
    rig.play(drive, rate=10.0, seconds=0.0)
    assert answered(rig, 8)
    assert rig.drops == {"clock jump": 1}  # that it was noticed; nothing is lost


@pytest.mark.parametrize("set_later", [False, True])
def test_simulated_time_that_stands_still_is_no_silence(
    world: Ros, monkeypatch: pytest.MonkeyPatch, set_later: bool
) -> None:
    monkeypatch.setattr("nmp.nodes.inputs.SILENT_AFTER", 0.4)
    rig = Rig(world, use_sim_time=not set_later)
    if set_later:  # as by ros2 param set
        (result,) = rig.node.set_parameters([Parameter("use_sim_time", value=True)])
        assert result.successful
    clock = rig.probe.create_publisher(Clock, "/clock", 10)
    place = rig.probe.create_publisher(String, "/location", profile(topics.LATCHED))
    inputs = rig.node._inputs
    assert inputs is not None

    def tick(seconds: float) -> None:
        stamp = to_time(START_NS + round(seconds * 1e9))
        for _ in range(5):
            clock.publish(Clock(clock=stamp))
            time.sleep(0.02)

    assert until(lambda: clock.get_subscription_count() and place.get_subscription_count())
    tick(1.0)
    place.publish(String(data=LOCATION))
    assert until(lambda: inputs.counts["location"] == 1)
    # a player at a tenth of the speed: half a second passes, but not for the car
    for tenths in range(5):
        tick(1.0 + 0.01 * tenths)
        assert not any("stands still" in text or "any input" in text for text in inputs.silent())
    assert until(lambda: "/clock: time stands still" in inputs.silent()[0], 2.0)
    tick(2.0)
    assert inputs.silent()[0].startswith("any input")


# --------------------------------------------------------------------------------------------------------- services


def test_services_are_refused_in_the_wrong_state(world: Ros) -> None:
    rig = Rig(world)
    assert ask(rig, LoadPrior, topics.LOAD_PRIOR).result == NOT_READY  # no city is known yet
    assert change(rig, Transition.TRANSITION_DEACTIVATE)
    for kind, name in (
        (SavePrior, topics.SAVE_PRIOR),
        (LoadPrior, topics.LOAD_PRIOR),
        (ExportPrior, topics.EXPORT_PRIOR),
        (ResetMapping, topics.RESET),
        (PauseMapping, topics.PAUSE),
    ):
        response = ask(rig, kind, name)
        assert response.result == NOT_READY and "the node is inactive: activate it first" in response.message


def test_frames_go_on_while_a_service_waits(world: Ros, drive: Path) -> None:
    rig = Rig(world, service_timeout=20.0, queue_size=10)
    play(rig, drive)
    held, go = threading.Event(), threading.Event()

    def slow() -> None:
        held.set()
        go.wait(20)

    rig.mapper.flush = slow
    client = rig.probe.create_client(SavePrior, "/mapping_node/save_prior")
    future = client.call_async(SavePrior.Request())
    assert held.wait(5)
    before = rig.node.statistics.received
    play(rig, drive)  # messages are taken meanwhile, and another service answers
    assert rig.node.statistics.received == before + 4
    assert ask(rig, PauseMapping, topics.PAUSE, paused=False).result == SUCCESS
    assert not future.done()
    go.set()
    assert until(future.done) and future.result().result == SUCCESS
    assert answered(rig, 8)


def test_reset_begins_anew(world: Ros, drive: Path) -> None:
    rig = Rig(world, queue_size=10)
    arrays: list[MarkerArray] = []
    latched = profile(topics.TopicQos(depth=10, latched=True))
    rig.probe.create_subscription(MarkerArray, "/mapping_node/vectors", arrays.append, latched)
    play(rig, drive)
    assert answered(rig, 4)
    assert ask(rig, ResetMapping, topics.RESET).result == SUCCESS
    assert rig.mapper.closed == 1
    assert until(lambda: any(m.action == Marker.DELETEALL for a in arrays for m in a.markers))
    play(rig, drive)  # the stamps go back: no clock jump after a reset
    assert answered(rig, 8) and not rig.drops


def test_the_city_is_what_was_seen_so_far(world: Ros, drive: Path) -> None:
    rig = Rig(world, queue_size=10, city_period=1e-3)
    play(rig, drive)
    assert answered(rig, 4)
    grids: list[OccupancyGrid] = []
    latched = profile(topics.LATCHED)
    rig.probe.create_subscription(OccupancyGrid, "/mapping_node/city/crossing", grids.append, latched)
    time.sleep(0.3)
    assert not grids  # nobody listened while there were frames
    play(rig, drive)
    assert answered(rig, 8) and until(lambda: grids and to_ns(grids[-1].header.stamp) == rig.mapper.frames[-1].stamp_ns)
    info = grids[-1].info
    cells = np.array(grids[-1].data, np.int8).reshape(info.height, info.width)
    assert info.resolution == pytest.approx(0.6) and grids[-1].header.frame_id == "map"
    corner = info.origin.position
    for frame in rig.mapper.frames:
        # under the car and two metres around it everything was seen, and the random layers have something in each cell
        col, row = np.floor((frame.map_from_base[:2, 3] - (corner.x, corner.y)) / 0.6).astype(int)
        assert (cells[row - 1 : row + 2, col - 1 : col + 2] > 60).all()
    assert (cells == -1).any() and cells.shape < (120, 120)
    assert (cells >= 0).any(axis=0).all() and (cells >= 0).any(axis=1).all()  # no larger than needed


def test_prior_services_on_a_real_prior(world: Ros, drive: Path, tmp_path: Path) -> None:
    from nmp.mapper import OnlineMapper
    from tests.test_mapper import _write_weights

    folder = tmp_path / "prior"
    mapper = OnlineMapper(_write_weights(tmp_path / "w.safetensors", 0), folder)
    rig = Rig(world, mapper, queue_size=10)

    def state() -> list[str]:
        return [r.id for r in Ledger.open(Storage(folder / LOCATION), read_only=True).active()]

    play(rig, drive)
    assert answered(rig, 4)
    early = ask(rig, ExportPrior, topics.EXPORT_PRIOR, file="early.zip")
    assert early.result == REFUSED and "no drive of" in early.message  # it is not over
    assert ask(rig, ResetMapping, topics.RESET).result == SUCCESS
    (first,) = state()
    out = ask(rig, ExportPrior, topics.EXPORT_PRIOR, file="city.zip")
    assert (out.result, out.path, out.records) == (SUCCESS, str(folder / "city.zip"), 1)
    assert any(first in name for name in zipfile.ZipFile(out.path).namelist())
    for name in ("../city.zip", "/tmp/city.zip", "city.zip", "", "city.tar", f"nowhere/{LOCATION}.zip"):
        refused = ask(rig, ExportPrior, topics.EXPORT_PRIOR, file=name)
        assert refused.result == REFUSED and refused.message, name
    assert ask(rig, ExportPrior, topics.EXPORT_PRIOR, location="../prior", file="x.zip").result == REFUSED

    shorter = [m for m in bag_messages(drive) if m.stamp_ns < START_NS + 1_200_000_000]
    play(rig, write_messages(tmp_path / "shorter", shorter), 3)
    assert answered(rig, 7)
    forgotten = ask(rig, ResetMapping, topics.RESET, forget_drive=True)
    assert forgotten.result == SUCCESS and "1 drives are left out" in forgotten.message
    assert state() == [first]
    assert ask(rig, LoadPrior, topics.LOAD_PRIOR, version="nonsense").result == REFUSED
    loaded = ask(rig, LoadPrior, topics.LOAD_PRIOR, version=first[:6])
    assert (loaded.result, loaded.drives) == (SUCCESS, 1)
    base = ask(rig, LoadPrior, topics.LOAD_PRIOR, version="base")
    assert (base.result, base.drives, state()) == (SUCCESS, 0, [])
    play(rig, drive)  # the first recording again: it counts once, and cannot be forgotten as if it were new
    assert answered(rig, 11) and not set(rig.drops) - {"clock jump"}
    assert rig.save().result == SUCCESS
    again = ask(rig, ResetMapping, topics.RESET, forget_drive=True)
    assert again.result == SUCCESS and "0 drives are left out" in again.message


@pytest.mark.parametrize("name", ["..", "../x.zip", "/etc/x.zip", "", ".", "a/../../x.zip", "link/x.zip", "a\0b.zip"])
def test_paths_stay_in_the_folder_of_the_prior(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(prior_jobs.Refused):
        prior_jobs.confined(folder, name)
    assert prior_jobs.confined(folder, "x.zip") == folder / "x.zip"


def test_rates_are_those_of_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("nmp.nodes.diagnostics.time.monotonic", lambda: now)
    reports, statistics, assembler = Reports("n"), RunStatistics(), FrameAssembler()
    received = {"odom": 0, "cam_front/image_raw/compressed": 5, "location": 1}

    def told(**condition: Any) -> dict[str, str]:
        made = reports.make(Condition("active", received=received, **condition), statistics, assembler)
        return {v.key: v.value for v in made.values}

    told()
    now += 2.0
    received = {"odom": 40, "cam_front/image_raw/compressed": 29, "location": 2}
    for _ in range(4):
        statistics.answer(0.2, {"network": 0.1})
    values = told(prior={"tiles": 12})
    rates = {k: v for k, v in values.items() if k.startswith("rate")}
    images = "rate cam_front/image_raw/compressed (Hz)"
    assert rates == {"rate frames (Hz)": "2.0", "rate odom (Hz)": "20.0", images: "12.0"}
    assert (values["latency network (s)"], values["prior tiles"]) == ("0.1000", "12")


def test_what_the_library_logs_is_passed_on_whatever_its_severity(world: Ros, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, str]] = []
    node = world.probe("teller")
    listener = world.probe("listener")
    listener.create_subscription(Log, "/rosout", lambda m: said.append((m.level, m.msg)), 10)
    assert until(lambda: node.count_subscribers("/rosout"))
    time.sleep(0.3)
    log = logging.getLogger("nmp")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    forward_log(node)
    log.warning("a tile is damaged")
    log.error("the disk is full")
    log.warning("a tile is damaged again")
    log.debug("not asked for")
    expected = [(30, "a tile is damaged"), (40, "the disk is full"), (30, "a tile is damaged again")]
    assert until(lambda: len(said) == 3) and said == expected


def test_a_destroyed_node_leaves_the_graph(world: Ros) -> None:
    probe = world.probe()
    node = MappingNode(threading.Event(), make_mapper=lambda settings: FakeMapper(), **world.options())
    assert until(lambda: "mapping_node" in probe.get_node_names())
    node.destroy_node()
    assert until(lambda: "mapping_node" not in probe.get_node_names())
