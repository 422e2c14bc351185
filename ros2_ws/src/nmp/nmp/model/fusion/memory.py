"""What the cells of a window of the map hold while a network works on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """Cells of B windows; rows grow with y, columns with x."""

    latent: Tensor
    """[B, D, rows, cols] in -1..1"""
    evidence: Tensor
    """[B, 1, rows, cols] how much was seen of each cell, 0 for never"""

    @classmethod
    def empty(cls, batch: int, channels: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Memory:
        """Return windows of cells that nobody has seen."""
        return cls(
            torch.zeros(batch, channels, rows, cols, device=device), torch.zeros(batch, 1, rows, cols, device=device)
        )
