"""The frames of a bag with their images decoded, on a GPU by processes beside the one that maps.

What reading, assembling and decoding do in Python would take turns with the mapper; a GPU then waits for both.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmp.assembly import FrameAssembler
from nmp.bags.reader import BagReader
from nmp.errors import NmpError
from nmp.frame import CAMERAS, Frame
from nmp.mapper import Decoded, decode
from nmp.model.config import NetworkConfig
from nmp.process import prepare_process
from nmp.replay import frames_of

DECODERS = 3
"""frames that are decoded at a time, in a process of its own"""
_CORES, _PROCESSES = DECODERS + 2, 4
"""such processes: one for so many cores, and at most so many. What Python does between two images takes turns within
each of them"""
_SLOTS = 2 * DECODERS
"""frames that are ready at a time"""
_PATIENCE_S = 5.0
"""how long a process is waited for that nobody wants anything of any more"""


class Ready(NamedTuple):
    """A frame, without the images that it came with."""

    frame: Frame
    decoded: Decoded | None
    error: str = ""
    """why its images cannot be used"""


class Ended(NamedTuple):
    """What comes last."""

    drops: Counter[str]
    """frames and messages that could not be used, by cause"""
    reasons: dict[str, str]
    """the latest text for each cause"""
    error: str = ""
    """why there is no more; empty at the end of the bag"""


class Source:
    """The frames of a bag in time order.

    :param location: the city, where the bag names none or the wrong one
    :param config: of the network that the images are for
    :param min_cameras: images that a frame must have
    """

    def __init__(self, bag: Path, location: str, config: NetworkConfig, min_cameras: int) -> None:
        self.bag = bag
        self.location = location
        self.config = config
        self.min_cameras = min_cameras

    def frames(self, assembler: FrameAssembler) -> Iterator[Frame]:
        """Yield what the bag gives. Raises :class:`NmpError` where it is damaged."""
        with BagReader(self.bag) as reader:
            yield from frames_of(reader, assembler, self.location)

    def items(self, depth: int = 0, part: int = 0, parts: int = 1) -> Iterator[Ready | Ended]:
        """Yield the frames decoded, ``depth`` of them ahead, and then :class:`Ended`.

        :param part: leave out all but every ``parts``-th frame, from this one on
        """
        assembler, error = FrameAssembler(), ""
        waiting: deque[Future[Ready]] = deque()
        with ThreadPoolExecutor(max(depth, 1), thread_name_prefix="frame") as pool:
            try:
                for frame in itertools.islice(self.frames(assembler), part, None, parts):
                    waiting.append(pool.submit(self._ready, frame))
                    if len(waiting) > depth:
                        yield waiting.popleft().result()
            except NmpError as exc:
                error = str(exc)
            yield from (future.result() for future in waiting)
        yield Ended(assembler.drops, assembler.last_error, error)

    def _ready(self, frame: Frame) -> Ready:
        light = replace(frame, shots=())
        try:
            return Ready(light, decode(frame, self.config, self.min_cameras))
        except NmpError as exc:
            return Ready(light, None, str(exc))


def made_ready(source: Source, *, beside: bool, processes: int | None = None) -> Iterator[Ready | Ended]:
    """Yield what a source gives, made in this process or, ahead of who wants it, by others beside it.

    Made beside it, the images of an item are good until the next one is asked for: they lie in memory that both
    processes see and use again, as new memory would cost more than the copy. Raises :class:`NmpError` when another
    process dies.

    :param processes: beside this one; None for as many as the cores allow
    """
    if not beside:
        # nothing is done ahead: on a CPU both would take the cores from each other
        yield from source.items()
        return
    parts = processes or max(1, min(_PROCESSES, len(os.sched_getaffinity(0)) // _CORES))
    makers: list[_Maker] = []
    try:
        for part in range(parts):
            makers.append(_Maker(source, part, parts))
        for maker in itertools.cycle(makers):
            item, slot = maker.take()
            yield item
            if isinstance(item, Ended):
                return
            if slot is not None:
                maker.free(slot)
    finally:
        for maker in makers:
            maker.leave()
        for maker in makers:
            maker.end()


class _Maker:
    """A process that reads the whole bag and makes every so many-th item of it.

    Reading is cheap beside decoding, and so nothing has to be handed from one of them to the other.
    """

    def __init__(self, source: Source, part: int, parts: int) -> None:
        # not a fork: this process may have a GPU and threads, which it would tear apart
        context = get_context("spawn")
        self._bag = source.bag
        room = context.RawArray("B", math.prod(_shape(source)))
        self._images = _images_in(room, source)
        self._ready, told = context.Pipe(duplex=False)
        freed, self._free = context.Pipe(duplex=False)
        arguments = (source, part, parts, room, told, freed)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name=f"source {part}")
        self._process.start()
        told.close()
        freed.close()

    def take(self) -> tuple[Ready | Ended, int | None]:
        """Wait for the next item; returns it with the slot that its images lie in."""
        try:
            item, rest, slot = self._ready.recv()
        except (EOFError, OSError) as exc:
            self._process.join()
            why = f"exit code {self._process.exitcode}: is there enough memory?"
            raise NmpError(f"the process that reads {self._bag} has died ({why})") from exc
        if rest is None:
            return item, None
        pixel_from_base, present, seconds = rest
        small = torch.from_numpy(pixel_from_base), torch.from_numpy(present)
        return item._replace(decoded=Decoded(self._images[slot], *small, seconds)), slot

    def free(self, slot: int) -> None:
        with suppress(OSError):  # it may have said all and gone
            self._free.send(slot)

    def leave(self) -> None:
        """Tell the process that nobody wants more."""
        self._ready.close()
        self._free.close()

    def end(self) -> None:
        self._process.join(timeout=_PATIENCE_S)
        self._process.kill()
        self._process.join()


def _shape(source: Source) -> tuple[int, int, int, int, int]:
    return _SLOTS, len(CAMERAS), source.config.input_height, source.config.input_width, 3


def _images_in(room: Any, source: Source) -> Tensor:
    """Return the images [slots, 1, 6, 3, H, W] in shared memory; each lies there pixel by pixel, as it was decoded.

    Any other order would be turned round twice, which takes as long as the network on a GPU.
    """
    images = torch.frombuffer(room, dtype=torch.uint8).view(_shape(source))
    return images.permute(0, 1, 4, 2, 3)[:, None]


def _serve(source: Source, part: int, parts: int, room: Any, told: Connection, freed: Connection) -> None:
    """Put the images of each frame into a free slot, and tell of it; until the other process is gone."""
    prepare_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other process, and that ends this one
    images = _images_in(room, source)
    slots = list(range(_SLOTS))
    for item in source.items(DECODERS, part, parts):
        rest, slot = None, -1
        try:
            if isinstance(item, Ready) and item.decoded is not None:
                slot = slots.pop() if slots else freed.recv()
                images[slot].copy_(item.decoded.images)
                # torch would send a tensor by a file of its own, whatever its size
                rest = item.decoded.pixel_from_base.numpy(), item.decoded.present.numpy(), item.decoded.seconds
                item = item._replace(decoded=None)
            told.send((item, rest, slot))
        except (EOFError, OSError):  # nobody wants more
            return
