"""Tiles on disk: one checksummed file each, through TensorStore."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.tiles import FIELD_PLANES, ORIGIN, TILE, Key
from nmp.prior.window import PriorSpec

_log = logging.getLogger(__name__)

_CELLS = "cells"
# TensorStore writes here, then renames
_UNFINISHED = ".__lock"


class TileStore:
    """The tiles of one city on disk.

    ``sizes`` lists what is there: {key: bytes of the file}. Methods may be called from any thread, but
    ``save`` from one at a time. Raises :class:`NmpError` when the array cannot be opened, OSError when the
    folder cannot be listed.
    """

    def __init__(self, folder: Path, spec: PriorSpec, *, read_only: bool) -> None:
        self._folder = (folder / _CELLS).absolute()
        self._read_only = read_only
        self.sizes: dict[Key, int] = _list_tiles(self._folder, clean=not read_only)
        self._array: ts.TensorStore | None = None
        if not read_only or self.sizes:
            self._array = _open_array(self._folder, spec, read_only)

    @staticmethod
    def has_tiles(folder: Path) -> bool:
        """Tell whether any tile lies below a city's folder."""
        return bool(_list_tiles(folder / _CELLS, clean=False))

    def path(self, key: Key) -> Path:
        """Return the file of a tile."""
        return self._folder / "c" / "0" / str(key[0] + ORIGIN) / str(key[1] + ORIGIN)

    def load(self, keys: Iterable[Key]) -> dict[Key, NDArray[np.uint8]]:
        """Return the planes [channels + 6, 64, 64] of those tiles that are on disk and intact.

        A corrupt or missing tile is reported in the log and from then on unknown; the corrupt file is put aside.
        Raises :class:`NmpError` when a file is there but cannot be read, or a corrupt one cannot be put aside.
        """
        pending = {key: self._chunk(key).read() for key in keys if key in self.sizes}
        tiles = {}
        for key, future in pending.items():
            try:
                tiles[key] = future.result()
            except (ValueError, OSError):
                planes = self._load_again(key)
                if planes is not None:
                    tiles[key] = planes
        for key in [key for key, planes in tiles.items() if not planes.any()]:
            # zeros stand for a missing file; a tile that was saved holds at least one time
            _log.warning("tile %s of the prior has vanished and counts as unknown: %s", key, self.path(key))
            del self.sizes[key], tiles[key]
        return tiles

    def save(self, tiles: Mapping[Key, NDArray[np.uint8]]) -> tuple[dict[Key, int], dict[Key, str]]:
        """Write tiles and wait until they are synced to disk.

        Returns the file sizes of the tiles that were saved, and a reason for each that was not; a tile that was
        not saved is on disk as it was before.
        """
        sizes: dict[Key, int] = {}
        failures: dict[Key, str] = {}
        pending = {}
        for key, planes in tiles.items():
            try:
                # TensorStore would write over the start of an unfinished file and keep the rest of it
                os.unlink(f"{self.path(key)}{_UNFINISHED}")
            except OSError:
                pass  # there is none, or the write itself will say what is wrong
            pending[key] = self._chunk(key).write(planes)
        for key, future in pending.items():
            try:
                future.result()
                sizes[key] = self.path(key).stat().st_size
            except (ValueError, OSError) as error:
                failures[key] = reason_of(error)
        return sizes, failures

    def _chunk(self, key: Key) -> ts.TensorStore:
        assert self._array is not None, "an empty read-only store has no tiles"
        row, col = ((index + ORIGIN) * TILE for index in key)
        return self._array[:, row : row + TILE, col : col + TILE]

    def _load_again(self, key: Key) -> NDArray[np.uint8] | None:
        """Tell a damaged file from a failure to read it, which must not cost a good tile."""
        path = self.path(key)
        try:
            path.read_bytes()
        except OSError as error:
            raise NmpError(f"cannot read {path} ({error.strerror}): check the disk and the permissions") from error
        try:
            return self._chunk(key).read().result()
        except (ValueError, OSError) as error:
            if "os_error_code" in str(error):
                raise NmpError(f"cannot read {path} ({reason_of(error)}): check the disk") from error
            self._reject(key, reason_of(error))
            return None

    def _reject(self, key: Key, reason: str) -> None:
        """Report a corrupt tile and put it aside. Raises :class:`NmpError` when that fails."""
        path = self.path(key)
        what = f"tile {key} of the prior is corrupt and counts as unknown ({reason}): {path}"
        if self._read_only:
            _log.warning("%s", what)
        else:
            aside = _free_name(path)
            try:
                path.rename(aside)
            except OSError as error:
                raise NmpError(f"cannot put aside the corrupt {path} ({error.strerror}): check permissions") from error
            _log.warning("%s, kept as %s", what, aside.name)
        del self.sizes[key]


def reason_of(error: BaseException) -> str:
    """Return what TensorStore says went wrong, in one short line."""
    text = " ".join(str(error).split())
    text = re.sub(r"^[A-Z_]+: ", "", text)
    return re.sub(r"(: )?\[(os_error_code|source locations|tensorstore_spec|kvstore_key)=.*$", "", text).strip()


def _open_array(folder: Path, spec: PriorSpec, read_only: bool) -> ts.TensorStore:
    planes = spec.channels + FIELD_PLANES
    extent = 2 * ORIGIN * TILE
    description = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": [planes, extent, extent],
            "dimension_names": ["plane", "row", "column"],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [planes, TILE, TILE]}},
            "codecs": [
                {"name": "bytes"},
                {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
                {"name": "crc32c"},  # last: it covers the compressed bytes
            ],
            "attributes": {
                "cell_m": spec.cell,
                "origin": [ORIGIN * TILE, ORIGIN * TILE],
                "planes": {"latent_int8": spec.channels, "evidence_uint16": 2, "last_seen_s_uint32": 4},
            },
        },
    }
    # saving shares the machine with the network: one thread compresses, and no second cache of tiles
    context = ts.Context(
        {
            "data_copy_concurrency": {"limit": 1},
            "file_io_concurrency": {"limit": 4},
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    # a reader trusts prior.json and creates nothing
    create = not read_only
    try:
        return ts.open(
            description,
            read=True,
            write=create,
            open=True,
            create=create,
            assume_metadata=read_only,
            context=context,
        ).result()
    except (ValueError, OSError) as error:
        raise NmpError(
            f"cannot open {folder}/zarr.json ({reason_of(error)}): check the disk and the permissions; if it is "
            "damaged, delete that one file, it is written again"
        ) from error


def _list_tiles(folder: Path, clean: bool) -> dict[Key, int]:
    """Return {key: size} of the tiles in an array's folder; ``clean`` removes what a crash left unfinished."""
    sizes: dict[Key, int] = {}
    if clean:
        (folder / f"zarr.json{_UNFINISHED}").unlink(missing_ok=True)
    top = folder / "c" / "0"
    if not top.is_dir():
        return sizes
    for row in os.scandir(top):
        if not (row.name.isdecimal() and row.is_dir()):
            continue
        for file in os.scandir(row.path):
            if file.name.isdecimal():
                sizes[int(row.name) - ORIGIN, int(file.name) - ORIGIN] = file.stat().st_size
            elif clean and file.name.endswith(_UNFINISHED):
                os.unlink(file.path)
    return sizes


def _free_name(path: Path) -> Path:
    """Return a name ending in .corrupt beside ``path`` that nobody uses yet."""
    aside = path.with_name(f"{path.name}.corrupt")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.{number}.corrupt")
        number += 1
    return aside
