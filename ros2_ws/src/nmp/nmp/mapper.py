"""The online mapper: frames in, local map layers out, the city prior in between. No ROS here.

The same class runs under the ROS node, in bag replay and in the trainer's evaluation.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmp.errors import NmpError
from nmp.frame import CAMERAS, Frame, LocalMap
from nmp.geometry import BevGrid, yaw_of
from nmp.model import fusion
from nmp.model.preprocess import network_input
from nmp.model.weights import load_network
from nmp.prior import CityPrior, PriorSpec, Window

log = logging.getLogger(__name__)


def default_prior_dir() -> Path:
    """Return the folder of the city prior when none is named (XDG base directory specification)."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "nmp" / "prior"


class OnlineMapper:
    """Maps frames to layers and remembers what it saw.

    :param weights: .safetensors file, None for the weights that come with nmp
    :param prior_dir: folder of the city prior, None for :func:`default_prior_dir`; made when missing
    :param use_prior: False neither reads nor writes a prior: every frame stands alone
    :param flush_interval_s: longest time that an update stays in memory only

    Raises :class:`NmpError` for weights that do not load and for a prior that another model wrote.
    """

    def __init__(
        self,
        weights: Path | None = None,
        prior_dir: Path | None = None,
        *,
        use_prior: bool = True,
        flush_interval_s: float = 2.0,
    ) -> None:
        self.network, self.fingerprint = load_network(weights)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = self.network.config
        self.prior_dir = Path(prior_dir) if prior_dir is not None else default_prior_dir()
        self.use_prior = use_prior
        self._flush_interval_s = flush_interval_s
        self._spec = PriorSpec(self.network.state_channels, self.config.prior_cell, self.fingerprint)
        self.prior_error = ""
        """why the last update could not be saved; empty when it could, or when it waits for the next flush"""
        self._cities: dict[str, CityPrior] = {}
        # one block of cells that holds the BEV region at any heading
        diagonal = math.hypot(self.config.bev_length, self.config.bev_width)
        self._side = 2 * math.ceil(diagonal / self.config.prior_cell / 2) + 2
        if use_prior and self.prior_dir.is_dir():
            # A foreign prior is refused before the first frame, not after the drive has begun.
            for found in sorted(p.name for p in self.prior_dir.iterdir() if p.is_dir()):
                CityPrior.open(self.prior_dir, found, self._spec, read_only=True).close()

        self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run the network once on nothing: the first call prepares its kernels, and no frame should wait for that."""
        height, width = self.config.input_height, self.config.input_width
        cameras = len(CAMERAS)
        images = torch.zeros(1, cameras, 3, height, width, dtype=torch.uint8)
        bev = self.network.encode(images, torch.zeros(1, cameras, 3, 4), torch.ones(1, cameras))
        memory = fusion.Memory.empty(1, self.network.state_channels, self._side, self._side)
        self.network.step(bev, memory, torch.zeros(1, 3), torch.zeros(1, 2))

    @property
    def grid(self) -> BevGrid:
        """The grid of the published layers."""
        return self.config.layer_grid

    def city(self, location: str) -> CityPrior:
        """Return the open prior of a city."""
        if location not in self._cities:
            self._cities[location] = CityPrior.open(
                self.prior_dir, location, self._spec, flush_interval_s=self._flush_interval_s
            )
        return self._cities[location]

    @torch.inference_mode()
    def update(self, frame: Frame) -> LocalMap:
        """Map one frame, and add what it saw to the prior.

        Raises :class:`NmpError` for bad input, before anything stored is changed.
        """
        if not frame.location:
            raise NmpError("frame names no location: set the parameter 'location' or publish the topic 'location'")
        images, pixel_from_base, present = network_input(frame, self.config)
        bev = self.network.encode(images, pixel_from_base, present)
        if not self.use_prior:
            logits = self.network.decode(bev).logits
            return self._local_map(frame, logits, np.ones(self.grid.shape, np.float32))

        x, y = float(frame.map_from_base[0, 3]), float(frame.map_from_base[1, 3])
        cell = self.config.prior_cell
        window = Window.around(x, y, cell, self._side, self._side)
        city = self.city(frame.location)
        latent_q, evidence_q = city.read(window)
        memory = fusion.Memory(
            torch.from_numpy(latent_q).float()[None] / fusion.LATENT_SCALE,
            torch.from_numpy(evidence_q.astype(np.float32))[None, None] / fusion.EVIDENCE_SCALE,
        )
        # Coordinates relative to the window keep float32 exact to a micrometre anywhere in a city.
        pose = torch.tensor([[x - window.col * cell, y - window.row * cell, yaw_of(frame.map_from_base)]])
        origin = torch.zeros(1, 2)
        output, memory = self.network.step(bev, memory, pose, origin)
        if not torch.isfinite(output.logits).all():
            raise NmpError(
                "the network's output is not finite: the weights or the images are damaged; nothing was stored"
            )
        if output.alignment is not None:
            pose = fusion.moved(pose, output.alignment.offset)
        region = torch.ones(1, 1, *self.config.feature_grid.shape)
        seen = fusion.ego_to_map(region, pose, self.config.feature_grid, origin, cell, self._side, self._side)
        try:
            city.write(
                window,
                _quantize(memory.latent[0], fusion.LATENT_SCALE, -127, 127).astype(np.int8),
                _quantize(memory.evidence[0, 0], fusion.EVIDENCE_SCALE, 0, 65535).astype(np.uint16),
                frame.stamp_ns,
                changed=(seen[0, 0] > 0).numpy(),
            )
            self.prior_error = ""
        except NmpError as error:
            # A full disk must not blind the car: the layers are right, only what is remembered is at risk.
            self.prior_error = str(error)
            log.error("%s", error)
        known = fusion.map_to_ego(memory.evidence, pose, self.config.feature_grid, origin, cell)[0, 0]
        step = round(self.config.feature_resolution / self.config.layer_resolution)
        return self._local_map(frame, output.logits, known.numpy().repeat(step, axis=0).repeat(step, axis=1))

    def _local_map(self, frame: Frame, logits: Tensor, evidence: NDArray[np.float32]) -> LocalMap:
        return LocalMap(
            stamp_ns=frame.stamp_ns,
            location=frame.location,
            map_from_base=frame.map_from_base,
            grid=self.grid,
            probabilities=torch.sigmoid(logits[0].float()).numpy(),
            evidence=evidence,
        )

    def flush(self) -> None:
        """Write everything that the prior holds to disk."""
        for city in self._cities.values():
            city.flush()

    def close(self) -> None:
        """Flush and release the prior. Safe to call twice."""
        while self._cities:
            _, city = self._cities.popitem()
            city.close()

    def __enter__(self) -> OnlineMapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _quantize(values: Tensor, scale: float, low: int, high: int) -> NDArray[np.float32]:
    out: NDArray[np.float32] = (values * scale).round().clamp(low, high).numpy()
    return out
