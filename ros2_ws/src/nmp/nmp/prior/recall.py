"""What the prior alone says: stored latents decoded to layers, without an image."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from nmp.frame import CAMERAS
from nmp.geometry import BevGrid
from nmp.model.fusion import EvidenceFusion, map_to_ego, means
from nmp.model.network import BEVNetwork
from nmp.model.preprocess import example_projection
from nmp.model.runner import prepare, read_quantized

CELL_PX = 2
"""pixels of the decoded layers along each edge of a cell"""
REACH = 88
"""cells of the features from which nothing further away can be felt by the convolutions (what lies beyond changes no
probability by more than rounding, 1e-4 with the shipped networks); a multiple of eight, because the fusion also looks
at every eighth cell"""


class Recall:
    """Decodes cells of the map as if a car stood on them, heading east, whose cameras deliver nothing.

    The decoder reads the sum of what is seen and what is remembered. What is seen is here what the network makes of no
    image at all, the mean over the region, so that it is the same at every place. (The state of the paper's recurrent
    fusion is what its decoder reads: nothing is added to that.)
    """

    def __init__(self, network: BEVNetwork) -> None:
        """Take a network on the CPU; it is made ready for running and can no longer be trained."""
        self._network = prepare(network)
        config = network.config
        self.margin = math.ceil(REACH * config.feature_resolution / config.prior_cell)
        """cells around the wanted ones that have to be known as well, so that these come out as they would in a whole
        city"""
        self.nothing = torch.zeros(1, config.bev_channels, 1, 1)
        """stands for the features of an image"""
        if isinstance(network.fusion, EvidenceFusion):
            images = torch.zeros(1, len(CAMERAS), 3, config.input_height, config.input_width)
            with torch.no_grad():
                bev = network.encode(images, example_projection(config), torch.zeros(1, len(CAMERAS)))
            self.nothing = bev.mean((2, 3), keepdim=True)

    @torch.no_grad()
    def __call__(self, latent: NDArray[np.int8], evidence: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return the probabilities [3, 2 rows, 2 cols] of the classes; row 0 is the southern edge.

        :param latent: [channels, rows, cols] as a :class:`~nmp.prior.CityPrior` reads it
        :param evidence: [rows, cols] of the same cells
        """
        network, config = self._network, self._network.config
        rows, cols = evidence.shape
        memory = read_quantized(
            torch.from_numpy(latent)[None], torch.from_numpy(np.ascontiguousarray(evidence).view(np.int16))[None, None]
        )
        cell = config.prior_cell
        length, width = cols * cell, rows * cell
        grid = BevGrid(length, width, config.feature_resolution)
        pose, origin = torch.tensor([[length / 2, width / 2, 0.0]]), torch.zeros(1, 2)
        if isinstance(network.fusion, EvidenceFusion):
            latents, weight = means(map_to_ego(network.fusion.opened(memory), pose, grid, origin, cell))
            bev = self.nothing.expand(-1, -1, *weight.shape[-2:])
            features = network.fusion.fuse(bev, latents, weight)
        else:
            state = torch.where(memory.evidence > 0, memory.latent, 0.0)
            features = map_to_ego(state, pose, grid, origin, cell, "nearest")
        layers = torch.sigmoid(network.decode(features).logits)[0].numpy()
        size = (cols * CELL_PX, rows * CELL_PX)
        if layers.shape[:0:-1] == size:
            return layers
        return np.stack([cv2.resize(layer, size, interpolation=cv2.INTER_LINEAR) for layer in layers])
