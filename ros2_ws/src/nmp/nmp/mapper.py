"""The online mapper: frames in, local map layers out, the city prior in between. No ROS here.

The same class runs under the ROS node, in bag replay and in the trainer's evaluation.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmp.defaults import RESIDENT_MB, STALE_DAYS
from nmp.drift import Drift
from nmp.errors import NmpError
from nmp.frame import CAMERAS, UNSTATED_STD, Frame, LocalMap
from nmp.gate import GateLimits, PoseGate, doubted
from nmp.geometry import Array, BevGrid, yaw_of
from nmp.model.config import NetworkConfig
from nmp.model.fusion import EVIDENCE_SCALE
from nmp.model.network import BEVNetwork
from nmp.model.preprocess import network_input
from nmp.model.runner import Answer, Runner, choose_device, prepare, window_side
from nmp.model.weights import load_network, read_description
from nmp.prior import CityPrior, PriorSpec, Window
from nmp.prior.coding import Coding, coding_of
from nmp.prior.record import Record
from nmp.prior.storage import Place, Storage

log = logging.getLogger(__name__)

AGAIN_S = 3.0
"""from one attempt to open or read a city that could not be to the next, s"""


def default_prior_dir() -> Path:
    """Return the folder of the city prior when none is named (XDG base directory specification)."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "nmp" / "prior"


class Decoded(NamedTuple):
    """The images of a frame as the network takes them, see :func:`nmp.model.preprocess.network_input`."""

    images: Tensor
    pixel_from_base: Tensor
    present: Tensor
    seconds: float
    """what decoding took, s"""


class _Attempt(NamedTuple):
    """To open a city."""

    begun_s: float
    """monotonic clock"""
    done: Future[None]


class _LookedUp(NamedTuple):
    """What was stored around a pose."""

    city: CityPrior | None
    """None where there is nothing that could be read or written"""
    window: Window
    stale: NDArray[np.uint16] | None
    """[side, side] evidence that the network is not told of"""
    pose: Tensor
    """[1, 3] x, y (m) from the corner of the window, yaw (rad)"""


class OnlineMapper:
    """Maps frames to layers and remembers what it saw.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param prior_dir: folder or URL of the city prior, None for :func:`default_prior_dir`; made when missing
    :param use_prior: False neither reads nor writes a prior: every frame stands alone
    :param flush_interval_s: longest time that an update stays in memory only
    :param resident_mb: memory for the tiles of a city, MiB
    :param stale_days: what was not seen for so long counts for less when it is read (:meth:`CityPrior.stale`), and is
        stored as it was; 0: age makes no difference
    :param vehicle: who drives: kept with what this drive adds to the prior
    :param whole: a drive counts only when :meth:`close` was reached: nothing of it is kept after a crash
    :param coded: cities that this mapper begins have the coding beside the weights, where there is one
    :param limits: of the poses with which the prior is used
    :param device: cpu, cuda, cuda:1 ... or auto (a GPU where there is one)
    :param precision: fp32, bf16, or auto (bf16 where the device computes in it)
    :param compiled: compile the network for the GPU, which takes a minute at the start; on a CPU this is left out

    :param min_cameras: images that a frame must have; the network is told which ones are missing
    :param tolerant: frames are mapped without a prior while it cannot be opened or read, for a car that must not be
        blind; else they are refused

    Raises :class:`NmpError` for weights that do not load, for a prior that another model wrote, and for a device that
    is not there or too small.
    """

    def __init__(
        self,
        weights: Path | None = None,
        prior_dir: Place | None = None,
        *,
        use_prior: bool = True,
        flush_interval_s: float = 2.0,
        resident_mb: int = RESIDENT_MB,
        stale_days: float = STALE_DAYS,
        vehicle: str = "",
        whole: bool = False,
        coded: bool = True,
        limits: GateLimits | None = None,
        device: str = "cpu",
        precision: str = "auto",
        compiled: bool = False,
        min_cameras: int = len(CAMERAS),
        tolerant: bool = False,
    ) -> None:
        place = choose_device(device)
        self.network, self.fingerprint = load_network(weights)
        self.config = self.network.config
        self.prior_dir: Place = prior_dir if prior_dir is not None else default_prior_dir()
        self.use_prior = use_prior
        self._flush_interval_s = flush_interval_s
        self._resident_mb = resident_mb
        # The state of the paper's recurrent unit is no sum, of which a part could be left out.
        self._stale_s = stale_days * 86400.0 if self.config.fusion == "evidence" else 0.0
        self._vehicle = vehicle
        self._whole = whole
        self._tolerant = tolerant
        self.min_cameras = min_cameras
        """images that a frame must have"""
        coding = coding_of(read_description(weights)) if coded else None
        self.city_spec = _spec_of(self.network, self.fingerprint, coding)
        """of cities that this mapper begins"""
        # The prior caps the evidence. The network must not: the weight of a frame could no longer be told.
        if self.config.fusion == "evidence":
            self.network.fusion.cap = math.inf
        self.prior_error = ""
        """why the last update could not be saved, or had no prior; empty when it was saved, or when it waits for the
        next flush. Storing goes on after :meth:`update` has returned: until it is done (:meth:`settle`) this is about
        the update before"""
        self.gates = PoseGate(limits)
        """judges the poses: how often and why a frame was not stored"""
        self._drift = Drift()
        self.stages_s: dict[str, float] = {}
        """what each stage of the last update took, s; writing the prior is that of the update before"""
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._stored: Future[None] | None = None
        """of what the last frame saw"""
        self._wrote_s = 0.0
        self._cities: dict[str, CityPrior] = {}
        self._attempts: dict[str, _Attempt] = {}
        """the last one for each city that this drive came to"""
        self._read_again_s = 0.0
        """no cells are read before, monotonic clock; 0 when the last ones could be read"""
        if use_prior and (stored := Storage(self.prior_dir)).local is not None:
            # A foreign prior is refused before the first frame, not after the drive has begun. Behind a URL that would
            # list every tile: there it is refused with the first frame.
            for found in stored.children():
                CityPrior.open(self.prior_dir, found, self.city_spec, read_only=True).close()
        self._side = window_side(self.config)
        prepare(self.network, place, precision)
        self._runner = Runner(
            self.network, side=self._side if use_prior else None, precision=precision, compiled=compiled
        )

    @property
    def device(self) -> torch.device:
        """What the network is computed on."""
        return self._runner.device

    @property
    def grid(self) -> BevGrid:
        """The grid of the published layers."""
        return self.config.layer_grid

    def city(self, location: str) -> CityPrior:
        """Return the open prior of a city, with all that was mapped so far.

        Raises :class:`NmpError` when it cannot be opened.
        """
        self.settle()
        self._end_attempts()
        if location not in self._cities:
            self._open(location)
        return self._cities[location]

    def _open(self, location: str) -> None:
        self._cities[location] = CityPrior.open(
            self.prior_dir,
            location,
            self.city_spec,
            flush_interval_s=self._flush_interval_s,
            resident_mb=self._resident_mb,
            vehicle=self._vehicle,
            whole=self._whole,
        )
        if self.prior_error:
            log.warning("the prior of %s is open now: what is seen is remembered from here on", location)
        self.prior_error = ""

    def _attempt(self, location: str, done: Future[None]) -> None:
        try:
            self._open(location)
        except Exception as error:  # belongs to the one who asks for the city
            done.set_exception(error)
        else:
            done.set_result(None)

    def _city_if_it_opens(self, location: str) -> CityPrior | None:
        """Return the open prior of a city; None, and :attr:`prior_error`, while it cannot be opened.

        The first attempt is waited for, as no drive should begin without what is known; later ones are made beside the
        frames, as a store that cannot be reached takes its time.
        """
        if not self._tolerant:
            return self.city(location)
        if location in self._cities:
            return self._cities[location]
        attempt, now = self._attempts.get(location), time.monotonic()
        if attempt is None or (attempt.done.done() and now - attempt.begun_s > AGAIN_S):
            first = attempt is None
            attempt = self._attempts[location] = _Attempt(now, Future())
            # Not in a pool: a disk that hangs would keep the process from ending.
            threading.Thread(target=self._attempt, args=(location, attempt.done), name="open", daemon=True).start()
            if first:
                wait((attempt.done,))
        if not attempt.done.done():
            return None
        try:
            attempt.done.result()
        except NmpError as error:
            self._go_without(error)
            return None
        return self._cities[location]

    def _go_without(self, error: NmpError) -> None:
        text = f"mapping without a prior, nothing is remembered: {error}"
        if text != self.prior_error:
            log.error("%s", text)
        self.prior_error = text

    def _read(self, city: CityPrior, window: Window) -> bool:
        """Read the cells of a window; False, and :attr:`prior_error`, where the frame is to be mapped without them."""
        now = time.monotonic()
        if now < self._read_again_s:
            return False
        try:
            city.read(window, self._runner.window)
        except NmpError as error:
            if not self._tolerant:
                raise
            # A store that cannot be reached takes seconds to say so: not with every frame.
            self._read_again_s = time.monotonic() + AGAIN_S
            self._go_without(error)
            return False
        if self._read_again_s:
            self._read_again_s, self.prior_error = 0.0, ""
        return True

    def expect(self, location: str) -> None:
        """Open the prior of a city before its first frame, which would have to wait for it.

        Raises :class:`NmpError` when it cannot be opened, but where frames are mapped without it then.
        """
        self._city_if_it_opens(location)

    def _end_attempts(self) -> None:
        """Wait until nobody tries to open a city any more."""
        wait([attempt.done for attempt in self._attempts.values()])

    def update(self, frame: Frame, decoded: Decoded | None = None) -> LocalMap:
        """Map one frame, and add what it saw to the prior, unless its pose is doubtful (:attr:`gates`).

        :param decoded: its images, where they were decoded before, beside the last frame

        Raises :class:`NmpError` for bad input, before anything stored is changed.
        """
        if not frame.location:
            raise NmpError("frame names no location: set the parameter 'location' or publish the topic 'location'")
        clock = _Stages()
        ready = decoded or decode(frame, self.config, self.min_cameras)
        clock.done("decoding")
        clock.seconds["decoding"] = ready.seconds
        self._runner.see(*ready[:3])
        if not self.use_prior:
            answer = _checked(self._runner.answer())
            clock.done("network")
            self.stages_s = clock.seconds
            return self._local_map(frame, answer)

        clock.done("network")
        self.settle()
        clock.restart()
        weight = self.gates.check(frame)
        if self.gates.doubts_motion:
            frame = replace(frame, position_std=UNSTATED_STD[0], yaw_std=UNSTATED_STD[1])
            self._drift.restart()
        believed = self._drift.expect(frame)
        x, y, yaw = _planar(frame) + believed.offset
        looked = self._look_up(frame, x, y, yaw)
        if weight < 1:
            evidence = self._runner.window[1]
            evidence[...] = doubted(evidence, weight, EVIDENCE_SCALE)
        clock.done("reading prior")
        answer = _checked(self._runner.answer(looked.pose, torch.tensor([[*believed[1:]]])))
        self._drift.learn(yaw, answer.found)
        clock.done("network")
        self.stages_s = clock.seconds | {"writing prior": self._wrote_s}
        if self.gates.may_store(answer.found) and looked.city is not None:
            self._stored = self._storing.submit(self._store, looked, answer, frame.stamp_ns)
        return self._local_map(frame, answer)

    def measure(self, frame: Frame) -> NDArray[np.float32] | None:
        """Return what the pose search finds from the pose of a frame, whatever frames before it found.

        Nothing is stored, and what follows is as if it had not been asked for.

        :return: [4, 3] as in :class:`nmp.model.runner.Answer`; None for a network without a search, and without a prior

        Raises :class:`NmpError` for bad input.
        """
        if not self.use_prior:
            return None
        self._runner.see(*decode(frame, self.config, self.min_cameras)[:3])
        self.settle()
        looked = self._look_up(frame, *_planar(frame))
        found = _checked(self._runner.answer(looked.pose, torch.tensor([[frame.position_std, frame.yaw_std]]))).found
        return None if found is None else found.copy()

    def _look_up(self, frame: Frame, x: float, y: float, yaw: float) -> _LookedUp:
        """Put what is stored around a pose (m, rad) into the window of the runner."""
        cell = self.config.prior_cell
        window = Window.around(x, y, cell, self._side, self._side)
        city = self._city_if_it_opens(frame.location)
        if city is not None:
            city.prefetch(x, y, yaw)
        latent, evidence = self._runner.window
        if city is None or not self._read(city, window):
            city = None
            latent.fill(0)  # with nothing in it the network gives what it gives without a prior
            evidence.fill(0)
        stale = city.stale(window, frame.stamp_ns, self._stale_s) if city is not None and self._stale_s else None
        if stale is not None:
            np.minimum(stale, evidence, out=stale)
            evidence -= stale
        # Coordinates relative to the window keep float32 exact to a micrometre anywhere in a city.
        pose = torch.tensor([[x - window.col * cell, y - window.row * cell, yaw]], dtype=torch.float32)
        return _LookedUp(city, window, stale, pose)

    def settle(self) -> None:
        """Wait until what the last frame saw is stored; every other method that needs it does so by itself."""
        stored, self._stored = self._stored, None
        if stored is not None:
            stored.result()

    def _store(self, looked: _LookedUp, answer: Answer, stamp_ns: int) -> None:
        city, window, stale, _ = looked
        assert city is not None and answer.latent is not None and answer.evidence is not None
        begin = time.monotonic()
        try:
            latent, evidence = answer.latent, answer.evidence
            if stale is not None:
                latent, evidence = _with_stale(latent, evidence, self._runner.window[0], stale)
            city.write(window, latent, evidence, stamp_ns, changed=answer.seen)
            self.prior_error = city.unsaved  # a write succeeds in memory while the disk is full
        except NmpError as error:
            # A full disk must not blind the car: the layers are right, only what is remembered is at risk.
            self.prior_error = str(error)
            log.error("%s", error)
        self._wrote_s = time.monotonic() - begin

    def _local_map(self, frame: Frame, answer: Answer) -> LocalMap:
        step = round(self.config.feature_resolution / self.config.layer_resolution)
        if answer.known is None:
            evidence = np.ones(self.grid.shape, np.float32)
        else:
            evidence = answer.known.repeat(step, axis=0).repeat(step, axis=1)
        return LocalMap(
            stamp_ns=frame.stamp_ns,
            location=frame.location,
            map_from_base=frame.map_from_base,
            grid=self.grid,
            probabilities=answer.probabilities.copy(),
            evidence=evidence,
        )

    def traversals(self, location: str, points: Array) -> NDArray[np.int64] | None:
        """Return how many drives saw the cells of a city at points [N, 2] (map frame, m), this one included.

        What the last frame saw may not be counted yet. None where no prior is open, or it cannot be read.
        """
        city = self._cities.get(location)
        if city is None or self._read_again_s or not len(points):
            return None
        cells = np.floor(points / self.config.prior_cell).astype(np.int64)
        (col, row), (cols, rows) = cells.min(axis=0), np.ptp(cells, axis=0) + 1
        try:
            counts = city.traversals(Window(int(row), int(col), int(rows), int(cols)))
        except NmpError as error:  # the next frame needs these cells, too, and tells of it
            log.debug("no traversals: %s", error)
            return None
        return counts[cells[:, 1] - row, cells[:, 0] - col].astype(np.int64)

    def prior_counts(self) -> Mapping[str, int]:
        """Return what the open cities hold, by kind: tiles, bytes, ..."""
        self.settle()
        counts = Counter[str]()
        for city in list(self._cities.values()):
            counts.update({name.replace("_", " "): count for name, count in city.statistics().items()})
        return counts

    @property
    def damage(self) -> str:
        """What of the open cities was found damaged last, and what to do; empty when nothing that was read is.

        From any thread.
        """
        return next((city.damage for city in list(self._cities.values()) if city.damage), "")

    def flush(self) -> None:
        """Write everything that the prior holds to disk.

        Raises :class:`NmpError` when that is not possible, also because a city cannot be opened.
        """
        self.settle()
        for location in self._attempts:
            self.city(location)
        for city in self._cities.values():
            city.flush()

    def use(self, prior_dir: Place) -> None:
        """Let go of the prior, and go on with the one in another folder or at another URL."""
        self.close()
        self.prior_dir = prior_dir

    def close(self, recording: str = "") -> dict[str, Record]:
        """Commit what this drive added to the prior, release it, and return the drive by city. Safe to call twice.

        More frames begin a new drive.

        :param recording: hash of the recording that was mapped from its first to its last frame, where it was one
        """
        self.settle()
        self._end_attempts()
        self._attempts.clear()
        self.gates.restart()
        self._drift.restart()
        added = {}
        while self._cities:
            location, city = self._cities.popitem()
            if record := city.close(recording):
                added[location] = record
        return added

    def discard(self) -> None:
        """Release the prior without what this drive added to it."""
        self.settle()
        self._end_attempts()
        self._attempts.clear()
        self.gates.restart()
        self._drift.restart()
        while self._cities:
            _, city = self._cities.popitem()
            city.discard()

    def __enter__(self) -> OnlineMapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._whole:
            self.discard()
        else:
            self.close()


class _Stages:
    """A stopwatch for what follows one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at_s = time.monotonic()

    def done(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._at_s
        self._at_s = now

    def restart(self) -> None:
        """Do not count the time since the last stage."""
        self._at_s = time.monotonic()


def decode(frame: Frame, config: NetworkConfig, min_cameras: int) -> Decoded:
    """Decode the images of a frame, for :meth:`OnlineMapper.update`; from any thread.

    Raises :class:`NmpError` for bad ones.
    """
    begin = time.monotonic()
    images = masked_input(frame, config, min_cameras)
    return Decoded(*images, time.monotonic() - begin)


def masked_input(frame: Frame, config: NetworkConfig, min_cameras: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images, pixel_from_base, present) of :func:`network_input` for a frame that may lack cameras.

    A camera without a shot is black and not present, as where training drops cameras. Where it would look makes no
    difference then. Raises :class:`NmpError` when there are fewer shots than ``min_cameras``.
    """
    there = {shot.camera.name for shot in frame.shots}
    lost = [name for name in CAMERAS if name not in there]
    if not lost or len(there) < max(min_cameras, 1):
        return network_input(frame, config)
    first = frame.shots[0]
    black = np.zeros((first.camera.height, first.camera.width, 3), np.uint8)
    stand_ins = [replace(first, camera=replace(first.camera, name=name), image=black) for name in lost]
    images, pixel_from_base, present = network_input(replace(frame, shots=(*frame.shots, *stand_ins)), config)
    present[0, [CAMERAS.index(name) for name in lost]] = 0.0
    return images, pixel_from_base, present


def _planar(frame: Frame) -> Array:
    """Return x, y (m) and yaw (rad) of the given pose."""
    return np.array([frame.map_from_base[0, 3], frame.map_from_base[1, 3], yaw_of(frame.map_from_base)])


def _spec_of(network: BEVNetwork, fingerprint: str, coding: Coding | None) -> PriorSpec:
    """What a network keeps in the cells of a city, and how drives add up there."""
    config = network.config
    cap = round(config.evidence_cap * EVIDENCE_SCALE)
    # The state of the paper's recurrent unit is no sum of anything: the newest drive's is taken.
    merge = "sum" if config.fusion == "evidence" else "latest"
    return PriorSpec(
        network.state_channels, config.prior_cell, fingerprint, merge=merge, evidence_cap=cap, coding=coding
    )


def _with_stale(
    latent: NDArray[np.int8], evidence: NDArray[np.uint16], before: NDArray[np.int8], stale: NDArray[np.uint16]
) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Return updated cells with the evidence that was left out when they were read.

    :param latent: [channels, rows, cols] the mean of what was read and what was seen; ``evidence`` [rows, cols]: theirs
    :param before: [channels, rows, cols] the latents that were read
    :param stale: [rows, cols] evidence behind these that the network was not told of
    """
    total = evidence.astype(np.float32) + stale
    mean = (latent * evidence.astype(np.float32) + before * stale.astype(np.float32)) / np.maximum(total, 1)
    return np.rint(mean).astype(np.int8), np.minimum(total, 65535).astype(np.uint16)


def _checked(answer: Answer) -> Answer:
    if not answer.finite:
        raise NmpError("the network's output is not finite: the weights or the images are damaged; nothing was stored")
    return answer
