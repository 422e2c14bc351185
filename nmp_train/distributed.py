"""Training in several processes, one for each GPU, as ``torchrun`` starts them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from nmp.errors import NmpError

PATIENCE = datetime.timedelta(hours=2)
"""how long a process waits for the others: the first one validates and writes files while they wait"""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a process alone is rank 0 of 1."""

    rank: int = 0
    ranks: int = 1
    local: int = 0
    """number of this process on its machine, and so of its GPU"""

    @classmethod
    def join(cls, device_type: str) -> Ranks:
        """Meet the other processes that torchrun started: NCCL between GPUs, Gloo between CPUs.

        Without torchrun's RANK, WORLD_SIZE and LOCAL_RANK in the environment the process is alone. Raises
        :class:`NmpError` for values that make no sense and for more processes than GPUs.
        """
        try:
            rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            local = int(os.environ.get("LOCAL_RANK", rank))
        except ValueError as error:
            raise NmpError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers ({error}): start with torchrun") from error
        if ranks == 1:
            return cls()
        if device_type == "cuda":
            if local >= torch.cuda.device_count():
                raise NmpError(
                    f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} found): "
                    "start torchrun with a smaller --nproc-per-node"
                )
            torch.cuda.set_device(local)
        distributed.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(rank, ranks, local)

    def leave(self) -> None:
        """Part from the other processes."""
        if self.ranks > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes files, logs and validates."""
        return self.rank == 0

    def share(self, batch: int, name: str) -> int:
        """Return how many of ``batch`` groups a process takes; ``name`` is the setting to change if that is no number.

        Raises :class:`NmpError` when they cannot be divided.
        """
        if batch % self.ranks:
            raise NmpError(f"{name} is {batch}, which {self.ranks} processes cannot share: choose a multiple of them")
        return batch // self.ranks

    def agreed(self, value: float, device: torch.device) -> float:
        """Return the value of the first process: clocks differ, and all have to decide alike."""
        if self.ranks == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(shared, 0)
        return float(shared)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` over the processes, without a gradient."""
        if self.ranks == 1:
            return values
        values = values.detach().clone()
        distributed.all_reduce(values)
        return values / self.ranks

    def gathered(self, value: Any) -> list[Any]:
        """Return ``value`` of every process, in the order of their ranks."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * self.ranks
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.ranks > 1:
            distributed.barrier()

    def batch_norms(self, module: Module, device: torch.device) -> Module:
        """Let the batch norms of a module take their statistics from the batches of all processes."""
        if self.ranks == 1:
            return module
        if device.type == "cuda":
            converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            return converted
        return convert(module)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Each process has a gradient of its own copy of the sum.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, with a gradient; for one process it stays as it is.

    For S = s_1 + ... + s_R and a loss L(S) that every rank computes, the backward pass of this sum adds up what the R
    ranks hand back: rank r is left with R dL/dS ds_r. DistributedDataParallel then takes the mean over the ranks,
    (1 / R) sum_r R dL/dS ds_r = dL/dS dS: the gradient of one process with the whole batch. No factor is needed.

    torch.distributed's own differentiable sum has moved between the versions of torch that are supported.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total: Tensor = _Sum.apply(values)
    return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes (Ioffe and Szegedy, 2015) on CPUs.

    ``torch.nn.SyncBatchNorm`` does the same on GPUs only. All processes have batches of the same size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        ranks = distributed.get_world_size()
        mean = sum_over_ranks(x.mean(dim=(0, 2, 3))) / ranks
        centred = x - mean[:, None, None]
        variance = sum_over_ranks(centred.square().mean(dim=(0, 2, 3))) / ranks
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            count = ranks * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]


def convert(module: Module) -> Module:
    """Replace the batch norms of a module by :class:`CpuSyncBatchNorm`; parameters and buffers stay the same."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                replaced = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
                replaced.train(child.training)
                for key, parameter in child.named_parameters():
                    setattr(replaced, key, parameter)
                for key, buffer in child.named_buffers():
                    replaced.register_buffer(key, buffer)
                setattr(parent, name, replaced)
    return module
