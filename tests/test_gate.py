"""The gate before the prior: which poses are doubted, and what becomes of the prior then."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bag_fixtures import bag_messages, feed, make_bag

from nmp.assembly import FrameAssembler
from nmp.errors import NmpError
from nmp.frame import Frame
from nmp.gate import CONFIRMED, JUMPS, SETTLING, UNCERTAIN, GateLimits, PoseGate, doubted
from nmp.geometry import transform_from_xyyaw
from nmp.mapper import OnlineMapper
from nmp.model import BEVNetwork, NetworkConfig, save_network
from nmp.model.fusion import EVIDENCE_SCALE
from nmp.nodes.parameters import GATE, PARAMETERS
from nmp.prior import CityPrior

CONFIG = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)
SURE = np.array([[0.1, -0.1, 0.0], [0.2, 0.2, 0.01], [0.2, -0.2, 0.0], [0.2, 0.2, 0.01]], np.float32)
"""what a pose search finds where the pose is right: offset, spread, what was measured and its error"""


def drive(
    count: int, period: float = 0.1, speed: float = 12.0, turn: float = 0.2, stds: tuple[float, float] = (0.05, 0.005)
) -> Iterator[Frame]:
    """A bend at constant speed, without images."""
    for k in range(count):
        t = k * period
        yaw = 0.4 + turn * t
        x, y = speed / turn * math.sin(yaw), -speed / turn * math.cos(yaw)
        yield Frame(round(t * 1e9), "boston-seaport", transform_from_xyyaw(x, y, yaw), (), *stds)


def displaced(frame: Frame, x: float = 0.0, y: float = 0.0, yaw: float = 0.0) -> Frame:
    return dataclasses.replace(frame, map_from_base=transform_from_xyyaw(x, y, yaw) @ frame.map_from_base)


def stored(gate: PoseGate, frames: list[Frame], found: np.ndarray | None = None) -> list[bool]:
    out = []
    for frame in frames:
        gate.check(frame)
        out.append(gate.may_store(found))
    return out


@pytest.mark.parametrize("period", [0.05, 0.1, 0.5])
def test_an_ordinary_drive_is_stored(period: float) -> None:
    rng = np.random.default_rng(0)
    gate = PoseGate()
    frames = [
        displaced(f, *rng.normal(0, 0.05, 2))
        for f in drive(200, period)  # the noise that the poses state
    ]
    assert all(stored(gate, frames)) and not gate.text and not any(gate.counts.values())


def test_a_car_that_brakes_hard_is_stored() -> None:
    x = [
        15.0 * min(t, 2.0) - 3.75 * min(max(t - 2, 0), 2.0) ** 2 + 15.0 * min(max(t - 2, 0), 2.0)
        for t in np.arange(0, 6, 0.25)
    ]
    frames = [Frame(k * 250_000_000, "a", transform_from_xyyaw(v, 0, 0), ()) for k, v in enumerate(x)]
    assert all(stored(PoseGate(), frames))


def test_noise_that_the_pose_states_is_no_jump() -> None:
    rng = np.random.default_rng(1)
    noisy = [displaced(f, *rng.normal(0, 1.0, 2)) for f in drive(300, 0.5, stds=(1.0, 0.035))]
    gate = PoseGate()
    assert np.mean(stored(gate, noisy)) > 0.95
    silent = [dataclasses.replace(f, position_std=0.0, yaw_std=0.0) for f in noisy]
    assert np.mean(stored(PoseGate(), silent)) < 0.9  # the same motion of poses that claim to be exact


def test_after_a_jump_nothing_is_stored_until_the_poses_are_consistent() -> None:
    frames = list(drive(40))
    frames[20:] = [displaced(f, x=3.0) for f in frames[20:]]
    gate = PoseGate()
    assert stored(gate, frames) == [True] * 20 + [False] * 5 + [True] * 15
    assert gate.counts == {UNCERTAIN: 0, SETTLING: 5, JUMPS: 1, CONFIRMED: 0}
    assert not gate.text and gate.last_text.startswith("pose jumped by 3.0 m against its motion: nothing is stored")


def test_a_turn_on_the_spot_is_a_jump_too() -> None:
    frames = list(drive(30))
    frames[10:] = [
        dataclasses.replace(f, map_from_base=f.map_from_base @ transform_from_xyyaw(0, 0, 0.15)) for f in frames[10:]
    ]
    gate = PoseGate()
    assert stored(gate, frames[:11])[-1] is False
    assert gate.text.startswith("pose turned by 9 degrees against its motion")


def test_poses_that_keep_jumping_are_never_stored() -> None:
    frames = [displaced(f, y=2.0 * (k % 4 < 2)) for k, f in enumerate(drive(40))]
    assert not any(stored(PoseGate(), frames)[2:])


def test_the_stored_map_confirms_a_new_place() -> None:
    frames = list(drive(30))
    frames[10:] = [displaced(f, x=8.0) for f in frames[10:]]
    gate = PoseGate()
    assert all(stored(gate, frames, SURE))
    assert gate.counts[JUMPS] == gate.counts[CONFIRMED] == 1
    spread = [0.2, 0.2, 0.01]
    for offset, wide in (([2.4, 0, 0], spread), ([0, 0, 0.06], spread), ([0, 0, 0], [1.0, 0.9, 0.03])):
        wrong = np.array([offset, wide, *SURE[2:]], np.float32)
        assert stored(PoseGate(), frames, wrong).count(False) == 5


def test_a_place_that_no_car_reaches_is_a_jump_without_any_history() -> None:
    first, second = list(drive(2))
    assert stored(PoseGate(), [first, displaced(second, x=50.0)]) == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: dataclasses.replace(f, stamp_ns=f.stamp_ns - 10**12),
        lambda f: dataclasses.replace(f, location="singapore-onenorth"),
        lambda f: dataclasses.replace(f, stamp_ns=f.stamp_ns + 600 * 10**9),
    ],
)
def test_another_drive_is_no_jump(change: object) -> None:
    frames = list(drive(20))
    frames[10:] = [change(displaced(f, x=900.0)) for f in frames[10:]]  # type: ignore[operator]
    assert all(stored(PoseGate(), frames))


def test_a_pose_of_large_covariance_is_read_less_and_not_stored() -> None:
    gate, frame = PoseGate(), next(drive(1))
    limits = GateLimits()

    def weight(position: float, yaw: float) -> float:
        return gate.check(dataclasses.replace(frame, position_std=position, yaw_std=yaw))

    assert weight(limits.position_m, limits.yaw_rad) == 1.0 and gate.may_store(None)
    assert weight((limits.position_m + limits.blind_position_m) / 2, 0.0) == pytest.approx(0.5)
    assert not gate.may_store(SURE)
    assert gate.text.startswith("pose is known to 2.40 m and 0.0 degrees only") and "counts 50%" in gate.text
    assert weight(0.0, limits.blind_yaw_rad) == 0.0 and weight(9.0, 0.0) == 0.0
    assert gate.counts[UNCERTAIN] == 1


def test_doubt_lowers_the_trust_in_proportion() -> None:
    evidence = np.array([[0, 1, 64, 256, 4096, 65535]], np.uint16)
    np.testing.assert_array_equal(doubted(evidence, 1.0, EVIDENCE_SCALE), evidence)
    np.testing.assert_array_equal(doubted(evidence, 0.0, EVIDENCE_SCALE), 0)
    before, after = (e / (e + EVIDENCE_SCALE) for e in (evidence.astype(float), doubted(evidence, 0.3, EVIDENCE_SCALE)))
    np.testing.assert_allclose(after, 0.3 * before, atol=0.002)


# -- in the mapper ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = BEVNetwork(dataclasses.replace(CONFIG, align=True))
    torch.nn.init.normal_(network.fusion.prior_out.weight, std=0.1)  # an open door for the prior
    path = tmp_path_factory.mktemp("weights") / "one.safetensors"
    save_network(network, path, {})
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Frame]:
    bag = make_bag(tmp_path_factory.mktemp("bag"), frames=4, period=0.1)
    return list(feed(FrameAssembler(), bag_messages(bag)))


def _shifted(frame: Frame, x: float) -> Frame:
    shift = transform_from_xyyaw(x, 0, 0)
    shots = tuple(dataclasses.replace(s, map_from_base=shift @ s.map_from_base) for s in frame.shots)
    return dataclasses.replace(frame, map_from_base=shift @ frame.map_from_base, shots=shots)


class Writes:
    """Counts what reaches the prior."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        write = CityPrior.write

        def counted(prior: CityPrior, *args: object, **kwargs: object) -> None:
            self.count += 1
            write(prior, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(CityPrior, "write", counted)


def test_a_doubtful_frame_is_mapped_but_not_stored(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(monkeypatch)
    lost = dataclasses.replace(frames[1], position_std=50.0)
    with OnlineMapper(weights, tmp_path) as mapper, OnlineMapper(weights, use_prior=False) as single:
        mapper.update(frames[0])
        layers = mapper.update(lost).probabilities
        assert writes.count == 1 and mapper.gates.counts[UNCERTAIN] == 1 and "50.00 m" in mapper.gates.text
        # as if there were no prior at all
        np.testing.assert_array_equal(layers, single.update(frames[1]).probabilities)
        exact = mapper.update(frames[1]).probabilities
        half = mapper.update(dataclasses.replace(frames[1], position_std=2.4)).probabilities
        assert writes.count == 2 and not np.array_equal(half, layers) and not np.array_equal(half, exact)


def test_a_jump_blocks_the_prior_until_the_drive_is_over(
    weights: Path, frames: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(monkeypatch)
    with OnlineMapper(weights, tmp_path, limits=GateLimits(agreed_m=0.0)) as mapper:
        for frame in (frames[0], frames[1], _shifted(frames[2], 5.0), _shifted(frames[3], 5.0)):
            mapper.update(frame)
        assert writes.count == 2 and mapper.gates.counts[JUMPS] == 1 and mapper.gates.counts[SETTLING] == 2
        assert "for 4 more frames" in mapper.gates.text
        mapper.use(tmp_path / "other")
        mapper.update(frames[3])
        mapper.settle()  # it is stored beside the next frame
        assert writes.count == 3 and not mapper.gates.text


def test_the_search_of_the_network_reaches_the_gate(weights: Path, frames: list[Frame], tmp_path: Path) -> None:
    with OnlineMapper(weights, tmp_path) as mapper:
        seen: list[np.ndarray | None] = []
        ask = mapper.gates.may_store
        mapper.gates.may_store = lambda found: (seen.append(found), ask(found))[1]  # type: ignore[method-assign]
        for frame in (
            dataclasses.replace(frames[0], position_std=0.5, yaw_std=0.02),
            dataclasses.replace(
                _shifted(frames[1], 500.0), position_std=0.0, yaw_std=0.0
            ),  # a jump, to where nothing is
        ):
            mapper.update(frame)
        mapper.close()
        mapper.update(dataclasses.replace(_shifted(frames[2], 900.0), position_std=0.0, yaw_std=0.0))
    assert all(f is not None and f.shape == (4, 3) and np.abs(f[0]).max() < 1e-3 for f in seen), "nothing is stored yet"
    spread = [f[1, 0] for f in seen if f is not None]
    assert 0.8 < spread[0] < 1.1, "twice what the pose says: it claims nothing"
    assert 0.8 < spread[1] < 1.1, "after a jump what the pose says is not believed"
    assert spread[2] < 0.1, "exact it is in the first frame of another drive"


def test_every_limit_is_a_parameter_of_the_node_with_its_default_in_range() -> None:
    limits = dataclasses.asdict(GateLimits())
    declared = {p.name.removeprefix(GATE): p for p in PARAMETERS if p.name.startswith(GATE)}
    assert {name: p.default for name, p in declared.items()} == limits
    assert all(p.low <= float(limits[name]) <= p.high and p.low < p.high for name, p in declared.items())
    with pytest.raises(NmpError, match="blind_yaw_rad of the gate is 0.01, yaw_rad 0.04"):
        GateLimits(blind_yaw_rad=0.01)
