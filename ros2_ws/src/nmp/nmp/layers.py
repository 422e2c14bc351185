"""Layers on disk: one small file per keyframe, the same bytes for the same layers.

Written by replay (``nmp map``) and by the recorder of a live run; read by ``nmp eval``. A file holds what an
OccupancyGrid carries: -1 for unknown, else the probability in percent.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.frame import LocalMap
from nmp.geometry import BevGrid


def to_occupancy(local_map: LocalMap) -> NDArray[np.int8]:
    """Return int8 [3, rows, cols]: probability in percent (0..100), -1 where nothing was ever seen."""
    return occupancy(local_map.probabilities, local_map.evidence > 0)


def occupancy(probability: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return the same of probabilities [3, rows, cols] 0..1 and of where anything was seen [rows, cols]."""
    percent = np.rint(probability * 100.0).astype(np.int8)
    # Rounding must not carry a cell over the threshold: more than 50 says present, before and after.
    percent += (probability > 0.5) & (percent == 50)
    percent[:, ~seen] = -1
    return percent


class LayerWriter:
    """Writes layers into a folder as ``<stamp_ns>.npz``."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NmpError(f"cannot write layers to {folder} ({error.strerror}): choose another --out") from error

    def write(self, local_map: LocalMap) -> None:
        path = self.folder / f"{local_map.stamp_ns}.npz"
        partial = path.with_suffix(".tmp")
        try:
            with partial.open("wb") as stream:
                np.savez_compressed(
                    stream,
                    occupancy=to_occupancy(local_map),
                    map_from_base=local_map.map_from_base,
                    grid=np.array([local_map.grid.length, local_map.grid.width, local_map.grid.resolution]),
                    location=np.array(local_map.location),
                    stamp_ns=np.array(local_map.stamp_ns, dtype=np.int64),
                )
            partial.replace(path)
        except OSError as error:
            raise NmpError(
                f"cannot write {path} ({error.strerror}): free some space or choose another --out"
            ) from error


def layer_files(folder: Path) -> list[Path]:
    """Return the layer files of a folder in time order; :class:`NmpError` when there are none."""
    paths = sorted(Path(folder).glob("*.npz"), key=lambda p: int(p.stem) if p.stem.isdigit() else -1)
    if not paths:
        raise NmpError(f"no layers in {folder}: give the folder that 'nmp map --out' or the recorder wrote")
    return paths


def read_layers(folder: Path) -> Iterator[LocalMap]:
    """Yield the layers of a folder in time order; unknown cells come back as probability 0, evidence 0."""
    return (read_layer(path) for path in layer_files(folder))


def read_layer(path: Path) -> LocalMap:
    """Return the layers of one file; :class:`NmpError` when it is none, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            occupancy = data["occupancy"]
            length, width, resolution = (float(v) for v in data["grid"])
            return LocalMap(
                stamp_ns=int(data["stamp_ns"]),
                location=str(data["location"]),
                map_from_base=data["map_from_base"],
                grid=BevGrid(length, width, resolution),
                probabilities=np.maximum(occupancy, 0).astype(np.float32) / 100.0,
                evidence=(occupancy[0] >= 0).astype(np.float32),
            )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise NmpError(f"{path} is not a layer file ({error}): write the layers again") from error
