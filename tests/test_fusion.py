"""What a network remembers: geometry of the windows, the weighted mean, the correction of the pose."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from nmp.geometry import BevGrid, transform_from_xyyaw
from nmp.model import BEVNetwork, NetworkConfig, fusion
from nmp.model.fusion.align import ALIKE, MAP_AS_WELL, SHIFTS, SURE, TURN_RAD, TURNS, Aligner, Exactness
from nmp.model.fusion.correlate import COARSE, correlate
from nmp.model.fusion.slope import SLOPE_STEP, Leveller

SMALL = NetworkConfig(
    backbone_stages=2, input_width=64, input_height=32, neck_channels=8, bev_channels=16, prior_channels=4
)


def _network(config: NetworkConfig = SMALL) -> BEVNetwork:
    torch.manual_seed(0)
    network = BEVNetwork(config).eval()
    for door in (network.fusion.prior_out, network.fusion.beyond):
        torch.nn.init.normal_(door.weight, std=0.1)  # open for the prior
    return network


@pytest.mark.parametrize("search", [False, True])
def test_an_empty_prior_changes_nothing(search: bool) -> None:
    network = _network(NetworkConfig(**{**SMALL.to_dict(), "align": search, "slopes": search}))
    if network.fusion.leveller is not None:
        torch.nn.init.normal_(network.fusion.leveller.bias)  # whatever it believes
    bev = torch.randn(1, 16, *SMALL.feature_grid.shape)
    pose, origin = torch.tensor([[35.0, 36.0, 0.4]]), torch.zeros(1, 2)
    empty = fusion.Memory.empty(1, 4, 236, 236)
    with torch.inference_mode():
        alone = network.decode(bev).logits
        first, memory = network.step(bev, empty, pose, origin)
        np.testing.assert_array_equal(alone.numpy(), first.logits.numpy())
        second, _ = network.step(bev, memory, pose, origin)
        assert (second.logits - alone).abs().max() > 0


def test_what_is_known_tells_of_the_cells_beside_it() -> None:
    network = _network()
    rows, cols = SMALL.feature_grid.shape
    bev = torch.randn(1, 16, rows, cols)
    behind = torch.zeros(1, 1, rows, cols)
    behind[..., : cols // 2] = 3.0
    with torch.inference_mode():
        changes = [
            (network.fusion.fuse(bev, torch.full((1, 4, rows, cols), value) * (behind > 0), behind) - bev)[..., 115:]
            for value in (-0.5, 0.5)
        ]
    assert (changes[0] - changes[1]).abs().max() > 1e-4  # 4.5 m and more beyond the last cell that is known


def test_a_frame_that_counts_twice_is_a_frame_seen_twice() -> None:
    network = _network()
    bev = torch.randn(1, 16, *SMALL.feature_grid.shape)
    pose, origin = torch.tensor([[35.0, 36.0, 0.4]]), torch.zeros(1, 2)
    empty = fusion.Memory.empty(1, 4, 236, 236)
    with torch.inference_mode():
        _, twice = network.step(bev, empty, pose, origin, repeat=torch.tensor([2.0]))
        _, once = network.step(bev, empty, pose, origin)
        _, again = network.step(bev, once, pose, origin)
    torch.testing.assert_close(twice.evidence, again.evidence)
    torch.testing.assert_close(twice.latent, again.latent)


@pytest.mark.parametrize("yaw", [0.0, 0.7, math.pi / 4, -2.5])
def test_turning_onto_the_map_and_back_keeps_smooth_values(yaw: float) -> None:
    grid = BevGrid(resolution=0.3)
    x, y = torch.as_tensor(grid.centres(), dtype=torch.float32).unbind(-1)
    values = torch.stack([torch.sin(x / 5) + torch.cos(y / 4), torch.ones_like(x)])[None]
    pose = torch.tensor([[33.3, 35.1, yaw]])
    origin = torch.zeros(1, 2)
    window = fusion.ego_to_map(values, pose, grid, origin, 0.3, 232, 232)
    back = fusion.map_to_ego(window, pose, grid, origin, 0.3)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert (back - values)[inner].abs().max() < 0.02
    # the value lands in the right cell of the map
    place = transform_from_xyyaw(33.3, 35.1, yaw) @ [10.0, -4.0, 0, 1]
    row, col = int(place[1] / 0.3), int(place[0] / 0.3)
    expected = math.sin(10 / 5) + math.cos(-4 / 4)
    assert float(window[0, 0, row, col]) == pytest.approx(expected, abs=0.08)


def test_the_order_of_updates_does_not_matter() -> None:
    torch.manual_seed(1)
    observations = [fusion.Memory(torch.rand(1, 4, 6, 6), torch.rand(1, 1, 6, 6)) for _ in range(4)]

    def run(order: list[int]) -> fusion.Memory:
        memory = fusion.Memory.empty(1, 4, 6, 6)
        for i in order:
            memory = fusion.means(fusion.sums(memory) + fusion.sums(observations[i]), cap=16.0)
        return memory

    first, second = run([0, 1, 2, 3]), run([3, 1, 0, 2])
    torch.testing.assert_close(first, second)


def test_agreement_is_summed_for_every_shift() -> None:
    torch.manual_seed(2)
    first, second = torch.randn(2, 4, 3, 20, 31), torch.randn(2, 3, 20, 31)
    found = correlate(first, second, 6)
    assert found.shape == (2, 4, 13, 13)
    padded = functional.pad(second, (6,) * 4)
    for dy, dx in ((0, 0), (-6, 3), (2, 6), (5, -4)):
        part = padded[..., 6 + dy : 26 + dy, 6 + dx : 37 + dx]
        expected = (first * part[:, None]).sum(dim=(2, 3, 4)) / math.sqrt(20 * 31)
        torch.testing.assert_close(found[..., 6 + dy, 6 + dx], expected, atol=1e-4, rtol=1e-4)


def _compare_as_it_is(search: Aligner | Leveller) -> None:
    """Set the weights of a search so that its features are the 8 channels given."""
    with torch.no_grad():
        for part in (search.seen, search.stored):
            for layer in (part[0], part[2]):
                layer.weight.zero_()
                layer.bias.zero_()
            part[0].weight[:8, :, 0, 0] = torch.eye(8)
            part[0].bias[:8] = 5.0  # above zero, where a ReLU changes nothing
            part[2].weight[:, :8, 1, 1] = torch.eye(8)
            part[2].bias[:] = -5.0
        search.scale.fill_(1.0)
    if isinstance(search, Aligner):
        search.exactness = Exactness(
            (1.0, 1.0, 1.0), (0.2 / ALIKE, 0.2 / ALIKE, 0.01 / ALIKE), (1 / ALIKE, 1 / ALIKE, 1 / ALIKE)
        )


def test_the_pose_is_corrected_towards_what_is_stored() -> None:
    """The stored cells are the seen ones from another pose: the search finds the motion between them."""
    torch.manual_seed(3)
    grid = BevGrid(resolution=0.3)
    rough = torch.randn(1, 8, 60, 60)
    window = functional.interpolate(rough, (300, 300), mode="bicubic")
    aligner = Aligner(grid, 8, 8)
    _compare_as_it_is(aligner)
    origin = torch.zeros(1, 2)
    true = torch.tensor([[45.0, 44.0, 0.6]])
    bev = fusion.map_to_ego(window, true, grid, origin, 0.3)
    ones = torch.full((1, 1, *(n // COARSE for n in grid.shape)), 8.0)
    for offset in ([0.0, 0.0, 0.0], [1.2, -0.6, 0.0], [-1.9, 1.4, 0.04], [0.3, 0.2, -0.06]):
        motion = torch.tensor([offset])
        # the given pose, from which this motion leads to the true one
        yaw = true[:, 2] - motion[:, 2]
        c, s = torch.cos(yaw), torch.sin(yaw)
        x = true[:, 0] - (c * motion[:, 0] - s * motion[:, 1])
        y = true[:, 1] - (s * motion[:, 0] + c * motion[:, 1])
        given = torch.stack([x, y, yaw], dim=1)
        torch.testing.assert_close(fusion.moved(given, motion), true)
        with torch.inference_mode():
            stored = fusion.map_to_ego(window, given, grid, origin, 0.3, square=COARSE)
            found = aligner(bev, stored, ones, torch.tensor([[2.0, 0.1]]))  # of the pose itself little is known
        assert (found.offset - motion)[0, :2].abs().max() < 0.31, offset
        assert (found.offset - motion)[0, 2].abs() < 0.015, offset
        assert found.spread.max() < 0.5
    assert found.score.shape == (1, 2 * TURNS + 1, 2 * SHIFTS + 1, 2 * SHIFTS + 1)
    assert TURNS * TURN_RAD > 0.06


def test_the_better_a_pose_is_known_the_less_it_is_corrected() -> None:
    torch.manual_seed(3)
    grid = BevGrid(resolution=0.3)
    stored = functional.interpolate(torch.randn(1, 8, 20, 40), (100, 200), mode="bicubic")
    aligner = Aligner(grid, 8, 8)
    _compare_as_it_is(aligner)
    seen = stored.roll(-4, dims=3)  # the car is 1.2 m ahead of where its pose has it
    stored = functional.avg_pool2d(stored, COARSE)
    ones = torch.full((1, 1, *stored.shape[2:]), 8.0)
    with torch.inference_mode():
        aligner.scale.fill_(-3.0)
        found = [float(aligner(seen, stored, ones, torch.tensor([[s, s / 20]])).offset[0, 0]) for s in (0.0, 0.3, 2.0)]
        unknown = float(aligner(seen, stored, ones).offset[0, 0])
    assert abs(found[0]) < 0.02 and found[0] < found[1] < found[2]
    assert found[2] > 0.8 and found[1] < unknown


def test_what_is_found_is_a_measurement_beside_the_pose() -> None:
    """However clear the maps are, the search is off by something, and a pose may be better than that."""
    torch.manual_seed(3)
    stored = functional.interpolate(torch.randn(1, 8, 20, 40), (100, 200), mode="bicubic")
    aligner = Aligner(BevGrid(resolution=0.3), 8, 8)
    _compare_as_it_is(aligner)
    aligner.scale.data.fill_(4.0)
    seen = stored.roll(-2, dims=3)  # 0.6 m ahead
    stored = functional.avg_pool2d(stored, COARSE)
    ones = torch.full((1, 1, *stored.shape[2:]), 8.0)
    for std in (0.05, 0.1, 0.5):
        with torch.inference_mode():
            found = float(aligner(seen, stored, ones, torch.tensor([[std, std / 20]])).offset[0, 0])
        variance = (MAP_AS_WELL * std) ** 2 + SURE[0] ** 2
        assert found == pytest.approx(0.6 * variance / (variance + 0.2**2), rel=0.02), std


def test_what_is_measured_depends_little_on_what_was_known_before() -> None:
    torch.manual_seed(3)
    stored = functional.interpolate(torch.randn(1, 8, 20, 40), (100, 200), mode="bicubic")
    aligner = Aligner(BevGrid(resolution=0.3), 8, 8)
    _compare_as_it_is(aligner)
    aligner.scale.data.fill_(-2.0)
    seen = stored.roll(-2, dims=3)
    stored = functional.avg_pool2d(stored, COARSE)
    ones = torch.full((1, 1, *stored.shape[2:]), 8.0)
    with torch.inference_mode():
        found = [aligner(seen, stored, ones, torch.tensor([[s, s / 10]])) for s in (0.0, 0.5, 1.0)]
        aligner.exactness = Exactness((3.0, 1.0, 1.0), (0.6 / ALIKE, 0.2, 0.01), (3 / ALIKE, 1.0, 1.0))
        scaled = aligner(seen, stored, ones, torch.tensor([[1.0, 0.1]]))
    for one in found:
        assert abs(float(one.measured[0, 0]) - 0.6) < 0.15
        assert 0.2 <= float(one.error[0, 0]) < 0.4
    assert float(scaled.measured[0, 0]) == pytest.approx(3 * float(found[2].measured[0, 0]))
    assert float(scaled.error[0, 0]) == pytest.approx(3 * float(found[2].error[0, 0]))


def test_without_anything_stored_the_pose_stays() -> None:
    torch.manual_seed(4)
    aligner = Aligner(BevGrid(resolution=0.3), 8, 4)
    with torch.inference_mode():
        found = aligner(torch.randn(1, 8, 100, 200), torch.zeros(1, 4, 50, 100), torch.zeros(1, 1, 50, 100))
    assert found.offset.abs().max() < 1e-4
    assert found.spread[0, 0] > 0.8  # and nobody claims to know it
    assert torch.isinf(found.error).all() and not found.measured.any()


def test_what_is_seen_on_a_slope_is_levelled() -> None:
    """What is stored lies on level ground, what is seen seems to rise: the search finds how much."""
    torch.manual_seed(5)
    grid = BevGrid(resolution=0.3)
    stored = functional.interpolate(torch.randn(1, 8, 25, 50), (100, 200), mode="bicubic")
    leveller = Leveller(grid, 8, 8)
    _compare_as_it_is(leveller)
    ones = torch.full((1, 1, *grid.shape), 8.0)
    seen_at = torch.as_tensor(grid.centres(), dtype=torch.float32).reshape(*grid.shape, 2)
    half = torch.tensor([grid.length / 2, grid.width / 2])
    for forward, left, ahead in ((0.0, 0.0, 0.0), (0.004, 0.0, 0.0), (-0.003, 0.005, 0.0), (0.002, -0.004, 0.6)):
        slope, shift = torch.tensor([forward, left]), torch.tensor([ahead, 0.0])
        place = seen_at
        for _ in range(50):  # of what is seen there: place + place (place . slope) = seen_at
            place = seen_at / (1 + (place @ slope)[..., None])
        bev = functional.grid_sample(stored, ((place + shift) / half)[None], align_corners=False)
        with torch.inference_mode():
            found = leveller(bev, stored, ones)
            levelled = leveller.level(bev, found)
        assert (found.slope[0] - slope).abs().max() < 0.51 * SLOPE_STEP, (forward, left)
        if ahead:
            continue  # an error of the pose is not taken for a slope, nor taken out
        inner = (slice(None), slice(None), slice(10, -10), slice(20, -20))
        before, after = ((x - stored)[inner].square().mean() for x in (bev, levelled))
        assert after < 0.02 + 0.3 * before, (forward, left, before, after)
    assert math.isclose(float(found.log_probability.exp().sum()), 1.0, rel_tol=1e-4)


def test_before_it_is_trained_the_ground_is_level() -> None:
    torch.manual_seed(6)
    leveller = Leveller(BevGrid(resolution=0.3), 8, 4)
    with torch.inference_mode():
        found = leveller(torch.randn(1, 8, 100, 200), torch.randn(1, 4, 100, 200), torch.ones(1, 1, 100, 200))
    assert found.slope.abs().max() < 1e-6
