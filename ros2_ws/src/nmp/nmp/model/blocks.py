"""Small convolution blocks used by the BEV encoder and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor, add: Tensor | None = None) -> Tensor:
    """Convolve and normalise, add something, and cut off what is below zero.

    In a network that :func:`nmp.model.runner.prepare` made ready for a GPU this is one kernel; bias, sum and ReLU would
    be three more, which together take half as long as the convolution.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or conv.weight.dtype != torch.bfloat16
    if plain or not x.is_cuda or not isinstance(norm, nn.Identity):
        y = norm(conv(x))
        return (y if add is None else y + add).relu_()
    assert not isinstance(conv.padding, str)
    x, weight, bias = x.to(conv.weight.dtype), conv.weight, conv.bias
    if add is None:
        return torch.cudnn_convolution_relu(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    add = add.to(weight.dtype, memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(
        x, weight, add, 1.0, bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


class ConvBnRelu(nn.Sequential):
    """A 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _ = self
        assert isinstance(conv, nn.Conv2d)
        return convolve(conv, norm, x)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBnRelu(channels, channels)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv2
        assert isinstance(conv, nn.Conv2d)
        return convolve(conv, norm, self.conv1(x), x)
