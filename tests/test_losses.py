"""Losses: against plain references, with nothing to see, and over several processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nmp_train.losses import direction_loss, embedding_loss, layer_loss, published_loss


def scene(frames: int, seed: int = 0, rows: int = 20, cols: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Truth with more in later frames: layers [B, 3, rows, cols], instances likewise, directions [B, 2, rows, cols]."""
    rng = np.random.default_rng(seed)
    instances = np.zeros((frames, 3, rows, cols), dtype=np.uint8)
    directions = np.zeros((frames, 2, rows, cols), dtype=np.uint8)
    for frame in range(frames):
        for number in range(1, 1 + frame):
            layer, row = rng.integers(3), rng.integers(rows - 2)
            instances[frame, layer, row : row + 2, : rng.integers(1, cols)] = number
        drawn = (instances[frame] > 0).any(axis=0)
        forward = rng.integers(1, 37, drawn.shape)
        directions[frame, 0] = np.where(drawn, forward, 0)
        directions[frame, 1] = np.where(drawn, (forward + 17) % 36 + 1, 0)
    return torch.from_numpy(instances > 0), torch.from_numpy(instances), torch.from_numpy(directions)


def test_layer_loss_is_entropy_plus_dice() -> None:
    truth = scene(3)[0]
    logits = torch.randn(3, 3, 20, 40, generator=torch.Generator().manual_seed(1))
    p, t = torch.sigmoid(logits.double()), truth.double()
    entropy = -(4 * t * p.log() + (1 - t) * (1 - p).log()).mean()
    dice = [1 - (2 * (p[:, c] * t[:, c]).sum() + 1) / ((p[:, c] + t[:, c]).sum() + 1) for c in range(3)]
    assert float(layer_loss(logits, truth, 4.0)) == pytest.approx(float(entropy + sum(dice) / 3), rel=1e-5)


def test_published_loss_is_the_cross_entropy_of_one_class_at_a_time() -> None:
    """Where at most one class is likely, the sum of binary losses is the four-way one that it stands for."""
    logits = torch.full((1, 3, 2, 2), -9.0)
    truth = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0, 0], truth[0, 1, 0, 0] = 2.0, 1
    background = torch.zeros(1, 1, 2, 2)
    four = functional.cross_entropy(
        torch.cat([background, logits], dim=1),
        torch.cat([1 - truth.amax(dim=1, keepdim=True), truth], dim=1).argmax(dim=1),
        weight=torch.tensor([1.0, 15, 15, 15]),
        reduction="none",
    ).mean()
    assert float(published_loss(logits, truth)) == pytest.approx(2 * float(four), rel=2e-3)


def reference_embedding_loss(embedding: Tensor, instances: Tensor) -> Tensor:
    """The formulas of De Brabandere et al., one line at a time."""
    total = embedding.new_zeros(())
    for frame, layer in itertools.product(range(instances.shape[0]), range(instances.shape[1])):
        of_class = instances[frame, layer]
        means = []
        numbers = [n for n in of_class.unique().tolist() if n]
        for number in numbers:
            pixels = embedding[frame][:, of_class == number]
            means.append(pixels.mean(dim=1))
            away = (pixels - means[-1][:, None]).norm(dim=0)
            total = total + ((away - 0.5).clamp(min=0) ** 2).mean() / len(numbers)
        for a, b in itertools.permutations(means, 2):
            total = total + (3 - (a - b).norm()).clamp(min=0) ** 2 / (len(means) * (len(means) - 1))
    return total / (instances.shape[0] * instances.shape[1])


def test_embedding_loss_agrees_with_a_loop() -> None:
    instances = scene(6)[1]
    assert len(instances.unique()) > 4
    embedding = torch.randn(6, 16, 20, 40, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = embedding_loss(embedding, instances)
    (grad,) = torch.autograd.grad(loss, embedding)
    wide = embedding.detach().double().requires_grad_()
    expected = reference_embedding_loss(wide, instances)
    (expected_grad,) = torch.autograd.grad(expected, wide)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-8)


def test_embedding_loss_is_zero_when_lines_are_apart() -> None:
    instances = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    instances[0, 0, 2], instances[0, 0, 5], instances[0, 1, 5] = 1, 2, 1
    embedding = torch.zeros(1, 16, 8, 8)
    embedding[0, 0, 5] = 3.1
    assert float(embedding_loss(embedding, instances)) == 0
    embedding[0, 0, 5] = 2.0  # too near: 1 m short of the margin, in one of three classes
    assert float(embedding_loss(embedding, instances)) == pytest.approx(1 / 3)


def test_direction_loss_wants_both_directions() -> None:
    truth = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    truth[0, 0, 1], truth[0, 1, 1] = 3, 21

    def loss_of(*classes: int) -> float:
        logits = torch.zeros(1, 37, 4, 4)
        logits[:, list(classes)] = 20.0
        return float(direction_loss(logits, truth))

    both = loss_of(3, 21)
    assert both == pytest.approx(0.2 * 2 * math.log(2) / 37, rel=1e-3)
    assert both < loss_of(3) and both < loss_of(21) and both < loss_of(4, 22)
    elsewhere = torch.zeros(1, 37, 4, 4)
    elsewhere[:, :, 2:] = torch.randn(37, 2, 4)
    assert float(direction_loss(elsewhere, truth)) == float(direction_loss(torch.zeros(1, 37, 4, 4), truth))


Loss = Callable[[Tensor], Tensor]


def all_losses(frames: int) -> dict[str, tuple[int, Loss]]:
    """Number of input channels and the call, by name."""
    layers, instances, directions = scene(frames)
    return {
        "layer": (3, lambda x: layer_loss(x, layers, 4.0)),
        "published": (3, lambda x: published_loss(x, layers)),
        "embedding": (16, lambda x: embedding_loss(x, instances)),
        "direction": (37, lambda x: direction_loss(x, directions)),
    }


@pytest.mark.parametrize("name", ["layer", "published", "embedding", "direction"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite_with_nothing_drawn_and_at_extremes(name: str, scale: float) -> None:
    for frames in (1, 4):  # the first frame is empty
        channels, loss = all_losses(frames)[name]
        x = (torch.randn(frames, channels, 20, 40) * scale).requires_grad_()
        value = loss(x)
        value.backward()
        assert x.grad is not None and bool(torch.isfinite(value)) and bool(torch.isfinite(x.grad).all())
        if frames == 1 and name in ("embedding", "direction"):
            assert float(value.detach()) == 0 and not x.grad.any()


@pytest.mark.parametrize("name", ["layer", "published", "embedding", "direction"])
def test_float32_inside_autocast(name: str) -> None:
    channels, loss = all_losses(4)[name]
    x = torch.randn(4, channels, 20, 40).bfloat16()
    expected = loss(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------- over several processes


def training_step(part: slice, out: Path | None = None) -> dict[str, Tensor]:
    """Loss and gradients of a small network on some of 8 frames; through DDP where a process group exists."""
    layers, instances, directions = scene(8)
    torch.manual_seed(5)
    network: nn.Module = nn.Conv2d(4, 3 + 16 + 37, 3, padding=1)
    x = torch.randn(8, 4, 20, 40)
    if torch.distributed.is_initialized():
        network = nn.parallel.DistributedDataParallel(network)
    logits, embedding, direction = network(x[part]).split([3, 16, 37], dim=1)
    loss = (
        layer_loss(logits, layers[part], 4.0)
        + published_loss(logits, layers[part])
        + embedding_loss(embedding, instances[part])
        + direction_loss(direction, directions[part])
    )
    loss.backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    result = {"loss": loss.detach(), "gradient": torch.cat(gradients)}
    if out:
        np.savez(out, **{name: value.numpy() for name, value in result.items()})
    return result


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    training_step(slice(4 * rank, 4 * rank + 4), folder / f"rank{rank}.npz")
    torch.distributed.barrier()  # nobody leaves while the other still talks
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    whole = training_step(slice(0, 8))
    halves = [training_step(slice(0, 4)), training_step(slice(4, 8))]
    assert abs(float((halves[0]["loss"] + halves[1]["loss"]) / 2 - whole["loss"])) > 1e-3  # a mean would be wrong
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=2)
    for rank in range(2):
        with np.load(tmp_path / f"rank{rank}.npz") as found:
            assert float(found["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
            np.testing.assert_allclose(found["gradient"], whole["gradient"], rtol=1e-4, atol=1e-6)
