"""What the search for the pose is taught, and the scores of held-out worlds."""

import math
from dataclasses import replace

import pytest
import torch

from nmp.geometry import BevGrid
from nmp.model import BEVNetwork, NetworkConfig
from nmp.model.fusion import Alignment, moved
from nmp.model.fusion.align import SHIFTS, TURN_RAD, TURNS, Aligner
from nmp.model.fusion.slope import Leveller, Slope
from nmp_train.alignment import alignment_loss, motion_between, slope_loss
from nmp_train.config import TrainConfig
from nmp_train.data import SimulatedSource
from nmp_train.validate import validate
from nmp_train.world import make_world

SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4, align=True
)


def _certain(turn: int, left: int, forward: int) -> Alignment:
    """Return an answer that is nearly sure of one motion of the grid."""
    score = torch.zeros(1, 2 * TURNS + 1, 2 * SHIFTS + 1, 2 * SHIFTS + 1)
    score[0, TURNS + turn, SHIFTS + left, SHIFTS + forward] = 20.0
    return Alignment(*(torch.zeros(1, 3) for _ in range(4)), score)


def test_the_true_motion_costs_least() -> None:
    aligner = Aligner(BevGrid(resolution=0.3), 4, 4)
    turn, left, forward = 2, -3, 4
    angle, dx, dy = turn * TURN_RAD, forward * aligner.step_m, left * aligner.step_m
    # Shifts are counted in the turned frame.
    x, y = math.cos(angle) * dx - math.sin(angle) * dy, math.sin(angle) * dx + math.cos(angle) * dy
    target, weight = torch.tensor([[x, y, angle]]), torch.ones(1)
    losses = {
        motion: float(alignment_loss(_certain(*motion), aligner, target, weight))
        for motion in ((turn, left, forward), (turn + 1, left, forward), (turn, left, forward - 3), (-turn, -left, 0))
    }
    assert min(losses, key=lambda m: losses[m]) == (turn, left, forward)
    # what the search can say best: the blurred truth itself
    assert all(value > 0 for value in losses.values())


def test_frames_without_weight_teach_nothing() -> None:
    aligner = Aligner(BevGrid(resolution=0.3), 4, 4)
    found = _certain(0, 0, 0)
    both = Alignment(*(torch.cat([v, v]) for v in found))
    target = torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 0.05]])
    first = alignment_loss(found, aligner, target[:1], torch.ones(1))
    assert alignment_loss(both, aligner, target, torch.tensor([1.0, 0.0])) == pytest.approx(float(first))
    assert alignment_loss(both, aligner, target, torch.zeros(2)) == 0


def test_how_well_a_pose_is_known_is_no_part_of_the_lesson() -> None:
    """Or poses known better than a step of the search would teach it to say nothing."""
    torch.manual_seed(1)
    aligner = Aligner(BevGrid(resolution=0.3), 4, 4)
    torch.nn.init.constant_(aligner.scale, 5.0)  # a comparison that says something
    bev, stored, evidence = torch.randn(2, 4, 100, 200), torch.randn(2, 4, 50, 100), torch.full((2, 1, 50, 100), 4.0)
    target = torch.tensor([[0.05, -0.05, 0.001], [0.6, 0.0, 0.02]])
    losses, offsets = [], []
    for std in (0.01, 2.0):
        found = aligner(bev, stored, evidence, torch.full((2, 2), std))
        losses.append(float(alignment_loss(found, aligner, target, torch.ones(2)).detach()))
        offsets.append(found.offset.abs().max())
    assert losses[0] == pytest.approx(losses[1])
    assert offsets[0] < 0.05 * offsets[1]  # of what is made of it, it is


def test_a_motion_leads_from_one_pose_to_the_other() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(moved(start, motion_between(start, end)), end)


def test_the_loss_of_the_slope_is_least_where_it_really_is() -> None:
    leveller = Leveller(BevGrid(resolution=0.3), 4, 4)
    forward, left, shift = 0.005, -0.0025, leveller.step_m
    score = torch.full((1, 7, 7, 5, 5), -30.0)
    score[0, 3 - 1, 3 + 2, 2, 2 + 1] = 0.0  # left by one step down, forward by two up, ahead by one
    found = Slope(torch.zeros(1, 2), score.flatten(1).log_softmax(1).view_as(score))
    weight = torch.ones(1)

    def loss(slope: tuple[float, float], ahead: float) -> float:
        return float(slope_loss(found, leveller, torch.tensor([slope]), torch.tensor([[ahead, 0.0]]), weight))

    best = loss((forward, left), shift)
    for slope, ahead in (((forward, -left), shift), ((left, forward), shift), ((forward, left), -shift)):
        assert loss(slope, ahead) > best + 1
    assert loss((math.nan, math.nan), shift) == 0  # nobody knows


def test_held_out_drives_are_scored_with_every_prior() -> None:
    worlds = [
        make_world(1001, size_m=250.0, drives=2, duration_s=3.0, texel_m=0.4, trips=2),
        make_world(1002, 1.0, 3, size_m=250.0, drives=4, duration_s=3.0, texel_m=0.4, trips=2),
    ]
    config = TrainConfig(workers=0, network=SMALL, supersample=1)
    torch.manual_seed(0)
    network = BEVNetwork(SMALL)
    source = SimulatedSource(worlds, config, torch.device("cpu"))
    scores = validate(network, source, config, drives=1, trips=2)
    plain = {name for name in scores if not name.startswith("changing city")}
    assert {"no prior", "empty", "one trip before", "empty at 0.2 m, 0.02 rad"} <= plain
    assert {f"changing city, {name}" for name in plain} == set(scores) - plain
    assert {"changed", "unchanged"} <= set(scores["changing city, one trip before"])
    assert "changed" not in scores["empty"] and "0-10 m" in scores["empty"]
    assert "nearest view 0-10 m" in scores["empty"] and "nearest view 0-10 m" not in scores["no prior"]
    # The path of the prior begins at zero: an untrained one changes nothing. And the same run gives the same scores.
    first, again = (validate(network, source.part(0, 1), config, drives=1, trips=1) for _ in range(2))
    assert first["empty"]["all"] == first["no prior"]["all"]
    assert str(again) == str(first)  # NaN is not equal to itself


def test_scores_by_the_nearest_view_of_a_place() -> None:
    world = make_world(1001, size_m=250.0, drives=1, duration_s=5.0, texel_m=0.4)
    config = TrainConfig(workers=0, network=SMALL, supersample=1)
    torch.manual_seed(0)
    network = BEVNetwork(SMALL)

    def scored(rows: slice) -> dict[str, dict[str, dict[str, float]]]:
        part = replace(world, frames=world.frames[rows])
        return validate(network, SimulatedSource([part], config, torch.device("cpu")), config, drives=1, trips=1)

    one = scored(slice(0, 1))["empty"]
    for ring in ("0-10 m", "10-20 m", "20-40 m"):
        assert str(one[f"nearest view {ring}"]) == str(one[ring])  # nothing was seen before
    # From two places, more of the map was once near, and nothing else of it is far.
    two = scored(slice(0, 9, 8))["empty"]
    assert two["nearest view 20-40 m"]["miou"] != two["20-40 m"]["miou"]
