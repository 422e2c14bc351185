"""Simulated data sets on disk: a nuScenes folder from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from nmp_train.sim.render import Ground, Weather, render, solids_from_boxes
from nmp_train.sim.traffic import Boxes

RenderCall = Callable[..., NDArray[np.uint8]]
MAX_SOLIDS = 80


def make_renderer(ground: Ground, city_index: int = 0) -> RenderCall:
    """Return the ``render`` call of :func:`write_dataset` for one city."""

    def call(
        intrinsics: NDArray[np.float64],
        map_from_camera: NDArray[np.float64],
        boxes: Boxes,
        size: tuple[int, int],
        weather: str,
        seed: int,
    ) -> NDArray[np.uint8]:
        about = map_from_camera[0, :2, 3].copy()
        relative = map_from_camera.copy()
        relative[:, :2, 3] -= about
        # One drive has one weather: its draw depends on the drive, the noise on the image.
        scene_generator = torch.Generator().manual_seed(seed // 100_000)
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            images = render(
                ground,
                torch.tensor([city_index]),
                torch.from_numpy(about)[None],
                torch.from_numpy(intrinsics).float()[None],
                torch.from_numpy(relative).float()[None],
                solids_from_boxes(boxes.centre, boxes.size, boxes.yaw, boxes.rgb, boxes.kind, about, MAX_SOLIDS),
                Weather.sample(1, scene_generator, weather),
                size,
                generator=generator,
            )
        return images[0].permute(0, 2, 3, 1).contiguous().numpy()

    return call
