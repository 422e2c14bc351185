"""Bilinear look-up, shared out over the threads of a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sample(values: Tensor, where: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Do what ``grid_sample`` does (``align_corners=False``), on a CPU with the channels of small batches in groups.

    Each group is computed as an image of its own: a CPU computes as many at once as it has threads, and would compute
    a single image in one of them. (On a GPU it saved 1 % of a frame.)

    :param values: [B, C, rows, cols]
    :param where: [B, out rows, out cols, 2] x, y in -1..1
    :return: [B, C, out rows, out cols], the same whatever the number of groups
    """
    b, c = values.shape[:2]
    wanted = 1 if values.is_cuda else torch.get_num_threads()
    groups = next((n for n in range(1, c + 1) if c % n == 0 and n * b >= wanted), c)
    if groups == 1:
        return functional.grid_sample(values, where, mode=mode, padding_mode=padding, align_corners=False)
    parts = values.reshape(b * groups, c // groups, *values.shape[2:])
    each = where[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
    found = functional.grid_sample(parts, each, mode=mode, padding_mode=padding, align_corners=False)
    return found.view(b, c, *where.shape[1:3])
