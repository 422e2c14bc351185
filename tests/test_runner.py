"""Running a network: folding, precisions, the numbers of the prior, and nothing that a CUDA graph could not record."""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmp.errors import NmpError
from nmp.model import BEVNetwork, NetworkConfig, fusion
from nmp.model.runner import (
    OneFrame,
    Runner,
    choose_device,
    choose_precision,
    compare,
    example_inputs,
    fold_batch_norms,
    prepare,
    quantize,
    read_quantized,
    window_side,
)

BASE: dict[str, Any] = dict(
    backbone_stages=2,
    input_width=64,
    input_height=32,
    neck_channels=8,
    bev_channels=16,
    prior_channels=4,
    bev_length=12.0,
    bev_width=6.0,
    feature_resolution=0.6,
    layer_resolution=0.3,
    prior_cell=0.6,
)
KINDS: dict[str, dict[str, Any]] = {
    "ground": {},
    "bottleneck": {"backbone": "resnet50"},
    "align": {"align": True},
    "slopes": {"align": True, "slopes": True},
    "bevformer": {"view": "bevformer", "view_layers": 1, "view_heads": 2, "view_points": 2},
    "lift_splat": {"view": "lift_splat", "depth_bins": 8},
    "hdmapnet": {"view": "hdmapnet"},
    "paper": {"fusion": "paper"},
    "vector heads": {"vector_heads": True},
}


def make(kind: str, **changes: Any) -> BEVNetwork:
    """A network whose batch norms and doors for the prior are not in their first state."""
    torch.manual_seed(0)
    network = BEVNetwork(NetworkConfig(**{**BASE, **KINDS[kind], **changes})).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    for name, parameter in network.named_parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05) if "bias" not in name else nn.init.zeros_(parameter)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_folding_and_bfloat16_change_nothing_but_rounding(kind: str) -> None:
    network = make(kind)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == norms > 0
    exact = compare(network)
    assert exact["logits"] < 1e-4 and exact["latent"] < 1e-2 and exact["evidence"] < 1e-3
    rough = compare(network, precision="bf16")
    assert rough["logits"] < 0.1 and rough["latent"] < 0.1


class _Watch(TorchDispatchMode):
    """Notes what makes a GPU wait for the host, or the host for the GPU; the device "meta" stands for the GPU."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_linalg_check_errors", "_unique2"}

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if func._overloadpacket.__name__ in self.WAITING or any(t.device.type == "cpu" for t in tensors):
            ours = [f for f in traceback.extract_stack() if f"{os.sep}nmp{os.sep}" in f.filename][-1]
            self.found.add(f"{func} at {ours.filename}:{ours.lineno}")
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_can_be_recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the device "meta" has none
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    network = make(kind).requires_grad_(False)
    inputs = [t.to("meta") for t in example_inputs(network, window_side(network.config))]
    frame = OneFrame(network.to("meta"), torch.float32)
    with torch.no_grad(), _Watch() as watch:
        outputs = frame.with_prior(frame.encode(*inputs[:3]), *inputs[3:])
    assert outputs.logits.device.type == "meta"
    assert not watch.found


def test_a_frame_is_what_the_network_says() -> None:
    network = make("ground", bev_length=24.0, bev_width=12.0)  # far enough for every camera to see some of it
    side = window_side(network.config)
    inputs = example_inputs(network, side, seed=3)
    given = inputs.images.permute(0, 1, 4, 2, 3)
    memory = read_quantized(inputs.latent, inputs.evidence)
    with torch.inference_mode():
        bev = network.encode(given, inputs.pixel_from_base, inputs.present)
        output, after = network.step(bev, memory, inputs.pose, torch.zeros(1, 2), spread=inputs.spread)
        alone = network.alone(bev)
    latent, evidence = inputs.latent[0].numpy(), inputs.evidence[0, 0].numpy().view(np.uint16)
    rest = (given, inputs.pixel_from_base, inputs.present)
    answer = Runner(network, side=side).run(*rest, inputs.pose, inputs.spread, latent, evidence)
    np.testing.assert_allclose(answer.probabilities, output.logits.sigmoid()[0].numpy(), atol=1e-6)
    assert answer.latent is not None and answer.evidence is not None and answer.seen is not None
    assert answer.finite and answer.latent.dtype == np.int8 and answer.evidence.dtype == np.uint16
    np.testing.assert_allclose(answer.latent / fusion.LATENT_SCALE, after.latent[0].numpy(), atol=0.51 / 127)
    np.testing.assert_allclose(answer.evidence / fusion.EVIDENCE_SCALE, after.evidence[0, 0].numpy(), atol=0.51 / 256)
    unseen = ~answer.seen
    assert unseen.any() and answer.seen.any()
    np.testing.assert_array_equal(answer.latent[:, unseen], latent[:, unseen])
    np.testing.assert_array_equal(answer.evidence[unseen], evidence[unseen])
    single = Runner(network, side=None).run(*rest)
    np.testing.assert_allclose(single.probabilities, alone.logits.sigmoid()[0].numpy(), atol=1e-6)
    assert single.latent is None
    # a camera that is missing is not looked at
    dark = given.clone()
    dark[:, 2] = 0
    absent = inputs.present.clone()
    absent[:, 2] = 0
    runner = Runner(network, side=None)
    one, two = (runner.run(i, inputs.pixel_from_base, absent).probabilities.copy() for i in (given, dark))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - single.probabilities).max() > 1e-4


def test_the_numbers_of_the_prior_survive() -> None:
    latent = torch.arange(-127, 128, dtype=torch.int8).view(1, 1, 1, -1)
    evidence = torch.from_numpy(np.linspace(0, 65535, 255).astype(np.uint16).view(np.int16)).view(1, 1, 1, -1)
    memory = read_quantized(latent, evidence)
    assert float(memory.evidence[..., -1]) == pytest.approx(65535 / 256)
    again = quantize(memory)
    assert torch.equal(again[0], latent) and torch.equal(again[1], evidence)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(NmpError, match="no GPU that torch can use"):
        choose_device("cuda")
    for name in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(NmpError, match="is unknown"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(NmpError, match="2 GPU"):
        choose_device("cuda:2")
    with pytest.raises(NmpError, match="precision 'fp8'"):
        choose_precision("fp8", torch.device("cpu"))


@pytest.mark.parametrize("fast", [False, True])
def test_half_precision_is_chosen_where_the_processor_has_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    chosen = choose_precision("auto", torch.device("cpu"))
    assert chosen == (torch.bfloat16 if fast else torch.float32)
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32


def test_a_prepared_network_gives_the_same_with_its_weights_frozen() -> None:
    network = make("ground")
    prepared = prepare(copy.deepcopy(network))
    assert not any(p.requires_grad for p in prepared.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    assert isinstance(network.backbone.bn1, nn.BatchNorm2d)
