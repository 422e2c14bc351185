"""Groups of frames: what the workers of a data loader make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Drawn:
    """What the simulator needs to render the frames of a group. Positions are relative to each frame's ``centre``."""

    city: Tensor
    """[T] int64 index of the ground that each frame shows: a city before and after a change has two"""
    centre: Tensor
    """[T, 2] float64 map position of each frame, m"""
    intrinsics: Tensor
    """[T, 6, 3, 3] of the network input"""
    map_from_camera: Tensor
    """[T, 6, 4, 4]"""
    solids: tuple[Tensor, ...]
    """fields of Solids, each [T, K, ...]"""
    conditions: tuple[Tensor, ...]
    """fields of Weather, each [T, ...]; frames of one drive have the same"""


@dataclass
class Group:
    """T frames of one place in the order of time; batching puts B in front, and joins the lists to B * T."""

    pose: Tensor
    """[T, 3] x, y (m) relative to the last frame, yaw (rad): where the car really was"""
    drive: Tensor
    """[T] int64 number of the drive that each frame is from, counted within the group from 0 on"""
    seed: Tensor
    """[] int64, of everything that is drawn at random for this group later on"""
    slope: Tensor
    """[T, 2] rise of the ground forward and to the left per metre over the height of the cameras (1/m), against the
    plane that the pose tells of; NaN where nobody knows"""
    pixel_from_base: Tensor
    """[T, 6, 3, 4] what the network is told"""
    present: Tensor
    """[T, 6] 1 where there is an image"""
    truth: Tensor
    """[T, 3, rows, cols] uint8"""
    names: list[str]
    """[T] for messages: world/drive/time, or the sample token"""
    weather: list[str]
    """[T] day, rain, night or night rain"""
    labels: list[str]
    """[T] what else scores are broken down by, empty where there is nothing"""
    instance: Tensor | None = None
    """[T, 3, rows, cols] uint8 number of the line that covers a cell, with vector heads"""
    direction: Tensor | None = None
    """[T, 2, rows, cols] uint8 the directions along the line, with vector heads"""
    images: Tensor | None = None
    """[T, 6, 3, H, W] uint8, where they are recorded"""
    drawn: Drawn | None = None
    """where they are rendered"""

    def pin_memory(self) -> Group:
        """Return it in pinned memory: the data loader calls this, so that copies to the GPU wait for nothing."""
        pinned: Group = _map(Tensor.pin_memory, [self])
        return pinned


def collate(groups: Sequence[Group]) -> Group:
    """Stack groups into a batch."""
    stacked: Group = _map(lambda *parts: torch.stack(parts), groups)
    return stacked


def _map(function: Callable[..., Tensor], values: Sequence[Any]) -> Any:
    """Apply a function to the tensors of values of one structure; lists are joined."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, tuple):
        return tuple(_map(function, parts) for parts in zip(*values, strict=True))
    if isinstance(first, list):
        return [item for value in values for item in value]
    if dataclasses.is_dataclass(first):
        names = [f.name for f in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: _map(function, [getattr(v, n) for v in values]) for n in names})  # type: ignore[type-var]
    return first
