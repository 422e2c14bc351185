"""ResNet trunk (He et al., CVPR 2016) with torchvision's parameter names, so that its checkpoints load."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nmp.errors import NmpError
from nmp.model.blocks import convolve


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv1, self.bn1, x)
        return convolve(self.conv2, self.bn2, y, x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _downsample(inplanes, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv1, self.bn1, x)
        y = convolve(self.conv2, self.bn2, y)
        return convolve(self.conv3, self.bn3, y, x if self.downsample is None else self.downsample(x))


def _downsample(inplanes: int, out: int, stride: int) -> nn.Module | None:
    if stride == 1 and inplanes == out:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))


LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """The trunk of a ResNet up to ``stages`` residual stages.

    ``forward`` takes [B, 3, H, W] and returns the outputs of all stages, at strides 4, 8, 16, 32;
    ``channels`` holds their widths.
    """

    def __init__(self, name: str, stages: int = 4) -> None:
        super().__init__()
        if name not in LAYOUTS:
            raise NmpError(f"unknown backbone {name!r}: choose one of {', '.join(LAYOUTS)}")
        if not 1 <= stages <= len(LAYOUTS[name][1]):
            raise NmpError(f"{name} has {len(LAYOUTS[name][1])} stages, {stages} were asked for: set backbone_stages")
        block, depths = LAYOUTS[name]
        self.name = name
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels: list[int] = []
        self.stages = stages
        inplanes = 64
        for index in range(stages):
            planes = 64 * 2**index
            blocks = []
            for depth in range(depths[index]):
                blocks.append(block(inplanes, planes, 2 if index > 0 and depth == 0 else 1))
                inplanes = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self.channels.append(inplanes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(convolve(self.conv1, self.bn1, images))
        out = []
        for index in range(self.stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
            out.append(x)
        return out


def load_torchvision(backbone: ResNet, path: Path) -> None:
    """Load the parameters of a torchvision ResNet, stored as .safetensors, into ``backbone`` (in place).

    The classifier and the stages that the backbone does not have are left out. Raises :class:`NmpError` when the
    file is a pickle, cannot be read, or holds another network.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise NmpError(
            f"{path} is not a .safetensors file, and nothing else is loaded, because pickles can run code: convert it "
            'where you trust it with python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise NmpError(f"cannot read backbone weights {path} ({error}): copy them again") from error
    expected = backbone.state_dict()
    # Checkpoints from before PyTorch 0.4.1 do not count batches, and nothing here depends on the count.
    missing = sorted(n for n in set(expected) - set(state) if not n.endswith("num_batches_tracked"))
    wrong = missing + sorted(n for n in set(expected) & set(state) if expected[n].shape != state[n].shape)
    # A deeper ResNet holds all the names of a shallower one, and more in the same stages.
    stages = {n.split(".")[0] for n in expected}
    wrong += sorted(n for n in set(state) - set(expected) if n.split(".")[0] in stages)
    if wrong:
        raise NmpError(
            f"{path} does not hold the {backbone.name} of the configuration ({len(wrong)} tensors differ, first "
            f"{wrong[0]}): give the checkpoint of that backbone"
        )
    if any(not torch.isfinite(state[n]).all() for n in expected if n in state):
        raise NmpError(f"{path} holds NaN or infinite weights: copy or convert it again")
    backbone.load_state_dict({n: state.get(n, value).to(value.dtype) for n, value in expected.items()})
