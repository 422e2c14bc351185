"""The bounded set of tiles that are in memory."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from nmp.prior.tiles import Key, Tile


class TileCache:
    """Tiles in the order of their last use; the least recently used saved ones go first.

    A tile with unsaved changes is never dropped, so the set can outgrow its limit while nothing can be saved;
    whoever adds changes has to keep ``dirty_bytes`` in check. Not safe to share between threads without a lock.
    """

    def __init__(self, tile_bytes: int, limit_bytes: int) -> None:
        self._tiles: OrderedDict[Key, Tile] = OrderedDict()
        self._dirty: dict[Key, None] = {}  # a dict, because it keeps the order of the first change
        self._tile_bytes = tile_bytes
        self._limit_bytes = limit_bytes

    def __len__(self) -> int:
        return len(self._tiles)

    @property
    def keys(self) -> set[Key]:
        return set(self._tiles)

    @property
    def dirty(self) -> list[Key]:
        """Tiles with unsaved changes, the longest unsaved first."""
        return list(self._dirty)

    @property
    def resident_bytes(self) -> int:
        return len(self._tiles) * self._tile_bytes

    @property
    def dirty_bytes(self) -> int:
        return len(self._dirty) * self._tile_bytes

    def __getitem__(self, key: Key) -> Tile:
        """Return a tile that is in memory, without counting it as used."""
        return self._tiles[key]

    def get(self, key: Key) -> Tile | None:
        """Return a tile and count it as used, or None when it is not in memory."""
        tile = self._tiles.get(key)
        if tile is not None:
            self._tiles.move_to_end(key)
        return tile

    def put(self, key: Key, tile: Tile) -> None:
        self._tiles[key] = tile

    def mark_dirty(self, key: Key) -> None:
        self._dirty.setdefault(key)

    def mark_saved(self, key: Key, edits: int) -> None:
        """Note that the tile is on disk as it was after ``edits`` changes; later ones keep it dirty."""
        if self._tiles[key].edits == edits:
            del self._dirty[key]

    def shrink(self) -> None:
        """Drop saved tiles until the limit holds."""
        surplus = -(-(self.resident_bytes - self._limit_bytes) // self._tile_bytes)
        if surplus <= 0:
            return
        saved = (key for key in self._tiles if key not in self._dirty)
        for key in list(islice(saved, surplus)):
            del self._tiles[key]
