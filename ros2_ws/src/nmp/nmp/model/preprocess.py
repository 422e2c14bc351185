"""Camera shots to network input: decode, scale, crop, and the projection that belongs to the result."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nmp.errors import NmpError
from nmp.frame import CAMERAS, IMAGE_FORMATS, CameraShot, Frame
from nmp.geometry import Array, flatten_to_plane, inverse
from nmp.model.config import NetworkConfig

_EXAMPLE_YAWS_DEG = (0.0, -55.0, -110.0, 180.0, 110.0, 55.0)
"""about where the cameras of nuScenes look, in the order of ``CAMERAS``"""


def network_intrinsics(intrinsics: Array, width: int, height: int, config: NetworkConfig) -> Array:
    """Return the [3, 3] intrinsics of the network input made from an image of this size.

    The image is scaled to the input's width; rows are cut (or added, black) at the top, where the sky is.
    """
    scale = config.input_width / width
    out = intrinsics.copy()
    out[0, 0] *= scale
    out[1, 1] *= scale
    # pixel centres: u' + 0.5 = scale * (u + 0.5)
    out[:2, 2] = (out[:2, 2] + 0.5) * scale - 0.5
    out[1, 2] += config.input_height - round(height * scale)
    return out


def unit_projection(intrinsics: Array, base_from_camera: Array, width: int, height: int) -> Array:
    """Return [3, 4]: base points (m) to homogeneous image coordinates in which 0..1 spans width and height."""
    to_unit = np.array([[1 / width, 0, 0.5 / width], [0, 1 / height, 0.5 / height], [0, 0, 1]])
    return np.asarray(to_unit @ intrinsics @ inverse(base_from_camera)[:3])


def example_projection(config: NetworkConfig) -> Tensor:
    """Return pixel_from_base [1, 6, 3, 4] of six plausible cameras around a car, to try a network without a drive."""
    projections = []
    for yaw in np.radians(_EXAMPLE_YAWS_DEG):
        forward, left = np.array([np.cos(yaw), np.sin(yaw), 0.0]), np.array([-np.sin(yaw), np.cos(yaw), 0.0])
        base_from_camera = np.eye(4)
        base_from_camera[:3, :3] = np.column_stack([-left, [0.0, 0.0, -1.0], forward])
        base_from_camera[:3, 3] = forward + [0.0, 0.0, 1.5]
        intrinsics = np.array([[1266.0, 0.0, 800.0], [0.0, 1266.0, 450.0], [0.0, 0.0, 1.0]])
        scaled = network_intrinsics(intrinsics, 1600, 900, config)
        projections.append(unit_projection(scaled, base_from_camera, config.input_width, config.input_height))
    return torch.from_numpy(np.stack(projections)).float()[None]


def _decode(shot: CameraShot, width: int) -> NDArray[np.uint8]:
    camera = shot.camera
    if isinstance(shot.image, np.ndarray):
        if shot.image.shape != (camera.height, camera.width, 3):
            raise NmpError(
                f"{camera.name}: image is {shot.image.shape[1]} x {shot.image.shape[0]}, camera_info says "
                f"{camera.width} x {camera.height}: calibrate for the images that are sent"
            )
        return shot.image
    try:
        size = Image.open(BytesIO(shot.image), formats=IMAGE_FORMATS).size
    except (UnidentifiedImageError, OSError) as error:
        raise NmpError(f"{camera.name}: image data cannot be decoded ({error}): check the camera driver") from error
    if size != (camera.width, camera.height):
        raise NmpError(
            f"{camera.name}: image is {size[0]} x {size[1]}, camera_info says {camera.width} x {camera.height}: "
            "calibrate for the images that are sent"
        )
    # JPEG decodes at a half, a quarter or an eighth for a fraction of the price; never below what is needed.
    reduce = max(f for f in (1, 2, 4, 8) if f == 1 or camera.width // f >= width)
    flag = {1: 1, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}[reduce]
    bgr = cv2.imdecode(np.frombuffer(shot.image, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        raise NmpError(f"{camera.name}: image data cannot be decoded: check the camera driver")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)  # a turned view would be resized slowly


def network_image(shot: CameraShot, config: NetworkConfig) -> NDArray[np.uint8]:
    """Return the network's view of one image: RGB [input_height, input_width, 3] uint8."""
    image = _decode(shot, config.input_width)
    height = round(shot.camera.height * config.input_width / shot.camera.width)
    shrink = image.shape[1] >= config.input_width
    scaled = cv2.resize(
        image, (config.input_width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    )
    out = np.zeros((config.input_height, config.input_width, 3), np.uint8)
    rows = min(height, config.input_height)
    out[config.input_height - rows :] = scaled[height - rows :]
    return out


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    """Threads that decode the images of a frame side by side; OpenCV lets go of Python's lock meanwhile."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")


def network_input(frame: Frame, config: NetworkConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images [1, 6, 3, H, W] uint8, pixel_from_base [1, 6, 3, 4], present [1, 6]) of a frame.

    Each camera is placed where it was when it fired, seen from the planar ego pose of the frame. Raises
    :class:`NmpError` that names the camera when an image is missing or does not fit its calibration.
    """
    names = [s.camera.name for s in frame.shots]
    missing = [c for c in CAMERAS if c not in names]
    if missing:
        raise NmpError(f"frame has no image of {', '.join(missing)}: check that the camera publishes")
    if not np.isfinite(frame.map_from_base).all():
        raise NmpError("pose is not finite: check the localisation")
    level = flatten_to_plane(frame.map_from_base)
    level[2, 3] = frame.map_from_base[2, 3]  # the road is under the wheels, whatever the map's datum
    ground_from_map = inverse(level)
    shots = [frame.shots[names.index(name)] for name in CAMERAS]
    projections = []
    for shot in shots:
        camera = shot.camera
        if not np.isfinite(shot.map_from_base).all():
            raise NmpError(f"{camera.name}: pose at the image's stamp is not finite: check the localisation")
        intrinsics = network_intrinsics(camera.intrinsics, camera.width, camera.height, config)
        base_from_camera = ground_from_map @ shot.map_from_base @ camera.base_from_camera
        projections.append(unit_projection(intrinsics, base_from_camera, config.input_width, config.input_height))
    images = list(_decoders().map(functools.partial(network_image, config=config), shots))
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[None],
        torch.from_numpy(np.stack(projections)).float()[None],
        torch.ones(1, len(CAMERAS)),
    )
