"""A set of tiles: one compressed, checksummed blob each, as a zarr array through TensorStore."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from nmp.errors import NmpError
from nmp.prior.storage import CONTEXT, Storage, reason_of
from nmp.prior.tiles import ORIGIN, TILE, Key

Planes = NDArray[np.uint8]
Reject = Callable[[Key, str], None]
"""is told of a tile that is damaged or gone, and why"""


class TileSet:
    """Tiles of bytes [planes, 64, 64] below one folder.

    :param level: of the zstd compression: 3 is fast, 19 small

    Methods may be called from any thread, but ``save`` from one at a time.
    """

    def __init__(self, storage: Storage, planes: int, level: int = 3) -> None:
        self.storage = storage
        extent = 2 * ORIGIN * TILE
        self._metadata: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [planes, extent, extent],
            "dimension_names": ["plane", "row", "column"],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [planes, TILE, TILE]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [
                {"name": "bytes"},
                {"name": "zstd", "configuration": {"level": level, "checksum": False}},
                {"name": "crc32c"},  # last: it covers the compressed bytes
            ],
            "attributes": {"origin": [ORIGIN * TILE, ORIGIN * TILE]},
        }
        description = {"driver": "zarr3", "kvstore": storage.spec, "metadata": self._metadata}
        # what is known of the array comes from the record: a damaged zarr.json harms nothing
        self._array = ts.open(
            description, read=True, write=True, open=True, assume_metadata=True, context=CONTEXT
        ).result()

    def describe(self) -> None:
        """Write zarr.json, for other programs that read zarr."""
        self.storage.put("zarr.json", self._description())

    def described(self) -> bool:
        """Tell whether zarr.json is as :meth:`describe` writes it."""
        return self.storage.get("zarr.json") == self._description()

    def _description(self) -> bytes:
        return json.dumps(self._metadata, indent=1, sort_keys=True).encode()

    @staticmethod
    def blob(key: Key) -> str:
        """Return the name of a tile's blob."""
        return f"c/0/{key[0] + ORIGIN}/{key[1] + ORIGIN}"

    def keys(self) -> set[Key]:
        """Return the tiles that are there."""
        return set(_keys_of(self.storage.keys()))

    def load(self, keys: Iterable[Key], reject: Reject) -> dict[Key, Planes]:
        """Return those of the tiles that are there and intact; ``reject`` is told of the others.

        Raises :class:`NmpError` when a tile is there but cannot be read, which must not cost a good tile.
        """
        pending = {key: self._chunk(key).read() for key in keys}
        tiles: dict[Key, Planes] = {}
        for key, future in pending.items():
            try:
                planes = future.result()
            except (ValueError, OSError):
                again = self._load_again(key, reject)
                if again is None:
                    continue
                planes = again
            if planes.any():
                tiles[key] = planes
            else:  # zeros stand for a blob that is not there; one that was saved holds at least one time
                reject(key, "vanished")
        return tiles

    def save(self, tiles: Mapping[Key, Planes]) -> dict[Key, str]:
        """Write tiles, wait until they are synced to disk, and return the reasons for those that were not saved."""
        failures: dict[Key, str] = {}
        pending = {key: self._chunk(key).write(planes) for key, planes in tiles.items()}
        for key, future in pending.items():
            try:
                future.result()
            except (ValueError, OSError) as error:
                failures[key] = reason_of(error)
        return failures

    def _chunk(self, key: Key) -> ts.TensorStore:
        row, col = ((index + ORIGIN) * TILE for index in key)
        return self._array[:, row : row + TILE, col : col + TILE]

    def _load_again(self, key: Key, reject: Reject) -> Planes | None:
        """Tell a damaged blob from a failure to read it."""
        self.storage.get(self.blob(key))
        try:
            planes: Planes = self._chunk(key).read().result()
            return planes
        except (ValueError, OSError) as error:
            if "os_error_code" in str(error):
                where = f"{self.storage.name}/{self.blob(key)}"
                raise NmpError(f"cannot read {where} ({reason_of(error)}): check the disk") from error
            reject(key, reason_of(error))
            return None


def _keys_of(names: Iterable[str]) -> Iterator[Key]:
    for name in names:
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == "c" and parts[2].isdecimal() and parts[3].isdecimal():
            yield int(parts[2]) - ORIGIN, int(parts[3]) - ORIGIN
