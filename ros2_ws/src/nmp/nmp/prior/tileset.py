"""A set of tiles, compressed and checksummed one by one, as a zarr array through TensorStore."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
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
SHARD = 8
"""tiles along each edge of a file, where tiles are written once: a tile is 1 to 2 KB, a block of a disk 4"""
BATCH = 16
"""tiles that are held in memory at a time while many are read or written, or as many as are in one file"""


def batches(keys: list[Key]) -> Iterator[list[Key]]:
    """Cut tiles into as many as are held in memory at a time."""
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]


class TileSet:
    """Tiles of bytes [planes, 64, 64] below one folder.

    :param level: of the zstd compression: 3 is fast, 22 small
    :param shard: tiles along each edge of a file: 1, or :data:`SHARD`. With more than one, changing a tile writes its
        whole file again

    Methods may be called from any thread, but ``save`` from one at a time.
    """

    def __init__(self, storage: Storage, planes: int, level: int = 3, shard: int = 1) -> None:
        self.storage = storage
        self.shard = shard
        self._kind = planes, level, shard
        extent = 2 * ORIGIN * TILE
        codecs: list[dict[str, Any]] = [
            {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": level, "checksum": False}},
            {"name": "crc32c"},  # last: it covers the compressed bytes
        ]
        if shard > 1:
            # zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            inside = {"chunk_shape": [planes, TILE, TILE], "codecs": codecs, "index_codecs": index}
            codecs = [{"name": "sharding_indexed", "configuration": inside}]
        self._metadata: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [planes, extent, extent],
            "dimension_names": ["plane", "row", "column"],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [planes, shard * TILE, shard * TILE]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs,
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

    def blob(self, key: Key) -> str:
        """Return the name of the blob in which a tile lies."""
        row, col = ((index + ORIGIN) // self.shard for index in key)
        return f"c/0/{row}/{col}"

    def keys(self) -> set[Key]:
        """Return the tiles that are there, where each is a file."""
        assert self.shard == 1
        return set(_keys_of(self.storage.keys()))

    def files(self, keys: Iterable[Key]) -> Iterator[list[Key]]:
        """Cut tiles into batches, none of which shares a file with another."""
        batch: list[Key] = []
        for _, group in groupby(sorted(keys, key=lambda key: (self._file(key), key)), self._file):
            batch += group
            if len(batch) >= BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _file(self, key: Key) -> Key:
        return key[0] // self.shard, key[1] // self.shard

    def load(self, keys: Iterable[Key], reject: Reject) -> dict[Key, Planes]:
        """Return those of the tiles that are there and intact; ``reject`` is told of the others.

        Raises :class:`NmpError` when a tile is there but cannot be read, which must not cost a good tile.
        """
        with ts.Batch() as batch:  # what lies in one file is read at once
            pending = {key: self._chunk(key).read(batch=batch) for key in keys}
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
        pending = []
        for _, group in groupby(sorted(tiles, key=self._file), self._file):
            keys = list(group)
            try:
                self.storage.make_room(self.blob(keys[0]))
            except OSError as error:
                failures.update(dict.fromkeys(keys, reason_of(error)))
                continue
            at_once = ts.Transaction()
            for written in [self._chunk(key).with_transaction(at_once).write(tiles[key]) for key in keys]:
                written.copy.result()  # what is not in the transaction by then is not committed
            pending.append((keys, at_once.commit_async()))
        for keys, future in pending:
            try:
                future.result()
            except (ValueError, OSError) as error:
                failures.update(dict.fromkeys(keys, reason_of(error)))
        return failures

    def replace(self, tiles: Mapping[Key, Planes]) -> None:
        """Write the one file of these tiles anew, with no others in it, whatever it is like now; keep that aside.

        Raises :class:`NmpError` when it cannot be written: the file is then as it was.
        """
        (blob,) = {self.blob(key) for key in tiles}
        room = Storage(f"memory://{uuid.uuid4().hex}")
        made = TileSet(room, *self._kind)
        try:
            made.save(tiles)
            content = room.get(blob)
            assert content is not None
            self.storage.keep_aside(blob)
            self.storage.put(blob, content)
        finally:
            room.clear()

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
