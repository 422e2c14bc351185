"""Backbones and view transforms: geometry against plain loops, gradients, missing cameras, every region."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from nmp.errors import NmpError
from nmp.frame import CAMERAS
from nmp.geometry import inverse, transform_from
from nmp.model import NetworkConfig
from nmp.model.neck import FeaturePyramid
from nmp.model.preprocess import network_intrinsics, unit_projection
from nmp.model.resnet import ResNet, load_torchvision
from nmp.model.views import VIEWS, GroundLift, View, make_view
from nmp.model.views.base import inverse_3x3
from nmp.model.views.bevformer import (
    BevFormer,
    CameraAttention,
    DeformableAttention,
    deformable_attention,
    find_cameras,
)
from nmp.model.views.lift_splat import HEIGHT_M, LiftSplat, splat, unproject
from nmp_train.config import load_config

CONFIGS = Path(__file__).parents[1] / "nmp_train" / "configs"
SMALL = NetworkConfig(
    backbone_stages=3,
    input_width=128,
    input_height=64,
    neck_channels=8,
    bev_channels=16,
    feature_resolution=1.5,
    view_layers=2,
    view_heads=2,
    view_points=2,
    depth_bins=20,
)
# heading (deg) and focal length (pixels of 1600) of the nuScenes cameras
RIG = {
    "cam_front": (0.0, 1266.0),
    "cam_front_right": (-56.0, 1261.0),
    "cam_back_right": (-110.0, 1259.0),
    "cam_back": (180.0, 809.0),
    "cam_back_left": (108.0, 1257.0),
    "cam_front_left": (55.0, 1273.0),
}


def projection(heading_deg: float, focal: float, config: NetworkConfig) -> np.ndarray:
    """pixel_from_base [3, 4] of a level camera 1.5 m above the ground that looks along this heading."""
    intrinsics = network_intrinsics(np.array([[focal, 0, 816.0], [0, focal, 491.0], [0, 0, 1]]), 1600, 900, config)
    turn = math.radians(heading_deg)
    forward = transform_from(np.zeros(3), np.array([-0.5, 0.5, -0.5, 0.5]))
    yaw = transform_from(
        np.array([1.7 * math.cos(turn), 0.5 * math.sin(turn), 1.5]),
        np.array([0, 0, math.sin(turn / 2), math.cos(turn / 2)]),
    )
    return unit_projection(intrinsics, yaw @ forward, config.input_width, config.input_height)


def rig(config: NetworkConfig, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(pixel_from_base [batch, 6, 3, 4], present [batch, 6])"""
    matrices = np.stack([projection(*RIG[name], config) for name in CAMERAS])
    return torch.from_numpy(matrices).float().expand(batch, -1, -1, -1), torch.ones(batch, len(CAMERAS))


def features_for(view: View, config: NetworkConfig, batch: int = 1) -> Tensor:
    stride = 4 * 2**view.level
    shape = (batch, len(CAMERAS), config.neck_channels, config.input_height // stride, config.input_width // stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Backbones


def test_backbone_has_torchvisions_parameter_names() -> None:
    names = set(ResNet("resnet50", 4).state_dict())
    for expected in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.1.bias",
        "layer3.5.conv3.weight",
        "layer4.2.bn2.weight",
    ):
        assert expected in names
    with pytest.raises(NmpError, match="resnet19"):
        ResNet("resnet19")
    with pytest.raises(NmpError, match="backbone_stages"):
        ResNet("resnet18", 5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # of torchvision's models, less their classifiers (512 or 2048 x 1000 + 1000)
    [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032), ("resnet101", 42_500_160)],
)
def test_backbones_have_torchvisions_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(name).parameters()) == parameters


def test_a_torchvision_checkpoint_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = ResNet("resnet18", 4)
    state = {n: v for n, v in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 512), torch.zeros(10)
    save_file(state, tmp_path / "r18.safetensors")
    backbone = ResNet("resnet18", 3)
    load_torchvision(backbone, tmp_path / "r18.safetensors")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    small, deep = ResNet("resnet18", 2), ResNet("resnet34", 2)
    save_file(deep.state_dict(), path)
    with pytest.raises(NmpError, match="resnet18 of the configuration .* first layer1.2"):
        load_torchvision(small, path)
    save_file(small.state_dict(), path)
    with pytest.raises(NmpError, match="resnet34 of the configuration"):
        load_torchvision(deep, path)
    save_file({**small.state_dict(), "conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, path)
    with pytest.raises(NmpError, match="NaN"):
        load_torchvision(small, path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(NmpError, match="cannot read"):
        load_torchvision(small, path)
    with pytest.raises(NmpError, match=r"pickles can run code.*save_file\(torch.load\('.*r18.pth'"):
        load_torchvision(small, tmp_path / "r18.pth")


def test_the_neck_delivers_the_level_that_the_view_reads() -> None:
    trunk = [torch.randn(2, c, 32 // s, 64 // s) for c, s in ((4, 1), (6, 2), (8, 4))]
    for level in range(3):
        neck = FeaturePyramid([4, 6, 8], 5, level).eval()
        assert neck(trunk).shape == (2, 5, 32 // 2**level, 64 // 2**level)
        # the coarsest output of the trunk reaches every level
        changed = [*trunk[:2], trunk[2] + 1]
        assert (neck(changed) - neck(trunk)).abs().max() > 0


# What all views have in common


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(("length", "width"), [(60.0, 30.0), (100.0, 100.0), (160.0, 100.0)])
def test_views_cover_every_region(name: str, length: float, width: float) -> None:
    torch.manual_seed(0)
    # 1.7 m does not divide the regions, and makes odd numbers of cells
    config = replace(SMALL, view=name, bev_length=length, bev_width=width, feature_resolution=1.7)
    view = make_view(config)
    out = view(features_for(view, config, 2), *rig(config, 2))
    assert out.shape == (2, view.channels, *config.feature_grid.shape)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", VIEWS)
def test_an_absent_camera_adds_nothing(name: str) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, view=name)
    view = make_view(config)
    features = features_for(view, config)
    pixel_from_base, present = rig(config)
    gone = present.clone()
    gone[:, 0] = 0
    out = view(features, pixel_from_base, gone)
    other = features.clone()
    other[:, 0] *= -1
    torch.testing.assert_close(view(other, pixel_from_base, gone), out)
    assert (view(other, pixel_from_base, present) - out).abs().max() > 0.1
    # with no calibration either, as where a camera was never heard of
    unknown = pixel_from_base.clone()
    unknown[:, 0] = 0
    torch.testing.assert_close(view(features, unknown, gone), out)
    none = view(features.requires_grad_(), pixel_from_base, torch.zeros_like(present))
    assert torch.isfinite(none).all()
    none.sum().backward()
    assert features.grad is not None and features.grad.abs().max() == 0


@pytest.mark.parametrize("name", VIEWS)
def test_a_camera_that_sees_no_cell_is_harmless(name: str) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, view=name)
    view = make_view(config)
    pixel_from_base, present = rig(config)
    away = pixel_from_base.clone()
    away[..., 2, 3] -= 1000  # each camera so far ahead that the whole region lies behind it
    out = view(features_for(view, config), away, present)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, view(2 * features_for(view, config), away, present))


@pytest.mark.parametrize("name", VIEWS)
def test_gradients_reach_the_features_and_all_parameters(name: str) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, view=name)
    view = make_view(config)
    for module in view.modules():
        if isinstance(module, DeformableAttention):  # starts with offsets that do not depend on the query
            torch.nn.init.normal_(module.offsets.weight, std=0.1)
    features = features_for(view, config).requires_grad_()
    out = view(features, *rig(config))
    (out * torch.randn_like(out)).sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert (features.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all()  # of every camera
    for path, parameter in view.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), path
        assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", VIEWS)
def test_views_learn_where_something_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overfit one sample: a target in the BEV must be reached by training the features and the view."""
    torch.manual_seed(0)
    monkeypatch.setattr("nmp.model.views.hdmapnet.PLAN_SHAPE", (12, 24))
    config = replace(SMALL, view=name, feature_resolution=3.0)
    view, readout = make_view(config), torch.nn.Conv2d(make_view(config).channels, 1, 3, padding=1)
    features, (pixel_from_base, present) = features_for(view, config), rig(config)
    x, y = torch.as_tensor(config.feature_grid.centres(), dtype=torch.float32).unbind(-1)
    target = ((x - y).abs() < 4)[None, None].float()
    trained = [*view.parameters(), *readout.parameters(), features.requires_grad_()]
    optimizer = torch.optim.Adam(trained, 0.03 if name != "hdmapnet" else 0.003)
    losses = []
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(readout(view(features, pixel_from_base, present)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses


@pytest.mark.parametrize("name", VIEWS)
def test_half_precision_stays_close(name: str) -> None:
    """Under autocast the coordinates must keep their precision: only the features may be rounded."""
    torch.manual_seed(0)
    config = replace(SMALL, view=name, bev_length=160.0, bev_width=100.0)
    view = make_view(config).eval()
    features = features_for(view, config)
    with torch.inference_mode():
        full = view(features, *rig(config))
        with torch.autocast("cpu", torch.bfloat16):
            half = view(features, *rig(config))
    assert (half.float() - full).abs().mean() < 0.01 * full.abs().mean() + 0.01


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(NmpError, match="choose one of ground, bevformer"):
        make_view(replace(SMALL, view="radar"))
    with pytest.raises(NmpError, match="equal parts"):
        make_view(replace(SMALL, view="bevformer", view_heads=3))
    with pytest.raises(NmpError, match="view_layers is 0"):
        make_view(replace(SMALL, view="bevformer", view_layers=0))
    with pytest.raises(NmpError, match="depth_bins is 0"):
        make_view(replace(SMALL, view="lift_splat", depth_bins=0))


def test_a_3x3_inverse_needs_no_solver() -> None:
    pixel_from_base, _ = rig(SMALL)
    matrix = pixel_from_base[..., :3].double()
    torch.testing.assert_close(inverse_3x3(matrix), torch.linalg.inv(matrix))
    assert torch.isfinite(inverse_3x3(torch.zeros(3, 3))).all()


# Inverse perspective


def test_lift_looks_up_the_ground_point() -> None:
    """A feature map that holds its own image coordinates must come back as the projection of each cell."""
    config = NetworkConfig(neck_channels=2)
    lift = GroundLift(config)
    h, w = 32, 88
    v, u = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    features = torch.stack([u, v])[None, None]
    matrix = projection(*RIG["cam_front"], config)
    out = lift(features, torch.from_numpy(matrix).float()[None, None], torch.ones(1, 1))[0]
    row, col = 48, 150  # about 15 m ahead
    point = np.append(config.feature_grid.centres()[row, col], [0, 1])
    expected = matrix @ point
    np.testing.assert_allclose(out[:2, row, col].numpy(), expected[:2] / expected[2], atol=1e-4)
    assert out[-1, row, col] == 1 and out[-1, row, 20] == 0  # nothing is seen behind the car
    absent = lift(features, torch.from_numpy(matrix).float()[None, None], torch.zeros(1, 1))[0]
    assert absent[:2].abs().max() == 0


# BEVFormer


def loop_attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention one sample and one corner at a time; [B, Q, heads, D]."""
    b, heads, depth, h, w = value.shape
    queries, samples = weights.shape[2:]
    rows = []
    for i, q, m in np.ndindex(b, queries, heads):
        total = value.new_zeros(depth)
        for s in range(samples):
            x, y = locations[i, m, q, s, 0] * w - 0.5, locations[i, m, q, s, 1] * h - 0.5
            left, top = math.floor(x.item()), math.floor(y.item())
            for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= r < h and 0 <= c < w:
                    share = (1 - (x - c).abs()) * (1 - (y - r).abs())
                    total = total + weights[i, m, q, s] * share * value[i, m, :, r, c]
        rows.append(total)
    return torch.stack(rows).view(b, queries, heads * depth)


def test_deformable_attention_is_the_sum_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    value = (random(2, 2, 3, 5, 7) - 0.5).requires_grad_()
    locations = (1.4 * random(2, 2, 4, 3, 2) - 0.2).requires_grad_()  # some lie outside
    weights = random(2, 2, 4, 3).requires_grad_()
    expected = loop_attention(value, locations, weights)
    torch.testing.assert_close(deformable_attention(value, locations, weights), expected, atol=1e-12, rtol=0)
    single = deformable_attention(value.float(), locations.float(), weights.float())
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)
    back = random(*expected.shape)
    inputs = (value, locations, weights)
    ours = torch.autograd.grad(deformable_attention(*inputs), inputs, back)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, inputs, back), atol=1e-10, rtol=0)


def test_camera_attention_averages_the_cameras_that_see_a_query() -> None:
    """The look-up in stacked images against one look-up per camera, with samples that leave their image."""
    torch.manual_seed(0)
    b, n, c, h, w, rows, cols = 2, 3, 4, 6, 9, 3, 5
    attention = CameraAttention(c, 2, 4, 2)
    with torch.no_grad():
        for parameter in (attention.offsets.weight, attention.weights.weight):
            torch.nn.init.normal_(parameter, std=2.0)
    query, images = torch.randn(b, rows, cols, c), torch.randn(b, n, h, w, c)
    config = replace(SMALL, bev_length=10.0, bev_width=10.0)
    pixel_from_base = torch.from_numpy(np.stack([projection(a, 900.0, config) for a in (0, 50, 180)])).float()
    pixel_from_base, present = pixel_from_base.expand(b, -1, -1, -1), torch.ones(b, n)
    points = torch.cat([20 * torch.rand(rows * cols, 4, 3) - torch.tensor([5.0, 10.0, 10.0]), torch.ones(15, 4, 1)], -1)
    out = attention(query, images, find_cameras(points, pixel_from_base, present))

    offsets, weights = attention.sampling(query.flatten(1, 2))
    total, count = torch.zeros(b, rows * cols, c), torch.zeros(b, rows * cols, 1)
    for camera in range(n):
        uvw = torch.einsum("bij,qaj->bqai", pixel_from_base[:, camera], points)
        uv = uvw[..., :2] / uvw[..., 2:]
        front = uvw[..., 2] > 0.5
        seen = (front & (uv > 0).all(-1) & (uv < 1).all(-1)).any(-1)
        uv = torch.where(front[..., None], uv, -2)[:, None, :, :, None]
        locations = uv + offsets / torch.tensor([w, h])
        value = attention.split(images[:, camera])
        single = deformable_attention(value, locations.flatten(3, 4), weights.flatten(3, 4))
        total = total + seen[..., None] * single
        count = count + seen[..., None]
    assert {0, 1, 2} <= set(count.flatten().tolist())  # the case is worth its name
    expected = attention.out(total / count.clamp(min=1)).unflatten(1, (rows, cols))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_no_more_than_two_cameras_of_the_rig_see_a_place() -> None:
    config = replace(SMALL, view="bevformer", bev_length=100.0, bev_width=100.0)
    view = BevFormer(config)
    pixel_from_base, present = rig(config)
    uvw = torch.einsum("nij,qaj->nqai", pixel_from_base[0], view.points)
    uv = uvw[..., :2] / uvw[..., 2:]
    cameras = ((uvw[..., 2] > 0.5) & (uv > 0).all(-1) & (uv < 1).all(-1)).any(-1).sum(0)
    assert cameras.max() == 2
    seen = find_cameras(view.points, pixel_from_base, present)
    assert torch.equal((seen.share[0] > 0).sum(-1), cameras)


def test_checkpointing_changes_memory_not_gradients() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, view="bevformer", feature_resolution=3.0)
    view = BevFormer(config)
    gradients = []
    for view.checkpoint in (False, True):
        features = features_for(view, config).requires_grad_()
        view.zero_grad()
        view(features, *rig(config)).square().sum().backward()
        gradients.append([features.grad, *(p.grad for p in view.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


# Lift-Splat


def test_unprojecting_undoes_the_projection() -> None:
    pixel_from_base, _ = rig(SMALL)
    matrices = pixel_from_base[0]
    pixels, depths = torch.rand(5, 2), torch.tensor([1.0, 7.0, 60.0])
    points = unproject(pixels, depths, matrices)
    uvw = torch.einsum("nij,ndpj->ndpi", matrices, functional.pad(points, (0, 1), value=1.0))
    torch.testing.assert_close(uvw[..., 2], depths[None, :, None].expand(6, -1, 5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(uvw[..., :2] / uvw[..., 2:], pixels.expand(6, 3, -1, -1), rtol=1e-4, atol=1e-4)


def test_splatting_adds_up_like_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.rand(40, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(9, 40, generator=generator, dtype=torch.float64).requires_grad_()
    cells = torch.randint(0, 8, (9, 40), generator=generator)  # 7 is outside
    cells[cells == 2] = 7  # an empty cell
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for depth, pixel in np.ndindex(9, 40):
        if cells[depth, pixel] < 7:
            where = torch.zeros(7, 1, dtype=torch.float64)
            where[cells[depth, pixel]] = 1
            expected = expected + where * weights[depth, pixel] * context[pixel]
    out = splat(context, weights, cells, 7)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    back = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (context, weights), back)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (context, weights), back), atol=1e-12, rtol=0)
    everything = splat(context, weights, torch.full_like(cells, 7), 7)
    assert everything.shape == (7, 3) and everything.abs().max() == 0


def test_lift_splat_puts_every_point_into_its_cell() -> None:
    """The whole view against a loop in double precision, and the mass of the points inside is conserved."""
    torch.manual_seed(0)
    config = replace(SMALL, view="lift_splat", neck_channels=2, depth_bins=6)
    view = LiftSplat(config).double()
    features = features_for(view, config)[:, [0, 3]].double()
    pixel_from_base, present = rig(config)
    matrices = pixel_from_base[:, [0, 3]]
    out = view(features, matrices, present[:, :2])[0]
    depth, context = view.predict(features[0]).split([6, 2], dim=1)
    depth = depth.softmax(dim=1)
    expected = torch.zeros(2, *config.feature_grid.shape, dtype=torch.float64)
    mass, (h, w) = 0.0, features.shape[-2:]
    for camera in range(2):
        matrix = np.vstack([matrices[0, camera].numpy().astype(np.float64), [0, 0, 0, 1]])
        base_from_pixel = np.linalg.inv(matrix)
        for d, r, c in np.ndindex(6, h, w):
            z = float(view.depths[d])
            x, y, up, _ = base_from_pixel @ [(c + 0.5) / w * z, (r + 0.5) / h * z, z, 1]
            col, row = math.floor((x + 30) / 1.5), math.floor((y + 15) / 1.5)
            if 0 <= col < 40 and 0 <= row < 20 and abs(up) < HEIGHT_M:
                contribution = depth[camera, d, r, c] * context[camera, :, r, c]
                expected[:, row, col] += contribution.detach()
                mass += contribution.sum().item()
    assert 0 < (expected[0] != 0).float().mean() < 0.9
    # The view sums in single precision.
    torch.testing.assert_close(out.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert out.sum().item() == pytest.approx(mass, rel=1e-5)


# HDMapNet


def test_the_homography_places_the_plan_view() -> None:
    """A plan view that holds its own metric coordinates must come back as each cell seen from the camera."""
    torch.manual_seed(0)
    config = replace(SMALL, view="hdmapnet", neck_channels=1)
    view = make_view(config)
    pixel_from_base, _ = rig(config)
    for camera, name in enumerate(CAMERAS):
        grid, seen = view._sources(pixel_from_base[:, camera])
        heading = math.radians(RIG[name][0])
        base_from_camera = transform_from(
            np.array([1.7 * math.cos(heading), 0.5 * math.sin(heading), 0]),
            np.array([0, 0, math.sin(heading / 2), math.cos(heading / 2)]),
        )
        centres = config.feature_grid.centres()
        points = np.concatenate([centres, np.zeros_like(centres[..., :1]), np.ones_like(centres[..., :1])], axis=-1)
        local = points @ inverse(base_from_camera).T  # x ahead of the camera, y to its left
        aside = grid[0, ..., 0].numpy() * view.reach
        ahead = (grid[0, ..., 1].numpy() + 1) / 2 * view.reach
        mask = seen[0].numpy()
        assert 0.05 < mask.mean() < 0.5
        np.testing.assert_allclose(ahead[mask], local[mask][:, 0], atol=1e-3)
        np.testing.assert_allclose(aside[mask], -local[mask][:, 1], atol=1e-3)


def test_the_plan_view_fits_one_input_size() -> None:
    view = make_view(replace(SMALL, view="hdmapnet"))
    with pytest.raises(NmpError, match="4 x 8, got 6 of 8 x 16"):
        view(torch.zeros(1, 6, 8, 8, 16), *rig(SMALL))


# The configurations that are shipped


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_fit_together(path: Path) -> None:
    """Backbone and neck at full image size, where the meta device computes shapes only, then the view."""
    config = replace(load_config(path, []).network, view_layers=1)
    view = make_view(config)
    with torch.device("meta"):
        backbone = ResNet(config.backbone, config.backbone_stages)
        neck = FeaturePyramid(backbone.channels, config.neck_channels, view.level)
        shape = neck(backbone(torch.zeros(6, 3, config.input_height, config.input_width))).shape
    with torch.inference_mode():
        out = view(torch.zeros(1, *shape), *rig(config))
    assert out.shape == (1, view.channels, *config.feature_grid.shape)
    assert torch.isfinite(out).all()
