"""The fusion of the paper: masks, recurrence, where cells are read and written, and the parts by themselves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nmp.errors import NmpError
from nmp.model.config import NetworkConfig
from nmp.model.fusion.memory import Memory
from nmp.model.fusion.paper import ABLATION, WINDOW, ConvGRU, PaperFusion, PriorAttention, _unwindow, _windows
from nmp.model.heads import DIRECTION_CHANNELS, VectorHeads
from nmp.truth import DIRECTIONS

CHANNELS = 16
CONFIG = NetworkConfig(bev_channels=CHANNELS, bev_length=9.0, bev_width=6.0, fusion="paper", evidence_cap=3.0)
ROWS, COLS = CONFIG.feature_grid.shape  # 20 x 30: six windows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fusion_of(seed: int = 0, **values: bool) -> PaperFusion:
    torch.manual_seed(seed)
    return PaperFusion(dataclasses.replace(CONFIG, **values))  # type: ignore[arg-type]


def some_prior(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and evidence of two frames, with the first window of both and half of the other cells never seen."""
    latent = torch.tanh(normal(2, CHANNELS, ROWS, COLS, seed=seed))
    evidence = (normal(2, 1, ROWS, COLS, seed=seed + 1) > 0).float() * 2
    evidence[:, :, :WINDOW, :WINDOW] = 0
    return latent * (evidence > 0), evidence


@pytest.mark.parametrize("shape", [(20, 30), (13, 27), (7, 5)])
def test_windows_are_undone(shape: tuple[int, int]) -> None:
    x = normal(2, 3, *shape)
    cut = _windows(x)
    assert cut.shape == (2 * math.ceil(shape[0] / 10) * math.ceil(shape[1] / 10), 100, 3)
    assert torch.equal(_unwindow(cut, 2, *shape), x)
    assert torch.equal(cut[0].view(10, 10, 3)[: shape[0], : shape[1]], x[0, :, :10, :10].movedim(0, -1))


@pytest.mark.parametrize("row", ABLATION)
def test_unseen_cells_change_nothing(row: str) -> None:
    fusion = fusion_of(**ABLATION[row])
    bev = normal(2, CHANNELS, ROWS, COLS, seed=3)
    latent, evidence = some_prior()
    before = fusion.fuse(bev, latent, evidence)
    for bad in (1e3, math.nan):
        assert torch.equal(fusion.fuse(bev, torch.where(evidence > 0, latent, bad), evidence), before)
    assert not torch.equal(fusion.fuse(bev, -latent, evidence), before)
    assert float(before.detach().abs().max()) <= 1


def test_attention_masks_keys() -> None:
    """The mask itself, on values that nobody has zeroed, as the published one fails to do."""
    torch.manual_seed(0)
    attention = PriorAttention(CHANNELS)
    bev = normal(2, CHANNELS, ROWS, COLS)
    latent, evidence = some_prior()
    seen = evidence > 0
    position = normal(1, CHANNELS, ROWS, COLS, seed=4)
    before = attention.attend(bev, latent, seen, position, position)
    after = attention.attend(bev, torch.where(seen, latent, 1e3), seen, position, position)
    assert torch.equal(before, after)
    # as by hand, in a window that is partly seen
    window, width = 7, CHANNELS // 8
    cells = _windows(seen.float())[window, :, 0] > 0
    assert 0 < int(cells.sum()) < 100
    query = attention.query(_windows(bev + position))[window]
    key = attention.key(_windows(latent + position))[window][cells]
    value = attention.value(_windows(latent))[window][cells]
    heads = [slice(i * width, (i + 1) * width) for i in range(8)]
    mixed = [torch.softmax(query[:, h] @ key[:, h].T / math.sqrt(width), dim=1) @ value[:, h] for h in heads]
    expected = attention.norm_attended(attention.out(torch.cat(mixed, dim=1)))
    torch.testing.assert_close(before[window], expected, rtol=1e-4, atol=1e-5)


def test_empty_window_is_exactly_zero() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(CHANNELS)
    bev = normal(2, CHANNELS, ROWS, COLS).requires_grad_()
    latent, evidence = some_prior()
    latent.requires_grad_()
    attended = attention.attend(bev, latent, evidence > 0, None, None)
    assert not attended[0].any() and not attended[6].any()  # the first window of both frames
    assert attended[1:6].any(dim=2).all() and bool(torch.isfinite(attended).all())
    attended.square().sum().backward()
    for x in (bev, latent):
        assert x.grad is not None and bool(torch.isfinite(x.grad).all())
        assert not x.grad[..., :WINDOW, :WINDOW].any() and x.grad.any()
    attention.zero_grad()
    nothing = attention.attend(bev, latent, torch.zeros_like(evidence, dtype=torch.bool), None, None)
    assert not nothing.any()
    nothing.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in attention.parameters())


def test_gru_follows_its_formula() -> None:
    torch.manual_seed(0)
    gru = ConvGRU(4).double()
    state, x, shown = (torch.tanh(normal(2, 4, 7, 9, seed=s)).double() for s in (1, 2, 3))
    of_input, of_state = gru.from_input.weight.chunk(3), gru.from_state.weight.chunk(2)

    def convolve(h: Tensor, from_state: Tensor, from_input: Tensor) -> Tensor:
        return functional.conv2d(torch.cat([h, x], dim=1), torch.cat([from_state, from_input], dim=1), padding=1)

    for seen, h in ((None, state), (shown, shown)):
        z = torch.sigmoid(convolve(h, of_state[0], of_input[0]))
        r = torch.sigmoid(convolve(h, of_state[1], of_input[1]))
        q = torch.tanh(convolve(r * h, gru.from_reset.weight, of_input[2]))
        torch.testing.assert_close(gru(state, x, seen), (1 - z) * state + z * q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ABLATION)
def test_every_part_is_used(row: str) -> None:
    """Two frames through a window: every parameter gets a finite gradient that is not zero."""
    fusion = fusion_of(**ABLATION[row])
    assert fusion.state_channels == CHANNELS
    memory = Memory.empty(2, CHANNELS, 50, 60)
    origin = torch.tensor([[-9.0, -7.5]]).expand(2, 2)
    seen = normal(2, CHANNELS, ROWS, COLS).requires_grad_()
    for frame, pose in enumerate(([0.0, 0.0, 0.1], [0.4, -0.2, -0.3])):
        poses = torch.tensor([pose, pose])
        bev = seen if frame == 0 else normal(2, CHANNELS, ROWS, COLS, seed=9)
        assert fusion.locate(bev, memory, poses, origin) is None
        cells = fusion.opened(memory)
        latent, evidence = fusion.read(cells, poses, origin)
        features = fusion.fuse(bev, latent, evidence)
        memory = fusion.write(cells, bev, features, poses, origin)
    features.square().sum().backward()
    assert seen.grad is not None and seen.grad.any()  # through the map
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.any(), name
    has = {
        part: any(part in name for name, _ in fusion.named_parameters()) for part in ("attention", "gru", "position")
    }
    assert has == {part: ABLATION[row][f"prior_{part}"] for part in has}


def test_moving_average_halves_the_difference() -> None:
    fusion = fusion_of(**ABLATION["moving average"])
    bev, (latent, evidence) = normal(2, CHANNELS, ROWS, COLS), some_prior()
    expected = torch.where(evidence > 0, (latent + torch.tanh(bev)) / 2, torch.tanh(bev))
    torch.testing.assert_close(fusion.fuse(bev, latent, evidence), expected)


@pytest.mark.parametrize("yaw_deg", [0, 27, 45, 90, -135])
def test_no_covered_cell_is_left_out(yaw_deg: float) -> None:
    fusion = fusion_of()
    x, y, yaw = 0.13, -0.4, math.radians(yaw_deg)
    pose, origin = torch.tensor([[x, y, yaw]]), torch.tensor([[-9.0, -9.0]])
    rows = cols = 60
    stored = Memory(torch.full((1, CHANNELS, rows, cols), 0.25), torch.full((1, 1, rows, cols), 2.0))
    features = torch.tanh(normal(1, CHANNELS, ROWS, COLS))
    memory = stored
    for _ in range(2):
        memory = fusion.write(fusion.opened(memory), features, features, pose, origin)
    centres = (np.arange(60) + 0.5) * 0.3 - 9.0
    mx, my = np.meshgrid(centres, centres)
    ex = math.cos(yaw) * (mx - x) + math.sin(yaw) * (my - y)
    ey = -math.sin(yaw) * (mx - x) + math.cos(yaw) * (my - y)
    margin = 1e-3
    inside = torch.from_numpy((np.abs(ex) < 4.5 - margin) & (np.abs(ey) < 3.0 - margin))
    outside = torch.from_numpy((np.abs(ex) > 4.5 + margin) | (np.abs(ey) > 3.0 + margin))
    assert (memory.evidence[0, 0][inside] == 3).all()  # the cap
    assert (memory.evidence[0, 0][outside] == 2).all()
    assert torch.equal(memory.latent[0][:, outside], stored.latent[0][:, outside])
    row, col = np.floor((ey + 3.0) / 0.3).astype(int), np.floor((ex + 4.5) / 0.3).astype(int)
    expected = features[0][:, row[inside.numpy()], col[inside.numpy()]]
    same = (memory.latent[0][:, inside] == expected).all(dim=0).float().mean()
    assert float(same) > 0.98  # the others lie on the border of two cells
    if yaw_deg == 45:  # what scattering ego cells to the map would have reached
        ego = CONFIG.feature_grid.centres().reshape(-1, 2)
        turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        hit = np.zeros((rows, cols), dtype=bool)
        hit[tuple(np.floor((ego @ turn.T + [x + 9.0, y + 9.0]) / 0.3).astype(int)[:, ::-1].T)] = True
        assert 0.1 < float((~hit[inside.numpy()]).mean()) < 0.2


def test_reads_the_nearest_cell_and_back() -> None:
    fusion = fusion_of()
    pose, origin = torch.tensor([[0.0, 0.0, math.pi / 2]]), torch.tensor([[-9.0, -9.0]])
    features = torch.tanh(normal(1, CHANNELS, ROWS, COLS))
    empty = fusion.opened(Memory.empty(1, CHANNELS, 60, 60))
    memory = fusion.write(empty, features, features, pose, origin)
    cells = fusion.opened(memory)
    latent, evidence = fusion.read(cells, pose, origin)
    assert torch.equal(latent, features) and (evidence == 1).all()
    repeated = fusion.write(cells, features, features, pose, origin, repeat=torch.tensor([1.0]))
    assert (fusion.read(fusion.opened(repeated), pose, origin)[1] == 2).all()
    far = torch.tensor([[100.0, 0.0, 0.0]])
    latent, evidence = fusion.read(cells, far, origin)
    assert not latent.any() and not evidence.any()
    assert all(
        torch.equal(a, b) for a, b in zip(fusion.write(cells, features, features, far, origin), memory, strict=True)
    )


def test_position_is_not_stored() -> None:
    """With an update gate that is shut the state is carried over as it is, whatever the embeddings say."""
    fusion = fusion_of(**ABLATION["GRU + position"])
    assert fusion.gru is not None and fusion.bev_position is not None and fusion.prior_position is not None
    with torch.no_grad():
        fusion.prior_position.row.fill_(5.0)
        fusion.gru.from_input.weight.zero_()
        fusion.gru.from_state.weight.zero_()
        # the gate reads the embedding, at the middle tap, and is shut by it
        fusion.gru.from_state.weight[:CHANNELS, CHANNELS // 2 :, 1, 1] = -30.0
    latent = torch.tanh(normal(1, CHANNELS, ROWS, COLS))
    out = fusion.fuse(normal(1, CHANNELS, ROWS, COLS), latent, torch.ones(1, 1, ROWS, COLS))
    torch.testing.assert_close(out, latent)


@pytest.mark.parametrize("row", ["GRU + position", "all"])
def test_unseen_cells_have_no_position(row: str) -> None:
    """They enter the recurrent unit as zeros, not as an embedding."""
    fusion = fusion_of(**ABLATION[row])
    assert fusion.prior_position is not None
    bev, nothing = normal(1, CHANNELS, ROWS, COLS), torch.zeros(1, 1, ROWS, COLS)
    latent = torch.tanh(normal(1, CHANNELS, ROWS, COLS))
    outs = []
    for value in (0.0, 5.0):
        torch.nn.init.constant_(fusion.prior_position.row, value)
        outs.append([fusion.fuse(bev, latent, nothing + seen) for seen in (0, 1)])
    assert torch.equal(outs[0][0], outs[1][0]) and not torch.equal(outs[0][1], outs[1][1])


@pytest.mark.parametrize("row", ["moving average", "all"])
def test_bfloat16(row: str) -> None:
    fusion = fusion_of(**ABLATION[row])
    bev, (latent, evidence) = normal(2, CHANNELS, ROWS, COLS), some_prior()
    exact = fusion.fuse(bev, latent, evidence)
    with torch.autocast("cpu", torch.bfloat16):
        rough = fusion.fuse(bev.bfloat16(), latent, evidence)
    assert rough.dtype == torch.float32 and float((rough - exact).detach().abs().max()) < 0.1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bev_channels": 20}, "bev_channels must be a multiple of 8"),
        ({"align": True}, "align works with fusion evidence only"),
        ({"slopes": True}, "slopes works with fusion evidence only"),
        ({"prior_attention": False, "prior_gru": False}, "prior_position needs"),
    ],
)
def test_bad_configurations_are_named(values: dict[str, bool], said: str) -> None:
    with pytest.raises(NmpError, match=said):
        fusion_of(**values)


def test_vector_heads() -> None:
    assert DIRECTION_CHANNELS == DIRECTIONS + 1
    heads = VectorHeads(CHANNELS)
    embedding, direction = heads(normal(2, CHANNELS, 5, 7))
    assert embedding.shape == (2, 16, 10, 14) and direction.shape == (2, 37, 10, 14)
    (embedding.sum() + direction.square().sum()).backward()
    assert all(p.grad is not None for p in heads.parameters())
