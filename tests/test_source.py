"""Frames made ready, in this process or in others beside it: the same ones, in order, with their errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nmp.assembly import FrameAssembler
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Frame
from nmp.model.config import NetworkConfig
from nmp.source import Ended, Ready, Source, made_ready
from tests.bag_fixtures import make_bag

CONFIG = NetworkConfig(input_width=176, input_height=96)
FRAMES = 9
"""more than are decoded ahead"""


class Dying(Source):
    """Is killed after the second frame."""

    def frames(self, assembler: FrameAssembler) -> Iterator[Frame]:
        for number, frame in enumerate(super().frames(assembler)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield frame


class Tampered(Source):
    """The images of the second frame are no images, and after the sixth frame the bag is damaged."""

    def frames(self, assembler: FrameAssembler) -> Iterator[Frame]:
        for number, frame in enumerate(super().frames(assembler)):
            if number == 6:
                raise NmpError("the bag ends here: copy it again")
            if number == 1:
                object.__setattr__(frame.shots[0], "image", b"no image")
            yield frame


class Endless(Source):
    """Begins again and again."""

    def frames(self, assembler: FrameAssembler) -> Iterator[Frame]:
        while True:
            yield from super().frames(FrameAssembler())


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bag(tmp_path_factory.mktemp("bag"), FRAMES)


def items(kind: type[Source], bag: Path, processes: int, wait_s: float = 0.0) -> list[Ready | Ended]:
    """Return what a source gives, made by so many processes beside this one, or in this one."""
    found: list[Ready | Ended] = []
    source = kind(bag, "", CONFIG, len(CAMERAS))
    for item in made_ready(source, beside=processes > 0, processes=processes):
        time.sleep(wait_s)
        if isinstance(item, Ready) and item.decoded:  # its images are good until the next one is asked for
            item = item._replace(decoded=item.decoded._replace(images=item.decoded.images.clone()))
        found.append(item)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_all_ways_give_the_same(drive: Path, processes: int) -> None:
    here, beside = items(Source, drive, 0), items(Source, drive, processes)
    assert len(here) == len(beside) == FRAMES + 1
    assert here[-1] == beside[-1] and isinstance(here[-1], Ended) and not here[-1].error
    stamps = []
    for one, two in zip(here[:-1], beside[:-1], strict=True):
        assert isinstance(one, Ready) and isinstance(two, Ready) and one.decoded and two.decoded
        assert one.frame.stamp_ns == two.frame.stamp_ns and one.frame.location == two.frame.location
        assert (one.frame.map_from_base == two.frame.map_from_base).all() and not two.frame.shots
        assert all(map(torch.equal, one.decoded[:3], two.decoded[:3])) and one.decoded.images.any()
        stamps.append(one.frame.stamp_ns)
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_errors_come_where_they_belong(drive: Path, processes: int) -> None:
    found = items(Tampered, drive, processes)
    assert len(found) == 7
    faults = [item.error for item in found]
    assert "cam_front" in faults[1] and faults[-1] == "the bag ends here: copy it again"
    assert not any(faults[:1] + faults[2:-1])


def test_who_is_slow_gets_all_of_it(drive: Path) -> None:
    found = items(Source, drive, 2, wait_s=0.2)  # the other processes end meanwhile
    assert len(found) == FRAMES + 1 and isinstance(found[-1], Ended)


def test_a_process_that_dies_is_told(drive: Path) -> None:
    with pytest.raises(NmpError, match="the process that reads .* has died"):
        items(Dying, drive, 2)


def test_who_stops_early_leaves_nothing_behind(drive: Path) -> None:
    ready = made_ready(Endless(drive, "", CONFIG, len(CAMERAS)), beside=True, processes=2)
    next(ready)
    assert len(multiprocessing.active_children()) == 2
    ready.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
