"""What a training step gets, and where it gets it from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nmp.errors import NmpError
from nmp_train.data.group import Group, collate
from nmp_train.data.sampler import StepSampler

if TYPE_CHECKING:
    from nmp_train.config import StageConfig


@dataclass
class Batch:
    """B groups of T frames on the training device, flattened to F = B * T, each group in the order of time."""

    images: Tensor
    """[F, 6, 3, H, W] uint8"""
    pixel_from_base: Tensor
    """[F, 6, 3, 4]"""
    present: Tensor
    """[F, 6] float, 1 where there is an image"""
    pose: Tensor
    """[B, T, 3] x, y (m) relative to the last frame of the group, yaw (rad): the true pose"""
    slope: Tensor
    """[B, T, 2] of the ground, see :class:`~nmp_train.data.group.Group`"""
    drive: Tensor
    """[B, T] int64 number of the drive that each frame is from, counted within the group: frames of one drive share
    the errors of its localisation"""
    seeds: Tensor
    """[B] int64 on the CPU: a seed for each group that does not depend on the number of ranks"""
    truth: Tensor
    """[F, 3, rows, cols] uint8"""
    instance: Tensor | None
    """[F, 3, rows, cols] uint8, with vector heads"""
    direction: Tensor | None
    """[F, 2, rows, cols] uint8, with vector heads"""
    weather: list[str]
    """[F] day, rain, night or night rain"""
    labels: list[str]
    """[F] what else scores are broken down by ("difficulty 0.4"), or empty"""
    names: list[str]
    """[F] world/drive/time or the sample token, for messages"""

    @classmethod
    def of(cls, group: Group, images: Tensor, device: torch.device) -> Batch:
        """Take a collated group to a device, with its images [F, 6, 3, H, W]."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        def flat(value: Tensor) -> Tensor:
            return moved(value).flatten(0, 1)

        return cls(
            images=images,
            pixel_from_base=flat(group.pixel_from_base),
            present=flat(group.present),
            pose=moved(group.pose),
            slope=moved(group.slope),
            drive=moved(group.drive),
            seeds=group.seed,
            truth=flat(group.truth),
            instance=None if group.instance is None else flat(group.instance),
            direction=None if group.direction is None else flat(group.direction),
            weather=group.weather,
            labels=group.labels,
            names=group.names,
        )


class Source(Protocol):
    """Where training batches come from."""

    def loader(
        self, stage: StageConfig, *, seed: int, length: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> GroupLoader:
        """Return the groups of a stage, ``stage.batch / ranks`` at a time, each batch a collated Group.

        What is drawn is a function of ``seed`` and the number of the group alone: all ranks together draw at every
        step what one process would.

        :param length: number of groups of the whole run, over all ranks
        :param start: groups of the whole run that are left out at its beginning, as they were trained before
        """

    def batch(self, group: Group) -> Batch:
        """Make a collated group into a batch on the training device."""


class GroupLoader(DataLoader[Group]):
    """A data loader of groups whose workers' :class:`NmpError` keep their words."""

    def __init__(
        self,
        groups: Dataset[Group],
        stage: StageConfig,
        workers: int,
        *,
        length: int,
        rank: int,
        ranks: int,
        start: int,
        ahead: int,
    ) -> None:
        """:param ahead: batches that each worker has ready: as many as memory allows"""
        super().__init__(
            groups,
            batch_sampler=StepSampler(length, stage.batch, rank=rank, ranks=ranks, start=start),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=ahead if workers else None,
            # Forked workers share the cities; a spawned one would have to be sent all of them.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=lambda _worker: use_one_thread(),
        )

    def __iter__(self) -> Iterator[Group]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except NmpError as error:
            # A worker's error comes as text, at the end of its traceback.
            raise NmpError(str(error).rpartition(f"{NmpError.__name__}: ")[2].strip()) from None


def use_one_thread() -> None:
    """Let a worker process take one core: there are as many of them as cores."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
