"""The cameras' mounting from a file, for cars that publish none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from nmp.errors import NmpError
from nmp.geometry import Array, transform_from


def read_extrinsics(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Return base_from_camera [4, 4] of every camera: optical frame (x right, y down, z forward) to base_link.

    The file maps each name to ``translation: [x, y, z]`` (m) and ``rotation: [x, y, z, w]`` (a quaternion). Raises
    :class:`NmpError` when it cannot be read, or lacks a camera.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise NmpError(f"cannot read the cameras' mounting from {path} ({' '.join(str(error).split())})") from error
    out = {}
    for name in names:
        try:
            entry = content[name]
            translation = np.array(entry["translation"], dtype=np.float64)
            rotation = np.array(entry["rotation"], dtype=np.float64)
            if translation.shape != (3,) or rotation.shape != (4,):
                raise ValueError("a length is wrong")
            out[name] = transform_from(translation, rotation)
        except (KeyError, TypeError, ValueError, NmpError) as error:
            raise NmpError(
                f"{path} has no usable mounting of {name} ({error}): give translation: [x, y, z] in m and "
                "rotation: [x, y, z, w]"
            ) from error
    return out
